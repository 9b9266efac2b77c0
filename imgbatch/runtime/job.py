"""The main job, whatever the engine: plan, pass after pass until no unit is pending, finalize.

plan_run -> check_sample -> passes over pending units -> isolation of what will not pass -> finalize
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
from rich.console import Console

from imgbatch.config import Config, InputConfig, ModelConfig
from imgbatch.core import current, storage
from imgbatch.core.access import fetch_settings, moved_inputs
from imgbatch.core.failed import failed_rows, failed_runs, find_retried, finished_retries
from imgbatch.core.finalize import finalize
from imgbatch.core.machine import Gpu
from imgbatch.core.plan import DeviceKind, Run, plan_retry, plan_run, read_plan
from imgbatch.core.preflight import check_sample
from imgbatch.core.runs import RunEntry, heartbeat, list_runs
from imgbatch.errors import ErrorBudgetExceeded, ImgbatchError, Interrupted, Status, UsageError
from imgbatch.runtime.engine import Engine
from imgbatch.runtime.interrupts import StopSwitch
from imgbatch.runtime.passes import Passes
from imgbatch.runtime.pools import Machine, Pools, choose_device, choose_pools, device_remarks, this_machine
from imgbatch.runtime.reporter import Reporter
from imgbatch.runtime.run_log import RunLog


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    out: str
    run_id: str
    counts: dict[str, int]
    """Rows by status; ``OK`` are predictions."""
    already_finished: bool
    """Whether there was nothing to do."""
    images_per_s: float | None
    """From the engine's readiness to the end, of this command; none where it classified nothing."""

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())

    @property
    def num_errors(self) -> int:
        return self.num_rows - self.counts.get(Status.OK.value, 0)


def classify(config: Config, console: Console | None = None, stop: StopSwitch | None = None) -> RunResult:
    """Classify every row of a manifest exactly once; the same configuration again continues or finds it done.

    Args:
        console: where progress and messages go; none: nowhere.
        stop: ends the job after the units in flight when it is turned on.

    Raises:
        NothingToDo: only unlabelled rows are wanted, and there are none.
        UsageError: bad input or configuration, or another unfinished run is in the way.
        ErrorBudgetExceeded: too many rows failed, or not one has a prediction.
        Interrupted: no unit was committed for ``run.no_progress_s``, ``run.stop_after_s`` is over, or ``stop`` was
            turned on.
    """
    stop = _begun(config, stop)
    with hardware(config) as there:
        return _work(plan_run(config, there.device, there.gpus), console or Console(quiet=True), stop)


def retry(
    config: Config, run_id: str | None = None, console: Console | None = None, stop: StopSwitch | None = None
) -> RunResult | None:
    """Classify the rows of a finished run that have no prediction yet, as a child run; none where there are none.

    ``config`` gives resources, and what it sets itself of fetching and decoding, as more time for images that had too
    little; whatever else changes results comes from the parent's plan. It ends well even where all fail again.

    Args:
        run_id: none: that of a retry which is unfinished, else the newest run that is no retry.

    Raises:
        UsageError: no such run, it is unfinished, or its manifest or model is not what it was.
        Interrupted: as for :func:`classify`.
    """
    stop = _begun(config, stop)
    out = storage.absolute(str(config.output.path))
    parent = find_retried(out, run_id)
    if not parent.finished:
        raise UsageError(f"run {parent.run_id} is unfinished; run its classify command again first")
    _bring_up_to_date(out)
    failed = failed_rows(out, parent)
    return _retry(config, parent, failed, console or Console(quiet=True), stop) if len(failed) else None


@dataclass(frozen=True)
class RetriedRun:
    """One run whose failed rows were to be classified again, by :func:`iter_retries`."""

    run_id: str
    """The run that they failed in."""
    result: RunResult | None
    error: ImgbatchError | None
    """Why there is no result."""


