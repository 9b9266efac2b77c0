"""``imgbatch submit`` and ``imgbatch jobs``: any command on a cluster, from a machine that is none of it."""

from __future__ import annotations

import ipaddress
import os
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from imgbatch.commands.common import AsJson, check_read, console, messages, print_json, print_table, read_config
from imgbatch.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from imgbatch.runtime.package import Package

Address = Annotated[
    str,
    typer.Option("--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard."),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="As `imgbatch jobs list` shows it.")]

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Where a tunnel to the dashboard ends: it listens on the head's loopback only."""
NOT_SUBMITTED = ("submit", "jobs", "demo")
READ = ("calibration", "corrections", "out_a", "out_b", "labels")
LISTED = ("sources", "scenes", "root")
WRITTEN = ("new_model", "directory", "path", "file", "to_file", "delta")
"""Parameters of commands that are paths, beside those that a configuration may give instead."""
_CPU_TARGETS = ("openvino", "mnn")
"""Of ``model optimize``, by how they begin: what runs on no GPU."""

jobs = typer.Typer(
    help="Jobs on a cluster: list, follow and stop them.", no_args_is_help=True, pretty_exceptions_enable=False
)


@dataclass(frozen=True)
class Command:
    """A command line that this imgbatch understands, and the paths in it."""

    words: tuple[str, ...]
    config_file: Path | None
    """On this machine; one in an object store the job reads from there."""
    read: tuple[str, ...]
    written: tuple[str, ...]
    listed: tuple[str, ...] = ()
    """Where images are, whose places a manifest keeps."""
    on_disk: str | None = None
    """A folder that is written with what knows no object stores."""
    endpoint_url: str | None = None
    """Where the configuration says that the object store is."""
    uses_gpu: bool = False
    """Whether the process of the command, and not an actor, runs what is made for a GPU."""


