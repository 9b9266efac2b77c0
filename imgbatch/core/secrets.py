"""URIs as they may be written down: presigned ones hold a signature that lets whoever reads it fetch the image."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

_SUSPICIOUS = r"(?i)^([a-z][a-z0-9+.-]*://[^/?#]*@|https?://.*\?)"
_USERINFO = re.compile(r"^([a-z][a-z0-9+.-]*://)[^/?#@]*@", re.IGNORECASE)
_SIGNATURE = re.compile(
    r"(?i)(x-amz-(signature|security-token|credential)|signature|sig|token|access_token|awsaccesskeyid|key-pair-id|"
    r"x-goog-(signature|credential)|password|secret|api_?key)="
)


def without_secrets(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    """URIs without user and password, and web addresses without a query that holds a signature or a key.

    Keys of object stores may hold question marks and stay whole.
    """
    suspicious = pc.match_substring_regex(uris, _SUSPICIOUS)
    if not pc.any(suspicious).as_py():
        return uris
    return pa.chunked_array([pa.array([uri and _without_secrets(uri) for uri in uris.to_pylist()], uris.type)])


def _without_secrets(uri: str) -> str:
    uri = _USERINFO.sub(r"\1", uri)
    if not re.match("https?://", uri, re.IGNORECASE):
        return uri
    address, mark, query = uri.partition("?")
    return address if mark and _SIGNATURE.search(query) else uri