def iter_retries(
    config: Config, console: Console | None = None, stop: StopSwitch | None = None
) -> Iterator[RetriedRun]:
    """As :func:`retry`, of every run with failed rows whose image has no prediction in a later run; each as it is done.

    Manifest and model are those of each run's own command, wherever ``config`` says that they are: it may be that of
    tonight. A run that cannot be retried, as when its manifest has changed, does not keep the others from it.

    Raises:
        UsageError: no finished run there, or no cluster.
        Interrupted: as for :func:`classify`; the same again continues.
    """
    stop = _begun(config, stop)
    out = storage.absolute(str(config.output.path))
    _bring_up_to_date(out)
    failed = failed_runs(out)
    config = config.model_copy(update={"input": InputConfig(), "model": ModelConfig()})
    with _one_ray(config) if failed else contextlib.nullcontext():
        for each in failed:
            stop.check()
            try:
                result = _retry(config, each.run, each.row_ids, console or Console(quiet=True), stop)
            except Interrupted:
                raise
            except ImgbatchError as error:
                yield RetriedRun(each.run_id, None, error)
            else:
                yield RetriedRun(each.run_id, result, None)


def _begun(config: Config, stop: StopSwitch | None) -> StopSwitch:
    """What ends the command, whose time begins."""
    storage.configure(config.storage)
    stop = stop or StopSwitch()
    stop.turn_on_after(config.run.stop_after_s)
    return stop


def _bring_up_to_date(out: str) -> None:
    if not current.is_up_to_date(out):  # a command was killed at its end; what failed is read through current.json
        current.update(out)


@contextlib.contextmanager
def _one_ray(config: Config) -> Iterator[None]:
    """One Ray for several runs, if that is the engine: it takes seconds to start."""
    if config.classify.engine == "local":
        yield
        return
    from imgbatch.runtime.session import cluster_address, ray_session

    machine = this_machine()
    of_our_own = cluster_address(config) is None
    pools = choose_pools(config.resources, choose_device(config.resources, machine), machine) if of_our_own else None
    with ray_session(config, pools):
        yield


def _retry(config: Config, parent: RunEntry, failed: pa.Array, console: Console, stop: StopSwitch) -> RunResult:
    settled = read_plan(parent).config
    config = settled.model_copy(
        update={
            "resources": config.resources,
            **moved_inputs(settled, config),
            "fetch": fetch_settings(parent.plan, config.fetch),
            "decode": settled.decode.model_copy(
                update={name: getattr(config.decode, name) for name in config.decode.model_fields_set}
            ),
            "errors": config.errors.model_copy(update={"max_rate": 1.0}),  # rows that failed may fail again
            "run": config.run,
            "storage": config.storage,
            "ray": config.ray,
            "classify": config.classify,
            "output": settled.output.model_copy(update={"path": parent.paths.out}),
        }
    )
    with hardware(config) as there:
        attempt = len(finished_retries(list_runs(parent.paths.out), parent.run_id)) + 1
        return _work(plan_retry(config, parent, failed, there.device, attempt=attempt), console, stop)


class Hardware(NamedTuple):
    """What the model is to run on."""

    device: DeviceKind
    gpus: Sequence[Gpu] | None
    """Of the cluster; none: this machine has them, or nothing hangs on them."""


@contextlib.contextmanager
def hardware(config: Config) -> Iterator[Hardware]:
    """What to plan for. A cluster has to be asked, so it is connected for the block; a Ray of our own starts later."""
    resources = config.resources
    # That it has GPUs does not say which variants they run.
    hangs_on_gpus = resources.device == "cuda" and config.classify.backend == "auto"
    if config.on_cluster and (resources.device == "auto" or hangs_on_gpus):
        from imgbatch.runtime.session import cluster_gpus, cluster_machine, ray_session

        with ray_session(config):
            device = choose_device(resources, cluster_machine(resources))
            yield Hardware(device, cluster_gpus(resources.classify_labels))
        return
    # What is named for a cluster, this machine need not have.
    yield Hardware(choose_device(resources, Machine(0, 0) if config.on_cluster else this_machine()), None)


