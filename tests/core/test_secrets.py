from __future__ import annotations

import pyarrow as pa
import pytest

from imgbatch.core.secrets import without_secrets


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://b.s3.amazonaws.com/k.jpg?X-Amz-Expires=60&X-Amz-Signature=abc", "https://b.s3.amazonaws.com/k.jpg"),
        ("https://a.blob.core.windows.net/c/k.jpg?sv=2024&sig=abc%3D", "https://a.blob.core.windows.net/c/k.jpg"),
        ("https://storage.googleapis.com/k.jpg?X-Goog-Signature=1", "https://storage.googleapis.com/k.jpg"),
        ("https://cdn.example/k.jpg?Expires=1&Signature=x&Key-Pair-Id=y", "https://cdn.example/k.jpg"),
        ("HTTPS://user:secret@host/k.jpg", "HTTPS://host/k.jpg"),
        ("ftp://user:secret@host/k.jpg", "ftp://host/k.jpg"),
        ("s3://bucket/a@b.jpg", "s3://bucket/a@b.jpg"),
        ("https://host/image?id=7&w=200", "https://host/image?id=7&w=200"),
        ("https://host/a@b.jpg", "https://host/a@b.jpg"),
        ("s3://bucket/what?token=1.jpg", "s3://bucket/what?token=1.jpg"),
        ("/photos/a?sig=b.jpg", "/photos/a?sig=b.jpg"),
        (None, None),
    ],
)
def test_what_may_be_written_down(uri: str | None, shown: str | None) -> None:
    assert without_secrets(pa.chunked_array([["https://u:p@h/x", uri]])).to_pylist() == ["https://h/x", shown]
    assert without_secrets(pa.chunked_array([[uri]], pa.string())).to_pylist() == [shown]


def test_plain_uris_are_not_touched() -> None:
    uris = pa.chunked_array([["s3://b/k", "/a/b.jpg", None]])
    assert without_secrets(uris) is uris


def test_no_uris() -> None:
    assert without_secrets(pa.chunked_array([pa.array([], pa.string())])).to_pylist() == []
