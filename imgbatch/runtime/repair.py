"""``imgbatch repair``: damaged output files written anew, from unit files where they were kept, else by classifying
the rows again that they held."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from imgbatch.config import Config
from imgbatch.core import current, storage
from imgbatch.core.access import fetch_settings, moved_inputs
from imgbatch.core.plan import Run, open_inputs, open_run, read_plan
from imgbatch.core.repair import Damage, find_damage, missing_units, rebuild
from imgbatch.core.runs import RunEntry, heartbeat
from imgbatch.core.verify import run_chain
from imgbatch.errors import RowsDiffer, UsageError
from imgbatch.runtime.interrupts import StopSwitch
from imgbatch.runtime.job import open_engine
from imgbatch.runtime.passes import Passes
from imgbatch.runtime.reporter import Reporter


@dataclass(frozen=True)
class RepairedRun:
    """What was done about one run."""

    run_id: str
    files: list[str]
    """Written anew, relative to the output."""
    num_strays: int
    """Files removed because they were not the run's."""
    num_units_classified: int
    """Units whose file had not been kept."""


def repair(config: Config, run_id: str | None, console: Console | None = None) -> list[RepairedRun]:
    """Repair a run of ``output.path`` and its retries; none: the newest that is no retry.

    ``config`` gives resources, and fetch settings where the run's command is not to be followed; what changes results
    comes from each run's plan.

    Raises:
        UsageError: the run is unfinished, or its model or manifest is not what it was.
        RowsDiffer: rows that were classified again came out otherwise than then.
        Interrupted: the engine stops whatever the unit, or does nothing in isolation, or ``run.stop_after_s`` is over.
    """
    console = console or Console(quiet=True)
    storage.configure(config.storage)
    stop = StopSwitch()
    stop.turn_on_after(config.run.stop_after_s)
    root, *retries = run_chain(str(config.output.path), run_id)
    if not root.finished:
        raise UsageError(f"run {root.run_id} is unfinished; its classify command continues it")
    repaired = []
    for entry in [root, *(entry for entry in retries if entry.finished)]:
        if damage := find_damage(entry.paths):
            run = _open(config, entry)
            with heartbeat(run.paths):
                repaired.append(_repair(run, damage, console, stop))
    if not current.is_up_to_date(root.paths.out):
        current.update(root.paths.out)
        console.print("current.json did not hold every finished run, and was written anew")
    return repaired


def _open(config: Config, entry: RunEntry) -> Run:
    settled = read_plan(entry).config
    updates = {name: getattr(config, name) for name in ("resources", "run", "storage", "ray")}
    updates |= moved_inputs(settled, config)
    updates["fetch"] = fetch_settings(entry.plan, config.fetch)
    # It was judged then how many may fail, and every unit is to come.
    updates["errors"] = settled.errors.model_copy(update={"max_rate": 1.0})
    updates["classify"] = settled.classify.model_copy(update={"engine": config.classify.engine})
    updates["output"] = settled.output.model_copy(update={"path": entry.paths.out})
    config = settled.model_copy(update=updates)
    manifest, bundle, spec = open_inputs(config)
    planned = entry.plan["fields"]
    for name, identity in (("model", bundle.model_id), ("manifest", manifest.content_identity())):
        if planned[name] != identity:
            raise UsageError(
                f"run {entry.run_id}: its {name} is not what it was; put it back, or classify anew with --new-run"
            )
    return open_run(entry.paths, config, bundle, spec)


def _repair(run: Run, damage: Damage, console: Console, stop: StopSwitch) -> RepairedRun:
    missing = missing_units(run, damage.units)
    if missing:
        console.print(f"run {run.run_id}: {len(missing):,} units have no file any more and are classified again")
        _classify(run, missing, console, stop)
    keep_units = run.plan.config.output.keep_units
    try:
        rebuild(run, damage)
    except RowsDiffer as error:
        if keep_units and not missing:
            raise
        # As when images could not be fetched now: the next repair must not take these for good.
        for uri in map(run.paths.unit_file, missing) if keep_units else [run.paths.units]:
            storage.remove(uri)
        raise RowsDiffer(
            f"{error}: some images came out otherwise than then; classify the manifest anew with --new-run"
        ) from error
    if not keep_units:  # what else ended the block leaves them to the next repair
        storage.remove(run.paths.units)
    return RepairedRun(run.run_id, [file.path for file in damage.files], len(damage.strays), len(missing))


def _classify(run: Run, units: list[int], console: Console, stop: StopSwitch) -> None:
    """As the run does it; what it takes is no part of the run's record."""
    reporter = Reporter(console, run_id=run.run_id, as_json=run.config.run.log_format == "json")
    with open_engine(run) as engine:
        Passes(
            run,
            engine,
            reporter,
            units,
            find_pending=lambda: missing_units(run, units),
            log=None,
            stop=stop,
        ).run_all()
