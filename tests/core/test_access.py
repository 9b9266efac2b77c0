from __future__ import annotations

from pathlib import Path

import pytest

from imgbatch.config import FetchConfig
from imgbatch.core.access import Refused, allowed_path, check_scheme
from imgbatch.core.fetch import Fetcher
from imgbatch.errors import RowError, Status


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A directory that images may lie in, and one beside it whose name begins alike."""
    inside, outside = tmp_path / "images", tmp_path / "images-of-others"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(b"jpeg")
    (inside / "link.jpg").symlink_to(outside / "a.jpg")
    (inside / "folder").symlink_to(outside)
    (tmp_path / "shortcut").symlink_to(inside)
    return inside, outside


def outcome(uri: str, **settings: object) -> bytes | Status:
    with Fetcher(FetchConfig.model_validate(settings)) as fetcher:
        (found,) = fetcher.fetch([uri])
    return found.status if isinstance(found, RowError) else found


def test_files_below_a_root_are_read_and_no_others(folders: tuple[Path, Path]) -> None:
    inside, outside = folders
    roots = (str(inside),)
    readable = [
        f"{inside}/a.jpg",
        f"file://{inside}/a.jpg",
        f"{outside}/../images/a.jpg",
        f"{inside.parent}/shortcut/a.jpg",
    ]
    assert [outcome(uri, roots=roots) for uri in readable] == [b"jpeg"] * 4
    refused = [f"{outside}/a.jpg", f"file://{outside}/a.jpg", f"{inside}/../images-of-others/a.jpg",
               f"{inside}/link.jpg", f"{inside}/folder/a.jpg", "/etc/passwd", "/proc/self/environ"]  # fmt: skip
    assert [outcome(uri, roots=roots) for uri in refused] == [Status.REFUSED] * 7
    assert outcome(f"{outside}/a.jpg", roots=(*roots, str(outside))) == b"jpeg"
    assert outcome(f"{outside}/a.jpg") == b"jpeg", "without roots every file may be read"


def test_a_root_may_be_a_link(folders: tuple[Path, Path]) -> None:
    shortcut = folders[0].parent / "shortcut"
    assert allowed_path(f"{shortcut}/a.jpg", FetchConfig(roots=(str(shortcut),))) == folders[0] / "a.jpg"


@pytest.mark.parametrize("uri", ["/a.jpg", "file:///a.jpg"])
def test_local_files_may_be_forbidden(uri: str) -> None:
    with pytest.raises(Refused, match="file:// is not among s3"):
        check_scheme(uri, FetchConfig(schemes=("s3",)))
    assert outcome(uri, schemes=("s3",)) is Status.REFUSED


@pytest.mark.parametrize("uri", ["gopher://x/", "FTP://x/", "https://x/", "memory://x", "data://x", "s3a://b/k"])
def test_a_scheme_is_allowed_by_name_only(uri: str) -> None:
    assert outcome(uri) is Status.REFUSED
