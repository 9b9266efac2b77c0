from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pytest

from imgbatch import schema
from imgbatch.errors import UsageError


@pytest.mark.parametrize(
    ("arrow_type", "plain"),
    [
        (pa.timestamp("ns", tz="UTC"), pa.timestamp("us", tz="UTC")),
        (pa.timestamp("s"), pa.timestamp("us")),
        (pa.float16(), pa.float32()),
        (pa.null(), pa.string()),
        (pa.time64("ns"), pa.int64()),
        (pa.duration("ns"), pa.int64()),
        (pa.dictionary(pa.int32(), pa.string()), pa.string()),
        (pa.large_string(), pa.string()),
        (pa.string_view(), pa.string()),
        (pa.binary(4), pa.binary()),
        (pa.large_list(pa.float16()), pa.list_(pa.float32())),
        (pa.list_(pa.float16(), 3), pa.list_(pa.float32())),
        (pa.struct([("a", pa.null())]), pa.struct([("a", pa.string())])),
        (pa.map_(pa.string(), pa.timestamp("ns")), pa.map_(pa.string(), pa.timestamp("us"))),
        (pa.uuid(), pa.binary()),
        (pa.int16(), pa.int16()),
        (pa.decimal128(10, 2), pa.decimal128(10, 2)),
    ],
)
def test_plain_types_are_those_that_every_reader_knows(arrow_type, plain):
    assert schema.plain_type(arrow_type) == plain


def test_columns_keep_their_values_when_brought_to_plain_types():
    noon = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "when": pa.array([noon, None], pa.timestamp("ns", tz="UTC")),
            "half": pa.array(np.array([0.5, 2.0], np.float16)),
            "nothing": pa.nulls(2),
            "category": pa.array(["a", "b"]).dictionary_encode(),
            "clock": pa.array([datetime.time(0, 0, 1), None], pa.time64("us")),
            "took": pa.array([datetime.timedelta(seconds=2), None], pa.duration("ms")),
            "id": pa.array([b"0" * 16, b"1" * 16], pa.uuid()),
            "nested": pa.array([[{"x": 1}], None], pa.large_list(pa.struct([("x", pa.int8())]))),
        },
    ).replace_schema_metadata({"pandas": "…"})
    plain = schema.to_plain(table)
    assert plain.to_pydict() == {
        "when": [noon, None],
        "half": [0.5, 2.0],
        "nothing": [None, None],
        "category": ["a", "b"],
        "clock": [1_000_000, None],
        "took": [2_000_000, None],
        "id": [b"0" * 16, b"1" * 16],
        "nested": [[{"x": 1}], None],
    }
    assert all(field.type == schema.plain_type(field.type) for field in plain.schema)
    assert plain.schema.metadata is None


def test_times_keep_their_values_wherever_they_are_nested():
    clock, took = datetime.time(0, 0, 1), datetime.timedelta(seconds=2)
    both = pa.struct([("clock", pa.time32("s")), ("took", pa.duration("ns"))])
    table = pa.table(
        {
            "clock": pa.array([clock, None], pa.time32("ms")),
            "list": pa.array([[clock], None], pa.list_(pa.time64("ns"))),
            "struct": pa.array([{"clock": clock, "took": took}, None], both),
            "map": pa.array([[("a", took)], None], pa.map_(pa.string(), pa.duration("ms"))),
            "deep": pa.array([[{"clock": clock, "took": None}], None], pa.large_list(both)),
        }
    )
    plain = schema.to_plain(table)
    assert plain.to_pydict() == {
        "clock": [1_000_000, None],
        "list": [[1_000_000], None],
        "struct": [{"clock": 1_000_000, "took": 2_000_000}, None],
        "map": [[("a", 2_000_000)], None],
        "deep": [[{"clock": 1_000_000, "took": None}], None],
    }
    assert all(field.type == schema.plain_type(field.type) for field in plain.schema)


def test_the_schema_of_units_is_plain_already():
    assert all(field.type == schema.plain_type(field.type) for field in schema.UNIT_SCHEMA)
    outcome = {*schema.PREDICTION_COLUMNS, *schema.ERROR_COLUMNS, *schema.EMBEDDING_COLUMNS}
    assert {*outcome, schema.ROW_ID} == set(schema.UNIT_SCHEMA.names)


@pytest.mark.parametrize("name", ["label", "row_id", "run_id", "error_message"])
def test_a_manifest_column_with_the_name_of_an_output_column_is_refused(name):
    with pytest.raises(UsageError, match=f"column '{name}' is the name of an output column"):
        schema.check_no_collisions(["uri", name])


def test_columns_that_differ_only_in_case_are_refused():
    with pytest.raises(UsageError, match="column 'Shop' stands there twice"):
        schema.check_no_collisions(["uri", "Shop", "shop"])


def test_a_manifests_own_columns_are_no_collision():
    schema.check_no_collisions(["uri", "image_id", "target", "targets", "split", "window", "bands", "shop"])


@pytest.mark.parametrize("name", ["Label", "WIDTH", "Image_ID", "URI"])
def test_case_makes_no_other_column(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        schema.check_no_collisions([name, "shop"])
