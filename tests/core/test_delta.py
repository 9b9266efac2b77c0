"""Runs in a Delta table, read back by deltalake."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from imgbatch.cli import run
from imgbatch.core import current, storage
from imgbatch.core.clean import remove_run
from imgbatch.core.delta import publish, storage_options
from imgbatch.core.views import open_views
from imgbatch.errors import ExitCode, UsageError

deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed (extra delta)")

CLASSES = ("hat", "shoe")
PROBS_NK = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], np.float32)


@pytest.fixture
def out(store_run: Callable[..., Path]) -> Path:
    """Two nights; the second knows a column that the first lacks."""
    store_run(CLASSES, PROBS_NK, run_id="r000000000001", columns={"shop": ["north", "south", None]})
    return store_run(
        CLASSES,
        PROBS_NK[:2],
        run_id="r000000000002",
        columns={"shop": ["north", "east"], "price": [1.5, None]},
        predicted_at="2026-01-03T03:04:05.000000+00:00",
    )


def rows_of(table: str) -> pa.Table:
    """Everything in the table, as any reader of its log would find it."""
    opened = deltalake.DeltaTable(table)
    return pa.table(deltalake.QueryBuilder().register("t", opened).execute("select * from t").read_all())


def test_every_run_is_one_transaction_and_is_there_once(out: Path, tmp_path: Path) -> None:
    table = str(tmp_path / "table")
    first = publish(str(out), table, "r000000000001")
    assert [(entry.run_id, entry.num_rows, entry.version) for entry in first] == [("r000000000001", 3, 1)]
    both = publish(str(out), table)
    assert [(entry.already_there, entry.version) for entry in both] == [(True, None), (False, 2)]
    again = publish(str(out), table)
    assert [entry.already_there for entry in again] == [True, True]
    assert deltalake.DeltaTable(table).version() == 2


def test_a_run_that_is_there_is_not_read_again(out: Path, tmp_path: Path) -> None:
    table = str(tmp_path / "table")
    publish(str(out), table, "r000000000001")
    (out / "predictions/run_id=r000000000001/part-00000.parquet").unlink()
    assert [(entry.already_there, entry.version) for entry in publish(str(out), table)] == [(True, None), (False, 2)]


def test_a_table_that_cannot_be_opened_is_one_line(out: Path, tmp_path: Path) -> None:
    log = tmp_path / "table" / "_delta_log"
    log.mkdir(parents=True)
    (log / "00000000000000000000.json").write_text("no log\n")
    with pytest.raises(UsageError, match=f"^{tmp_path}/table: ") as raised:
        publish(str(out), str(tmp_path / "table"))
    assert "\n" not in str(raised.value)


def test_a_run_that_was_cleaned_and_classified_anew_takes_the_place_of_its_rows(
    out: Path, store_run: Callable[..., Path], tmp_path: Path
) -> None:
    """It has the id that it had; the other run stays as it is."""
    table = str(tmp_path / "table")
    publish(str(out), table)
    remove_run(str(out), "r000000000001")
    store_run(CLASSES, 1 - PROBS_NK[:2], run_id="r000000000001", predicted_at="2026-01-04T03:04:05.000000+00:00")
    assert [(entry.run_id, entry.version) for entry in publish(str(out), table)] == [
        ("r000000000002", None),
        ("r000000000001", 3),
    ]
    found = rows_of(table).select(["run_id", "row_id", "label"]).to_pylist()
    assert sorted(tuple(row.values()) for row in found) == [
        ("r000000000001", 0, "shoe"),
        ("r000000000001", 1, "hat"),
        ("r000000000002", 0, "hat"),
        ("r000000000002", 1, "shoe"),
    ]
    assert [entry.already_there for entry in publish(str(out), table)] == [True, True]


def test_a_run_that_current_json_lacks_is_published(out: Path, tmp_path: Path) -> None:
    storage.remove(current.location(str(out)))
    assert [entry.num_rows for entry in publish(str(out), str(tmp_path / "table"))] == [3, 2]


def test_the_table_says_what_the_views_say(out: Path, tmp_path: Path) -> None:
    table = str(tmp_path / "table")
    publish(str(out), table)
    columns = "run_id, row_id, image_id, label, probability, top_k, probabilities, predicted_at, shop, price"
    query = f"select {columns} from {{}} order by run_id, row_id"
    with duckdb.connect() as connection, open_views(str(out)) as views:
        connection.execute("set timezone = 'UTC'")
        connection.register("found", rows_of(table))
        found = connection.sql(query.format("found")).fetchall()
        assert found == views.sql(query.format("all_predictions")).fetchall()
    files = deltalake.DeltaTable(table).file_uris()
    assert {part.split("run_id=")[1].split("/")[0] for part in files} == {"r000000000001", "r000000000002"}


def test_of_publishers_at_once_one_wins(out: Path, tmp_path: Path) -> None:
    """Also to a table that none of them finds."""
    table = str(tmp_path / "table")
    for run_id in ("r000000000001", "r000000000002"):
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: publish(str(out), table, run_id), range(4)))  # noqa: B023 - done below
        assert sum(entry.version is not None for (entry,) in results) == 1
        assert sum(entry.already_there for (entry,) in results) == 3
    assert rows_of(table).num_rows == 5


def test_columns_that_the_table_has_otherwise_are_one_line(
    out: Path, store_run: Callable[..., Path], tmp_path: Path
) -> None:
    table = str(tmp_path / "table")
    publish(str(out), table)
    other = store_run(CLASSES, PROBS_NK[:1], out="other", run_id="r00000000000f", columns={"price": ["cheap"]})
    with pytest.raises(UsageError, match="'price'") as raised:
        publish(str(other), table)
    assert "\n" not in str(raised.value)
    assert deltalake.DeltaTable(table).version() == 2


def test_unsigned_columns_become_the_next_wider_signed_ones(store_run: Callable[..., Path], tmp_path: Path) -> None:
    types = {"u8": pa.uint8(), "u16": pa.uint16(), "u32": pa.uint32(), "u64": pa.uint64()}
    values: dict[str, list[Any]] = {name: [2**each.bit_width - 1, 0, None] for name, each in types.items()}
    values["nested"] = [[{"x": 2**64 - 1}], [], None]
    columns = {name: pa.array(values[name], each) for name, each in types.items()}
    columns["nested"] = pa.array(values["nested"], pa.list_(pa.struct([("x", pa.uint64())])))
    out, table = str(store_run(CLASSES, PROBS_NK, columns=columns)), str(tmp_path / "table")
    assert [entry.num_rows for entry in publish(out, table)] == [3]
    assert [entry.already_there for entry in publish(out, table)] == [True]
    found = rows_of(table).select(["row_id", *values]).sort_by("row_id")
    assert found.drop_columns("row_id").to_pydict() == values


def test_a_run_without_a_prediction_leaves_no_trace(store_run: Callable[..., Path], tmp_path: Path) -> None:
    failed = {"image_id": ["a"], "status": ["NOT_FOUND"]}
    out = store_run(CLASSES, PROBS_NK[:0], failed=failed)
    (entry,) = publish(str(out), str(tmp_path / "table"))
    assert (entry.version, entry.already_there) == (None, False)
    assert not (tmp_path / "table").exists()


def test_a_run_that_has_no_prediction_any_more_takes_its_former_rows_away(
    out: Path, store_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was cleaned and classified anew; the other run stays as it is."""
    table = str(tmp_path / "table")
    publish(str(out), table)
    for day, version in (("04", 3), ("05", None)):
        remove_run(str(out), "r000000000001")
        store_run(
            CLASSES,
            PROBS_NK[:0],
            run_id="r000000000001",
            failed={"image_id": ["image-0"], "status": ["NOT_FOUND"]},
            predicted_at=f"2026-01-{day}T03:04:05.000000+00:00",
        )
        published = publish(str(out), table, "r000000000001")
        assert [(entry.num_rows, entry.version, entry.already_there) for entry in published] == [(0, version, False)]
        assert set(rows_of(table)["run_id"].to_pylist()) == {"r000000000002"}
    assert run(["publish", str(out), "--delta", table]) == ExitCode.DONE
    assert capsys.readouterr().out == "r000000000002: was there already\nr000000000001: has no prediction\n"
    # With predictions it comes back.
    remove_run(str(out), "r000000000001")
    store_run(CLASSES, PROBS_NK, run_id="r000000000001", predicted_at="2026-01-06T03:04:05.000000+00:00")
    assert [entry.num_rows for entry in publish(str(out), table, "r000000000001")] == [3]
    assert rows_of(table).num_rows == 5


