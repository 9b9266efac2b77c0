from __future__ import annotations

import botocore.exceptions
import pytest
from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError

from imgbatch.core import retry
from imgbatch.core.retry import Throttling, backoff_s, may_pass

PARTS = {"provider": "sso", "error_msg": "expired", "cred_var": "key", "profile": "night"}
"""What the messages of botocore's errors are made of."""


@pytest.mark.parametrize(
    "name",
    [
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
    ],
)
def test_credentials_that_somebody_has_to_renew_do_not_come_back_by_themselves(name: str) -> None:
    error = getattr(botocore.exceptions, name)(**PARTS)
    assert isinstance(error, BotoCoreError)
    assert not may_pass(error)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524])
def test_what_a_server_in_trouble_answers_may_pass(status: int) -> None:
    assert may_pass(ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"))


@pytest.mark.parametrize("status", [400, 403, 404, 501, 505, 519, 525])
def test_what_a_server_says_of_the_request_does_not_pass(status: int) -> None:
    assert not may_pass(ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"))


def test_no_answer_may_pass() -> None:
    assert may_pass(EndpointConnectionError(endpoint_url="http://127.0.0.1:9"))
    assert may_pass(TimeoutError())


def test_waiting_doubles_up_to_a_limit_and_is_what_the_server_asks_for_up_to_the_same() -> None:
    for attempt, longest in ((1, 0.2), (2, 0.4), (6, 6.4), (7, 10.0), (5000, 10.0)):
        assert longest / 2 <= backoff_s(attempt) <= longest
    assert backoff_s(1, at_least_s=7.0) == 7.0
    assert backoff_s(1, at_least_s=3600.0) == retry.MAX_BACKOFF_S


def test_a_request_is_turned_away_with_patience_and_a_server_too() -> None:
    throttling = Throttling(60.0)
    assert throttling.turned_away("s3://a", began=0, now=10)
    assert throttling.turned_away("s3://a", began=0, now=59)
    assert not throttling.turned_away("s3://a", began=0, now=60)
    assert throttling.turned_away("s3://a", began=60, now=69)
    assert not throttling.turned_away("s3://a", began=60, now=70)
    assert throttling.turned_away("s3://b", began=60, now=70)
    throttling.let_through("s3://a")
    assert throttling.turned_away("s3://a", began=60, now=70)
