"""The main job through the local engine: what every engine promises, cheap enough to be tried from all sides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import stages, storage
from imgbatch.core.failpoints import parse_failpoints
from imgbatch.core.runs import RunPaths
from imgbatch.core.verify import verify
from imgbatch.errors import UsageError
from imgbatch.runtime.job import classify
from tests.conftest import changed
from tests.runtime.conftest import files_of, rows_of


def test_every_row_comes_out_once(photo_config: Config) -> None:
    result = classify(photo_config)
    assert result.num_rows == 120
    assert result.counts["OK"] == 114
    assert result.num_errors == 6
    assert verify(result.out).ok
    assert not Path(RunPaths(result.out, result.run_id).units).exists()
    assert rows_of(photo_config, "select count(*), count(distinct image_id), min(width) >= 40 from predictions") == [
        (114, 114, True)
    ]
    statuses = rows_of(photo_config, "select distinct status, error_stage from errors order by 1")
    assert {stage for _, stage in statuses} == {"decode"}
    assert rows_of(photo_config, "select run_id, predictions, errors from runs") == [(result.run_id, 114, 6)]


def test_the_manifests_own_columns_and_order_come_through(photo_config: Config) -> None:
    result = classify(photo_config)
    (path,) = Path(result.out, "predictions").rglob("*.parquet")
    table = pq.read_table(path, partitioning=None)
    assert table.column_names[:4] == ["row_id", "image_id", "uri", "label"]
    assert table.column_names[-5:] == ["model_id", "predicted_at", "target", "shop", "price"]
    ids = table["row_id"].to_pylist()
    assert ids == sorted(ids)
    assert table["price"].to_pylist() == [row_id / 4 for row_id in ids]
    assert table.schema.metadata[b"imgbatch.schema_version"] == b"1"


def test_finalize_gives_the_same_bytes_from_the_same_units(photo_config: Config) -> None:
    from imgbatch.core.finalize import finalize
    from imgbatch.core.plan import open_inputs, open_run

    result = classify(changed(photo_config, output__keep_units=True, output__partition_by=("shop",)))
    paths = RunPaths(result.out, result.run_id)
    before = files_of(photo_config)
    for name in (paths.success, paths.files):
        storage.remove(name)
    stray = Path(paths.data("predictions"), "shop=north", "part-00009.parquet")
    stray.write_bytes(b"left by a crash")
    _, bundle, spec = open_inputs(photo_config)

    def elsewhere(*_: object) -> Iterator[Any]:
        raise AssertionError("a process started for eight units")

    finalize(open_run(paths, photo_config, bundle, spec), elsewhere)
    assert files_of(photo_config) == before


@pytest.mark.parametrize("partition_by", [("shop",), ("date", "bucket:3"), ("label",)])
def test_partitions(photo_config: Config, partition_by: tuple[str, ...]) -> None:
    config = changed(photo_config, output__partition_by=partition_by)
    result = classify(config)
    assert verify(result.out).ok
    names = [entry.split(":")[0] for entry in partition_by]
    for path in Path(result.out, "predictions").rglob("*.parquet"):
        assert [part.split("=")[0] for part in path.relative_to(result.out).parts[1:-1]] == ["run_id", *names]
        assert not set(names) & set(pq.read_schema(path).names)
    assert rows_of(config, f"select count({names[-1]}) > 0, count(*) from predictions") == [(True, 114)]
    if partition_by == ("shop",):
        found = rows_of(config, "select shop, count(*) from predictions group by 1 order by 1 nulls last")
        assert found == [("north", 38), ("sö/uth", 38), (None, 38)]


def test_small_files_are_cut_at_units(photo_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgbatch.core.finalize._rows_per_file", lambda *_: 40)
    result = classify(photo_config)
    files = sorted(Path(result.out, "predictions").rglob("*.parquet"))
    assert [path.name for path in files] == [f"part-{index:05d}.parquet" for index in range(4)]
    assert verify(result.out).ok


def test_embedded_images(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    manifest = tmp_path / "embedded.parquet"
    table = pa.table({"bytes": [path.read_bytes() for path in photos], "name": [path.name for path in photos]})
    pq.write_table(table, manifest, row_group_size=50)
    embedded = classify(changed(photo_config, input__manifest=str(manifest), output__path=str(tmp_path / "embedded")))
    by_uri = classify(photo_config)
    assert embedded.counts == by_uri.counts
    config = changed(photo_config, output__path=embedded.out)
    labels, probabilities = (
        f"select {name} from predictions order by row_id" for name in ("row_id, label", "probability")
    )
    assert rows_of(config, labels) == rows_of(photo_config, labels)
    # Units end with row groups, so batches differ, and with them the last digit on some processors.
    ours, theirs = (np.array(rows_of(each, probabilities), float) for each in (config, photo_config))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert rows_of(config, "select min(image_id), count(uri) from predictions") == [("0", 0)]
    paths = RunPaths(embedded.out, embedded.run_id)
    assert storage.read_json(paths.plan)["segments"] == [50, 50, 20]
    (planned,) = Path(paths.rows).iterdir()
    assert pq.read_schema(planned).names == ["row_id", "image_id", "uri", "name"], "the images are read where they are"
    assert verify(embedded.out).ok


def test_embeddings_stand_beside_the_predictions(photo_config: Config) -> None:
    config = changed(photo_config, output__embeddings=True, output__partition_by=("shop",))
    result = classify(config)
    assert verify(result.out).ok
    assert "embeddings" in {check.name for check in verify(result.out).checks}
    assert result.counts["OK"] == 114
    (path,) = Path(result.out, "embeddings").rglob("*.parquet")
    assert pq.read_schema(path).names == ["row_id", "image_id", "embedding"]
    lengths = "select count(*), min(len(embedding)), max(len(embedding)) from embeddings semi join predictions"
    (found,) = rows_of(config, f"{lengths} using (row_id, image_id)")
    assert found[0] == 114
    assert found[1] == found[2] > 3
    select = "select row_id, label, probability from predictions order by row_id"
    with_embeddings = rows_of(config, select)
    without = classify(photo_config)
    assert without.run_id != result.run_id
    assert rows_of(photo_config, select) == with_embeddings
    assert rows_of(photo_config, "select count(*) from embeddings") == [(0,)]
    assert rows_of(photo_config, "select count(*) from all_embeddings") == [(114,)]


def test_limit_takes_the_first_rows(photo_config: Config) -> None:
    result = classify(changed(photo_config, input__limit=10))
    assert result.num_rows == 10
    assert rows_of(photo_config, "select max(row_id) from predictions") == [(9,)]


def test_an_image_id_may_stand_twice_only_if_allowed(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    manifest = tmp_path / "twice.parquet"
    pq.write_table(pa.table({"uri": [str(photos[0]), str(photos[1]), str(photos[0])]}), manifest)
    config = changed(photo_config, input__manifest=str(manifest))
    with pytest.raises(UsageError, match="stands there 2 times"):
        classify(config)
    result = classify(changed(config, input__duplicates="keep"))
    assert result.num_rows == 3
    assert rows_of(config, "select count(*) from all_predictions") == [(3,)]
    assert rows_of(config, "select count(*) from predictions") == [(2,)]


@pytest.mark.parametrize("name", ["night[1]", "date=2026-10-01", "what?"])
def test_a_directory_that_readers_take_for_a_pattern_is_refused(
    photo_config: Config, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match="for a pattern or a partition"):
        classify(changed(photo_config, output__path=str(tmp_path / name / "out")))
    assert not (tmp_path / name).exists()


def test_a_unit_that_kills_the_engine_ends_in_isolation(photo_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit of unit 2 fails whenever the engine tries it; the rest goes through and unit 2 ends all the same."""
    in_both_passes = "commit.before[2]=raise@1;commit.before[2]=raise@2"
    monkeypatch.setattr(stages, "failpoint", parse_failpoints(in_both_passes))
    result = classify(photo_config)
    assert verify(result.out).ok
    sessions = storage.read_json(RunPaths(result.out, result.run_id).run_json)["sessions"]
    assert sessions[-1]["isolated_units"] == 1
    assert result.counts["OK"] == 114
