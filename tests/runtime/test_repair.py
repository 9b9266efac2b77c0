"""Damaged outputs put right, with and without the unit files of then."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.cli import run as command
from imgbatch.config import Config
from imgbatch.core import current, stages, storage
from imgbatch.core.failpoints import FailpointHit, parse_failpoints
from imgbatch.core.model import ModelBundle
from imgbatch.core.runs import RunPaths
from imgbatch.core.verify import verify
from imgbatch.errors import ImgbatchError, RowsDiffer, UsageError
from imgbatch.runtime.job import RunResult, classify, retry
from imgbatch.runtime.repair import repair
from tests.conftest import changed
from tests.runtime.conftest import rows_of


@pytest.fixture
def config(photo_config: Config) -> Config:
    return changed(photo_config, output__partition_by=("shop",))


def output_files(result: RunResult) -> dict[str, bytes]:
    out = Path(result.out)
    return {str(path.relative_to(out)): path.read_bytes() for kind in ("predictions", "errors")
            for path in (out / kind).rglob("*.parquet")}  # fmt: skip


def damage(result: RunResult) -> list[str]:
    """Damage one file and lose another; returns their names."""
    damaged = next(Path(result.out, "errors").rglob("*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"gone")
    lost = next(Path(result.out, "predictions").rglob("shop=north/*.parquet"))
    lost.unlink()
    assert not verify(result.out).ok
    return sorted(str(path.relative_to(result.out)) for path in (damaged, lost))


def test_from_kept_units_the_bytes_are_those_of_then(config: Config) -> None:
    config = changed(config, output__keep_units=True)
    result = classify(config)
    before = output_files(result)
    units = sorted(path.name for path in Path(RunPaths(result.out, result.run_id).units).iterdir())
    names = damage(result)
    (done,) = repair(config, None)
    assert (done.run_id, sorted(done.files), done.num_units_classified) == (result.run_id, names, 0)
    assert output_files(result) == before
    assert verify(result.out).ok
    assert sorted(path.name for path in Path(RunPaths(result.out, result.run_id).units).iterdir()) == units


def test_without_units_only_what_is_needed_is_classified_again(config: Config) -> None:
    result = classify(config)
    before = output_files(result)
    lost = next(Path(result.out, "predictions").rglob("shop=north/*.parquet"))
    lost.unlink()
    (done,) = repair(config, None)
    assert done.num_units_classified == 3, "rows 0 to 39 lie in units 0 to 2"
    assert output_files(result) == before
    assert verify(result.out).ok
    assert not Path(RunPaths(result.out, result.run_id).units).exists()


def test_a_file_that_is_not_the_runs_is_removed(config: Config) -> None:
    result = classify(config)
    stray = Path(result.out, "predictions", f"run_id={result.run_id}", "part-00009.parquet")
    stray.write_bytes(b"left by somebody")
    (done,) = repair(config, None)
    assert (done.files, done.num_strays) == ([], 1)
    assert not stray.exists()
    assert verify(result.out).ok


@pytest.mark.parametrize("written", [".", "./out", "out/", "../{name}/out", "file://{path}", "//{path}"])
def test_however_the_directory_is_written_only_what_is_damaged_is_touched(
    config: Config, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing has other names than those that are written so, and what has no name in the record is removed."""
    result = classify(changed(config, output__keep_units=True))
    before = output_files(result)
    (name,) = damage(result)[:1]
    monkeypatch.chdir(result.out if written == "." else tmp_path)
    out = written.format(name=tmp_path.name, path=result.out)
    (done,) = repair(changed(config, output__path=out), None)
    assert (name in done.files, len(done.files), done.num_strays) == (True, 2, 0)
    assert output_files(result) == before
    assert verify(out).ok


