from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from imgbatch.config import Config
from imgbatch.core import current, storage
from imgbatch.core.clean import remove_abandoned, remove_run
from imgbatch.core.runs import RunPaths, list_runs
from imgbatch.core.verify import verify
from imgbatch.core.views import open_views
from imgbatch.errors import UsageError
from imgbatch.runtime.job import classify
from tests.conftest import changed


class CutOff(BaseException):
    """The process ended here."""


def cut_off_at(removal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The removal of that number, from 0, is the last thing that does not happen."""
    remove, removed = storage.remove, list[str]()

    def removes_until(uri: str) -> None:
        if len(removed) == removal:
            raise CutOff
        removed.append(uri)
        remove(uri)

    monkeypatch.setattr(storage, "remove", removes_until)


def left(out: Path) -> list[str]:
    return sorted(path.name for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("again", ["one run", "abandoned", "classify"])
def test_a_removal_that_was_cut_off_can_be_done_again_wherever_that_was(
    photo_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    config = changed(photo_config, input__limit=40, output__keep_units=True)
    whole = classify(config)
    for removal in range(100):
        out = tmp_path / f"cut-off-{removal}"
        shutil.copytree(whole.out, out)
        with monkeypatch.context() as patched:
            cut_off_at(removal, patched)
            try:
                remove_run(str(out), whole.run_id)
            except CutOff:
                pass
            else:
                break
        if again == "classify":
            result = classify(changed(config, output__path=str(out), output__keep_units=False))
            assert (result.counts, verify(result.out).ok) == (whole.counts, True)
        if any(run.run_id == whole.run_id and not run.finished for run in list_runs(str(out))):
            # The first removal is that of its success.
            assert whole.run_id not in [run.run_id for run in current.load_finished(str(out))]
            if again == "abandoned":
                assert remove_abandoned(str(out), [whole.run_id]) == [whole.run_id]
            else:
                remove_run(str(out), whole.run_id)
            assert not Path(RunPaths(str(out), whole.run_id).root).exists()
    assert removal > 10


def test_what_a_removal_left_that_was_cut_off_gives_no_labels_to_other_rows(photo_config: Config) -> None:
    """As before plans were removed last: the unit files of a night stayed, of which nobody knew any more."""
    night = changed(photo_config, input__skip_existing=True, classify__unit_rows=8, output__keep_units=True)
    first = classify(night)
    paths = RunPaths(first.out, first.run_id)
    for uri in (paths.plan, paths.success, paths.finalize, paths.data("predictions"), paths.data("errors")):
        storage.remove(uri)
    storage.remove(current.location(first.out))
    classify(changed(photo_config, input__limit=17))  # labels 16: whole units are left
    again = classify(night)
    assert again.run_id == first.run_id
    assert verify(again.out).ok
    whole = classify(changed(photo_config, output__path=f"{first.out}-whole"))
    sql = "select image_id, label, probability from predictions order by image_id"
    with open_views(again.out) as connection, open_views(whole.out) as oracle:
        found, expected = (opened.sql(sql).fetchnumpy() for opened in (connection, oracle))
    assert len(expected["label"]) == 114
    assert found["image_id"].tolist() == expected["image_id"].tolist()
    assert found["label"].tolist() == expected["label"].tolist()
    np.testing.assert_allclose(found["probability"], expected["probability"], atol=1e-5)


def test_a_run_that_is_worked_on_is_not_removed(store_run: Callable[..., Path]) -> None:
    out = store_run(("cat", "dog"), np.array([[0.75, 0.25]], np.float32))
    (entry,) = list_runs(str(out))
    storage.write_json(entry.paths.heartbeat, {"host": socket.gethostname(), "pid": os.getppid(), "time": time.time()})
    before = left(out)
    with pytest.raises(UsageError, match="another driver works on it"):
        remove_run(str(out), entry.run_id)
    assert left(out) == before
    storage.remove(entry.paths.heartbeat)
    remove_run(str(out), entry.run_id)
    assert left(out) == ["current.json"]


def test_a_run_of_an_object_store_is_removed_with_all_that_it_wrote(photo_config: Config, s3_bucket: str) -> None:
    result = classify(changed(photo_config, output__path=f"{s3_bucket}/out", input__limit=20))
    remove_run(result.out, result.run_id)
    assert [info.uri for info in storage.list_files(s3_bucket)] == [current.location(result.out)]
