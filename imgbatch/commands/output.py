"""``imgbatch status``, ``verify``, ``query`` and ``clean``: commands on what was written. None needs a cluster."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from imgbatch.commands.common import AsJson, console, messages, print_json, print_table
from imgbatch.config import OutputConfig
from imgbatch.errors import CheckFailed, ExitCode, UsageError

OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="Output directory.")]
FORMATS = ("table", "csv", "json", "parquet")
FETCHED_ROWS = 1000


def status(out: OutArgument, as_json: AsJson = False) -> None:
    """What runs an output holds and how far each is, from storage alone."""
    from imgbatch.core.status import run_states

    states = run_states(out)
    if as_json:
        print_json(states)
        return
    print_table(
        (
            "run",
            "state",
            "rows",
            "units",
            "predictions",
            "errors",
            "images/s",
            "started",
        ),
        [_state_row(state) for state in states],
    )


def _state_row(state: dict[str, Any]) -> list[str]:
    counts = state["counts"]
    return [
        state["run_id"],
        state["state"],
        f"{state['num_rows']:,}",
        f"{state['units_done']:,}/{state['num_units']:,}",
        f"{counts.get('OK', 0):,}" if counts else "",
        f"{sum(n for name, n in counts.items() if name != 'OK'):,}" if counts else "",
        f"{state['images_per_s']:,.1f}" if state["images_per_s"] else "",
        _started(state),
    ]


def _started(run: Mapping[str, Any]) -> str:
    """To the second, UTC."""
    return str(run["predicted_at"][:19])


def verify(
    out: OutArgument,
    run: Annotated[
        str | None,
        typer.Option("--run", help="Run to verify; default: the newest, with its retries."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read everything back: every row once, nothing else, files intact. Exit 0 only then, 5 otherwise."""
    from dataclasses import asdict

    from imgbatch.core.verify import verify as verify_output

    result = verify_output(out, run)
    if as_json:
        print_json({"ok": result.ok, **asdict(result)})
    else:
        for check in result.checks:
            mark = "[green]ok[/]  " if check.ok else "[red]FAIL[/]"
            console.print(f"{mark} {check.run_id} {check.name}: ", end="")
            console.print(check.detail, markup=False)
        for run_id, counts in result.counts.items():
            console.print(
                f"{run_id}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()),
                markup=False,
            )
    if not result.ok:
        failed = next(check for check in result.checks if not check.ok)
        raise CheckFailed(f"{out}: {failed.run_id}: {failed.name}: {failed.detail}")


def query(
    out: OutArgument,
    sql: Annotated[
        str,
        typer.Argument(
            help="DuckDB SQL over predictions, all_predictions, errors, all_errors, embeddings, all_embeddings, runs."
        ),
    ],
    output_format: Annotated[str, typer.Option("--format", help="table, csv, json or parquet (needs -o).")] = "table",
    to_file: Annotated[str | None, typer.Option("-o", "--output", help="Write to this file.")] = None,
) -> None:
    """Run SQL over an output."""
    import duckdb

    from imgbatch.core.views import open_views

    if output_format not in FORMATS:
        raise UsageError(f"--format {output_format}: one of {', '.join(FORMATS)}")
    if output_format == "parquet" and to_file is None:
        raise UsageError("--format parquet: name a file with -o")
    with contextlib.closing(open_views(out)) as connection, _opened(to_file) as staged:
        try:
            if output_format == "parquet":
                connection.sql(sql).write_parquet(str(staged))
                return
            result = connection.execute(sql)
            if result.description is None:
                if staged:
                    staged.touch()
                return
            columns = [column[0] for column in result.description]
            rows = iter(lambda: result.fetchmany(FETCHED_ROWS), [])
            with staged.open("w", newline="") if staged else contextlib.nullcontext(sys.stdout) as file:
                _WRITERS[output_format](columns, itertools.chain.from_iterable(rows), file)
        except duckdb.Error as error:  # which may come with any row
            raise UsageError(f"query: {error}") from error


def _opened(uri: str | None) -> contextlib.AbstractContextManager[Path | None]:
    """Where a file is written that is there when all of it is, if one is named."""
    from imgbatch.core import storage

    return storage.staged_file(uri) if uri is not None else contextlib.nullcontext()


