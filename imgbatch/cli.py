"""The command line: one command per verb, one line per error, an exit code per outcome."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer
from typer.exceptions import TyperException

from imgbatch.commands import (
    attack,
    classify,
    demo,
    evaluate,
    explain,
    manifest,
    model,
    mosaic,
    output,
    plan,
    publish,
    repair,
    report,
    review,
    submit,
    train,
)
from imgbatch.commands.common import messages, with_settings
from imgbatch.errors import ExitCode, ImgbatchError

TYPER_INTERRUPTED = 130
"""What typer makes of a KeyboardInterrupt."""
_CONTINUED = ("classify", "retry", "repair", "train", "publish", "demo")
"""Commands that go on where they were interrupted; the others begin anew."""

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
app.add_typer(review.app, name="review")
app.add_typer(submit.jobs, name="jobs")
app.command("demo")(demo.demo)
app.command("plan")(plan.plan)
app.command("classify")(classify.classify)
app.command("retry")(classify.retry)
app.command("status")(output.status)
app.command("verify")(output.verify)
app.command("repair")(repair.repair)
app.command("query")(output.query)
app.command("compact")(output.compact)
app.command("publish")(publish.publish)
app.command("mosaic")(mosaic.mosaic)
app.command("clean")(output.clean)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("calibrate")(evaluate.calibrate)
app.command("compare")(evaluate.compare)
app.command("explain")(explain.explain)
app.command("attack")(attack.attack)
app.command("report")(report.report)
app.command("submit")(submit.submit)
for group in (app, manifest.app, model.app, review.app, submit.jobs):
    for registered in group.registered_commands:
        if registered.callback is not None:
            registered.callback = with_settings(registered.callback)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """The installed command: runs it and turns every outcome into an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """One command line; returns the exit code. Expected failures print one line."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in own
    arguments = [argument for argument in own if argument != "--debug"] + arguments[len(own) :]
    try:
        code = app(arguments, standalone_mode=False) or ExitCode.DONE
        if code != TYPER_INTERRUPTED:
            return code
        return _fail(_interrupted(arguments), ExitCode.INTERRUPTED, debug)
    except TyperException as error:
        message = error.format_message()
        if "\n" in message:  # a group without a command: the message is its help
            typer.echo(message, err=True)
            return ExitCode.USAGE
        return _fail(f"{message} (see {_help_of(error)})", ExitCode.USAGE, debug)
    except ImgbatchError as error:
        return _fail(str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_interrupted(arguments), ExitCode.INTERRUPTED, debug)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", ExitCode.FAILED, debug)


def _help_of(error: TyperException) -> str:
    """The command line that shows the options of the command which ``error`` is about."""
    context = getattr(error, "ctx", None)
    names = []
    while context is not None and context.parent is not None:
        names.append(context.info_name)
        context = context.parent
    return " ".join(["imgbatch", *reversed(names), "--help"])


def _interrupted(arguments: list[str]) -> str:
    return "interrupted; the same command continues" if arguments and arguments[0] in _CONTINUED else "interrupted"


def _fail(message: str, code: ExitCode, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    style = "red" if code else None
    messages.print("imgbatch: " + " ".join(message.split()), markup=False, style=style)
    return code
