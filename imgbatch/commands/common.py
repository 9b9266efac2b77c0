"""What every command shares: the options of the configuration and the way results are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

ConfigFile = Annotated[
    Path | None, typer.Option("-c", "--config", help="YAML file of configuration sections.", show_default=False)
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One configuration value; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

console = Console(highlight=False, soft_wrap=True)
"""For results: standard output."""

messages = Console(stderr=True, highlight=False, soft_wrap=True)
"""For everything that is not the result: standard error."""


def print_json(value: Any) -> None:
    """``value`` as indented JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))
