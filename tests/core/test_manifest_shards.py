"""Tar shards as a source of manifests, on a disk and in a bucket, and their members as the images of a run."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config, FetchConfig, StorageConfig
from imgbatch.core import fetch, storage
from imgbatch.core.byte_ranges import ByteRange, ranged_uri, split_range
from imgbatch.core.fetch import Fetcher
from imgbatch.core.manifest_build import BuildOptions, build_manifest
from imgbatch.core.manifest_sources import TableOptions
from imgbatch.core.verify import verify
from imgbatch.core.views import open_views
from imgbatch.errors import RowError, Status, UsageError
from imgbatch.runtime.job import classify
from tests.conftest import TINY_CLASSES, changed


def write_shard(path: Path, members: Mapping[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def build(tmp_path: Path, *sources: object, **options: object) -> pa.Table:
    output = str(tmp_path / "m.parquet")
    given = BuildOptions(**{"table": TableOptions(), **options})  # type: ignore[arg-type]
    build_manifest([str(source) for source in sources], output, given, overwrite=True)
    return pq.read_table(output)


def contents(uris: list[str]) -> list[bytes | RowError]:
    with Fetcher(FetchConfig()) as fetcher:
        return list(fetcher.fetch(uris))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of samples as WebDataset writes them, one of names too long for a plain header."""
    long = "deep/" * 30 + "c.seg.png"
    members = {
        "a.jpg": b"image a",
        "a.cls": b"7\n",
        "a.json": b"{}",
        "b.jpg": b"image bb",
        ".c.jpg": b"x",
        "d.txt": b"",
    }
    write_shard(tmp_path / "shards" / "train-000.tar", members)
    write_shard(tmp_path / "shards" / "train-001.tar", {"./cat/a.png": b"third", long: b"fourth", "e.jpg": b""})
    return tmp_path / "shards"


def test_a_range_of_a_tar_file_is_written_and_read_alike() -> None:
    assert split_range(ranged_uri("s3://b/a.tar", ByteRange(512, 611))) == ("s3://b/a.tar", ByteRange(512, 611))
    assert ByteRange(512, 611).size == 100
    assert split_range(ranged_uri("s3://b/a.tar", ByteRange(512, 511))) == ("s3://b/a.tar", ByteRange(512, 511))
    for whole in ("s3://b/a.tar", "s3://b/a.jpg#bytes=0-3", "/a.tar#bytes=9-3", "/a.tar#bytes=x-3"):
        assert split_range(whole) == (whole, None)


def test_every_image_is_a_row_that_says_where_it_is(shards: Path, tmp_path: Path) -> None:
    table = build(tmp_path, f"{shards}/*.tar")
    names = [image_id.removeprefix(f"{shards}/") for image_id in table["image_id"].to_pylist()]
    assert names == [
        "train-000.tar/a.jpg",
        "train-000.tar/b.jpg",
        "train-001.tar/cat/a.png",
        "train-001.tar/" + "deep/" * 30 + "c.seg.png",
        "train-001.tar/e.jpg",
    ]
    assert contents(table["uri"].to_pylist()) == [b"image a", b"image bb", b"third", b"fourth", b""]


def test_files_beside_shards_go_by_their_uri(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.jpg").write_bytes(b"alone")
    table = build(tmp_path, tmp_path / "alone.jpg", shards / "train-000.tar")
    assert table["image_id"].to_pylist()[:2] == [str(tmp_path / "alone.jpg"), f"{shards}/train-000.tar/a.jpg"]
    assert contents(table["uri"].to_pylist()) == [b"alone", b"image a", b"image bb"]


def test_gnu_headers_are_read_as_well(tmp_path: Path) -> None:
    name = "x" * 150 + ".jpg"
    shard = write_shard(tmp_path / "gnu.tar", {name: b"long", "b.jpg": b"short"}, tarfile.GNU_FORMAT)
    assert contents(build(tmp_path, shard)["uri"].to_pylist()) == [b"long", b"short"]


def test_a_member_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "old.tar", {"a.jpg": b"a", "caf\udce9.jpg": b"b"}, tarfile.GNU_FORMAT)
    with pytest.raises(UsageError, match=r"old\.tar/caf\\udce9\.jpg': the file's name is not UTF-8"):
        build(tmp_path, shard)


Link = tuple[bytes, str]
"""Its type, and what it names."""


