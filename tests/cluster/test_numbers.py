"""aws.yaml, the manifests, their configurations and the README have the same numbers, and the arithmetic holds."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from imgbatch.config import Config, ResourcesConfig, load_config
from imgbatch.core.finalize import COUNTED_UNITS, OPEN_FILES, READERS
from imgbatch.core.units import choose_unit_rows
from imgbatch.runtime.forecast import price_per_hour
from imgbatch.runtime.memory import max_stored_units
from imgbatch.runtime.pools import Machine, choose_pools
from tests.cluster.conftest import CLUSTER, documents

RECIPE = CLUSTER.parent / "jobs/recipes/s3_nightly.yaml"
README = (CLUSTER / "README.md").read_text()

IMAGES = 10_000_000
IMAGES_PER_S_OF_VCPU = 64
PIXEL_BYTES = 224 * 224 * 3
RESULT_ROW_BYTES = 200
MAX_BLOCK_BYTES = 80 * 2**20
SPILLING_AT = 0.8
START_AND_IDLE_H = 1 / 6
GET_USD, PUT_USD = 0.0004 / 1000, 0.005 / 1000
BETWEEN_ZONES_USD_PER_GB = 0.02


@pytest.fixture
def recipe() -> Config:
    return load_config(RECIPE)


@pytest.fixture
def node_types() -> dict[str, Any]:
    (config,) = documents("aws.yaml")
    return config["available_node_types"]


def worker_groups() -> dict[str, Any]:
    (cluster,) = documents("kuberay/raycluster.yaml")
    return {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}


def costs() -> dict[str, float]:
    """What the README's table of ten million images says, USD by line."""
    table = README.partition("| ten million images,")[2].partition("\n\n")[0]
    return {
        line: float(usd.strip("+ ")) for line, usd in re.findall(r"^\| ([^|]+) \| \**([+ \d.]+)\** \|$", table, re.M)
    }


def cost(beginning: str) -> float:
    (usd,) = [usd for line, usd in costs().items() if line.startswith(beginning)]
    return usd


def images_per_s(recipe: Config) -> int:
    assert isinstance(recipe.resources.decode_actors, int)
    return recipe.resources.decode_actors * IMAGES_PER_S_OF_VCPU


def hours(recipe: Config) -> float:
    return IMAGES / images_per_s(recipe) / 3600 + START_AND_IDLE_H


def test_the_recipe_fills_the_cluster_on_aws(recipe, node_types):
    cpu, gpu = node_types["cpu"], node_types["gpu"]
    assert recipe.resources.decode_actors == cpu["max_workers"] * cpu["resources"]["CPU"]
    assert recipe.resources.classify_actors == gpu["max_workers"] * gpu["resources"]["GPU"]
    assert recipe.storage.region == documents("aws.yaml")[0]["provider"]["region"]
    assert recipe.plan.nodes == {
        node["node_config"]["InstanceType"]: node.get("max_workers", 1) for node in node_types.values()
    }


def test_the_recipe_starts_from_a_cluster_without_workers(recipe):
    pools = choose_pools(recipe.resources, "cuda", Machine(num_cpus=0, num_gpus=0))
    assert (pools.decode_actors, pools.classify_actors) == (128, 4)
    assert (pools.decode_cpus, pools.classify_cpus, pools.classify_gpus) == (1, 0, 1)


def test_the_night_fills_the_cluster_on_kubernetes():
    night = load_config(CLUSTER / "kuberay/night/night.yaml").resources
    groups = worker_groups()
    cpus = {
        name: int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for name, group in groups.items()
    }
    assert night.decode_actors == groups["cpu"]["maxReplicas"] * cpus["cpu"]
    assert night.classify_actors == groups["gpu"]["maxReplicas"]


def test_each_pool_finds_its_own_nodes_by_label_and_no_other(recipe, node_types):
    night = load_config(CLUSTER / "kuberay/night/night.yaml").resources
    for nodes in (node_types, worker_groups()):
        labels = {name: node["labels"].items() for name, node in nodes.items()}
        for resources in (recipe.resources, night):
            assert resources.decode_labels.items() <= labels["cpu"]
            assert resources.classify_labels.items() <= labels["gpu"]
            assert not resources.decode_labels.items() <= labels["gpu"]
            assert not resources.classify_labels.items() <= labels["cpu"]


