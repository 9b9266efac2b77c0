from __future__ import annotations

import datetime
from collections import Counter

import pyarrow as pa
import pytest

from imgbatch.core.partitions import NULL_PARTITION, PartitionCheck, encode_value, parse_partitions, partition_paths
from imgbatch.errors import UsageError

SCHEMA = pa.schema([("image_id", pa.string()), ("shop", pa.string()), ("year", pa.int32()), ("day", pa.date32())])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, NULL_PARTITION),
        ("", NULL_PARTITION),
        ("a/b", "a%2Fb"),
        ("..", "%2E%2E"),
        ("ö=1%", "%C3%B6%3D1%25"),
        ("0012", "0012"),
        (True, "true"),
        (7, "7"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
    ],
)
def test_values_are_safe_directory_names(value: object, expected: str) -> None:
    assert encode_value(value) == expected


def test_paths_of_rows() -> None:
    table = pa.table(
        {
            "image_id": ["a", "b", "c"],
            "shop": ["x", None, "x"],
            "year": pa.array([2025, 2026, 2025], pa.int32()),
            "day": pa.array([None, None, None], pa.date32()),
        }
    )
    partitions = parse_partitions(["year", "shop"], SCHEMA)
    paths = partition_paths(table, partitions, "2026-01-02").to_pylist()
    assert paths == ["year=2025/shop=x", f"year=2026/shop={NULL_PARTITION}", "year=2025/shop=x"]
    dated = partition_paths(table, parse_partitions(["date", "bucket:2"], SCHEMA), "2026-01-02").to_pylist()
    assert {path.split("/")[0] for path in dated} == {"date=2026-01-02"}
    assert {path.split("/")[1] for path in dated} <= {"bucket=0", "bucket=1"}
    assert partition_paths(table, (), "2026-01-02").to_pylist() == ["", "", ""]


def test_an_image_keeps_its_bucket_in_every_version() -> None:
    """A finished output is read by bucket for years, and the nights that are added to it have to agree with it."""
    image_ids = ["cat/1.jpg", *(f"image {number}" for number in range(10_000))]
    paths = partition_paths(pa.table({"image_id": image_ids}), parse_partitions(["bucket:4"], SCHEMA), "2026-01-02")
    first, *others = paths.to_pylist()
    assert first == "bucket=1"
    assert sorted(Counter(others)) == [f"bucket={number}" for number in range(4)]
    assert all(2_250 < count < 2_750 for count in Counter(others).values())


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["colour"], "no column 'colour'"),
        (["shop", "shop"], "twice"),
        (["bucket:0"], "buckets"),
        (["bucket:x"], "no column"),
    ],
)
def test_what_cannot_be_a_partition(entries: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_partitions(entries, SCHEMA)


@pytest.mark.parametrize(("value", "words"), [(NULL_PARTITION, "means null"), ("x" * 201, "longer than")])
def test_values_are_checked_as_the_run_is_planned(value: str, words: str) -> None:
    check = PartitionCheck(parse_partitions(["shop"], SCHEMA))
    with pytest.raises(UsageError, match=words):
        check(pa.table({"shop": ["fine", value]}))
