"""Dockerfile and compose.yaml: what they name is there. (Building them needs a network and minutes.)"""

from __future__ import annotations

import re
import shlex
import tomllib

import ray.scripts.scripts
import yaml
from click.testing import CliRunner
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

from tests.cluster.conftest import CLUSTER, documents
from tests.test_readme import blocks, problems

ROOT = CLUSTER.parent


def dockerfile_lines() -> list[str]:
    """Instructions with their continuation lines, without comments."""
    text = "\n".join(line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def targets() -> dict[str, list[str]]:
    """The instructions of each build target, those of the target it is built from included."""
    found: dict[str, list[str]] = {}
    for line in dockerfile_lines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            name = match[2]
            found[name] = list(found.get(match[1], []))
        found[name].append(line)
    return found


def test_there_is_a_target_for_cpus_and_one_for_gpus_and_neither_runs_as_root():
    for name in ("cpu", "cuda"):
        users = [line.split()[1] for line in targets()[name] if line.startswith("USER ")]
        assert users[-1] == "1000", name


def test_everything_installed_is_pinned_by_the_lock():
    for target in ("cpu", "cuda"):
        installs = [line for line in targets()[target] if "pip install" in line]
        assert len(installs) >= 3
        for line in installs:
            assert re.search(r"--constraint \S*requirements\.lock|--no-deps", line)
    assert re.search(r"^uv==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)


def test_a_share_of_the_decoding_can_be_left_to_the_gpu():
    """In every image, because the driver asks for the package too."""
    for target in ("cpu", "cuda"):
        assert any("--extra nvjpeg" in line for line in targets()[target])
    (capabilities,) = re.findall(r"NVIDIA_DRIVER_CAPABILITIES=(\S+)", " ".join(targets()["cuda"]))
    assert {"compute", "utility", "video"} <= set(capabilities.split(",")), "nvJPEG's engines need libnvcuvid"


def test_scenes_are_read_everywhere_and_variants_for_cpus_made_where_they_run():
    extras = {name: set(re.findall(r"--extra (\S+)", " ".join(lines))) for name, lines in targets().items()}
    assert "geo" in extras["cuda"]
    assert extras["cpu"] - extras["cuda"] == {"openvino", "mnn"}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["cpu"] <= set(declared)


def test_every_command_that_can_be_submitted_has_its_packages():
    for target in ("cpu", "cuda"):
        extras = set(re.findall(r"--extra (\S+)", " ".join(targets()[target])))
        assert {"explain", "baselines", "delta", "report", "geo"} <= extras


def test_what_is_copied_exists_and_is_in_the_context():
    ignore = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [word for line in targets()["cpu"] if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"requirements.lock", "imgbatch", "jobs"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists()
        assert f"!{path}" in ignore


def test_the_lock_is_for_the_python_of_the_image():
    (base,) = [line for line in dockerfile_lines() if line.startswith("FROM python:")]
    (version,) = re.findall(r"--python-version (\S+)", (ROOT / "Makefile").read_text())
    assert f"python:{version}-" in base


def test_compose_builds_a_target_that_exists_and_keeps_to_loopback():
    (compose,) = documents("compose.yaml")
    services = compose["services"]
    assert set(services) == {"head", "worker", "s3"}
    for name in ("head", "worker"):
        build = services[name]["build"]
        context = (CLUSTER / build["context"]).resolve()
        assert (context / build["dockerfile"]).is_file()
        assert build["target"] in targets()
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert set(services[name]["secrets"]) <= set(compose["secrets"])
    assert services["worker"]["deploy"]["replicas"] == 2
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_ray_knows_every_option_that_starts_it():
    (compose,) = documents("compose.yaml")
    (aws,) = documents("aws.yaml")
    commands = [compose["services"][name]["command"] for name in ("head", "worker")]
    commands += aws["head_start_ray_commands"] + aws["worker_start_ray_commands"]
    known = CliRunner().invoke(ray.scripts.scripts.start, ["--help"]).output
    for command in commands:
        for word in shlex.split(command):
            if word.startswith("--"):
                assert word.partition("=")[0] in known, command


def test_prometheus_finds_the_metrics_of_every_node():
    (compose,) = documents("compose.yaml")
    (aws,) = documents("aws.yaml")
    commands = [compose["services"][name]["command"] for name in ("head", "worker")]
    commands += [aws[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    (scraped,) = [text for text in blocks((CLUSTER / "README.md").read_text(), "yaml") if "scrape_configs" in text]
    home, cloud = yaml.safe_load(scraped)["scrape_configs"]
    (services,), (nodes,) = home["dns_sd_configs"], cloud["ec2_sd_configs"]
    assert set(services["names"]) == {"head", "worker"}
    assert nodes["region"] == aws["provider"]["region"]
    assert nodes["filters"] == [{"name": f"tag:{TAG_RAY_CLUSTER_NAME}", "values": [aws["cluster_name"]]}]
    for command in commands:
        assert f"--metrics-export-port={services['port']}" in command
        assert f"--metrics-export-port={nodes['port']}" in command


def test_the_readme_names_what_is_there():
    text = (CLUSTER / "README.md").read_text()
    for written_by_runs in ("`query.py`", "`spark.py`"):
        text = text.replace(written_by_runs, "")
    assert problems(text) == []