def test_workers_stand_in_the_one_zone_that_their_labels_say(node_types):
    zone = documents("aws.yaml")[0]["provider"]["availability_zone"]
    assert {node["labels"]["ray.io/availability-zone"] for node in node_types.values()} == {zone}
    for group in worker_groups().values():
        assert group["labels"]["ray.io/availability-zone"] == zone
        assert group["template"]["spec"]["nodeSelector"]["topology.kubernetes.io/zone"] == zone


def test_both_clusters_have_the_same_nodes(node_types):
    for name, group in worker_groups().items():
        selector = group["template"]["spec"]["nodeSelector"]
        assert selector["node.kubernetes.io/instance-type"] == node_types[name]["node_config"]["InstanceType"]
        assert group["maxReplicas"] == node_types[name]["max_workers"]


def test_no_node_holds_keys_or_answers_the_old_metadata_service(node_types):
    for node in node_types.values():
        assert node["node_config"]["IamInstanceProfile"]["Arn"].isupper()
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    for path in [RECIPE, *CLUSTER.rglob("*.yaml")]:
        assert not re.search(r"AKIA[0-9A-Z]{16}", path.read_text()), path


def test_prices_of_the_recipe_are_those_of_the_readme(recipe):
    stated = {}
    for node_type, listed, market in re.findall(r"^\| (\S+\.\w+) \| ([\d.]+) an hour \| ([^|]+) \|$", README, re.M):
        spot = re.fullmatch(r"spot assumed at 40%: ([\d.]+)", market)
        stated[node_type] = float(spot[1]) if spot else float(listed)
        assert not spot or stated[node_type] == pytest.approx(0.4 * float(listed), abs=0.0005)
    assert stated == recipe.plan.prices
    workers = recipe.plan.model_copy(update={"nodes": {"c7i.4xlarge": 8, "g6.xlarge": 4}})
    assert price_per_hour(workers, None) / 6 == pytest.approx(0.60, abs=0.005)


