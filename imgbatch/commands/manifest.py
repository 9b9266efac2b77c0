"""``imgbatch manifest``: list images into a manifest, and check one."""

from __future__ import annotations

import typer

app = typer.Typer(help="Build and check manifests.", no_args_is_help=True)
