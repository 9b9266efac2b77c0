from __future__ import annotations

import gzip
import hashlib
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imgbatch.config import StorageConfig
from imgbatch.core import storage
from imgbatch.core.manifest import open_manifest
from imgbatch.core.manifest_build import BuildOptions, build_manifest, draw_split, parse_split_shares
from imgbatch.core.manifest_sources import ImageFolder, TableOptions, open_sources, resolve
from imgbatch.core.parquet import BATCH_ROWS
from imgbatch.errors import UsageError
from imgbatch.schema import WINDOW_TYPE
from tests.core.encoding import encode
from tests.faults.proxy import faulty_server


def image_bytes(image_format: str = "PNG") -> bytes:
    return encode(Image.new("RGB", (4, 3), (10, 20, 30)), image_format)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes in two splits, and files that are no images of the collection."""
    folder = tmp_path / "photos"
    for name in ["train/cat/a.JPG", "train/dog/b.jpeg", "val/cat/c.png", "val/dog/d.tiff"]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes("PNG" if name.endswith("png") else "TIFF" if name.endswith("tiff") else "JPEG"))
    for name in [".hidden.jpg", "train/cat/notes.txt", ".git/x.jpg"]:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_bytes())
    return folder


def build(tmp_path: Path, *sources: object, **options: object) -> pa.Table:
    table = TableOptions(**{k: options.pop(k) for k in ("columns", "root", "targets_separator") if k in options})
    output = str(tmp_path / "out" / "m.parquet")
    build_manifest([str(source) for source in sources], output, BuildOptions(table=table, **options), overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.parquet"]
    return pa.concat_tables(open_manifest(output).iter_batches())


def names_of(table: pa.Table, folder: Path) -> list[str]:
    return [uri.removeprefix(f"{folder}/") for uri in table["uri"].to_pylist()]


def write_csv(tmp_path: Path, text: str, name: str = "list.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_folder_gives_its_images_sorted_and_absolute(tmp_path: Path, photos: Path) -> None:
    table = build(tmp_path, photos)
    assert table.column_names == ["uri"]
    assert names_of(table, photos) == ["train/cat/a.JPG", "train/dog/b.jpeg", "val/cat/c.png", "val/dog/d.tiff"]


def test_target_and_split_come_from_folders(tmp_path: Path, photos: Path) -> None:
    table = build(tmp_path, photos, targets_from="folder", split_from="folder")
    assert table["target"].to_pylist() == ["cat", "dog", "cat", "dog"]
    assert table["split"].to_pylist() == ["train", "train", "validation", "validation"]


def test_the_listed_folder_itself_may_name_the_split(tmp_path: Path, photos: Path) -> None:
    assert build(tmp_path, photos / "val", split_from="folder")["split"].to_pylist() == ["validation"] * 2
    with pytest.raises(UsageError, match="--split-from folder needs a folder named"):
        build(tmp_path, photos / "train" / "cat", split_from="folder")


def test_globs_folders_and_single_images_are_concatenated(tmp_path: Path, photos: Path) -> None:
    table = build(tmp_path, photos / "*" / "dog" / "*.*", photos / "train/cat/a.JPG", photos / "val")
    assert names_of(table, photos) == [
        "train/dog/b.jpeg", "val/dog/d.tiff", "train/cat/a.JPG", "val/cat/c.png", "val/dog/d.tiff"
    ]  # fmt: skip
    assert names_of(build(tmp_path, photos / "**" / "*.png"), photos) == ["val/cat/c.png"]


def test_csv_columns_are_mapped_and_stay_strings(tmp_path: Path) -> None:
    path = write_csv(tmp_path, '\ufefffile,class,shop,note\na.jpg,cat,0012,"two\nlines"\n\n/x/b.jpg,NA,7,\n')
    table = build(tmp_path, path, columns={"uri": "file", "target": "class"})
    assert table.to_pydict() == {
        "uri": [f"{tmp_path}/a.jpg", "/x/b.jpg"],
        "target": ["cat", "NA"],
        "shop": ["0012", "7"],
        "note": ["two\nlines", None],
    }


def test_targets_are_split_and_an_empty_cell_is_no_class(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "uri\tlabels\na.jpg\tRBC| WBC\nb.jpg\t\n", "list.tsv")
    table = build(tmp_path, path, columns={"targets": "labels"}, targets_separator="|")
    assert table["targets"].to_pylist() == [["RBC", "WBC"], []]


def test_gzipped_csv_below_another_root(tmp_path: Path) -> None:
    path = tmp_path / "list.csv.gz"
    path.write_bytes(gzip.compress(b"uri\nsub/a.jpg\n../b.jpg\ns3a://bucket/c.jpg\n"))
    assert build(tmp_path, path, root="/data/images")["uri"].to_pylist() == [
        "/data/images/sub/a.jpg", "/data/b.jpg", "s3://bucket/c.jpg"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "uri", "expected"),
    [
        ("/data", "./a.jpg", "/data/a.jpg"),
        ("s3://bucket/p", "a/../b.jpg", "s3://bucket/p/b.jpg"),
        ("s3://bucket", "a.jpg", "s3://bucket/a.jpg"),
        ("s3://bucket/a//c", "x.jpg", "s3://bucket/a//c/x.jpg"),
        ("s3://bucket/a/", "x.jpg", "s3://bucket/a//x.jpg"),
        ("s3://bucket/a//c", "./d//x.jpg", "s3://bucket/a//c/d//x.jpg"),
        ("s3://bucket/a//c", "../x.jpg", "s3://bucket/a//x.jpg"),
        ("s3://bucket/a", "../../../x.jpg", "s3://bucket/x.jpg"),
        ("/data//a", "b//x.jpg", "/data/a/b/x.jpg"),
        ("s3://bucket/p", "/local/a.jpg", "/local/a.jpg"),
        ("/data", "https://host/a//b.jpg", "https://host/a//b.jpg"),
        ("/data", "s3a://bucket/s3a://b.jpg/", "s3://bucket/s3a://b.jpg/"),
    ],
)
def test_resolve(folder: str, uri: str, expected: str) -> None:
    assert resolve(folder, uri) == expected


def test_parquet_with_uris_keeps_its_types(tmp_path: Path) -> None:
    pq.write_table(pa.table({"file": ["a.jpg", "b.jpg"], "shop": [1, 2]}), tmp_path / "in.parquet")
    table = build(tmp_path, tmp_path / "in.parquet", columns={"uri": "file"})
    assert table.to_pydict() == {"uri": [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"], "shop": [1, 2]}


def test_embedded_images_get_small_row_groups(tmp_path: Path) -> None:
    images = [bytes([n % 256]) * (1 << 20) for n in range(300)]
    pq.write_table(pa.table({"bytes": images}), tmp_path / "in.parquet", use_dictionary=False)
    with pytest.raises(UsageError, match=r"row group 0 .* -o NEW\.parquet"):
        open_manifest(str(tmp_path / "in.parquet"))

    shares = {"train": 0.5, "test": 0.5}
    build_manifest([str(tmp_path / "in.parquet")], str(tmp_path / "out.parquet"), BuildOptions(split_shares=shares))

    manifest = open_manifest(str(tmp_path / "out.parquet"))
    assert [group.num_rows for group in manifest.row_groups] == [127, 127, 46]  # offsets and splits take room too
    assert [image for group in manifest.row_groups for image in manifest.read_images(group).to_pylist()] == images
    (table,) = manifest.iter_batches()
    assert set(table["split"].to_pylist()) == set(shares)


def test_sources_of_different_columns_are_filled_with_nulls(tmp_path: Path, photos: Path) -> None:
    path = write_csv(tmp_path, "uri,target,shop\nx.jpg,cat,7\n")
    table = build(tmp_path, photos / "val", path)
    assert table.column_names == ["uri", "target", "shop"]
    assert table["shop"].to_pylist() == [None, None, "7"]


def test_a_long_list_streams_into_even_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    with path.open("w") as file:
        file.write("uri,target\n")
        file.writelines(f"{n:07d}.jpg,class {n % 3}\n" for n in range(300_000))
    tally = build_manifest([str(path)], str(tmp_path / "m.parquet"), BuildOptions())
    assert tally.num_rows == 300_000
    assert tally.targets() == {"class 0": 100_000, "class 1": 100_000, "class 2": 100_000}
    groups = open_manifest(str(tmp_path / "m.parquet")).row_groups
    assert [group.num_rows for group in groups] == [BATCH_ROWS] * 4 + [300_000 - 4 * BATCH_ROWS]


def test_more_images_and_another_place_move_no_split(tmp_path: Path) -> None:
    shares = {"train": 0.6, "validation": 0.2, "test": 0.2}

    def splits_of(folder: Path, num_images: int) -> dict[str, str]:
        folder.mkdir()
        for n in range(num_images):
            (folder / f"{n}.png").write_bytes(b"an image")
        table = build(tmp_path, folder, split_shares=shares)
        return dict(zip(names_of(table, folder), table["split"].to_pylist(), strict=True))

    few, many = splits_of(tmp_path / "few", 50), splits_of(tmp_path / "many", 500)
    assert few.items() <= many.items()
    counts = Counter(many.values())
    assert counts["train"] > counts["validation"] > 50
    assert counts["test"] > 50


def test_the_split_follows_a_mapped_image_id(tmp_path: Path) -> None:
    shares = {"train": 0.5, "test": 0.5}
    one = write_csv(tmp_path, "uri,sku\n" + "".join(f"{n}.jpg,sku {n}\n" for n in range(40)), "one.csv")
    two = write_csv(tmp_path, "uri,sku\n" + "".join(f"moved/{n}.jpg,sku {n}\n" for n in range(40)), "two.csv")
    splits = [
        build(tmp_path, path, columns={"image_id": "sku"}, split_shares=shares)["split"].to_pylist()
        for path in (one, two)
    ]
    assert splits[0] == splits[1]
    other_seed = build(tmp_path, one, columns={"image_id": "sku"}, split_shares=shares, seed=1)["split"].to_pylist()
    assert other_seed != splits[0]


DRAWN = {
    "a": "train",
    "b": "train",
    "cat/1.jpg": "train",
    "cat/2.jpg": "validation",
    "dog/1.jpg": "train",
    "dog/2.jpg": "test",
    "owl/ü.png": "train",
    "": "test",
}


def test_draw_split_takes_its_shares() -> None:
    shares = parse_split_shares("train=0.8, val=0.1, test=0.1")
    assert shares == {"train": 0.8, "validation": 0.1, "test": 0.1}
    counts = Counter(draw_split(f"image {n}", shares, seed=0) for n in range(10_000))
    assert {name: round(count / 10_000, 1) for name, count in counts.items()} == shares


def test_an_image_keeps_its_split_in_every_version() -> None:
    """Drawn otherwise, images that a model was trained on would be tested on after an update."""
    shares = {"train": 0.6, "validation": 0.2, "test": 0.2}
    assert {name: draw_split(name, shares, seed=0) for name in DRAWN} == DRAWN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train", "expected like train=0.8"),
        ("train=x", "expected like train=0.8"),
        ("train=0.5,test=0.4", "add up to 0.9"),
        ("train=1.2,test=-0.2", "a share above 0"),
        ("val=0.5,validation=0.5", "a name of its own"),
        ("train=nan,test=0.5", "a share above 0"),
    ],
)
def test_shares_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_split_shares(text)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "empty; the first line must name the columns"),
        ("uri,target\na.jpg,x\nb.jpg\n", {}, "list.csv line 3: 1 fields, but the first line has 2"),
        ('uri\na.jpg\n"b.jpg\n', {}, "list.csv line 3: unexpected end of data"),
        ("uri,uri\na,b\n", {}, "every column needs a name of its own"),
        ("file\na.jpg\n", {}, "no column 'uri'; say which one holds the images with --column uri=NAME"),
        ("file\na.jpg\n", {"columns": {"uri": "path"}}, "has no column 'path' (columns: file)"),
        ("uri,file\na,b\n", {"columns": {"uri": "file"}}, "has a column 'uri' as well"),
        ("uri,label\na,b\n", {}, "'label' is the name of an output column"),
        ("uri,targets\na,b\n", {}, "--targets-separator makes lists of strings"),
        ("uri,target\na,b\n", {"targets_from": "folder"}, "has a column 'target' already"),
        ("uri\n", {}, "no image found"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path: Path, text: str, options: dict, message: str) -> None:
    path = write_csv(tmp_path, text)
    with pytest.raises(UsageError) as error:
        build(tmp_path, path, **options)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_list_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(b"uri\na.jpg\n\xff\xfe.jpg\n")
    with pytest.raises(UsageError, match=r"list\.csv line \d: .*can't decode"):
        build(tmp_path, path)


def test_a_source_that_is_damaged_further_on_is_named(tmp_path: Path) -> None:
    parquet, compressed = tmp_path / "in.parquet", tmp_path / "list.csv.gz"
    pq.write_table(pa.table({"uri": [f"{n}.jpg" for n in range(1000)]}), parquet, compression="zstd")
    compressed.write_bytes(gzip.compress(b"uri\n" + b"".join(b"%d.jpg\n" % n for n in range(1000))))
    for path, message in ((parquet, r"in\.parquet: cannot be read"), (compressed, r"list\.csv\.gz line \d+: ")):
        data = bytearray(path.read_bytes())
        data[20:200] = b"\xff" * 180
        path.write_bytes(data)
        with pytest.raises(UsageError, match=message):
            build(tmp_path, path)


def test_embedded_images_and_uris_do_not_mix(tmp_path: Path, photos: Path) -> None:
    pq.write_table(pa.table({"bytes": [b"x"]}), tmp_path / "in.parquet")
    with pytest.raises(UsageError, match="build a manifest of each"):
        build(tmp_path, tmp_path / "in.parquet", photos)
    with pytest.raises(UsageError, match="embedded images lie in no folder"):
        build(tmp_path, tmp_path / "in.parquet", targets_from="folder")


def test_sources_whose_types_differ(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["a"], "shop": [1]}), tmp_path / "in.parquet")
    with pytest.raises(UsageError, match="column 'shop' is string, but int64 in"):
        build(tmp_path, tmp_path / "in.parquet", write_csv(tmp_path, "uri,shop\na,1\n"))


def test_an_object_store_is_listed_and_written(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    try:
        for name in ["cat/a.jpg", "dog/b.jpg", "dog/c.txt"]:
            fs.pipe(f"/photos/{name}", image_bytes("JPEG"))
        options = BuildOptions(targets_from="folder", split_shares={"train": 0.5, "test": 0.5})
        build_manifest(["memory://photos"], "memory://out/m.parquet", options)
        (table,) = open_manifest("memory://out/m.parquet").iter_batches()
        assert table["uri"].to_pylist() == ["memory:///photos/cat/a.jpg", "memory:///photos/dog/b.jpg"]
        assert table["target"].to_pylist() == ["cat", "dog"]
        assert table["split"].to_pylist() == [
            draw_split(name, {"train": 0.5, "test": 0.5}, seed=0) for name in ("cat/a.jpg", "dog/b.jpg")
        ]
        assert build(tmp_path, "memory://photos/*/b*.jpg").num_rows == 1
    finally:
        fs.rm("/", recursive=True)


def test_objects_keep_their_size_and_etag(s3_bucket: str, tmp_path: Path) -> None:
    names = ["cat/1.jpg", "cat/2.png", "dog/3.jpg", "dog/notes.txt", ".hidden/4.jpg"]
    for index, name in enumerate(names):
        storage.replace(f"{s3_bucket}/images/{name}", bytes(index + 1))
    (tmp_path / "5.jpg").write_bytes(b"local")
    output = f"{s3_bucket}/manifests/all.parquet"
    tally = build_manifest(
        [f"{s3_bucket}/images", f"{s3_bucket}/images/c*/1.jpg", str(tmp_path / "5.jpg")], output, BuildOptions()
    )
    assert tally.num_rows == 5
    rows = open_manifest(output)
    table = pa.concat_tables(rows.iter_batches())
    assert table["uri"].to_pylist()[:3] == [f"{s3_bucket}/images/{name}" for name in names[:3]]
    assert table["size"].to_pylist() == [1, 2, 3, 1, None]
    digests = [hashlib.md5(bytes(size)).hexdigest() for size in (1, 2, 3, 1)]
    assert table["etag"].to_pylist() == [*digests, None]


def test_s3a_is_s3(s3_bucket: str, tmp_path: Path) -> None:
    for name in ("a.jpg", "list.csv"):
        storage.replace(f"{s3_bucket}/images/{name}", b"uri\nb.jpg\n")
    sources = [f"{s3_bucket.replace('s3:', 's3a:')}/images/{name}" for name in ("a.jpg", "list.csv")]
    assert build(tmp_path, *sources)["uri"].to_pylist() == [f"{s3_bucket}/images/{name}" for name in ("a.jpg", "b.jpg")]


def test_a_list_in_a_bucket_keeps_the_slashes_of_its_folder(s3_bucket: str, tmp_path: Path) -> None:
    folder = f"{s3_bucket}/2026//night"
    storage.replace(f"{folder}/list.csv", b"uri\na.jpg\n")
    assert build(tmp_path, f"{folder}/list.csv")["uri"].to_pylist() == [f"{folder}/a.jpg"]


def test_what_a_folder_in_a_bucket_holds_is_told_by_one_page(s3_bucket: str, s3_server: str) -> None:
    """It may be ten million objects, which are listed once, by whoever reads them."""
    storage.replace(f"{s3_bucket}/images/a.jpg", b"x")
    storage.replace(f"{s3_bucket}/images/deeper/b.jpg", b"x")
    with faulty_server(s3_server) as (url, server):
        storage.configure(StorageConfig(endpoint_url=url))
        (source,) = open_sources([f"{s3_bucket}/images"], TableOptions())
        listings = [path for _, path, _ in server.passed if "list-type=2" in path and "max-keys" not in path]
        assert isinstance(source, ImageFolder)
        assert len(listings) == 1
        storage.replace(f"{s3_bucket}/images/m.parquet", b"x")
        with pytest.raises(UsageError, match=r"holds images and Parquet files \(m\.parquet\)"):
            open_sources([f"{s3_bucket}/images"], TableOptions())


def test_a_manifest_in_the_folder_of_its_images_is_built_anew(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(image_bytes("JPEG"))
    output = str(folder / "manifest.parquet")
    build_manifest([str(folder)], output, BuildOptions())
    (folder / "b.jpg").write_bytes(image_bytes("JPEG"))
    build_manifest([str(folder)], output, BuildOptions(), overwrite=True)
    assert open_manifest(output).num_rows == 2
    with pytest.raises(UsageError, match=r"holds images and Parquet files \(manifest\.parquet\); name those"):
        build(tmp_path, folder)


def test_jpeg_2000_is_an_image(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "B02.JP2").write_bytes(b"whatever")
    assert names_of(build(tmp_path, tmp_path / "scenes"), tmp_path) == ["scenes/B02.JP2"]


def test_tiles_of_a_scene_share_a_split(tmp_path: Path) -> None:
    windows = [{"col_off": 32 * i, "row_off": 0, "width": 32, "height": 32} for i in range(8)]
    scenes = [f"s{i}.tif" for i in range(20)]
    table = pa.table(
        {
            "uri": [str(tmp_path / scene) for scene in scenes for _ in windows],
            "image_id": [f"{scene}#{w['col_off']},0,32,32" for scene in scenes for w in windows],
            "window": pa.array(windows * len(scenes), WINDOW_TYPE),
        }
    )
    pq.write_table(table, tmp_path / "tiles.parquet")
    built = build(tmp_path, tmp_path / "tiles.parquet", split_shares={"train": 0.5, "test": 0.5})
    splits: dict[str, set[str]] = {}
    for uri, split in zip(built["uri"].to_pylist(), built["split"].to_pylist(), strict=True):
        splits.setdefault(uri, set()).add(split)
    assert {len(found) for found in splits.values()} == {1}
    assert {split for found in splits.values() for split in found} == {"train", "test"}


def test_linked_folders_are_listed_but_for_those_that_lead_back(tmp_path: Path) -> None:
    (tmp_path / "disk" / "cats").mkdir(parents=True)
    (tmp_path / "disk" / "cats" / "a.jpg").write_bytes(image_bytes("JPEG"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cats").symlink_to(tmp_path / "disk" / "cats")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "disk" / "cats")
    (tmp_path / "set" / "itself").symlink_to(tmp_path / "set")
    assert names_of(build(tmp_path, tmp_path / "set"), tmp_path) == ["set/cats/a.jpg", "set/more/a.jpg"]
