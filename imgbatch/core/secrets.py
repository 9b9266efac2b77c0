"""URIs as they may be written down: presigned ones hold a signature that lets whoever reads it fetch the image."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

_WEB = "(?i)^https?://.*[?@]"
_USERINFO = re.compile(r"^(https?://)[^/?#@]*@", re.IGNORECASE)
_SIGNATURE = re.compile(
    r"(?i)(x-amz-(signature|security-token|credential)|signature|sig|token|access_token|awsaccesskeyid|key-pair-id|"
    r"x-goog-(signature|credential)|password|secret|api_?key)="
)


def without_secrets(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    """Web addresses without user and password, and without the query where it holds a signature or a key; the rest as
    it is. Keys of object stores may hold question marks and stay whole."""
    suspicious = pc.match_substring_regex(uris, _WEB)
    if not pc.any(suspicious).as_py():
        return uris
    return pa.chunked_array([pa.array([uri and _without_secrets(uri) for uri in uris.to_pylist()], uris.type)])


def _without_secrets(uri: str) -> str:
    if not re.match("https?://", uri, re.IGNORECASE):
        return uri
    uri = _USERINFO.sub(r"\1", uri)
    address, mark, query = uri.partition("?")
    return address if mark and _SIGNATURE.search(query) else uri
