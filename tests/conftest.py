"""Shared fixtures: real data where it is there; tiny images, a model, a finished run and one local Ray otherwise."""

from __future__ import annotations

import importlib.util
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imgbatch.config import Config, StorageConfig, load_config
from imgbatch.core import current, storage
from imgbatch.core.model import ModelBundle, save_bundle
from imgbatch.core.runs import RunPaths
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.schema import PREDICTED_AT_TYPE, TOP_K_TYPE, UNIT_SCHEMA

TINY_CLASSES = ("red", "green", "blue")
RAY_CPUS = 4
_S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
}


def s3_environment() -> dict[str, str]:
    """What clients of the test server need beside its address: what the environment says goes first."""
    return {name: os.environ.get(name, value) for name, value in _S3_ENVIRONMENT.items()}


def pytest_configure() -> None:
    """Clients of S3 do not follow the settings of whoever runs the tests, here or in the processes that tests start.

    Where ``IMGBATCH_TEST_S3`` names a server, its keys stay.
    """
    named = os.environ.get("IMGBATCH_TEST_S3")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        if not named or name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
            del os.environ[name]
    if not named:
        os.environ |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side, a file's tests stay together, which share its fixtures, and all of Ray's, which share one Ray."""
    for item in items:
        assert isinstance(item, pytest.Function)
        group = "ray" if "ray_local" in item.fixturenames else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images and weights that ``IMGBATCH_TEST_DATA`` names; skips where it is not set."""
    folder = os.environ.get("IMGBATCH_TEST_DATA")
    if not folder:
        pytest.skip("IMGBATCH_TEST_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """A three-class network with random weights for crops of 32 px."""
    import torch

    from imgbatch.core.architectures import build_network

    torch.manual_seed(0)
    network = build_network("simple_cnn", len(TINY_CLASSES))
    return save_bundle(
        str(tmp_path_factory.mktemp("tiny_model")),
        arch="simple_cnn",
        task="multiclass",
        class_names=TINY_CLASSES,
        preprocess=PreprocessSpec(resize_size=36, crop_size=32),
        state_dict=network.state_dict(),
    )


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """120 small JPEGs and PNGs of noise and colour; every 20th is cut short."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    paths = []
    for index in range(120):
        width, height = (int(size) for size in rng.integers(40, 90, 2))
        colour = np.zeros(3)
        colour[index % 3] = 120
        pixels = np.clip(colour + rng.normal(80, 40, (height, width, 3)), 0, 255).astype(np.uint8)
        path = folder / f"photo{index:03d}.{'png' if index % 7 == 0 else 'jpg'}"
        Image.fromarray(pixels).save(path)
        if index % 20 == 5:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def photo_manifest(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos as a manifest, with a ``target``, a ``shop`` and a ``price`` column."""
    path = tmp_path_factory.mktemp("manifest") / "manifest.parquet"
    table = pa.table(
        {
            "uri": [str(photo) for photo in photos],
            "target": [TINY_CLASSES[index % 3] for index in range(len(photos))],
            "shop": [["north", "sö/uth", None][index // 40] for index in range(len(photos))],
            "price": pa.array([index / 4 for index in range(len(photos))], pa.float32()),
        }
    )
    pq.write_table(table, path)
    return path


@pytest.fixture(scope="session")
def openvino() -> Any:
    """The package; skips where it or NNCF is not installed."""
    for name in ("openvino", "nncf"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (extra openvino)")
    from imgbatch.core.openvino_predict import import_openvino

    return import_openvino()


@pytest.fixture(scope="session")
def optimized_model(
    openvino: Any,  # noqa: ARG001, skips without it
    tiny_model: ModelBundle,
    photo_manifest: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> ModelBundle:
    """The tiny model with its two OpenVINO variants, of which int8 is said to be the faster one."""
    from imgbatch.core.optimize import optimize_bundle
    from imgbatch.core.variants import read_files, save_variant

    path = str(tmp_path_factory.mktemp("optimized") / "model")
    for target, rate, source in (("openvino-fp32", 2.0, tiny_model.path), ("openvino-int8", 3.0, path)):
        bundle, made = optimize_bundle(source, target=target, calibration=str(photo_manifest), output=path)
        # What so small a model measures is chance.
        variant = made.model_copy(update={"images_per_s": {"original": 1.0, "variant": rate}})
        save_variant(bundle, variant, read_files(bundle, made))
    return bundle


@pytest.fixture(scope="session")
def mnn_model(tiny_model: ModelBundle, photo_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """The tiny model with its MNN variant."""
    for name in ("MNN", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (extra mnn)")
    from imgbatch.core.optimize import optimize_bundle

    path = str(tmp_path_factory.mktemp("mnn") / "model")
    bundle, _ = optimize_bundle(tiny_model.path, target="mnn-fp32", calibration=str(photo_manifest), output=path)
    return bundle


@pytest.fixture
def photo_config(photo_manifest: Path, tiny_model: ModelBundle, tmp_path: Path) -> Config:
    """Classifies the photos in units of 16 with the local engine into ``tmp_path / "out"``."""
    return load_config(
        flags={
            "input.manifest": str(photo_manifest),
            "model.path": tiny_model.path,
            "output.path": str(tmp_path / "out"),
            "classify.engine": "local",
            "classify.unit_rows": 16,
            "classify.batch_size": 8,
            "errors.max_rate": 1.0,
            "resources.device": "cpu",
        }
    )


def changed(config: Config, **flags: object) -> Config:
    """``config`` with some keys changed; ``section__key=value``."""
    tree = config.model_dump()
    for name, value in flags.items():
        section, key = name.split("__")
        tree[section][key] = value
    return Config.model_validate(tree)


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for the whole test run, with more logical CPUs than cores, and nothing written into the home."""
    import ray

    os.environ |= s3_environment()  # Ray's workers have the environment that it was started in
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(tmp_path_factory.mktemp("ray") / "token")
    ray.init(
        address="local",
        num_cpus=RAY_CPUS,
        labels={"role": "tests"},
        object_store_memory=500 * 10**6,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of an S3 server in this process, for the whole test run, or of the one that ``IMGBATCH_TEST_S3`` names.

    That one's keys are taken from the environment.
    """
    if url := os.environ.get("IMGBATCH_TEST_S3"):
        yield url
        return
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """``s3://`` and the name of a new bucket; this process, and those it starts, find the server by environment."""
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setattr(storage, "_filesystems", {})
    bucket = f"s3://bucket-{uuid.uuid4().hex[:12]}"
    fs, path = storage.filesystem(bucket)
    fs.mkdir(path)
    yield bucket
    storage.configure(StorageConfig())


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., ModelBundle]:
    """Writes a ``simple_cnn`` bundle of 32 px images with weights drawn from ``seed``; any part can be replaced."""

    def make(name: str = "model", *, seed: int = 0, **parts: Any) -> ModelBundle:
        import torch

        from imgbatch.core.architectures import build_network

        class_names = parts.setdefault("class_names", ("cat", "dog", "owl"))
        if "state_dict" not in parts:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                parts["state_dict"] = build_network("simple_cnn", len(class_names)).state_dict()
        parts = {
            "arch": "simple_cnn",
            "task": "multiclass",
            "preprocess": PreprocessSpec(resize_size=32, crop_size=32),
            **parts,
        }
        return save_bundle(str(tmp_path / name), **parts)

    return make


@pytest.fixture
def store_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a finished run and returns its output directory."""

    def store(
        class_names: Sequence[str],
        probs_NK: np.ndarray,
        *,
        task: str = "multiclass",
        out: str = "out",
        run_id: str = "r000000000001",
        columns: dict[str, Sequence[Any]] | None = None,
        failed: dict[str, Sequence[Any]] | None = None,
        keep: str = "all",
        top_k: int = 5,
        model_id: str = "m000000000001",
        predicted_at: str = "2026-01-02T03:04:05.000000+00:00",
        image_ids: Sequence[str] | None = None,
    ) -> Path:
        """One prediction per row of ``probs_NK``, with the manifest's ``columns``; ``failed`` are the error rows'."""
        folder = tmp_path / out
        paths = RunPaths(str(folder), run_id)
        ids = list(image_ids) if image_ids is not None else [f"image-{i}" for i in range(len(probs_NK))]
        predictions = _predictions(class_names, probs_NK, task, keep, top_k, ids, model_id, predicted_at)
        for name, values in (columns or {}).items():
            if name in predictions.column_names:
                predictions = predictions.drop_columns(name)
            predictions = predictions.append_column(name, pa.array(values))
        manifest_columns = predictions.select(["image_id", *(columns or {})])
        errors = manifest_columns.slice(0, 0).append_column("status", pa.array([], pa.string()))
        if failed is not None:
            errors = pa.table(failed)
        for name in ("uri", "error_stage", "error_message"):
            if name in errors.column_names:
                continue
            errors = errors.append_column(name, pa.nulls(errors.num_rows, pa.string()))
        errors = errors.append_column("row_id", pa.array(range(errors.num_rows), pa.int64()))
        files = []
        for kind, table in (("predictions", predictions), ("errors", errors)):
            relative = f"{kind}/run_id={run_id}/part-00000.parquet"
            (folder / relative).parent.mkdir(parents=True)
            pq.write_table(table, folder / relative)
            files.append({"path": relative, "kind": kind, "rows": table.num_rows})
        fields = {"model": model_id, "input.duplicates": "error"}
        plan = {"fields": fields, "predicted_at": predicted_at, "parent": None, "probabilities": keep}
        storage.write_json(paths.plan, plan)
        storage.write_json(paths.classes, {"task": task, "class_names": list(class_names), "model_id": model_id})
        storage.write_json(paths.files, {"files": files, "partition_types": {}})
        storage.create_if_absent(paths.success, b"")
        current.update(str(folder))
        return folder

    return store


def _predictions(
    class_names: Sequence[str],
    probs_NK: np.ndarray,
    task: str,
    keep: str,
    top_k: int,
    ids: list[str],
    model_id: str,
    predicted_at: str,
) -> pa.Table:
    order_NK = np.argsort(-probs_NK, axis=1, kind="stable")
    best_N = order_NK[:, 0]
    listed = [
        [{"label": class_names[k], "probability": float(p[k])} for k in order[:top_k]]
        for p, order in zip(probs_NK, order_NK, strict=True)
    ]
    said = [[class_names[k] for k in np.flatnonzero(p >= 0.5)] for p in probs_NK]
    size = len(ids)
    values = {
        "label": [class_names[k] for k in best_N],
        "label_index": best_N,
        "probability": probs_NK.max(axis=1),
        "margin": [None] * size if task == "multilabel" else -np.diff(-np.sort(-probs_NK, axis=1)[:, :2])[:, 0],
        "decision": [None] * size,
        "top_k": listed if keep != "none" else [None] * size,
        "probabilities": probs_NK.tolist() if keep == "all" else [None] * size,
        "labels": said if task == "multilabel" else [None] * size,
    }
    types = {field.name: field.type for field in UNIT_SCHEMA} | {"top_k": TOP_K_TYPE}
    moment = datetime.fromisoformat(predicted_at)
    return pa.table(
        {
            "row_id": pa.array(range(size), pa.int64()),
            "image_id": ids,
            "uri": [f"s3://bucket/{image_id}.jpg" for image_id in ids],
            **{name: pa.array(column, types[name]) for name, column in values.items()},
            "model_id": [model_id] * size,
            "predicted_at": pa.array([moment] * size, PREDICTED_AT_TYPE),
        }
    )