def write_linked(path: Path, members: Mapping[str, bytes | Link]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            else:
                entry.type, entry.linkname = content
                tar.addfile(entry)
    return path


HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE


def test_links_are_the_images_that_they_name(tmp_path: Path) -> None:
    """As tar writes a folder whose equal files share their content, or that links into one beside it."""
    members: dict[str, bytes | Link] = {
        "./cat/a.jpg": b"image a",
        "./cat/a.cls": b"7",
        "./cat/b.jpg": (HARD, "./cat/a.jpg"),
        "./cat/b.cls": (HARD, "./cat/a.cls"),
        "./dog/c.jpg": (SYMBOLIC, "../blobs/0f"),
        "./dog/c.cls": (SYMBOLIC, "d.cls"),
        "./dog/d.jpg": (HARD, "./dog/c.jpg"),
        "./dog/d.cls": b"8",
        "./dog/.hidden.jpg": (SYMBOLIC, "nowhere"),
        "./folder": (SYMBOLIC, "dog"),
        "./blobs/0f": b"image of a blob",
        "./empty.jpg": b"",
        "./empty-too.jpg": (HARD, "./empty.jpg"),
    }
    shard = write_linked(tmp_path / "linked.tar", members)
    table = build(tmp_path, shard, table=TableOptions(targets_from_cls=True))
    names = [image_id.removeprefix(f"{shard}/") for image_id in table["image_id"].to_pylist()]
    assert names == ["cat/a.jpg", "cat/b.jpg", "dog/c.jpg", "dog/d.jpg", "empty.jpg", "empty-too.jpg"]
    assert contents(table["uri"].to_pylist()) == [b"image a"] * 2 + [b"image of a blob"] * 2 + [b""] * 2
    assert table["target"].to_pylist() == ["7", "7", "8", "8", None, None]


def test_a_hard_link_names_the_member_before_it(tmp_path: Path) -> None:
    """Of several members of one name, as updating an archive leaves them."""
    path = tmp_path / "updated.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("blob", b"old"), ("a.jpg", None), ("blob", b"newer")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content or b"")
            if content is None:
                entry.type, entry.linkname = HARD, "blob"
            tar.addfile(entry, io.BytesIO(content or b""))
    assert contents(build(tmp_path, path)["uri"].to_pylist()) == [b"old"]


@pytest.mark.parametrize("link", [(SYMBOLIC, "/data/a.jpg"), (HARD, "gone.jpg"), (SYMBOLIC, "a.jpg")])
def test_a_link_out_of_the_shard_is_one_line(link: Link, tmp_path: Path) -> None:
    shard = write_linked(tmp_path / "linked.tar", {"a.jpg": link})
    with pytest.raises(UsageError, match=r"linked\.tar: a\.jpg is a link to .* tar --dereference"):
        build(tmp_path, shard)


def test_targets_are_classes_or_folders(shards: Path, tmp_path: Path) -> None:
    of_classes = build(tmp_path, shards / "train-000.tar", table=TableOptions(targets_from_cls=True))
    assert of_classes["target"].to_pylist() == ["7", None]
    of_folders = build(tmp_path, shards / "train-001.tar", targets_from="folder")
    assert of_folders["target"].to_pylist() == ["cat", "deep", "train-001.tar"]
    with pytest.raises(UsageError, match="is for tar shards"):
        build(tmp_path, shards, table=TableOptions(targets_from_cls=True))


def test_splits_stay_when_the_shards_move(shards: Path, tmp_path: Path) -> None:
    options = {"split_shares": {"train": 0.5, "test": 0.5}}
    before = build(tmp_path, f"{shards}/*.tar", **options)["split"].to_pylist()
    moved = shards.rename(tmp_path / "moved")
    assert build(tmp_path, f"{moved}/*.tar", **options)["split"].to_pylist() == before


@pytest.mark.parametrize("content", [b"", b"no tar" * 200, None], ids=["empty", "other", "cut short"])
def test_what_is_no_tar_file_is_one_line(shards: Path, tmp_path: Path, content: bytes | None) -> None:
    broken = tmp_path / "broken.tar"
    broken.write_bytes((shards / "train-000.tar").read_bytes()[:600] if content is None else content)
    with pytest.raises(UsageError, match=r"broken\.tar: no readable tar file"):
        build(tmp_path, broken)


def test_a_shard_of_which_the_rest_would_be_left_out_is_one_line(shards: Path, tmp_path: Path) -> None:
    """Python's tarfile ends without a word at a damaged header, and at the end of the first of several archives."""
    data = (shards / "train-000.tar").read_bytes()
    damaged, several = tmp_path / "damaged.tar", tmp_path / "several.tar"
    damaged.write_bytes(data[:1100] + b"\xff" * 50 + data[1150:])
    several.write_bytes(data + (shards / "train-001.tar").read_bytes())
    with pytest.raises(UsageError, match=r"damaged\.tar: no readable member header at byte 1024"):
        build(tmp_path, damaged)
    with pytest.raises(UsageError, match=r"several\.tar: .* byte 5632, but data at byte 10240"):
        build(tmp_path, several)


def test_zeros_after_the_last_member_are_no_fault(shards: Path, tmp_path: Path) -> None:
    shard = shards / "train-000.tar"
    shard.write_bytes(shard.read_bytes()[:5632] + bytes(3 * 512 + 100))
    assert build(tmp_path, shard).num_rows == 2


def test_a_compressed_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(UsageError, match="compressed shard"):
        build(tmp_path, tmp_path / "a.tar.gz")


def test_a_shard_that_shrank_or_went_is_an_outcome(shards: Path, tmp_path: Path) -> None:
    uris = build(tmp_path, shards / "train-000.tar")["uri"].to_pylist()
    shard = shards / "train-000.tar"
    assert uris[0].endswith("#bytes=512-518")
    shard.write_bytes(shard.read_bytes()[:515])
    with Fetcher(FetchConfig(max_bytes=7)) as fetcher:
        shrunk, too_large = fetcher.fetch(uris)
    shard.unlink()
    (gone,) = contents(uris[:1])
    for outcome, status in ((shrunk, Status.CHANGED), (too_large, Status.TOO_LARGE), (gone, Status.NOT_FOUND)):
        assert isinstance(outcome, RowError)
        assert outcome.status is status


def test_a_run_over_shards_says_what_one_over_files_says(
    photos: list[Path], photo_config: Config, tmp_path: Path
) -> None:
    for first in (0, 60):
        files = {f"{TINY_CLASSES[n % 3]}/{photos[n].name}": photos[n].read_bytes() for n in range(first, first + 60)}
        write_shard(tmp_path / f"shard-{first:03d}.tar", files)
    build(tmp_path, tmp_path / "shard-*.tar", targets_from="folder")

    def labels(config: Config) -> list[tuple[object, ...]]:
        out = classify(config).out
        assert verify(out).ok
        with open_views(out) as connection:
            return connection.sql("select row_id, target, label, probability from predictions order by 1").fetchall()

    of_files = labels(photo_config)
    of_shards = labels(
        changed(photo_config, input__manifest=str(tmp_path / "m.parquet"), output__path=str(tmp_path / "shards"))
    )
    assert of_shards == of_files


@pytest.mark.parametrize("client", ["s3fs", "obstore"])
def test_shards_in_a_bucket_are_read_in_place(
    client: str, shards: Path, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(client)
    monkeypatch.setattr(fetch, "choose_client", lambda _: client)
    for path in shards.iterdir():
        storage.replace(storage.join(s3_bucket, "shards", path.name), path.read_bytes())
    table = build(tmp_path, f"{s3_bucket}/shards/*.tar")
    assert table["size"].to_pylist() == [7, 8, 5, 6, 0]
    uris, etags = table["uri"].to_pylist(), table["etag"].to_pylist()
    storage.configure(StorageConfig(endpoint_url=None))
    with Fetcher(FetchConfig()) as fetcher:
        assert list(fetcher.fetch(uris, etags)) == [b"image a", b"image bb", b"third", b"fourth", b""]
        storage.replace(storage.join(s3_bucket, "shards", "train-000.tar"), b"another" * 1000)
        (changed_since,) = fetcher.fetch(uris[:1], etags[:1])
        beyond = ranged_uri(storage.join(s3_bucket, "shards", "train-000.tar"), ByteRange(6990, 7010))
        (cut, gone) = fetcher.fetch([beyond, beyond.replace("6990-7010", "7000-7010")])
    assert isinstance(changed_since, RowError)
    assert changed_since.status is Status.CHANGED
    for outcome in (cut, gone):
        assert isinstance(outcome, RowError)
        assert (outcome.status, outcome.attempts) == (Status.CHANGED, 1)