def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="As after `imgbatch` on the cluster.")],
    address: Address = DEFAULT_ADDRESS,
    working_dir: Annotated[
        Path, typer.Option("--working-dir", help="What the job takes along, and where its relative paths begin.")
    ] = Path(),
    entrypoint_gpus: Annotated[
        int | None,
        typer.Option(
            "--entrypoint-gpus",
            min=0,
            help="GPUs for the command's own process.",
            show_default="1 for model optimize, if the cluster has any",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show what the job prints until it ends.")] = True,
    config_file: Annotated[str | None, typer.Option("-c", "--config", hidden=True)] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", hidden=True)] = None,
) -> None:
    """Run an imgbatch command on a Ray cluster: the job's output here, its exit code as ours.

    -c and --set belong to that command and stand after the --.
    """
    if config_file is not None or assignments:
        raise UsageError("submit: -c and --set belong to the command that is sent; put them after the --")
    parsed = parse_command(command)
    from imgbatch.runtime.package import collect_package
    from imgbatch.runtime.submit import JobServer

    package = collect_package(working_dir, parsed.config_file)
    check_paths(parsed, package)
    if warning := endpoint_warning(parsed, address):
        messages.print(f"imgbatch: warning: {warning}", markup=False)
    server = JobServer(address)
    server.check_versions(package)
    if entrypoint_gpus is None:
        entrypoint_gpus = int(parsed.uses_gpu and server.has_gpus())
    job_id = server.submit(with_config(parsed.words, package.config), package, num_gpus=entrypoint_gpus)
    messages.print(f"job {job_id} on {server.address}", markup=False)
    if wait:
        _follow(server, job_id)
    else:
        messages.print(_how_to_follow(server.address, job_id), markup=False)


@jobs.command("list")
def list_jobs(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """The jobs that the cluster remembers, the newest first."""
    from dataclasses import asdict

    from imgbatch.runtime.submit import JobServer

    found = JobServer(address).jobs()
    if as_json:
        print_json([asdict(job) for job in found])
        return
    rows = [
        (
            job.job_id,
            job.status,
            datetime.fromtimestamp(job.started).isoformat(" ", "seconds") if job.started else "",
            str(timedelta(seconds=round(job.seconds))) if job.seconds is not None else "",
            job.command,
        )
        for job in found
    ]
    print_table(("job", "status", "started", "took", "command"), rows)


@jobs.command("logs")
def logs(
    job: JobId,
    address: Address = DEFAULT_ADDRESS,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the job ends, with its exit code.")] = False,
) -> None:
    """What a job has printed."""
    from imgbatch.runtime.submit import JobServer

    server = JobServer(address)
    if follow:
        _follow(server, job)
    else:
        _write(server.logs(job))


@jobs.command("stop")
def stop(job: JobId, address: Address = DEFAULT_ADDRESS) -> None:
    """Stop a job; what it has committed stays, and the same command continues."""
    from imgbatch.runtime.submit import JobServer

    console.print(f"{job}: {JobServer(address).stop(job)}", markup=False)


def parse_command(words: list[str]) -> Command:
    """``words`` as the cluster's imgbatch would read them; raises as it would."""
    from imgbatch.cli import app as whole
    from imgbatch.core import storage
    from imgbatch.core.classes import IMAGENET1K
    from imgbatch.core.weights import published_name

    command: Any = typer.main.get_command(whole)
    rest = [word for word in words if word != "--debug"]
    path: list[str] = []
    while rest and rest[0] in getattr(command, "commands", {}):
        path.append(rest.pop(0))
        command = command.commands[path[-1]]
    if hasattr(command, "commands") or path[0] in NOT_SUBMITTED:
        raise UsageError(f"submit: {' '.join(words[:2])!r} is no command that a cluster runs (see imgbatch --help)")
    given = command.make_context(path[-1], list(rest)).params
    config_file = given.get("config_file")
    config = read_config(config_file, given.get("assignments"))
    check_read(given.get("assignments"), command.callback.read)
    read = [given.get("model") or config.model.path, given.get("manifest") or config.input.manifest]
    out = given.get("out") or given.get("output") or config.output.path
    read += [given.get(name) for name in READ]
    weights = given.get("weights") or (config.train.weights if path == ["train"] else None)
    if weights and not published_name(weights):
        read.append(weights)
    if given.get("classes") != IMAGENET1K:
        read.append(given.get("classes"))
    listed = [each for name in LISTED for each in _as_list(given.get(name))]
    on_disk = given["directory"] if path == ["mosaic"] else None
    written = [given.get(name) for name in WRITTEN if on_disk is None]
    optimizes = path == ["model", "optimize"]
    if optimizes:
        out = given["output"] or given["model"]  # where the variant goes
    return Command(
        words=tuple(words),
        config_file=storage.local_path(config_file) if config_file and storage.is_local(config_file) else None,
        read=tuple(each for each in read if each),
        written=tuple(each for each in (out, *written) if each),
        listed=tuple(listed),
        on_disk=on_disk,
        endpoint_url=config.storage.endpoint_url,
        uses_gpu=optimizes and not all(target.value.startswith(_CPU_TARGETS) for target in given["target"]),
    )


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def check_paths(command: Command, package: Package) -> None:
    """Raises :class:`UsageError` for paths that mean something here and nothing, or something else, on the nodes."""
    from imgbatch.core import storage

    if command.on_disk is not None and (_is_relative(command.on_disk) or not storage.is_local(command.on_disk)):
        raise UsageError(
            f"{command.on_disk}: rasters are written to local folders; give the absolute path of one on a disk that "
            f"all nodes share, or run the command here, without submit"
        )
    for path in command.written:
        if _is_relative(path):
            raise UsageError(
                f"{path}: would be written into a working directory that every node has for itself; "
                f"give a path that all nodes share, like s3://BUCKET/{path}"
            )
    for path in command.listed:
        if _is_relative(path) and Path(path).as_posix() not in package.files:  # lists may go along, images may not
            raise UsageError(
                f"{path}: the manifest would name images as they lie on one node; give a path that all nodes share, "
                f"like s3://BUCKET/{path}"
            )
    for path in command.read:
        if _is_relative(path) and path not in package:
            raise UsageError(f"{path}: not among the files that the job takes along; give a path that all nodes share")


def endpoint_warning(command: Command, address: str) -> str | None:
    """One line about an object store of this machine, which the nodes of a cluster elsewhere do not reach."""
    from imgbatch.core import storage
    from imgbatch.core.s3 import ENDPOINT_VARIABLES

    if _is_loopback(address) or not any(storage.is_s3(path) for path in (*command.read, *command.written)):
        return None
    advice = "set storage.endpoint_url to a name under which the nodes reach the server"
    if command.endpoint_url is not None:
        if _is_loopback(command.endpoint_url):
            return f"storage.endpoint_url {command.endpoint_url} is on each node that node itself; {advice}"
        return None
    for name in ENDPOINT_VARIABLES:
        url = os.environ.get(name)
        if url and _is_loopback(url):
            return f"{name} {url} is this machine and does not go along; {advice}"
    return None


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _is_relative(path: str) -> bool:
    return "://" not in path and not Path(path).is_absolute()


def with_config(words: tuple[str, ...], config: str | None) -> list[str]:
    """``words`` with the configuration file where the job finds it."""
    if config is None:
        return list(words)
    replaced = list(words)
    for index, word in enumerate(words):
        if word in ("-c", "--config"):
            replaced[index + 1] = config
        elif word.startswith("--config="):
            replaced[index] = f"--config={config}"
        elif word.startswith("-c") and not word.startswith("--"):
            replaced[index] = f"-c{config}"
    return replaced


def _follow(server: Any, job_id: str) -> None:
    try:
        server.follow(job_id, _write)
    except KeyboardInterrupt:
        raise Interrupted(f"detached, the job goes on; {_how_to_follow(server.address, job_id)}") from None
    code = server.exit_code(job_id)
    if code:
        messages.print(f"imgbatch: job {job_id} ended with exit code {code}", markup=False)
        raise typer.Exit(code)


def _how_to_follow(address: str, job_id: str) -> str:
    where = f"--address {address}"
    return f"follow: imgbatch jobs logs -f {job_id} {where}; stop: imgbatch jobs stop {job_id} {where}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