@contextlib.contextmanager
def open_engine(run: Run, meanwhile: Callable[[], object] = lambda: None) -> Iterator[Engine]:
    """The engine that ``classify.engine`` asks for; Ray is connected inside the block.

    ``meanwhile`` is done before the block, while Ray starts where there is Ray; what it raises is raised here.
    """
    if run.config.classify.engine == "local":
        meanwhile()
        from imgbatch.runtime.local import LocalEngine

        engine: Engine = LocalEngine(run)
        with contextlib.closing(engine):
            yield engine
        return
    from imgbatch.runtime.session import cluster_address, cluster_machine, ray_session

    def load_and_go_on() -> None:
        # Ray Data takes its seconds to load, which pass beside Ray's own.
        importlib.import_module("imgbatch.runtime.ray_data")
        meanwhile()

    # A cluster may have the GPUs that this machine lacks; only a Ray of our own is sized from here.
    of_our_own = cluster_address(run.config) is None
    planned = choose_pools(run.config.resources, run.plan.device, this_machine()) if of_our_own else None
    with ray_session(run.config, planned, load_and_go_on) as is_our_own:
        from imgbatch.runtime.own_ray import without_data_actors
        from imgbatch.runtime.ray_data import RayEngine

        def sized() -> Pools:
            return choose_pools(run.config.resources, run.plan.device, cluster_machine(run.config.resources))

        lighter = without_data_actors() if is_our_own else contextlib.nullcontext()
        with lighter, contextlib.closing(RayEngine(run, sized)) as ray_engine:
            yield ray_engine


def _work(run: Run, console: Console, stop: StopSwitch) -> RunResult:
    if run.paths.is_finished():
        result = RunResult(run.paths.out, run.run_id, finalize(run)["counts"], already_finished=True, images_per_s=None)
    else:
        with heartbeat(run.paths):
            result = _classify_pending(run, console, stop)
    if run.plan.parent is None and not result.counts.get(Status.OK.value):
        raise ErrorBudgetExceeded(
            f"run {run.run_id} has not one prediction ({_counted(result.counts)}); see why with "
            f'`imgbatch query {run.paths.out} "select status, error_message, uri from errors"`, and try the rows again '
            f"with `imgbatch retry {run.paths.out} --run {run.run_id}`"
        )
    return result


def _classify_pending(run: Run, console: Console, stop: StopSwitch) -> RunResult:
    layout = run.plan.layout
    reporter = Reporter(console, run_id=run.run_id, as_json=run.config.run.log_format == "json")
    reporter.say(f"run {run.run_id}: {layout.num_rows:,} images in {layout.num_units:,} units of {layout.unit_rows:,}")
    if run.remark:
        reporter.say(run.remark)
    log = RunLog(run)
    state = "failed"
    try:
        pending = run.pending_units()
        if pending:
            if len(pending) < layout.num_units:
                reporter.say(f"continuing: {layout.num_units - len(pending):,} units are done already")
            with open_engine(run, lambda: check_sample(run)) as engine:
                log.engine_described(engine.describe())
                reporter.say(f"{engine.describe()}, {run.plan.device}; {run.spec.describe()}")
                for line in (*_device_remarks(run.config), run.backend.describe(), *run.backend.left_out):
                    reporter.say(line)
                Passes(run, engine, reporter, pending, find_pending=run.pending_units, log=log, stop=stop).run_all()
                counts = finalize(run, engine.map_parts)["counts"]
        else:
            counts = finalize(run)["counts"]
    except BaseException as error:
        if isinstance(error, ErrorBudgetExceeded):
            state = "error_budget"
        elif isinstance(error, Interrupted | KeyboardInterrupt):
            state = "interrupted"
        # A store that is away must not hide why the job ended.
        with contextlib.suppress(Exception):
            log.write(state)
        raise
    record = log.write("finished")
    return RunResult(run.paths.out, run.run_id, counts, already_finished=False, images_per_s=record["images_per_s"])


def _device_remarks(config: Config) -> list[str]:
    if not config.on_cluster:
        return device_remarks(config.resources, this_machine())
    from imgbatch.runtime.session import cluster_machine

    return device_remarks(config.resources, cluster_machine(config.resources))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {status}" for status, n in counts.items())
