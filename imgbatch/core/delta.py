"""Finished runs as commits of a Delta table (extra ``delta``): each in one transaction, and never twice.

The run's id is the application id of its transaction, and the time of its plan the version, which Delta keeps for ever:
a run that is there is not written again, one that was cleaned and classified anew takes the place of its former rows,
and of two publishers at once one is refused by the table itself. The table is partitioned by ``run_id`` and holds
copies, so that neither cleaning the output nor vacuuming the table hurts the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from imgbatch.core import current, storage
from imgbatch.core.current import CurrentRun
from imgbatch.core.database import spilling
from imgbatch.core.regions import bucket_region
from imgbatch.core.runs import find_run
from imgbatch.core.s3 import endpoint_in
from imgbatch.core.views import view_statements
from imgbatch.errors import UsageError, normalise_message
from imgbatch.schema import convert_nested, to_plain

_MEMORY_MB = 2000
_BATCH_ROWS = 65_536
_RUN_ID = "run_id"
_WIDER = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20, 0),
}


@dataclass(frozen=True)
class Published:
    """What became of one run."""

    run_id: str
    num_rows: int
    version: int | None
    """Of the table, that the run made; none: it was there already, or has no prediction, and there was none of it."""
    already_there: bool


def publish(out: str, table: str, run_id: str | None = None) -> list[Published]:
    """Add the predictions of finished runs to the Delta table ``table``, which is made where there is none.

    Args:
        run_id: one run; none: every finished run, oldest first.

    Raises:
        UsageError: no such run or none finished, ``deltalake`` is missing, or the table does not take the columns.
    """
    try:
        import deltalake  # noqa: F401
    except ImportError as error:
        raise UsageError("publish: needs the package deltalake; install imgbatch[delta]") from error
    runs = current.load_finished(out)
    if run_id is not None:
        find_run(out, run_id)
    chosen = [run for run in runs if run_id in (None, run.run_id)]
    if not chosen:
        raise UsageError(f"{out}: no finished run there" + (f" of the name {run_id}" if run_id else ""))
    table = storage.absolute(table)
    held = _held(table, chosen)
    return [_there(run) if run.run_id in held else _publish_run(out, run, table) for run in chosen]


def _held(table: str, runs: list[CurrentRun]) -> set[str]:
    """run_ids of those that the table holds already, whose files nobody needs to read."""
    from deltalake.exceptions import DeltaError, TableNotFoundError

    options = storage_options(table)
    try:
        opened = _open(table, None, options)
    except TableNotFoundError:
        return set()
    except (DeltaError, OSError, ValueError) as error:
        raise UsageError(f"{table}: {normalise_message(error)}") from error
    return {run.run_id for run in runs if _holds(opened, run)}


def _there(run: CurrentRun) -> Published:
    return Published(run.run_id, run.num_predictions, None, already_there=True)


def _publish_run(out: str, run: CurrentRun, table: str) -> Published:
    from deltalake import CommitProperties, Transaction, write_deltalake
    from deltalake.exceptions import CommitFailedError, DeltaError

    options = storage_options(table)  # for each, as credentials of a role do not last for many nights
    properties = CommitProperties(
        app_transactions=[Transaction(run.run_id, _app_version(run))],
        custom_metadata={"imgbatch.model_id": run.model_id, "imgbatch.output": storage.absolute(out)},
    )
    try:
        if not run.num_predictions:
            return _publish_none(run, table, options, properties)
        with spilling(out, memory_mb=_MEMORY_MB) as connection:
            rows = _read(connection, out, run)
            # The table as it is now: what others commit from here on is in conflict with this transaction.
            opened = _open(table, rows.schema, options)
            if _holds(opened, run):
                return _there(run)
            how: dict[str, Any] = {"mode": "append"}
            if opened.transaction_version(run.run_id) is not None:  # the rows of before it was cleaned
                how = {"mode": "overwrite", "predicate": _rows_of(run)}
            write_deltalake(opened, rows, schema_mode="merge", commit_properties=properties, **how)
    except CommitFailedError as error:
        if _holds(_open(table, None, options), run):  # another publisher was first
            return _there(run)
        raise UsageError(f"{table}: {run.run_id}: {normalise_message(error)}; run the same command again") from error
    except (DeltaError, OSError, ValueError) as error:
        raise UsageError(f"{table}: {run.run_id}: {normalise_message(error)}") from error
    return Published(run.run_id, run.num_predictions, opened.version(), already_there=False)


def _publish_none(run: CurrentRun, table: str, options: dict[str, str] | None, properties: Any) -> Published:
    """A run without a prediction leaves no trace, but for taking away the rows of before it was cleaned."""
    from deltalake.exceptions import TableNotFoundError

    nothing = Published(run.run_id, 0, None, already_there=False)
    try:
        opened = _open(table, None, options)
    except TableNotFoundError:
        return nothing
    if opened.transaction_version(run.run_id) is None:
        return nothing
    if _holds(opened, run):
        return replace(nothing, already_there=True)
    before = opened.version()
    opened.delete(_rows_of(run), commit_properties=properties)
    # Where there is no row to take away, nothing is committed.
    return replace(nothing, version=opened.version()) if opened.version() > before else nothing


def _rows_of(run: CurrentRun) -> str:
    return f"{_RUN_ID} = '{run.run_id}'"


def _app_version(run: CurrentRun) -> int:
    """When the run was planned, microseconds since 1970: later where it was classified anew."""
    since_1970 = datetime.fromisoformat(run.predicted_at) - datetime.fromtimestamp(0, UTC)
    return since_1970 // timedelta(microseconds=1)


def _holds(opened: Any, run: CurrentRun) -> bool:
    found = opened.transaction_version(run.run_id)
    return found is not None and found >= _app_version(run)


def _open(table: str, schema: pa.Schema | None, options: dict[str, str] | None) -> Any:
    """The table; with a ``schema`` it is made, empty, where there is none, and refused where its columns differ.

    deltalake itself would cast what comes to the type that is there, nulls for what does not fit.
    """
    from deltalake import DeltaTable, Schema
    from deltalake.exceptions import TableNotFoundError

    try:
        opened = DeltaTable(table, storage_options=options)
    except TableNotFoundError:
        if schema is None:
            raise
        DeltaTable.create(table, schema, mode="ignore", partition_by=[_RUN_ID], storage_options=options)
        opened = DeltaTable(table, storage_options=options)
    if schema is not None:
        types = {field.name: field.type for field in opened.schema().fields}
        for field in Schema.from_arrow(schema).fields:
            if types.get(field.name, field.type) != field.type:
                raise UsageError(
                    f"{table}: column {field.name!r} is {types[field.name]} there and {field.type} in the run; "
                    f"publish to another table"
                )
    return opened


def _read(connection: Any, out: str, run: CurrentRun) -> pa.RecordBatchReader:
    """The run's predictions with its run_id and its partition columns, plain types without unsigned ones."""
    for statement in view_statements(out, [run]):
        connection.execute(statement)
    reader = connection.sql("from all_predictions").to_arrow_reader(_BATCH_ROWS)
    plain = to_plain(reader.schema.empty_table()).schema
    schema = pa.schema([pa.field(field.name, _signed(field.type)) for field in plain])

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in reader:
            yield from to_plain(pa.Table.from_batches([batch])).cast(schema).to_batches()

    return pa.RecordBatchReader.from_batches(schema, batches())


