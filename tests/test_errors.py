from __future__ import annotations

import pytest

from imgbatch import errors
from imgbatch.errors import ExitCode, Stage, Status, normalise_message, row_error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ImgbatchError, 1),
        (errors.UsageError, 2),
        (errors.ErrorBudgetExceeded, 3),
        (errors.Interrupted, 4),
        (errors.CheckFailed, 5),
    ],
)
def test_exit_codes_are_the_documented_ones(error, code):
    assert error("x").exit_code == code
    assert error.exit_code in ExitCode


def test_a_status_is_its_own_name():
    assert [str(status) for status in Status] == [status.name for status in Status]
    assert set(errors.MAY_PASS) == {Status.FETCH_FAILED, Status.FORBIDDEN}


@pytest.mark.parametrize(
    ("message", "stored"),
    [
        ("cannot identify <_io.BytesIO object at 0x7f3a5c0d1e40>", "cannot identify <_io.BytesIO object at 0x…>"),
        ("403 for https://b.example/a.jpg?X-Amz-Signature=abc&X=1 now", "403 for https://b.example/a.jpg now"),
        ("s3://key:secret@bucket/a.jpg is gone", "s3://bucket/a.jpg is gone"),
        ("aws_secret_access_key=abc123 refused", "aws_secret_access_key=*** refused"),
        ("token: hunter2", "token: ***"),
        ("two\n  lines\tand tabs", "two lines and tabs"),
        ("what? no query here", "what? no query here"),
    ],
)
def test_messages_are_stored_without_addresses_credentials_and_queries(message, stored):
    assert normalise_message(message) == stored


def test_an_exception_without_words_is_named_by_its_type():
    assert normalise_message(MemoryError()) == "MemoryError"


def test_long_messages_are_cut_visibly():
    stored = normalise_message("x" * 1000)
    assert len(stored) == 300
    assert stored.endswith("…")


def test_row_error_normalises_and_counts_tries_from_one():
    error = row_error(Status.CORRUPT, Stage.DECODE, ValueError("at 0xdeadbeef"))
    assert error == errors.RowError(Status.CORRUPT, Stage.DECODE, "at 0x…", 1)
