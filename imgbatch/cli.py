"""The command line: one command per verb, one line per error, an exit code per outcome."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import click
import typer

from imgbatch.commands import manifest, model
from imgbatch.commands.common import messages
from imgbatch.errors import ExitCode, ImgbatchError

app = typer.Typer(
    name="imgbatch",
    help="Label large image collections on a Ray cluster: every manifest row comes out exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(manifest.app, name="manifest")
app.add_typer(model.app, name="model")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", envvar="IMGBATCH_DEBUG")] = False,
) -> None:
    if debug:
        os.environ["IMGBATCH_DEBUG"] = "1"


def main() -> None:
    """The installed command: runs it and turns every outcome into an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """One command line; returns the exit code. Expected failures print one line."""
    try:
        return app(arguments, standalone_mode=False) or ExitCode.DONE
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return ExitCode.USAGE
    except click.ClickException as error:
        return _fail(f"{error.format_message()} (see imgbatch --help)", ExitCode.USAGE)
    except ImgbatchError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; the same command continues", ExitCode.INTERRUPTED)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", ExitCode.FAILED)


def _fail(message: str, code: ExitCode) -> int:
    if os.environ.get("IMGBATCH_DEBUG") == "1":
        traceback.print_exc()
    messages.print("imgbatch: " + " ".join(message.split()), markup=False, style="red")
    return code
