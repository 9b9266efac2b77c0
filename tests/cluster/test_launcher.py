"""aws.yaml against the schema and the defaults of Ray's launcher; its nodes, and who can reach its dashboard."""

from __future__ import annotations

import copy

import pytest
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.conftest import documents


@pytest.fixture
def config():
    (config,) = documents("aws.yaml")
    return config


def test_the_launcher_accepts_it(config):
    validate_config(prepare_config(copy.deepcopy(config)))


def test_a_misspelt_key_would_be_found(config):
    config["available_node_types"]["gpu"]["max_worker"] = 4
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


def test_nodes_stand_behind_a_security_group_of_yours(config):
    """Ray makes one that is open to everybody for node types that name none."""
    for node in config["available_node_types"].values():
        for key in ("SubnetIds", "SecurityGroupIds"):
            (placeholder,) = node["node_config"][key]
            assert placeholder.isupper()


def test_nothing_runs_on_the_head_and_it_is_no_spot_node(config):
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    assert any("--num-cpus=0" in command for command in config["head_start_ray_commands"])


def test_workers_are_spot_nodes_from_zero_that_add_up(config):
    workers = {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}
    assert {node["node_config"]["InstanceMarketOptions"]["MarketType"] for node in workers.values()} == {"spot"}
    assert {node["min_workers"] for node in workers.values()} == {0}
    assert sum(node["max_workers"] for node in workers.values()) == config["max_workers"]
    assert {name: node["resources"].get("GPU", 0) for name, node in workers.items()} == {"gpu": 1, "cpu": 0}
    assert "," not in config["provider"]["availability_zone"]


def test_the_dashboard_is_on_loopback_and_wants_the_token_that_is_copied(config):
    (start,) = [command for command in config["head_start_ray_commands"] if "start --head" in command]
    assert "--dashboard-host=127.0.0.1" in start
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (token,) = config["file_mounts"]
    assert f"--env RAY_AUTH_TOKEN_PATH={token}" in options