def test_of_publishers_that_take_rows_away_at_once_one_wins(
    out: Path, store_run: Callable[..., Path], tmp_path: Path
) -> None:
    table = str(tmp_path / "table")
    publish(str(out), table)
    remove_run(str(out), "r000000000001")
    failed = {"image_id": ["image-0"], "status": ["NOT_FOUND"]}
    later = "2026-01-04T03:04:05.000000+00:00"
    store_run(CLASSES, PROBS_NK[:0], run_id="r000000000001", failed=failed, predicted_at=later)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: publish(str(out), table, "r000000000001"), range(4)))
    assert sum(entry.version is not None for (entry,) in results) == 1
    assert sum(entry.already_there for (entry,) in results) == 3
    assert rows_of(table).num_rows == 2


def test_the_command(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = str(tmp_path / "table")
    assert run(["publish", str(out), "--delta", table, "--run", "r000000000001"]) == ExitCode.DONE
    assert capsys.readouterr().out == f"r000000000001: 3 predictions, version 1 of {table}\n"
    assert run(["publish", str(out), "--delta", table, "--json"]) == ExitCode.DONE
    printed: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [entry["version"] for entry in printed] == [None, 2]
    assert run(["publish", str(out), "--delta", table, "--run", "nobody"]) == ExitCode.USAGE
    assert "nobody" in capsys.readouterr().err


def test_a_table_in_a_bucket(out: Path, s3_bucket: str) -> None:
    table = storage.join(s3_bucket, "table")
    assert [entry.version for entry in publish(str(out), table)] == [1, 2]
    assert [entry.already_there for entry in publish(str(out), table)] == [True, True]
    opened = deltalake.DeltaTable(table, storage_options=storage_options(table))
    assert sum(pa.table(opened.get_add_actions())["num_records"].to_pylist()) == 5
    prefix = storage.listing_prefix(table)
    assert {info.uri.removeprefix(prefix).split("/")[0] for info in storage.list_files(table)} == {
        "_delta_log",
        "run_id=r000000000001",
        "run_id=r000000000002",
    }