def test_rates_and_times_of_the_readme(recipe):
    assert f"{images_per_s(recipe):,} images/s" in README
    assert f"{IMAGES / images_per_s(recipe) / 60:.1f} minutes" in README
    assert f"{2048 * PIXEL_BYTES // 10**6} MB/s" in README
    unit_rows = choose_unit_rows(PIXEL_BYTES, RESULT_ROW_BYTES, IMAGES)
    assert f"| the driver | {36 * unit_rows:,} | 36 units a second" in README
    for images, units, pair, most, usd in growth():
        assert units == -(-images // unit_rows)
        assert pair == pytest.approx(images / 2048 / 60, rel=0.03)
        assert most == pytest.approx(images / images_per_s(recipe) / 60, rel=0.03)
        assert usd == pytest.approx(images * GET_USD + units * (PUT_USD + 2 * GET_USD), abs=0.005)


def growth() -> list[tuple[int, int, float, float, float]]:
    """Of the table on growth: images, units, minutes with a pair of nodes, minutes with most nodes, USD."""
    rows = re.findall(
        r"^\| ([\d,]+000) \| ([\d,]+) \| ([\d.]+) (minutes|hours) \| ([\d.]+) (minutes|hours) \| ([\d.]+) \|$",
        README,
        re.M,
    )
    assert len(rows) == 3
    minutes = {"minutes": 1, "hours": 60}
    return [
        (
            int(images.replace(",", "")),
            int(units.replace(",", "")),
            float(pair) * minutes[pair_unit],
            float(most) * minutes[most_unit],
            float(usd),
        )
        for images, units, pair, pair_unit, most, most_unit, usd in rows
    ]


def test_what_ten_million_images_cost(recipe):
    prices, units = recipe.plan.prices, -(-IMAGES // 512)
    gpu, cpu = 4 * prices["g6.xlarge"] * hours(recipe), 8 * prices["c7i.4xlarge"] * hours(recipe)
    assert cost("4 g6.xlarge") == pytest.approx(gpu, abs=0.01)
    assert cost("8 c7i.4xlarge") == pytest.approx(cpu, abs=0.01)
    assert cost("head") == pytest.approx(prices["m7i.xlarge"], abs=0.01)
    assert cost("10,000,000 GETs") == pytest.approx(IMAGES * GET_USD)
    assert cost("19,532 units") == pytest.approx((units + 16) * (PUT_USD + 2 * GET_USD), abs=0.01)
    parts = ("4 g6.xlarge", "8 c7i.4xlarge", "head", "10,000,000 GETs", "19,532 units")
    assert cost("**together") == pytest.approx(sum(cost(part) for part in parts), abs=0.005)
    assert cost("the workers on demand") == pytest.approx((gpu + cpu) * (1 / 0.4 - 1), abs=0.01)
    assert cost("GPU and CPU nodes in two zones") == pytest.approx(
        IMAGES * PIXEL_BYTES / 1e9 * BETWEEN_ZONES_USD_PER_GB, abs=0.01
    )


def test_what_finalize_takes():
    readme = " ".join(README.split())
    units, files = -(-IMAGES // 512), 16
    tasks = f"{-(-units // COUNTED_UNITS)} tasks of {COUNTED_UNITS:,} units"
    assert f"takes {tasks}, {seconds(COUNTED_UNITS):.1f} s" in readme
    each = -(-units // files)
    assert f"each of the {files} files of predictions, with {each:,} units or {seconds(each):.1f} s" in readme
    assert f"at worst all of them, {seconds(units):.0f} s" in readme
    assert f"for {OPEN_FILES} files together, {seconds(units):.0f} s for all of them" in readme


def seconds(units: int) -> float:
    """Of one task that reads so many unit files, where each takes 50 ms."""
    return units * 0.05 / READERS


def test_blocks_in_the_object_stores(recipe):
    blocks = max_stored_units(choose_pools(recipe.resources, "cuda", Machine(num_cpus=0, num_gpus=0)))
    assert f"= {blocks} blocks" in README
    assert f"{blocks * 512 * PIXEL_BYTES / 1e9:.1f} GB in all" in " ".join(README.split())


@pytest.mark.parametrize(
    ("group", "decode_actors", "classify_actors", "said"),
    [
        ("cpu", 15, 0, "15 decode actors, 2.7 blocks of 80 MiB each: 3.4 GB"),
        ("gpu", 3, 1, "1.2 GB with 3 decode actors"),
    ],
)
def test_shared_memory_has_room_for_the_blocks_of_a_node(group, decode_actors, classify_actors, said):
    night = load_config(CLUSTER / "kuberay/night/night.yaml").resources
    pools = choose_pools(night, "cuda", Machine(num_cpus=0, num_gpus=0))
    on_node = replace(pools, decode_actors=decode_actors, classify_actors=classify_actors)
    held = max_stored_units(on_node) * MAX_BLOCK_BYTES
    assert f"{held / 1e9:.2g} GB" in said
    for file in ("raycluster", "rayjob"):
        assert said in (CLUSTER / f"kuberay/{file}.yaml").read_text()
    (volume,) = worker_groups()[group]["template"]["spec"]["volumes"]
    assert held < SPILLING_AT * int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30


def test_shared_memory_at_home_has_room_for_the_blocks_of_two_workers():
    units = max_stored_units(choose_pools(ResourcesConfig(), "cpu", Machine(num_cpus=4, num_gpus=0, node_cpus=2)))
    text = (CLUSTER / "compose.yaml").read_text()
    assert f"in the two workers {units} units at most" in text
    (store_bytes,) = {int(size) for size in re.findall(r"--object-store-memory=(\d+)", text)}
    assert units * MAX_BLOCK_BYTES / 2 < SPILLING_AT * store_bytes


def test_published_rates_follow_from_the_published_seconds():
    rows = re.findall(
        r"^\| \S+ \((\d+) vCPU, L4\) \| [^|]+, ([\d.]+) s \| ([\d,]+) \| (\d+) \|$",
        README,
        re.M,
    )
    assert len(rows) == 4
    for vcpus, seconds, rate, per_vcpu in rows:
        stated = int(rate.replace(",", ""))
        assert stated == pytest.approx(803_580 / float(seconds), abs=1)
        assert int(per_vcpu) == pytest.approx(stated / (8 * int(vcpus)), abs=1)


def test_a_night_that_was_cut_off_does_not_stop_the_next(recipe):
    night = load_config(CLUSTER / "kuberay/night/night.yaml")
    assert night.run.on_unfinished == recipe.run.on_unfinished == "abandon"
    assert recipe.input.skip_existing
    assert "--skip-existing" in (CLUSTER / "kuberay/night/night.sh").read_text()