def test_a_storage_that_lists_by_other_names_has_nothing_removed(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = classify(config)
    before = output_files(result)
    monkeypatch.setattr(storage, "listing_prefix", lambda uri: f"abfs://container/{uri}/")
    with pytest.raises(ImgbatchError, match=r"lists it under another name than .*; nothing was removed"):
        repair(config, None)
    assert output_files(result) == before


def test_nothing_to_repair(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    result = classify(config)
    assert repair(config, None) == []
    assert command(["repair", result.out, "--engine", "local"]) == 0
    assert "nothing to repair" in capsys.readouterr().out


def test_the_command_says_what_it_did(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    result = classify(config)
    names = damage(result)
    assert command(["repair", result.out, "--engine", "local", "--run", result.run_id]) == 0
    printed = capsys.readouterr().out
    assert f"run {result.run_id}: 2 files written anew, 6 units classified again, 0 stray files" in printed
    assert all(name in printed for name in names)


def test_retries_are_repaired_too(config: Config, photos: list[Path], tmp_path: Path) -> None:
    late = tmp_path / "late.jpg"
    manifest = tmp_path / "late.parquet"
    pq.write_table(pa.table({"uri": [str(photos[1]), str(late)], "shop": ["a", "b"]}), manifest)
    config = changed(config, input__manifest=str(manifest))
    root = classify(config)
    late.write_bytes(photos[2].read_bytes())
    child = retry(config, None)
    assert child is not None
    next(Path(root.out, "predictions", f"run_id={child.run_id}").rglob("*.parquet")).unlink()
    (done,) = repair(config, None)
    assert done.run_id == child.run_id
    assert verify(root.out).ok


@pytest.mark.parametrize("keep_units", [False, True])
def test_rows_that_come_out_otherwise_are_one_line(
    config: Config, photos: list[Path], tmp_path: Path, keep_units: bool
) -> None:
    """And whoever repairs once the images are back finds no unit of the time when they were away."""
    moving = tmp_path / "moving.jpg"
    moving.write_bytes(photos[1].read_bytes())
    manifest = tmp_path / "moving.parquet"
    pq.write_table(pa.table({"uri": [str(moving), str(photos[2])], "shop": ["a", "a"]}), manifest)
    config = changed(config, input__manifest=str(manifest), output__keep_units=keep_units)
    result = classify(config)
    storage.remove(RunPaths(result.out, result.run_id).units)
    next(Path(result.out, "predictions").rglob("*.parquet")).unlink()
    moving.unlink()
    with pytest.raises(ImgbatchError, match=r"1 rows where finalize\.json has 2: some images came out otherwise"):
        repair(config, None)
    moving.write_bytes(photos[1].read_bytes())
    assert len(repair(config, None)) == 1
    assert verify(result.out).ok


@pytest.mark.parametrize("at_reading", [False, True])
def test_what_was_classified_again_outlasts_a_storage_that_is_away(
    config: Config, monkeypatch: pytest.MonkeyPatch, at_reading: bool
) -> None:
    result = classify(config)
    damage(result)
    read_bytes = storage.read_bytes

    def away(uri: str) -> bytes:
        if "/units/" in uri:
            raise OSError("503 Slow Down")
        return read_bytes(uri)

    with monkeypatch.context() as patched:
        if at_reading:
            patched.setattr(storage, "read_bytes", away)
        else:
            patched.setattr("imgbatch.core.output_files.failpoint", parse_failpoints("finalize.mid_file=raise@1"))
        with pytest.raises(ImgbatchError if at_reading else FailpointHit) as failed:
            repair(config, None)
    assert "came out otherwise" not in str(failed.value)
    (done,) = repair(config, None)
    assert done.num_units_classified == 0
    assert verify(result.out).ok
    assert not Path(RunPaths(result.out, result.run_id).units).exists()


def test_a_repair_that_goes_on_says_which_rows_came_out_otherwise(
    config: Config, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the one before left has no better claim than what it classified itself."""
    moving, manifest = tmp_path / "moving.jpg", tmp_path / "moving.parquet"
    moving.write_bytes(photos[1].read_bytes())
    pq.write_table(pa.table({"uri": [str(moving), str(photos[2])], "shop": ["a", "a"]}), manifest)
    config = changed(config, input__manifest=str(manifest))
    result = classify(config)
    next(Path(result.out, "predictions").rglob("*.parquet")).unlink()
    moving.unlink()
    with monkeypatch.context() as patched:
        patched.setattr("imgbatch.runtime.repair.rebuild", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            repair(config, None)
    with pytest.raises(RowsDiffer, match="some images came out otherwise"):
        repair(config, None)
    moving.write_bytes(photos[1].read_bytes())
    (done,) = repair(config, None)
    assert done.num_units_classified == 1
    assert verify(result.out).ok


def test_why_a_row_failed_is_recorded_as_it_is_now(config: Config, tmp_path: Path, photos: list[Path]) -> None:
    broken, manifest = tmp_path / "broken.jpg", tmp_path / "broken.parquet"
    broken.write_text("<html>not here</html>")
    pq.write_table(pa.table({"uri": [str(broken), str(photos[1])], "shop": ["a", "a"]}), manifest)
    config = changed(config, input__manifest=str(manifest))
    result = classify(config)
    assert result.counts == {"NOT_AN_IMAGE": 1, "OK": 1}
    broken.write_bytes(b"")
    next(Path(result.out, "errors").rglob("*.parquet")).unlink()
    assert len(repair(config, None)) == 1
    verified = verify(result.out)
    assert (verified.ok, verified.counts) == (True, {result.run_id: {"EMPTY": 1, "OK": 1}})


OUTCOMES = (
    "select row_id, label, 'OK' status from predictions union all select row_id, null, status from errors order by 1"
)


def test_a_unit_that_kills_the_engine_ends_in_isolation(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    result = classify(config)
    before = rows_of(config, OUTCOMES)
    damage(result)
    fail, tries = parse_failpoints("commit.before[1]=raise@1;commit.before[1]=raise@2"), Counter[object]()

    def passed(point: str, key: object = None) -> None:
        if point == "commit.before":
            tries[key] += 1
        fail(point, key)

    monkeypatch.setattr(stages, "failpoint", passed)
    (done,) = repair(config, None)
    assert tries == {unit: 3 if unit == 1 else 1 for unit in tries}
    assert done.num_units_classified == len(tries) > 2
    assert rows_of(config, OUTCOMES) == before
    assert verify(result.out).ok


def test_a_run_that_current_json_lacks_is_put_there(config: Config) -> None:
    result = classify(config)
    storage.write_json(current.location(result.out), {"runs": []})
    assert not verify(result.out).ok
    assert repair(config, None) == []
    assert verify(result.out).ok


def test_another_model_cannot_repair(config: Config, make_bundle: Callable[..., ModelBundle]) -> None:
    bundle = make_bundle(seed=1)
    config = changed(config, model__path=bundle.path)
    result = classify(config)
    damage(result)
    make_bundle(seed=2)
    with pytest.raises(UsageError, match="its model is not what it was"):
        repair(config, None)


def test_without_its_records_nothing_can_be_told(config: Config) -> None:
    result = classify(config)
    storage.remove(RunPaths(result.out, result.run_id).finalize)
    with pytest.raises(UsageError, match=r"finalize\.json cannot be read"):
        repair(config, None)


def test_an_unfinished_run_is_continued_instead(config: Config) -> None:
    result = classify(config)
    storage.remove(RunPaths(result.out, result.run_id).success)
    with pytest.raises(UsageError, match="is unfinished; its classify command continues it"):
        repair(config, None)
