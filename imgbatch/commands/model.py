"""``imgbatch model``: make and inspect model bundles."""

from __future__ import annotations

import typer

app = typer.Typer(help="Make and inspect model bundles.", no_args_is_help=True)
