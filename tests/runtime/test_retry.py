from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import imgbatch
from imgbatch.config import Config, load_config
from imgbatch.core import current, storage
from imgbatch.core.failed import failed_runs
from imgbatch.core.model import ModelBundle
from imgbatch.core.runs import RunPaths, list_runs
from imgbatch.core.verify import verify
from imgbatch.errors import Interrupted, UsageError
from imgbatch.runtime.interrupts import StopSwitch
from imgbatch.runtime.job import RunResult, classify, iter_retries, retry
from tests.conftest import changed
from tests.runtime.conftest import UNREADABLE, rows_of


def broken_manifest(photos: list[Path], tmp_path: Path) -> tuple[Path, list[Path]]:
    """30 photos, 10 of which are not there yet."""
    late = [tmp_path / f"late{index}.jpg" for index in range(10)]
    manifest = tmp_path / "broken.parquet"
    pq.write_table(pa.table({"uri": [str(path) for path in [*photos[6:26], *late]]}), manifest)
    return manifest, late


def test_retry_classifies_what_failed_into_a_child_run(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    manifest, late = broken_manifest(photos, tmp_path)
    config = changed(photo_config, input__manifest=str(manifest))
    first = classify(config)
    assert first.counts["NOT_FOUND"] == 10
    for path in late[:8]:
        path.write_bytes(photos[1].read_bytes())
    child = retry(config, None)
    assert isinstance(child, RunResult)
    assert child.counts["OK"] == 8
    assert rows_of(config, "select count(*), count(distinct row_id) from predictions") == [(27, 27)]
    assert rows_of(config, "select status, row_id from errors where status = 'NOT_FOUND' order by 2") == [
        ("NOT_FOUND", 28),
        ("NOT_FOUND", 29),
    ]
    late[8].write_bytes(photos[1].read_bytes())
    late[9].write_bytes(photos[1].read_bytes())
    again = retry(config, None)
    assert isinstance(again, RunResult)
    assert again.counts["OK"] == 2
    result = verify(first.out)
    assert result.ok
    assert set(result.counts) == {first.run_id, child.run_id, again.run_id}


@pytest.mark.parametrize("written", [".", "./out", "file://{path}"])
def test_a_retry_keeps_its_files_however_the_directory_is_written(
    photo_config: Config, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    manifest, late = broken_manifest(photos, tmp_path)
    first = classify(changed(photo_config, input__manifest=str(manifest)))
    late[0].write_bytes(photos[1].read_bytes())
    monkeypatch.chdir(first.out if written == "." else tmp_path)
    flags = {"output.path": written.format(path=first.out), "classify.engine": "local"}
    child = retry(load_config(flags=flags), None)
    assert isinstance(child, RunResult)
    assert (child.out, child.counts["OK"]) == (first.out, 1)
    assert list(Path(first.out, "predictions").glob(f"run_id={child.run_id}/*.parquet"))
    assert verify(first.out).ok


def test_a_retry_may_give_decoding_more_time(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    missing = str(tmp_path / "late.jpg")
    pq.write_table(pa.table({"uri": [str(photos[1]), str(photos[2]), missing]}), tmp_path / "m.parquet")
    config = changed(photo_config, input__manifest=str(tmp_path / "m.parquet"), decode__memory_mb=1024)
    first = classify(config)
    Path(missing).write_bytes(photos[1].read_bytes())
    flags = {"output.path": first.out, "classify.engine": "local", "decode.timeout_s": 120.0}
    child = retry(load_config(flags=flags), first.run_id)
    assert isinstance(child, RunResult)
    fields = storage.read_json(RunPaths(child.out, child.run_id).plan)["fields"]
    assert (fields["decode.timeout_s"], fields["decode.memory_mb"]) == (120, 1024)


def test_a_retry_is_of_the_same_model_wherever_it_is_asked_for(
    photo_config: Config,
    photos: list[Path],
    tmp_path: Path,
    make_bundle: Callable[..., ModelBundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest, late = broken_manifest(photos, tmp_path)
    bundle = make_bundle()
    monkeypatch.chdir(tmp_path)
    first = classify(changed(photo_config, input__manifest=manifest.name, model__path=Path(bundle.path).name))
    late[0].write_bytes(photos[1].read_bytes())
    monkeypatch.chdir("/")
    flags = {"output.path": first.out, "classify.engine": "local"}
    child = retry(load_config(flags=flags), None)
    assert isinstance(child, RunResult)
    assert child.counts["OK"] == 1
    late[1].write_bytes(photos[1].read_bytes())
    description = Path(bundle.path, "model.json")
    kept = description.read_text()
    other = make_bundle("other", class_names=("a", "b", "c"))
    description.write_text(Path(other.path, "model.json").read_text())
    Path(bundle.path, "model.safetensors").write_bytes(Path(other.path, "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match=f"not the one of run {first.run_id}"):
        retry(load_config(flags=flags), None)
    assert kept != description.read_text()


def test_a_run_that_current_json_lacks_is_found_and_retried(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    """As after a kill between _SUCCESS and current.json."""
    manifest, late = broken_manifest(photos, tmp_path)
    config = changed(photo_config, input__manifest=str(manifest))
    first = classify(config)
    storage.remove(current.location(first.out))
    (failed,) = (check for check in verify(first.out).checks if not check.ok)
    assert (failed.run_id, failed.name) == (first.run_id, "current")
    late[0].write_bytes(photos[1].read_bytes())
    child = retry(config, None)
    assert isinstance(child, RunResult)
    assert (child.num_rows, child.counts["OK"]) == (first.num_errors, 1)
    assert verify(first.out).ok


def test_rows_that_fail_again_end_the_retry_all_the_same(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    """However few errors are allowed: for want of the images, then for want of whoever lets them be read."""
    manifest = tmp_path / "broken.parquet"
    uris = [*(str(photo) for photo in photos[6:9]), str(tmp_path / "late.jpg"), UNREADABLE]
    pq.write_table(pa.table({"uri": uris, "image_id": [*"abcde"]}), manifest)
    first = classify(changed(photo_config, input__manifest=str(manifest)))
    config = load_config(
        flags={
            "output.path": first.out,
            "classify.engine": "local",
            "errors.max_rate": 0.0,
            "errors.min_rows": 1,
            "fetch.retries": 0,
        }
    )
    again = [retry(config, None) for _ in range(2)]
    assert [child and child.counts for child in again] == [{"FETCH_FAILED": 1, "NOT_FOUND": 1}] * 2
    assert len({child.run_id for child in again if child}) == 2
    assert verify(first.out).ok


def test_a_retry_that_is_unfinished_is_no_fault_of_the_run(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    manifest, late = broken_manifest(photos, tmp_path)
    config = changed(photo_config, input__manifest=str(manifest))
    first = classify(config)
    late[0].write_bytes(photos[1].read_bytes())
    stop = StopSwitch()
    stop.is_on = True
    with pytest.raises(Interrupted):
        retry(config, None, stop=stop)
    result = verify(first.out)
    assert result.ok
    (child,) = (check for check in result.checks if "unfinished: 0 of 1 units" in check.detail)
    assert not verify(first.out, child.run_id).ok
    finished = retry(config, None)
    assert finished is not None
    assert (finished.run_id, finished.counts["OK"]) == (child.run_id, 1)


def test_nothing_to_retry(photo_config: Config) -> None:
    classify(changed(photo_config, input__limit=4))
    assert retry(photo_config, None) is None
    assert list(iter_retries(photo_config)) == []


def test_it_is_called_from_python_too() -> None:
    assert imgbatch.retry is retry


class Nights:
    """Two nights, and a third that labels one of the images that failed in the first.

    Monday's rows 1 and 2 are to be tried again, and Tuesday's row 1 and 2, of which the first had failed on Monday too.
    """

    def __init__(self, config: Config, photos: list[Path], tmp_path: Path) -> None:
        self._config = config
        self.again = load_config(flags={"output.path": config.output.path, "classify.engine": "local"})
        """Of a retry, which names no manifest."""
        self._photos = photos
        self._folder = tmp_path
        self.monday = self.classify("monday", [photos[6], *self.late("a", "b", "often", "c")]).run_id
        self.tuesday = self.classify("tuesday", [photos[7], *self.late("often", "d")]).run_id
        self.arrive("c")
        self.wednesday = self.classify("wednesday", [photos[8], *self.late("c")]).run_id

    def late(self, *names: str) -> list[Path]:
        return [self._folder / f"{name}.jpg" for name in names]

    def arrive(self, *names: str) -> None:
        for path in self.late(*names):
            path.write_bytes(self._photos[1].read_bytes())

    def manifest(self, night: str) -> Path:
        return self._folder / f"{night}.parquet"

    def classify(self, night: str, images: list[Path]) -> RunResult:
        pq.write_table(pa.table({"uri": [str(path) for path in images]}), self.manifest(night))
        return classify(changed(self._config, input__manifest=str(self.manifest(night))))

    def wanted(self) -> list[tuple[str, list[int]]]:
        return [(each.run_id, each.row_ids.to_pylist()) for each in failed_runs(str(self._config.output.path))]

    def verify(self) -> None:
        for run_id in (self.monday, self.tuesday, self.wednesday):
            assert verify(str(self._config.output.path), run_id).ok


@pytest.fixture
def nights(photo_config: Config, photos: list[Path], tmp_path: Path) -> Nights:
    return Nights(photo_config, photos, tmp_path)


def test_every_night_with_images_that_no_later_one_labelled_is_retried(nights: Nights, photo_config: Config) -> None:
    """An image that failed in two of them is tried once, and one that a later night labelled not at all; the manifest
    that the configuration names is of no matter."""
    assert retry(nights.again) is None, "of the newest run every row has a prediction"
    assert nights.wanted() == [(nights.monday, [1, 2]), (nights.tuesday, [1, 2])]
    nights.arrive("a", "d")
    done = list(iter_retries(photo_config))
    assert [(each.run_id, each.result and each.result.counts) for each in done] == [
        (nights.monday, {"NOT_FOUND": 1, "OK": 1}),
        (nights.tuesday, {"NOT_FOUND": 1, "OK": 1}),
    ]
    assert rows_of(photo_config, "select row_id from errors order by 1") == [(1,), (2,)]
    nights.arrive("b", "often")
    assert nights.wanted() == [(nights.monday, [2]), (nights.tuesday, [1])]
    assert [each.result and each.result.counts for each in iter_retries(photo_config)] == [{"OK": 1}, {"OK": 1}]
    assert rows_of(photo_config, "select count(*) from errors") == [(0,)]
    assert nights.wanted() == []
    nights.verify()


def test_a_night_whose_manifest_has_changed_keeps_no_other_from_its_retry(
    nights: Nights, photo_config: Config, photos: list[Path]
) -> None:
    nights.arrive("a", "d")
    pq.write_table(pa.table({"uri": [str(photos[9])]}), nights.manifest("monday"))
    passed_over, done = iter_retries(photo_config)
    assert (passed_over.run_id, passed_over.result) == (nights.monday, None)
    assert isinstance(passed_over.error, UsageError)
    assert f"changed since run {nights.monday}" in str(passed_over.error)
    assert done.result is not None
    assert (done.run_id, done.result.counts["OK"]) == (nights.tuesday, 1)


def test_what_was_interrupted_between_two_nights_goes_on_with_the_second(nights: Nights) -> None:
    """Though rows of the first, which failed again, are still to be had."""
    stop = StopSwitch()
    retries = iter_retries(nights.again, stop=stop)
    assert next(retries).run_id == nights.monday
    stop.is_on = True
    with pytest.raises(Interrupted):
        next(retries)
    assert {run.parent for run in list_runs(str(nights.again.output.path))} == {None, nights.monday}
    assert nights.wanted() == [(nights.tuesday, [1, 2]), (nights.monday, [1, 2])]


@pytest.mark.parametrize("every", [True, False], ids=["all", "one"])
def test_what_was_interrupted_within_a_night_is_continued(nights: Nights, photo_config: Config, every: bool) -> None:
    """Also by a retry of that run alone, which would have had more rows of its own."""
    # Looked at when it begins, before the first night, and before its pass.
    stop = StopSwitch(itertools.count().__next__)
    with pytest.raises(Interrupted, match="stop_after_s"):
        list(iter_retries(changed(photo_config, run__stop_after_s=1.5), stop=stop))
    (child,) = (run for run in list_runs(str(photo_config.output.path)) if run.parent is not None)
    assert (child.parent, child.finished, child.plan["num_rows"]) == (nights.monday, False, 2)
    nights.arrive("a", "b")
    result = next(iter_retries(photo_config)).result if every else retry(nights.again, nights.monday)
    assert isinstance(result, RunResult)
    assert (result.run_id, result.counts) == (child.run_id, {"OK": 2})
    nights.verify()


def test_a_retry_of_one_night_that_was_interrupted_is_continued_with_all(nights: Nights) -> None:
    """With its own rows, of which later nights have labelled one, or are to try one again."""
    stop = StopSwitch()
    stop.is_on = True
    with pytest.raises(Interrupted):
        retry(nights.again, nights.monday, stop=stop)
    first = next(iter_retries(nights.again))
    assert (first.run_id, first.result and first.result.num_rows) == (nights.monday, 4)
    assert not any(run.abandoned for run in list_runs(str(nights.again.output.path)))


def test_every_row_of_an_image_that_stands_twice_is_retried(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    late = tmp_path / "late.jpg"
    pq.write_table(pa.table({"uri": [str(late), str(photos[6]), str(late)]}), tmp_path / "twice.parquet")
    config = changed(photo_config, input__manifest=str(tmp_path / "twice.parquet"), input__duplicates="keep")
    first = classify(config)
    late.write_bytes(photos[1].read_bytes())
    (done,) = iter_retries(config)
    assert done.result is not None
    assert done.result.counts == {"OK": 2}
    assert verify(first.out).ok


def test_a_retry_of_a_retry_counts_for_the_run_that_both_are_of(nights: Nights) -> None:
    child = retry(nights.again, nights.tuesday)
    assert child is not None
    nights.arrive("d")
    assert nights.wanted() == [(nights.monday, [1, 2]), (nights.tuesday, [1, 2])]
    grandchild = retry(nights.again, child.run_id)
    assert grandchild is not None
    assert grandchild.counts == {"NOT_FOUND": 1, "OK": 1}
    assert nights.wanted() == [(nights.monday, [1, 2]), (nights.tuesday, [1])]
