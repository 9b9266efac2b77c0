from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from imgbatch.core import current, storage
from imgbatch.core.runs import RunPaths

CLASSES = ("a", "b")
PROBS = np.array([[0.25, 0.75]], np.float32)


def test_a_run_that_ends_while_another_one_is_recorded_is_not_lost(
    store_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(store_run(CLASSES, PROBS, run_id="r1"))
    store_run(CLASSES, PROBS, run_id="r2")
    success = RunPaths(out, "r2").success
    storage.remove(success)
    write = storage.write_json

    def write_and_meanwhile(uri: str, value: object) -> None:
        write(uri, value)
        storage.create_if_absent(success, b"")

    monkeypatch.setattr(storage, "write_json", write_and_meanwhile)
    current.update(out)
    assert [run.run_id for run in current.load(out)] == ["r1", "r2"]


def test_it_is_known_whether_every_finished_run_is_there(store_run: Callable[..., Path]) -> None:
    out = str(store_run(CLASSES, PROBS, run_id="r1"))
    assert current.is_up_to_date(out)
    storage.remove(current.location(out))
    assert not current.is_up_to_date(out)
    assert [run.run_id for run in current.load_finished(out)] == ["r1"]
    current.update(out)
    assert current.load_finished(out) == current.load(out)
    assert current.is_up_to_date(out)
    storage.remove(RunPaths(out, "r1").success)
    assert not current.is_up_to_date(out)