def _signed(arrow_type: pa.DataType) -> pa.DataType:
    """Delta knows signed numbers only: the next wider one that holds every value."""
    return _WIDER.get(arrow_type) or convert_nested(arrow_type, _signed)


def storage_options(table: str) -> dict[str, str] | None:
    """How deltalake reaches an S3 bucket: as s3fs does; none elsewhere."""
    if not storage.is_s3(table):
        return None
    import botocore.session

    settings = storage.settings()
    fs, _ = storage.filesystem(table)
    fs.connect()
    endpoint = fs.s3.meta.endpoint_url
    region = bucket_region("/".join(table.split("/")[:3])) or fs.s3.meta.region_name or "us-east-1"
    options = {"AWS_REGION": region}
    endpoint = endpoint_in(region, endpoint)
    if endpoint != f"https://s3.{region}.amazonaws.com":
        options |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": str(endpoint.startswith("http://")).lower()}
    if settings.anonymous:
        return options | {"AWS_SKIP_SIGNATURE": "true"}
    credentials = botocore.session.Session(profile=settings.profile).get_credentials()
    if credentials is None:
        raise UsageError(f"{table}: no credentials in the environment, a profile or a role")
    frozen = credentials.get_frozen_credentials()
    options |= {"AWS_ACCESS_KEY_ID": frozen.access_key, "AWS_SECRET_ACCESS_KEY": frozen.secret_key}
    return options | ({"AWS_SESSION_TOKEN": frozen.token} if frozen.token else {})
