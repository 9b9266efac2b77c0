"""When to try again, and how long to wait before."""

from __future__ import annotations

import random
from typing import Any

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 10.0

CREDENTIAL_ERRORS = ("CredentialRetrievalError", "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
"""Names of botocore's."""
_NETWORK_PACKAGES = ("aiohttp", "botocore", "urllib3")
_CALLERS_MISTAKE = "ParamValidationError"

TRANSIENT_HTTP = frozenset({429, 500, 502, 503, 504})
"""Answers that a later attempt may not get."""


def backoff_s(attempt: int) -> float:
    """Seconds to wait after the ``attempt``-th failure, from 1: doubling, with jitter, so that a thousand actors do
    not come back at once."""
    return min(FIRST_BACKOFF_S * 2 ** (attempt - 1), MAX_BACKOFF_S) * random.uniform(0.5, 1.0)


def http_answer(error: BaseException | None) -> dict[str, Any]:
    """botocore's account of the answer behind ``error``, empty where there was none: s3fs translates errors and keeps
    the cause."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {})
        error = error.__cause__
    return {}


def http_status(error: BaseException | None) -> int | None:
    """The HTTP status behind ``error``; none: no answer came."""
    return http_answer(error).get("HTTPStatusCode")


def may_pass(error: Exception) -> bool:
    """Whether a request to an object store that failed like this may succeed later: no answer, or one that passes."""
    status = http_status(error)
    if status is not None:
        return status in TRANSIENT_HTTP
    if type(error).__name__ in (*CREDENTIAL_ERRORS, _CALLERS_MISTAKE):
        return False
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES
