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

from imgbatch.config import Config
from imgbatch.core import current, storage
from imgbatch.core.access import fetch_settings, moved_inputs
from imgbatch.core.finalize import finalize
from imgbatch.core.machine import Gpu
from imgbatch.core.plan import DeviceKind, Run, plan_retry, plan_run, read_plan
from imgbatch.core.preflight import check_sample
from imgbatch.core.runs import RunEntry, find_run, heartbeat, list_runs
from imgbatch.core.views import open_views
from imgbatch.errors import ErrorBudgetExceeded, Interrupted, Status, UsageError
from imgbatch.runtime.engine import Engine
from imgbatch.runtime.interrupts import StopSwitch
from imgbatch.runtime.passes import Passes
from imgbatch.runtime.pools import Pools, choose_device, choose_pools, this_machine
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
    """
    console = console or Console(quiet=True)
    stop = _begun(config, stop)
    out = storage.absolute(str(config.output.path))
    parent = _unfinished_retry_parent(out, run_id) or _newest_root(out, run_id)
    if not parent.finished:
        raise UsageError(f"run {parent.run_id} is unfinished; run its classify command again first")
    if not current.is_up_to_date(out):  # a command was killed at its end; what failed is read through current.json
        current.update(out)
    failed = _failed_rows(out, parent)
    if not len(failed):
        return None
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
            "output": settled.output.model_copy(update={"path": out}),
        }
    )
    with hardware(config) as there:
        attempt = len(_finished_retries(out, parent)) + 1
        run = plan_retry(config, parent, failed, there.device, attempt=attempt)
        return _work(run, console, stop)


def _begun(config: Config, stop: StopSwitch | None) -> StopSwitch:
    """What ends the command, whose time begins."""
    storage.configure(config.storage)
    stop = stop or StopSwitch()
    stop.turn_on_after(config.run.stop_after_s)
    return stop


def _newest_root(out: str, run_id: str | None) -> RunEntry:
    if run_id is not None:
        return find_run(out, run_id)
    roots = [run for run in list_runs(out) if run.parent is None and not run.abandoned]
    return roots[-1] if roots else find_run(out)


def _unfinished_retry_parent(out: str, run_id: str | None) -> RunEntry | None:
    for run in list_runs(out):
        if run.parent is not None and not run.finished and not run.abandoned and run_id in (None, run.parent):
            return find_run(out, run.parent)
    return None


def _failed_rows(out: str, parent: RunEntry) -> pa.Array:
    """row_ids of the parent's error rows that no retry has turned into a prediction, in order."""
    retries = [run.run_id for run in _finished_retries(out, parent)]
    with contextlib.closing(open_views(out)) as connection:
        found = connection.sql(
            "select row_id from all_errors where run_id = ? and row_id not in "
            "(select row_id from all_predictions where run_id in (select unnest(?::varchar[]))) order by row_id",
            params=[parent.run_id, retries],
        )
        return found.to_arrow_table()["row_id"].combine_chunks()


def _finished_retries(out: str, parent: RunEntry) -> list[RunEntry]:
    return [run for run in list_runs(out) if run.parent == parent.run_id and run.finished]


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
            device = choose_device(resources, cluster_machine())
            yield Hardware(device, cluster_gpus(resources.classify_labels))
        return
    yield Hardware(choose_device(resources, this_machine()), None)


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
            return choose_pools(run.config.resources, run.plan.device, cluster_machine())

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
                for line in (run.backend.describe(), *run.backend.left_out):
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


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {status}" for status, n in counts.items())
