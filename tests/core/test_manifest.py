from __future__ import annotations

import base64
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.core.manifest import MAX_ROW_GROUP_BYTES, Manifest, open_manifest
from imgbatch.errors import UsageError
from imgbatch.schema import WINDOW_TYPE

URIS = ["/images/a.jpg", "/images/b.jpg", "/images/c.jpg"]


def write(path: Path, columns: dict | pa.Table, **options: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return str(path)


def with_ids(manifest: Manifest, **options: int) -> pa.Table:
    first_row, tables = 0, []
    for table in manifest.iter_batches(**options):
        tables.append(manifest.with_image_id(table, first_row))
        first_row += table.num_rows
    return pa.concat_tables(tables)


def test_files_in_name_order_are_the_row_order(tmp_path: Path) -> None:
    write(tmp_path / "m/part-1.parquet", {"uri": ["c", "d"], "shop": [3, 4]})
    write(tmp_path / "m/part-0.parquet", {"uri": ["a", "b"], "shop": [1, 2]})
    write(tmp_path / "m/_temporary/part-9.parquet", {"x": [1]})
    (tmp_path / "m/_SUCCESS").touch()

    manifest = open_manifest(str(tmp_path / "m"))

    assert [Path(info.uri).name for info in manifest.files] == ["part-0.parquet", "part-1.parquet"]
    assert manifest.row_groups == ((0, 0, 2), (1, 0, 2))
    assert manifest.num_rows == 4
    assert not manifest.has_bytes
    (table,) = manifest.iter_batches()
    assert table.to_pydict() == {"uri": ["a", "b", "c", "d"], "shop": [1, 2, 3, 4]}


def test_batches_have_one_size_whatever_the_row_groups(tmp_path: Path) -> None:
    rows = [f"/i/{n}.jpg" for n in range(1000)]
    manifest = open_manifest(write(tmp_path / "m.parquet", {"uri": rows}, row_group_size=70))

    tables = list(manifest.iter_batches(batch_rows=300))
    assert [table.num_rows for table in tables] == [300, 300, 300, 100]
    assert pa.concat_tables(tables)["uri"].to_pylist() == rows
    assert [table.num_rows for table in manifest.iter_batches(batch_rows=300, limit=450)] == [300, 150]


def test_columns_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    manifest = open_manifest(write(tmp_path / "m.parquet", {"uri": URIS, "a.b": [1, 2, 3], "a": [4, 5, 6]}))
    (table,) = manifest.iter_batches(["a", "uri"])
    assert table.column_names == ["a", "uri"]


def test_types_become_plain(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.parquet",
        {
            "uri": pa.array(URIS, pa.large_string()),
            "taken": pa.array([1, 2, 3], pa.timestamp("ns")),
            "score": pa.array(np.array([1, 2, 3], np.float16)),
            "nothing": pa.nulls(3),
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "window": pa.array(
                [{"col_off": 0, "row_off": 1, "width": 2, "height": 3}] * 3,
                pa.struct([(name, pa.int32()) for name in ("col_off", "row_off", "width", "height")]),
            ),
        },
    )
    manifest = open_manifest(path)
    (table,) = manifest.iter_batches()
    assert table.schema == manifest.schema
    types = {field.name: str(field.type) for field in manifest.schema}
    window = types.pop("window")
    assert types == {
        "uri": "string", "taken": "timestamp[us]", "score": "float", "nothing": "string", "kind": "string"
    }  # fmt: skip
    assert window == "struct<col_off: int64, row_off: int64, width: int64, height: int64>"


def test_image_id_defaults_to_the_uri_with_its_window(tmp_path: Path) -> None:
    window = {"col_off": 10, "row_off": 20, "width": 30, "height": 40}
    path = write(tmp_path / "m.parquet", {"uri": URIS, "window": [window, None, window]})
    table = with_ids(open_manifest(path), batch_rows=2)
    assert table["image_id"].to_pylist() == [f"{URIS[0]}#10,20,30,40", URIS[1], f"{URIS[2]}#10,20,30,40"]
    assert table.column_names == ["image_id", "uri", "window"]


def test_own_image_id_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", {"uri": URIS, "image_id": ["1", "2", "3"]})
    table = with_ids(open_manifest(path))
    assert table["image_id"].to_pylist() == ["1", "2", "3"]
    assert table.column_names == ["image_id", "uri"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"bytes": [b"x", b"y", None]}, ["0", "1", "2"]),
        ({"bytes": [b"x", b"y", b"z"], "uri": ["a", None, "c"]}, ["a", "1", "c"]),
    ],
)
def test_embedded_images_are_known_by_row_id(tmp_path: Path, columns: dict, expected: list[str]) -> None:
    manifest = open_manifest(write(tmp_path / "m.parquet", columns, row_group_size=2))
    assert manifest.has_bytes
    assert "bytes" not in manifest.schema.names
    assert with_ids(manifest, batch_rows=2)["image_id"].to_pylist() == expected
    assert manifest.row_groups == ((0, 0, 2), (0, 1, 1))
    images = [image for group in manifest.row_groups for image in manifest.read_images(group).to_pylist()]
    assert images == columns["bytes"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"uri": ["a", None]}, "row 1 (from 0): uri is null"),
        ({"uri": ["a", "b"], "image_id": ["1", None]}, "row 1 (from 0): image_id is null"),
        (
            {"uri": ["a"], "window": pa.array([{"col_off": 1, "width": 2, "height": 2}], WINDOW_TYPE)},
            "row 0 (from 0): a field of window is null",
        ),
    ],
)
def test_a_row_without_identity_is_named(tmp_path: Path, columns: dict, message: str) -> None:
    manifest = open_manifest(write(tmp_path / "m.parquet", columns))
    with pytest.raises(UsageError, match="fill it in or drop the row") as error:
        with_ids(manifest, batch_rows=1)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": URIS}, "neither a 'uri' nor a 'bytes' column (columns: path)"),
        ({"uri": [1, 2, 3]}, "column 'uri' is int64, expected string"),
        ({"bytes": URIS}, "column 'bytes' is string, expected binary"),
        ({"uri": URIS, "target": [1, 2, 3]}, "column 'target' is int64, expected string"),
        ({"uri": URIS, "targets": URIS}, "column 'targets' is string, expected a list of strings"),
        ({"uri": URIS, "window": [{"x": 1}] * 3}, "expected struct<col_off, row_off, width, height>"),
        ({"uri": URIS, "bands": [[0.5]] * 3}, "expected a list of integers"),
        ({"uri": URIS, "label": URIS}, "column 'label' is the name of an output column"),
        ({"uri": URIS, "Shop": URIS, "shop": URIS}, "column 'Shop' stands there twice"),
        ({"uri": pa.array([], pa.string())}, "no rows"),
    ],
)
def test_schemas_that_are_no_manifest(tmp_path: Path, columns: dict, message: str) -> None:
    path = write(tmp_path / "m.parquet", columns)
    with pytest.raises(UsageError) as error:
        open_manifest(path)
    assert str(error.value).startswith(f"manifest {path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_manifest_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("not Parquet at all")
    for name, message in [
        ("missing.parquet", "there is no such file"),
        ("empty", "holds no .parquet file"),
        ("text.parquet", "not a readable Parquet file"),
    ]:
        with pytest.raises(UsageError, match=message):
            open_manifest(str(tmp_path / name))


def test_files_must_have_one_schema(tmp_path: Path) -> None:
    write(tmp_path / "m/0.parquet", {"uri": ["a"], "shop": [1]})
    write(tmp_path / "m/1.parquet", {"uri": ["a"], "shop": ["1"]})
    with pytest.raises(UsageError, match=r"1\.parquet: column 'shop' is string, but int64 in .*0\.parquet"):
        open_manifest(str(tmp_path / "m"))


def test_partition_directories_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m/split=train/0.parquet", {"uri": ["a"]})
    with pytest.raises(UsageError, match=r"partition directories \(split=train\)"):
        open_manifest(str(tmp_path / "m"))


def test_a_row_group_too_large_to_read_whole_says_how_to_rewrite(tmp_path: Path) -> None:
    image = bytes(MAX_ROW_GROUP_BYTES // 4)
    table = pa.table({"bytes": [image] * 5})
    path = write(tmp_path / "m.parquet", table, compression="zstd", use_dictionary=False)
    with pytest.raises(UsageError, match=r"row group 0 of .* is 320 MB, .*imgbatch manifest build .* -o NEW\.parquet"):
        open_manifest(path)


class ExplosiveType(pa.ExtensionType):
    """Stands for a type whose metadata runs code when it is looked at."""

    name = "ray.data.explosive"
    deserialized = 0

    def __init__(self) -> None:
        super().__init__(pa.int64(), self.name)

    def __arrow_ext_serialize__(self) -> bytes:
        return b"payload"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> ExplosiveType:
        del storage_type, serialized
        cls.deserialized += 1
        return cls()


@pytest.mark.parametrize("padding", ["", "x" * 4, "x" * 8])  # moves the name within the base64 of the footer
def test_extension_types_of_ray_are_refused_before_they_are_loaded(tmp_path: Path, padding: str) -> None:
    explosive = ExplosiveType()
    pa.register_extension_type(explosive)
    try:
        column = pa.ExtensionArray.from_storage(explosive, pa.array([1, 2, 3]))
        path = write(
            tmp_path / "m.parquet", pa.table({"uri": URIS, "tensor": column}).replace_schema_metadata({"p": padding})
        )
        pq.ParquetFile(path).close()
        assert ExplosiveType.deserialized, "pyarrow no longer loads types when it opens a file"
        ExplosiveType.deserialized = 0
        with pytest.raises(UsageError, match=r"extension type ray\.data\.…, which may run code when read"):
            open_manifest(path)
        assert ExplosiveType.deserialized == 0
    finally:
        pa.unregister_extension_type(ExplosiveType.name)


def test_unknown_and_known_extension_types_become_their_storage(tmp_path: Path) -> None:
    unknown = pa.field("geometry", pa.int64(), metadata={"ARROW:extension:name": "someone.else"})
    known = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1", "2", "3"]))
    table = pa.table([URIS, [1, 2, 3], known], schema=pa.schema([("uri", pa.string()), unknown, ("extra", pa.json_())]))
    manifest = open_manifest(write(tmp_path / "m.parquet", table))
    assert [str(field.type) for field in manifest.schema] == ["string", "int64", "string"]
    (read,) = manifest.iter_batches()
    assert read["extra"].to_pylist() == ["1", "2", "3"]


def test_damaged_arrow_schema_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    table = pa.table({"uri": URIS})
    with pq.ParquetWriter(path, table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"ARROW:schema": base64.b64encode(b"nonsense").decode()[:-1] + "é"})
    with pytest.raises(UsageError, match="not a readable"):
        open_manifest(str(path))


def test_content_identity_follows_the_rows_and_not_the_place(tmp_path: Path) -> None:
    first = open_manifest(write(tmp_path / "one/m.parquet", {"uri": URIS}))
    moved = open_manifest(write(tmp_path / "two/n.parquet", {"uri": URIS}))
    changed = open_manifest(write(tmp_path / "three/m.parquet", {"uri": URIS[:2]}))
    assert first.content_identity() == moved.content_identity()
    assert first.content_identity() != changed.content_identity()


def test_content_identity_of_embedded_images_reads_the_footer(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", {"bytes": [b"x", b"y"]})
    before = open_manifest(path).content_identity()
    assert open_manifest(path).content_identity() == before
    write(tmp_path / "m.parquet", {"bytes": [b"x", b"z"], "shop": [1, 2]})
    assert open_manifest(path).content_identity() != before


def test_any_filesystem_will_do() -> None:
    fs = fsspec.filesystem("memory")
    for name, uris in [("b", ["c"]), ("a", ["a", "b"])]:
        with fs.open(f"/manifest/{name}.parquet", "wb") as file:
            pq.write_table(pa.table({"uri": uris}), file)
    try:
        manifest = open_manifest("memory://manifest")
        assert with_ids(manifest)["uri"].to_pylist() == ["a", "b", "c"]
        assert len(manifest.content_identity()) == 64
        assert open_manifest("memory://manifest/a.parquet").num_rows == 2
        with pytest.raises(UsageError, match="no such file"):
            open_manifest("memory://nothing")
    finally:
        fs.rm("/manifest", recursive=True)
