"""What every command shares: the options of the configuration and the way results are printed."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console

from imgbatch.config import Config, load_config

ConfigFile = Annotated[
    Path | None, typer.Option("-c", "--config", help="YAML file of configuration sections.", show_default=False)
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One configuration value; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_UNBOUNDED_WIDTH = 1000

# A class may be called :id:, which is an emoji to rich.
console = Console(highlight=False, soft_wrap=True, emoji=False)
"""For results: standard output."""

messages = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
"""For everything that is not the result: standard error."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, which reaches object stores as the configuration says; takes ``-c`` and ``--set`` if it did not.

    A parameter of the type :class:`Config` is the configuration, and no option of the command line.
    """
    signature = inspect.signature(command, eval_str=True)
    given = [name for name, parameter in signature.parameters.items() if parameter.annotation is Config]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in (("config_file", ConfigFile), ("assignments", Assignments))
        if name not in signature.parameters
    ]

    @functools.wraps(command)
    def configured(**arguments: Any) -> None:
        from imgbatch.core import storage

        config = load_config(arguments["config_file"], arguments["assignments"] or ())
        storage.configure(config.storage)
        own = {name: value for name, value in arguments.items() if name in signature.parameters}
        command(**own, **dict.fromkeys(given, config))

    parameters = [*(parameter for name, parameter in signature.parameters.items() if name not in given), *added]
    configured.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    configured.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return configured


def print_json(value: Any) -> None:
    """``value`` as indented JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], file: IO[str] | None = None) -> None:
    """Aligned columns, nothing cut off: as wide as they need to be where the output is no terminal."""
    from rich.table import Table

    table = Table(box=None)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    table_console(file).print(table)


def table_console(file: IO[str] | None = None) -> Console:
    """What tables are printed on, of text as it is: as wide as they need to be where the output is no terminal."""
    file = file or sys.stdout
    width = None if file.isatty() else _UNBOUNDED_WIDTH
    return Console(file=file, highlight=False, markup=False, emoji=False, width=width)
