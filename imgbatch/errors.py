"""What can go wrong, in two kinds: a job outcome is an exit code, a row outcome is data.

``ImgbatchError`` and its children end a command with one line and an exit code.
``RowError`` is a value: it becomes an error row and never travels as an exception past the stage that made it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """The exit codes of every command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    ERROR_BUDGET = 3
    INTERRUPTED = 4
    CHECK_FAILED = 5


class ImgbatchError(Exception):
    """Ends a command with one line that names the field, file or row, and what to do about it."""

    exit_code = ExitCode.FAILED


class NothingToDo(ImgbatchError):
    """What the command would do has been done (exit 0)."""

    exit_code = ExitCode.DONE


class UsageError(ImgbatchError):
    """Wrong usage, configuration or input (exit 2)."""

    exit_code = ExitCode.USAGE


class ErrorBudgetExceeded(ImgbatchError):
    """Too many rows failed for the run to be worth continuing (exit 3)."""

    exit_code = ExitCode.ERROR_BUDGET


class Interrupted(ImgbatchError):
    """Stopped by a person, a signal or the watchdog; the same command continues (exit 4)."""

    exit_code = ExitCode.INTERRUPTED


class CheckFailed(ImgbatchError):
    """A verification found a problem (exit 5)."""

    exit_code = ExitCode.CHECK_FAILED


class RowsDiffer(ImgbatchError):
    """Output files would hold other rows than were planned for them."""


class CannotWrite(ImgbatchError):
    """What was worked out cannot be stored, which trying again from the start would not change."""


class Status(StrEnum):
    """The outcome of one row. Everything but ``OK`` is an error row."""

    OK = "OK"
    NOT_FOUND = "NOT_FOUND"
    FORBIDDEN = "FORBIDDEN"
    FETCH_FAILED = "FETCH_FAILED"
    EMPTY = "EMPTY"
    NOT_AN_IMAGE = "NOT_AN_IMAGE"
    UNSUPPORTED_FORMAT = "UNSUPPORTED_FORMAT"
    TRUNCATED = "TRUNCATED"
    CORRUPT = "CORRUPT"
    TOO_LARGE = "TOO_LARGE"
    TIMEOUT = "TIMEOUT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DECODER_CRASH = "DECODER_CRASH"
    NON_FINITE = "NON_FINITE"
    CLASSIFY_FAILED = "CLASSIFY_FAILED"
    CHANGED = "CHANGED"
    REFUSED = "REFUSED"
    BAD_WINDOW = "BAD_WINDOW"


MAY_PASS = frozenset({Status.FETCH_FAILED, Status.FORBIDDEN})
"""Failures of the surroundings rather than of the image: a later pass may well succeed."""


class Stage(StrEnum):
    """Where a row failed."""

    FETCH = "fetch"
    DECODE = "decode"
    CLASSIFY = "classify"


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row has no prediction.

    ``message`` is normalised on construction through :func:`row_error`; ``attempts`` counts tries, from 1.
    """

    status: Status
    stage: Stage
    message: str
    attempts: int = 1


_ADDRESS = re.compile(r"0x[0-9a-fA-F]{4,}")
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s?#'\"]+)\?[^\s'\"]*")
_USERINFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+@")
_SECRET = re.compile(
    r"(?i)\b(aws_secret_access_key|aws_session_token|x-amz-[a-z-]+|signature|token|password|secret)(\s*[=:]\s*)\S+"
)
_MAX_MESSAGE_CHARS = 300


def normalise_message(message: object) -> str:
    """One line without memory addresses, credentials or presigned query strings, at most 300 characters."""
    text = str(message) or type(message).__name__
    text = _QUERY.sub(r"\1", text)
    text = _USERINFO.sub(r"\1", text)
    text = _SECRET.sub(r"\1\2***", text)
    text = _ADDRESS.sub("0x…", text)
    text = " ".join(text.split())
    return text if len(text) <= _MAX_MESSAGE_CHARS else text[: _MAX_MESSAGE_CHARS - 1] + "…"


def row_error(status: Status, stage: Stage, message: object, attempts: int = 1) -> RowError:
    """A :class:`RowError` whose message is safe to store: see :func:`normalise_message`."""
    return RowError(status, stage, normalise_message(message), attempts)
