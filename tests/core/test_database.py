from __future__ import annotations

from pathlib import Path

import pytest

from imgbatch.core.database import spilling

GROUP = "select count(*) from (select hash(i) from range({}) numbers(i) group by 1)"


def test_more_than_the_memory_is_spilled_and_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with spilling(memory_mb=256) as connection:
        assert connection.execute(GROUP.format(12_000_000)).fetchall() == [(12_000_000,)]
    assert not list(tmp_path.iterdir())


def test_the_memory_bounds_the_threads() -> None:
    for memory_mb, most in [(256, 2), (512, 4)]:
        with spilling(memory_mb=memory_mb) as connection:
            ((threads,),) = connection.execute("select current_setting('threads')").fetchall()
        assert 2 <= threads <= most