def compact(
    output: OutputConfig,
    out: OutArgument,
    target_file_mb: Annotated[
        int | None, typer.Option("--target-file-mb", min=1, help="Size that files aim at, MB.", show_default="128")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the current label of every image, over all runs, as one dataset of large files: OUT/compacted/<id>/.

    The id is another after each new run, and the former dataset is removed: OUT/compacted/current.json names the one
    that is there (path, runs, files).
    """
    from dataclasses import asdict

    from imgbatch.core.compact import compact as compact_output

    result = compact_output(out, target_file_mb=target_file_mb or output.target_file_mb)
    if as_json:
        print_json(asdict(result))
        return
    if result.already_there:
        console.print("no run has finished since the last time, nothing to do", markup=False)
    size_mb = sum(file["bytes"] for file in result.files) / 1e6
    console.print(
        f"{result.num_rows:,} rows of {len(result.runs)} runs in {len(result.files)} files, {size_mb:,.1f} MB: "
        f"{result.path}",
        markup=False,
    )


def clean(
    out: OutArgument,
    run: Annotated[str | None, typer.Option("--run", help="Run to remove.")] = None,
    abandoned: Annotated[
        bool, typer.Option("--abandoned", help="Every run that was given up unfinished for one with other settings.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a run and everything it wrote, or every run that was given up."""
    from imgbatch.core.clean import remove_run

    if abandoned == (run is not None):
        raise UsageError("name one run with --run, or give --abandoned")
    if run is None:
        _clean_abandoned(out, yes=yes)
        return
    _confirm(f"Remove run {run} of {out}, its labels included?", yes=yes)
    remove_run(out, run)
    console.print(f"removed {run}", markup=False)


def _clean_abandoned(out: str, *, yes: bool) -> None:
    from imgbatch.core.clean import abandoned_runs, remove_abandoned

    found = abandoned_runs(out)
    if not found:
        console.print("no run there that was given up, nothing to remove", markup=False)
        return
    size_of = {each.run.run_id: each.num_bytes / 1e6 for each in found}
    print_table(
        ("run", "rows", "MB", "started"),
        [
            [each.run.run_id, f"{each.run.plan['num_rows']:,}", f"{each.num_bytes / 1e6:,.1f}", _started(each.run.plan)]
            for each in found
        ],
    )
    _confirm(f"Remove these {len(found):,} runs of {out}, {sum(size_of.values()):,.1f} MB?", yes=yes)
    removed = remove_abandoned(out, [*size_of])
    size_mb = sum(size_of[run_id] for run_id in removed)
    console.print(f"removed {len(removed):,} runs, {size_mb:,.1f} MB", markup=False)


def _confirm(question: str, *, yes: bool) -> None:
    """Ends the command where a person, who is asked unless ``yes`` was given, does not agree."""
    if not yes and not _confirmed(question):
        messages.print("nothing was removed; --yes removes without asking")
        raise typer.Exit(ExitCode.FAILED)


def _confirmed(question: str) -> bool:
    """Whether a person says yes; an interruption, or an input that has ended, says no."""
    try:
        return typer.confirm(question)
    except typer.Abort:
        typer.echo()
        return False


def _write_table(columns: list[str], rows: Iterator[tuple[Any, ...]], file: IO[str]) -> None:
    print_table(columns, ([_shown(value) for value in row] for row in rows), file)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _write_csv(columns: list[str], rows: Iterator[tuple[Any, ...]], file: IO[str]) -> None:
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows(rows)


def _write_json(columns: list[str], rows: Iterator[tuple[Any, ...]], file: IO[str]) -> None:
    from imgbatch.core.plain import to_plain

    names = _unique(columns)
    separator = "[\n  "
    for row in rows:
        record = to_plain(dict(zip(names, row, strict=True)))
        file.write(separator + json.dumps(record, default=str, ensure_ascii=False))
        separator = ",\n  "
    file.write("[]\n" if separator.startswith("[") else "\n]\n")


def _unique(names: list[str]) -> list[str]:
    """``a, a_1`` of ``a, a``, as DuckDB does it in a subquery."""
    unique: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        unique.append(name if name not in unique else next(each for each in numbered if each not in unique))
    return unique


_WRITERS = {"table": _write_table, "csv": _write_csv, "json": _write_json}
