"""When to try again, and how long to wait before."""

from __future__ import annotations

import random
from typing import Any

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 10.0

THROTTLED_PATIENCE_S = 60.0
"""For which a request that was turned away for the number of requests is tried again."""

CREDENTIAL_ERRORS = (
    "CredentialRetrievalError",
    "LoginInsufficientPermissions",
    "LoginRefreshRequired",
    "LoginTokenLoadError",
    "NoAuthTokenError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
)
"""Names of botocore's, for credentials that are not there or that somebody has to renew."""
_NETWORK_PACKAGES = ("aiohttp", "botocore", "urllib3")
_CALLERS_MISTAKE = "ParamValidationError"

TRANSIENT_HTTP = frozenset({408, 429, 500, 502, 503, 504, *range(520, 525)})
"""Answers that a later attempt may not get; those from 520 are of caches that cannot reach the server behind them."""
THROTTLED_HTTP = frozenset({429, 503})
"""Answers to too many requests: S3 gives the second for minutes, until it has spread a prefix."""


def backoff_s(attempt: int, *, at_least_s: float = 0.0) -> float:
    """Seconds to wait after the ``attempt``-th failure, from 1: doubling, with jitter, so that a thousand actors do
    not come back at once.

    Args:
        at_least_s: what the server asked for, granted up to :data:`MAX_BACKOFF_S`.
    """
    backoff = min(FIRST_BACKOFF_S * 2.0 ** min(attempt - 1, 30), MAX_BACKOFF_S) * random.uniform(0.5, 1.0)
    return max(backoff, min(at_least_s, MAX_BACKOFF_S))


class Throttling:
    """Which servers turn requests away for their number, and how long that is waited out; for any thread.

    For ``patience_s`` of each request. A server that has let nothing through for that long is taken to be out of
    order, until it lets something through: otherwise each of a night's rows would wait.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._since: dict[str, float] = {}
        """When a server first turned a request away after the last that it let through, s."""

    def let_through(self, server: str) -> None:
        self._since.pop(server, None)

    def turned_away(self, server: str, began: float, now: float) -> bool:
        """Whether a request that ``began`` then is to be tried again, both in seconds on one clock."""
        since = self._since.setdefault(server, now)
        return now - min(began, since) < self._patience_s


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
