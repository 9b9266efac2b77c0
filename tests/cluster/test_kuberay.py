"""The Kubernetes manifests against KubeRay's schemas, Ray's own reading of a RayCluster, and Kubernetes' schemas."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from imgbatch.config import load_config
from tests.cluster.conftest import CLUSTER, documents

SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.34"


def load_schema(kind: str) -> dict[str, Any]:
    return closed(json.loads((SCHEMAS / f"{kind}.json").read_text()))


def closed(schema: Any) -> Any:
    """``schema``, in which a field that it does not name is an error: Kubernetes would drop it in silence."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result.setdefault("additionalProperties", False)
    return result


def ray_cluster(name: str) -> dict[str, Any]:
    """The RayCluster in the file ``name``: the whole of it, or what a RayJob makes one of."""
    (document,) = documents(name)
    if document["kind"] == "RayCluster":
        return document
    spec = document["spec"]["rayClusterSpec"]
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "night"}, "spec": spec}


def pods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    spec = ray_cluster(name)["spec"]
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


both = pytest.mark.parametrize("name", ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"])


@both
def test_kuberay_accepts_the_cluster(name):
    jsonschema.validate(ray_cluster(name), load_schema("RayCluster"))


def test_kuberay_accepts_the_job():
    (job,) = documents("kuberay/rayjob.yaml")
    jsonschema.validate(job, load_schema("RayJob"))


def test_a_misspelt_field_would_be_found():
    (job,) = documents("kuberay/rayjob.yaml")
    job["spec"]["backofLimit"] = 1
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate(job, load_schema("RayJob"))


@both
def test_ray_reads_a_head_without_work_and_groups_from_zero(name):
    cluster = copy.deepcopy(ray_cluster(name))
    cluster["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert {group: (kind["min_workers"], kind["max_workers"]) for group, kind in types.items()} == {
        "headgroup": (0, 0),
        "gpu": (0, 4),
        "cpu": (0, 8),
    }
    assert types["gpu"]["resources"]["GPU"] == 1
    assert "GPU" not in types["cpu"]["resources"]
    assert config["idle_timeout_minutes"] == 10


@both
def test_kubernetes_accepts_the_pods(name):
    for group, template in pods(name):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@both
def test_pods_run_without_privileges_and_share_memory_that_fits(name):
    for _, template in pods(name):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["requests"] == container["resources"]["limits"]
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts["shm"] == "/dev/shm"
            assert set(mounts) == {volume["name"] for volume in spec["volumes"]}


def restricted(spec: dict[str, Any], container: dict[str, Any]) -> bool:
    """Whether the Pod Security Standard of that name lets a container in."""
    of_pod, own = spec["securityContext"], container["securityContext"]
    return (
        of_pod["runAsNonRoot"]
        and of_pod["seccompProfile"]["type"] == "RuntimeDefault"
        and own["allowPrivilegeEscalation"] is False
        and own["capabilities"]["drop"] == ["ALL"]
    )


@both
def test_the_autoscaler_is_as_restricted_as_the_container_beside_it(name):
    """KubeRay puts it into the head's pod, with no security context but the one that its options give."""
    options = ray_cluster(name)["spec"]["autoscalerOptions"]
    head, *workers = (template["spec"] for _, template in pods(name))
    assert restricted(head, options)
    assert all(restricted(spec, container) for spec in (head, *workers) for container in spec["containers"])


def test_the_submitter_is_what_kuberay_would_make_but_restricted():
    (job,) = documents("kuberay/rayjob.yaml")
    spec = job["spec"]["submitterPodTemplate"]["spec"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "submitter"}, "spec": spec}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    (container,) = spec["containers"]
    assert restricted(spec, container)
    assert spec["restartPolicy"] == "Never"
    _, head = next(pods("kuberay/rayjob.yaml"))
    assert container["image"] == head["spec"]["containers"][0]["image"]
    assert not {"command", "args"} & container.keys()


def test_what_nodes_must_have_is_named_where_a_reader_looks():
    """Because the selectors are not in capitals, and a pod that fits nowhere waits in silence."""
    readme = (CLUSTER / "README.md").read_text().partition("## Nights on Kubernetes")[2]
    for name in ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml"):
        header = (CLUSTER / name).read_text().partition("apiVersion")[0]
        assert "nodeSelector" in header
        for _, template in pods(name):
            for label, value in template["spec"]["nodeSelector"].items():
                assert value in readme, label


