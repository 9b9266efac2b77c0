"""What a person is told of an actor's exception, which arrives wrapped several times; without a cluster."""

from __future__ import annotations

import pickle
import traceback

import pyarrow as pa
import pytest
from ray.data.exceptions import SystemException
from ray.exceptions import ActorDiedError, RayError, RayTaskError, UserCodeException

from imgbatch.errors import CannotWrite
from imgbatch.runtime.actors import RECEIPT, read_receipts
from imgbatch.runtime.ray_data import describe_failure


def arrived(error: Exception, *, wrapped: bool) -> RayError:
    """``error`` as the driver sees it after an actor raised it; ``wrapped`` as Ray Data does."""
    try:
        try:
            raise error
        except Exception as first:
            if not wrapped:
                raise
            raise UserCodeException("UDF failed to process a data block.") from first
    except Exception as last:
        sent = RayTaskError("submit", traceback.format_exc(), last)
    return pickle.loads(pickle.dumps(sent)).as_instanceof_cause()


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_actors_own_exception_is_what_is_told(wrapped: bool) -> None:
    assert (
        describe_failure(arrived(ValueError("unit 3: two\nlines"), wrapped=wrapped)) == "ValueError: unit 3: two lines"
    )


def test_why_an_actor_could_not_be_made_is_what_is_told() -> None:
    try:
        try:
            raise OSError("the cause")
        except OSError as cause:
            raise ValueError("model.json: two\nlines") from cause
    except ValueError as error:
        died = ActorDiedError(RayTaskError("__init__", traceback.format_exc(), error))
    died.__cause__ = SystemException()  # as Ray Data adds
    assert describe_failure(died) == "ValueError: model.json: two lines"


def test_an_actor_that_died_says_so() -> None:
    assert describe_failure(ActorDiedError()).startswith("ActorDiedError: The actor died")


def test_a_unit_that_cannot_be_written_is_told_by_its_receipt() -> None:
    with pytest.raises(CannotWrite, match="disk full"):
        read_receipts(pa.table({RECEIPT: ['{"cannot_write": "disk full"}']}))
