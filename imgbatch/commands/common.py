"""What every command shares: the options of the configuration and the way results are printed."""

from __future__ import annotations

import functools
import inspect
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console

from imgbatch.config import Config, Section, StorageConfig
from imgbatch.errors import UsageError

ConfigFile = Annotated[
    str | None, typer.Option("-c", "--config", help="YAML file of configuration sections.", show_default=False)
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One configuration value; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_SECTIONS: dict[type, str] = {type(section): name for name, section in Config()}
"""Class of each section of the configuration to its name."""
_UNBOUNDED_WIDTH = 1000

# A class may be called :id:, which is an emoji to rich.
console = Console(highlight=False, soft_wrap=True, emoji=False)
"""For results: standard output."""

messages = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
"""For everything that is not the result: standard error."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, which reaches object stores as the configuration says; takes ``-c`` and ``--set`` if it did not.

    A parameter of the type :class:`Config`, or of one of its sections, is that of the configuration, and no option of
    the command line. ``--set`` of a section that the command does not read is refused; a file may serve several
    commands. The attribute ``read`` lists the classes of the sections that it reads.
    """
    signature = inspect.signature(command, eval_str=True)
    kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    given = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}
    reads_all = "config_file" in signature.parameters or Config in given.values()
    read: list[type] = list(_SECTIONS) if reads_all else [StorageConfig, *given.values()]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in (("config_file", ConfigFile), ("assignments", Assignments))
        if name not in signature.parameters
    ]

    @functools.wraps(command)
    def configured(**arguments: Any) -> None:
        from imgbatch.core import storage

        config = read_config(arguments["config_file"], arguments["assignments"])
        check_read(arguments["assignments"], read)
        storage.configure(config.storage)
        own = {name: value for name, value in arguments.items() if name in signature.parameters}
        parts: dict[type, Section] = {Config: config, **{type(section): section for _, section in config}}
        command(**own, **{name: parts[kind] for name, kind in given.items()})

    parameters = [*(parameter for name, parameter in signature.parameters.items() if name not in given), *added]
    configured.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    configured.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    configured.read = read  # type: ignore[attr-defined]
    return configured


def read_config(
    config_file: str | None, assignments: Sequence[str] | None, flags: Mapping[str, Any] | None = None
) -> Config:
    """The configuration of a command line, wherever its file is."""
    from imgbatch.core.config_file import read_config as read

    return read(config_file, assignments or (), flags)


def check_read(assignments: Sequence[str] | None, read: Sequence[type]) -> None:
    """Raises :class:`UsageError` for ``--set`` of a section whose class is not among those ``read``."""
    names = [name for kind, name in _SECTIONS.items() if kind in read]
    for assignment in assignments or ():
        if assignment.partition(".")[0].strip() not in names:
            raise UsageError(f"--set {assignment}: this command reads only {' and '.join(names)} of the configuration")


def this_command() -> str:
    """``imgbatch`` as it can be typed where it was started: by its path where no search finds it."""
    is_script = Path(sys.argv[0]).name == "imgbatch"
    return shlex.quote(sys.argv[0]) if is_script and shutil.which("imgbatch") is None else "imgbatch"


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