@both
def test_clusters_want_a_token_and_run_the_ray_that_is_installed(name):
    spec = ray_cluster(name)["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["rayVersion"] == ray.__version__


def test_the_standing_cluster_and_the_night_have_the_same_workers():
    standing, night = (ray_cluster(f"kuberay/{name}.yaml")["spec"] for name in ("raycluster", "rayjob"))
    assert standing["workerGroupSpecs"] == night["workerGroupSpecs"]


def test_a_night_ends_whatever_happens():
    (job,) = documents("kuberay/rayjob.yaml")
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["backoffLimit"] >= 1


def test_a_night_and_its_second_cluster_end_before_midnight():
    """Which keeps nights apart, and gives both the same name for their listing."""
    *_, cron = documents("kuberay/cronjob.yaml")
    (job,) = documents("kuberay/rayjob.yaml")
    assert cron["spec"]["timeZone"] == "Etc/UTC"
    minute, hour = (int(number) for number in cron["spec"]["schedule"].split()[:2])
    last_start = 3600 * hour + 60 * minute + cron["spec"]["startingDeadlineSeconds"]
    assert last_start + (1 + job["spec"]["backoffLimit"]) * job["spec"]["activeDeadlineSeconds"] < 24 * 3600


def test_kubernetes_accepts_the_nights():
    for document in documents("kuberay/cronjob.yaml"):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_ray_is_open_to_its_own_namespace_and_the_operator_alone():
    (policy,) = documents("kuberay/networkpolicy.yaml")
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)
    (rule,) = policy["spec"]["ingress"]
    own, operator = rule["from"]
    assert own == {"podSelector": {}}
    assert operator["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"].isupper()
    assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_the_nights_start_what_lies_beside_them_with_what_the_head_mounts():
    *_, cron = documents("kuberay/cronjob.yaml")
    spec = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert container["command"][-1].endswith("/rayjob.yaml")
    (job,) = documents("kuberay/rayjob.yaml")
    assert job["metadata"]["generateName"]  # `kubectl create` makes a new object each night
    script = Path(job["spec"]["entrypoint"].split()[-1])
    assert (CLUSTER / "kuberay/night" / script.name).is_file()
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert spec["volumes"][0]["configMap"] in [volume.get("configMap") for volume in head["volumes"]]
    assert str(script.parent) in [mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]]


def test_the_night_is_commands_and_keys_that_exist():
    from tests.test_readme import problems_of_command

    script = CLUSTER / "kuberay/night/night.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = [line.split() for line in re.split(r"\n| \|\| ", script.read_text()) if line.startswith("imgbatch ")]
    assert [words[1] for words in lines] == ["manifest", "manifest", "classify", "verify"]
    assert [problem for words in lines for problem in problems_of_command(words[1:])] == []
    config = load_config(CLUSTER / "kuberay/night/night.yaml")
    groups = {group["groupName"]: group for group in ray_cluster("kuberay/rayjob.yaml")["spec"]["workerGroupSpecs"]}
    assert config.resources.classify_actors == groups["gpu"]["maxReplicas"]


def test_a_night_that_starts_again_keeps_to_its_listing(photos, tiny_model, tmp_path):
    """The script itself, with a folder for the bucket, into which another image comes between the two starts."""
    images = tmp_path / "images"
    images.mkdir()
    for photo in photos[:3]:
        shutil.copy(photo, images)
    config = tmp_path / "night.yaml"
    settings = {
        "model": {"path": tiny_model.path},
        "output": {"path": str(tmp_path / "labels")},
        "classify": {"engine": "local"},
        "resources": {"device": "cpu"},
        "run": {"on_unfinished": "abandon"},
    }
    config.write_text(yaml.safe_dump(settings))
    script = (CLUSTER / "kuberay/night/night.sh").read_text()
    script = script.replace("s3://BUCKET", str(tmp_path)).replace("/etc/imgbatch/night.yaml", str(config))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    said = []
    for _ in range(2):
        night = subprocess.run(
            ["bash", "-c", script],
            env={**os.environ, "PATH": path, "NIGHT": "2026-11-30"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert night.returncode == 0, night.stdout + night.stderr
        said.append(night.stdout)
        shutil.copy(photos[3], images)
    assert [manifest.name for manifest in (tmp_path / "manifests").iterdir()] == ["2026-11-30.parquet"]
    assert "finished already, nothing to do" in said[1]
    assert "3 of 3 rows" in said[1]
