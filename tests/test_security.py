"""Attacks on the whole job through what it reads; SECURITY.md says what they are after.

Attacks on one part are tested beside it: addresses and redirects, allowed directories, weights and model.json, the
report, presigned URLs in columns.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.cli import run as command
from imgbatch.config import Config, StorageConfig, load_config
from imgbatch.core import storage
from imgbatch.core.model import ModelBundle
from imgbatch.core.partitions import MAX_PARTITIONS, PartitionCheck, parse_partitions
from imgbatch.core.runs import RunPaths
from imgbatch.core.verify import verify
from imgbatch.core.views import open_views
from imgbatch.errors import UsageError
from imgbatch.runtime.job import RunResult, classify
from tests.conftest import changed, s3_environment

HOSTILE_NAMES = [
    "../../../escape", "..", ".", "/etc/passwd", "a/b", "a\\b", "x=y", "%2e%2e%2f", "a\nb", "a\0b", " ", "-rf",
    "~", "$HOME", "`id`", "'; drop table x; --", '"', "<script>alert(1)</script>", "*", "?", "ünï", "CON", "a" * 200,
]  # fmt: skip
SECRET = "s3cr3t-c4n4ry"


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._mark,)


def with_manifest(config: Config, table: pa.Table, tmp_path: Path, **flags: object) -> Config:
    path = tmp_path / "hostile.parquet"
    pq.write_table(table, path)
    return changed(config, input__manifest=str(path), **flags)


def assert_only_partitions(result: RunResult, column: str, tmp_path: Path) -> None:
    """Every data file lies in a directory of one partition of the run, and nothing outside the output is new."""
    for path in Path(result.out, "predictions").rglob("*"):
        parts = path.relative_to(result.out).parts
        if path.is_file():
            assert len(parts) == 4
            assert parts[2].startswith(f"{column}=")
            assert parts[3].startswith("part-")
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "hostile.parquet", "model"}


def test_values_of_partitions_stay_in_their_directories(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    uris = [str(photos[6 + index % 10]) for index in range(len(HOSTILE_NAMES))]
    ids = [str(index) for index in range(len(uris))]
    table = pa.table({"uri": uris, "image_id": ids, "shop": HOSTILE_NAMES})
    config = with_manifest(photo_config, table, tmp_path, output__partition_by=("shop",))
    result = classify(config)
    assert result.counts == {"OK": len(HOSTILE_NAMES)}
    assert verify(result.out).ok
    assert_only_partitions(result, "shop", tmp_path)
    with open_views(result.out) as connection:
        found = connection.execute("select shop from predictions order by row_id").fetchall()
    assert [shop for (shop,) in found] == HOSTILE_NAMES


def test_names_of_classes_stay_in_their_directories(
    photo_config: Config, make_bundle: Callable[..., ModelBundle], tmp_path: Path
) -> None:
    names = ("../../up", "a/b=c", "<img src=x onerror=alert(1)>")
    bundle = make_bundle(class_names=names)
    result = classify(changed(photo_config, model__path=bundle.path, output__partition_by=("label",)))
    assert verify(result.out).ok
    assert_only_partitions(result, "label", tmp_path)
    with open_views(result.out) as connection:
        assert {label for (label,) in connection.execute("select label from predictions").fetchall()} <= set(names)


def test_a_class_too_long_for_a_directory_is_refused_at_the_start(
    photo_config: Config, make_bundle: Callable[..., ModelBundle]
) -> None:
    bundle = make_bundle(class_names=("a", "ü" * 100))
    with pytest.raises(UsageError, match="longer than 200 characters as a directory name"):
        classify(changed(photo_config, model__path=bundle.path, output__partition_by=("label",)))


def test_partitions_are_counted() -> None:
    schema = pa.schema([("shop", pa.string())])
    check = PartitionCheck(parse_partitions(["shop"], schema))
    check(pa.table({"shop": [str(index) for index in range(MAX_PARTITIONS)]}))
    with pytest.raises(UsageError, match="more than 10,000 values"):
        check(pa.table({"shop": ["one more"]}))


@pytest.mark.parametrize("name", ["../up", "a/b", "a=b", "a\\b", ".hidden", "a\nb"])
def test_a_column_that_cannot_name_a_directory_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a directory"):
        parse_partitions([name], pa.schema([(name, pa.string())]))


def texts_in(out: Path) -> str:
    """All that an output says, but for ``rows/``, which a run needs to fetch its images."""
    said = []
    for path in out.rglob("*"):
        if path.is_dir() or "rows" in path.relative_to(out).parts:
            continue
        said.append(str(pq.read_table(path, partitioning=None).to_pydict()) if path.suffix == ".parquet" else "")
        said.append(path.read_bytes().decode(errors="replace") + str(path))
    return "\n".join(said)


@pytest.fixture
def _default_storage() -> Iterator[None]:
    """What a command set is taken back."""
    yield
    storage.configure(StorageConfig())


@pytest.mark.usefixtures("_default_storage")
@pytest.mark.parametrize("client", ["s3fs", "obstore"])
def test_secrets_are_nowhere_in_an_output(
    client: str,
    photo_config: Config,
    photos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Presigned URLs that are refused and that fail, and credentials in the environment, which a client reads."""
    keys = {"AWS_ACCESS_KEY_ID": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": SECRET}
    for name, value in (s3_environment() | keys).items():
        monkeypatch.setenv(name, value)
    server = "127.0.0.1:1"  # where nothing listens
    uris = [
        str(photos[6]),
        f"https://{server}/k.jpg?X-Amz-Signature={SECRET}",
        f"https://user:{SECRET}@{server}/l.jpg",
        f"ftp://user:{SECRET}@{server}/m.jpg",
        "s3://bucket/n.jpg",
    ]
    manifest = tmp_path / "hostile.parquet"
    pq.write_table(pa.table({"uri": uris}), manifest)
    inputs = ["-m", str(photo_config.model.path), "--manifest", str(manifest), "-o", str(photo_config.output.path)]
    settings = ["errors.max_rate=1", "fetch.retries=0", "fetch.private_addresses=true", f"fetch.client={client}"]
    settings += ["fetch.schemes=[file, https, s3]", f"storage.endpoint_url=http://{server}"]
    given = [part for setting in settings for part in ("--set", setting)]
    assert command(["classify", *inputs, "--engine", "local", *given, "--debug"]) == 0
    with open_views(str(photo_config.output.path)) as connection:
        found = connection.execute("select status from errors where uri = 's3://bucket/n.jpg'").fetchall()
    assert found == [("FETCH_FAILED",)], "without keys it would be FORBIDDEN"
    said = texts_in(tmp_path / "out")
    assert f"https://{server}/k.jpg" in said
    assert SECRET not in said
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err


def hostile_column(name: str, mark: Path) -> pa.Field:
    """Of an extension type whose description, and whose values, are pickles."""
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": pickle.dumps(Evil(mark))}
    return pa.field("extra", pa.binary(), metadata=metadata)


@pytest.mark.parametrize("name", ["ray.data.arrow_tensor", "ray.data.arrow_pickled_object"])
def test_extension_types_of_ray_are_refused_unread(
    name: str, photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    schema = pa.schema([pa.field("uri", pa.string()), hostile_column(name, mark)])
    table = pa.table([[str(photos[6])], [pickle.dumps(Evil(mark))]], schema=schema)
    with pytest.raises(UsageError, match="which may run code when read"):
        classify(with_manifest(photo_config, table, tmp_path))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pandas.period", "unknown"])
def test_other_extension_types_are_what_they_are_stored_as(
    name: str, photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    schema = pa.schema([pa.field("uri", pa.string()), hostile_column(name, mark)])
    table = pa.table([[str(photos[6])], [pickle.dumps(Evil(mark))]], schema=schema)
    assert classify(with_manifest(photo_config, table, tmp_path)).counts == {"OK": 1}
    assert not mark.exists()


def test_a_bundle_of_pickled_weights_is_refused_though_its_checksum_is_right(
    photo_config: Config, make_bundle: Callable[..., ModelBundle], tmp_path: Path
) -> None:
    bundle = make_bundle()
    mark = tmp_path / "mark"
    weights = pickle.dumps(Evil(mark))
    folder = Path(bundle.path)
    (folder / "model.safetensors").write_bytes(weights)
    description = json.loads((folder / "model.json").read_text())
    description["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    del description["model_id"]
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(UsageError, match="safetensors"):
        classify(changed(photo_config, model__path=bundle.path))
    assert not mark.exists()


@pytest.mark.parametrize("key", ["weights_file", "code", "__reduce__"])
def test_a_bundle_cannot_name_other_files(
    key: str, photo_config: Config, make_bundle: Callable[..., ModelBundle]
) -> None:
    bundle = make_bundle()
    path = Path(bundle.path, "model.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "../../../../etc/passwd"}))
    with pytest.raises(UsageError, match=f"unknown key '{key}'"):
        classify(changed(photo_config, model__path=bundle.path))


def laughs(depth: int) -> str:
    """YAML of a few hundred bytes that holds 9 to the power of ``depth`` elements, written out."""
    lines = ["  a0: &a0 [" + ",".join("x" * 9) + "]"]
    lines += [f"  a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, depth)]
    return "input:\n" + "\n".join([*lines, f"  manifest: *a{depth - 1}"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (laughs(12), "input.manifest"),
        ("[" * 3000, "not valid YAML"),
        ("input: !!python/object/apply:os.system ['touch mark']", "not valid YAML"),
        ("input: {manifest: !!python/name:os.system }", "not valid YAML"),
    ],
    ids=["laughs", "deep", "call", "name"],
)
def test_a_hostile_configuration_file_is_one_line(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words) as refused:
        load_config(file)
    assert len(str(refused.value)) < 1000
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("run_id", ["../../elsewhere", "/etc", "..", ""])
def test_a_run_is_one_of_those_that_are_listed(run_id: str, photo_config: Config, tmp_path: Path) -> None:
    classify(changed(photo_config, input__limit=2))
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    assert command(["clean", str(photo_config.output.path), "--run", run_id, "--yes"]) == 2
    assert kept.exists()
    assert RunPaths(str(photo_config.output.path), "r1").root.startswith(str(photo_config.output.path))
