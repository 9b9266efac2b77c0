"""What a classification would be: units, pools, the rate that a sample suggests, hours, size, cost, and warnings."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from imgbatch.config import Config, PlanConfig
from imgbatch.core import storage
from imgbatch.core.backends import Backend, choose_backend, lacking_gpus, without_bfloat16
from imgbatch.core.fingerprint import fingerprint_of, result_fields
from imgbatch.core.layout import choose_layout, estimate_row_bytes
from imgbatch.core.machine import Gpu, local_gpus
from imgbatch.core.manifest import Manifest
from imgbatch.core.model import ModelBundle, float32_bytes
from imgbatch.core.plan import DeviceKind, Settled, as_begun, open_inputs, read_plan, wanted_rows, wants_new_run
from imgbatch.core.regions import region_warnings
from imgbatch.core.runs import list_runs, run_id_of, runs_in_the_way, why_in_the_way
from imgbatch.core.sample import DecodedSample, classify_sample, decode_sample, sample_rows
from imgbatch.core.stages import fitting_batch_size
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.units import UnitLayout, max_unit_rows
from imgbatch.errors import UsageError
from imgbatch.runtime.memory import MemoryBudget, memory_budget
from imgbatch.runtime.pools import (
    Machine,
    Pools,
    choose_batch_size,
    choose_device,
    choose_pools,
    device_remarks,
    this_machine,
)
from imgbatch.schema import TARGET, TARGETS, URI

_START_UP_S = 30.0
_MUCH_LARGER = 4.0
"""A source whose shorter side is so many times the resized one spends its decoding on pixels that are thrown away."""
_MANY_UNITS = 200_000
_UNITS_PER_S = 36
"""That a driver hands out, on a Ray of two cores (``cluster/README.md``)."""
_UNKNOWN_PIXELS = 1_000_000
"""Of an image where none was looked at."""


@dataclass(frozen=True)
class Forecast:
    """What would run."""

    run_id: str
    state: str
    """``new``, ``unfinished`` (it would be continued) or ``finished`` (nothing to do)."""
    units_done: int
    num_rows: int
    num_units: int
    unit_rows: int
    device: str
    backend: str
    """What would run the model."""
    pools: str
    preprocess: str
    sampled: int
    """Images looked at."""
    failed: dict[str, int]
    """Of those, by status."""
    stage_ms: dict[str, float]
    """Milliseconds per image of one process: fetch (waiting), decode, classify; what was not measured is left out."""
    stage_images_per_s: dict[str, float]
    """What each pool could do; ``cores`` where the pools share them."""
    limit: str | None
    images_per_s: float | None
    hours: float | None
    output_mb: float
    """Before compression, about."""
    memory: str
    """What the job takes of a machine that all of it runs on, by arithmetic."""
    price_per_hour: float | None
    warnings: list[str]

    @property
    def cost(self) -> float | None:
        """Of the whole run, in the currency of the price."""
        return self.hours * self.price_per_hour if self.hours and self.price_per_hour is not None else None


def forecast(config: Config) -> Forecast:
    """Look at inputs, machine and a sample of images; nothing is written, and no actor is started.

    Raises:
        UsageError: bad input or configuration.
        NothingToDo: only unlabelled rows are wanted, and there are none.
    """
    manifest, bundle, spec = open_inputs(config)
    out = storage.absolute(str(config.output.path))
    with _place(config) as place:
        machine, regions, warnings = place.machine, place.regions, place.warnings
        device = choose_device(config.resources, machine)
        backend = choose_backend(config, bundle, spec, device, place.gpus)
        now = Settled(device, backend, result_fields(config, manifest, bundle, spec, device, backend))
        device, backend, fields, remark = as_begun(config, manifest, bundle, spec, now, out)
        pools = choose_pools(config.resources, device, machine)
    run_id, state, layout, done = _run_ahead(config, manifest, bundle, spec, device, fields, out)
    sample, stage_s = _measure(config, manifest, bundle, spec, device, pools, backend, layout.unit_rows)
    rates = stage_rates(stage_s, pools, device, machine)
    limit = min(rates, key=lambda stage: rates[stage]) if "classify" in rates else None
    left = layout.num_rows - sum(layout.unit(index).num_rows for index in done)
    hours = (left / rates[limit] + _START_UP_S) / 3600 if limit and state != "finished" else None
    statuses = Counter(error.status.value for error in sample.decoded.errors if error) if sample else Counter()
    warnings += [*device_remarks(config.resources, machine), *gpu_warnings(pools, machine)]
    warnings += [*_blocked(config, fields, out), *filter(None, [remark]), *backend.left_out]
    warnings += [*input_warnings(sample, bundle, spec)]
    if rates and limit is None:
        warnings.append(
            "the model was not measured: no GPU here, so there is no limit, time or cost to tell; on one of a cluster: "
            "imgbatch submit --entrypoint-gpus 1 -- plan …"
        )
    images = [row.get(URI) for row in sample.rows] if sample else []
    warnings += region_warnings([config.input.manifest, config.model.path, out, *images], regions)
    if config.decode.gpu_share and device == "cpu":
        warnings.append("decode.gpu_share: the model runs on the cores, where this only moves work from one to another")
    row_bytes = estimate_row_bytes(config, bundle)
    warnings += unit_warnings(layout, rates[limit] if limit else None, max_unit_rows(spec.pixel_bytes, row_bytes))
    return Forecast(
        run_id=run_id,
        state=state,
        units_done=len(done),
        num_rows=layout.num_rows,
        num_units=layout.num_units,
        unit_rows=layout.unit_rows,
        device=device,
        backend=backend.describe(),
        pools=pools.describe(),
        preprocess=spec.describe(),
        sampled=len(sample.rows) if sample else 0,
        failed=dict(statuses),
        stage_ms={stage: 1000 * seconds for stage, seconds in stage_s.items()},
        stage_images_per_s=rates,
        limit=limit,
        images_per_s=rates[limit] if limit else None,
        hours=hours,
        output_mb=layout.num_rows * row_bytes / 1e6,
        memory=_budget(config, bundle, spec, backend, device, pools, place, layout.unit_rows, sample).describe(pools),
        price_per_hour=price_per_hour(config.plan, config.report.price_per_hour),
        warnings=warnings,
    )


class _Place(NamedTuple):
    """Where the job would run."""

    machine: Machine
    regions: list[str]
    warnings: list[str]
    gpus: Sequence[Gpu] | None = None
    """Of a cluster."""

    @property
    def is_cluster(self) -> bool:
        return self.gpus is not None


@contextlib.contextmanager
def _place(config: Config) -> Iterator[_Place]:
    """What there is to run on; a cluster is connected for the block."""
    configured = [config.storage.region] if config.storage.region else []
    if config.classify.engine == "ray":
        from imgbatch.runtime import session

        if session.cluster_address(config) is not None:
            with session.ray_session(config):
                regions = session.cluster_regions() or configured
                warnings = zone_warnings(*session.cluster_zones())
                gpus = session.cluster_gpus(config.resources.classify_labels)
                yield _Place(session.cluster_machine(config.resources), regions, warnings, gpus)
            return
    yield _Place(this_machine(), configured, [])


class _RunAhead(NamedTuple):
    """The run that classify would continue, start, or find done."""

    run_id: str
    state: str
    layout: UnitLayout
    done: Collection[int]
    """Indices of its finished units."""


def _run_ahead(
    config: Config,
    manifest: Manifest,
    bundle: ModelBundle,
    spec: PreprocessSpec,
    device: DeviceKind,
    fields: Mapping[str, Any],
    out: str,
) -> _RunAhead:
    """A run keeps the units that it was planned with, whatever the settings would make of them now."""
    fingerprint = fingerprint_of(dict(fields))
    runs = list_runs(out)
    run_id = run_id_of(runs, fingerprint, new_run=wants_new_run(config, manifest, bundle, out, fingerprint))
    run = next((run for run in runs if run.run_id == run_id), None)
    if run is None:
        wanted = wanted_rows(config, manifest, bundle, out)
        layout = choose_layout(config, manifest, wanted, bundle, spec, on_cpus=device == "cpu")
        return _RunAhead(run_id, "new", layout, ())
    layout = read_plan(run).layout
    if run.finished:
        return _RunAhead(run_id, "finished", layout, range(layout.num_units))
    return _RunAhead(run_id, "unfinished", layout, run.paths.committed_units(layout.num_units))


def _blocked(config: Config, fields: Mapping[str, Any], out: str) -> list[str]:
    """A warning where an unfinished run would stop classify."""
    if config.run.on_unfinished == "abandon":
        return []
    in_the_way = runs_in_the_way(list_runs(out), fingerprint_of(dict(fields)))
    return [f"classify would stop: {why_in_the_way(out, run, fields)}" for run in in_the_way[:1]]


def _measure(
    config: Config,
    manifest: Manifest,
    bundle: ModelBundle,
    spec: PreprocessSpec,
    device: DeviceKind,
    pools: Pools,
    backend: Backend,
    unit_rows: int,
) -> tuple[DecodedSample | None, dict[str, float]]:
    """A sample and the seconds per image of each stage in one process; the model only where it runs here."""
    if config.plan.sample_rows == 0:
        return None, {}
    sample = decode_sample(manifest, sample_rows(manifest, config.plan.sample_rows), spec, config)
    num_ok = sum(error is None for error in sample.decoded.errors)
    if num_ok == 0:
        return sample, {}
    stage_s = {"fetch": sample.fetch_s / len(sample.rows), "decode": sample.decoded.decode_s / len(sample.rows)}
    if _runs_here(backend, device):
        batch_size = _batch_size(config, spec, backend, device, unit_rows)
        threads = pools.classify_threads
        stage_s["classify"] = classify_sample(
            sample, bundle, backend, device=device, batch_size=batch_size, threads=threads
        )
    return sample, stage_s


def _runs_here(backend: Backend, device: DeviceKind) -> bool:
    """Whether this machine, which may be the head of a cluster, has what runs the model."""
    variant = backend.variant
    if device == "cuda":
        here = this_machine()
        fit = here.num_gpus > 0 and not here.unfit_gpus
        return fit and (variant is None or not lacking_gpus(variant.target, local_gpus()))
    return variant is None or without_bfloat16(variant.target, device) is None


def _batch_size(config: Config, spec: PreprocessSpec, backend: Backend, device: DeviceKind, unit_rows: int) -> int:
    configured = config.classify.batch_size
    chosen = choose_batch_size(configured, device, spec.crop_size, backend)
    return fitting_batch_size(chosen, unit_rows=unit_rows, backend=backend, configured=configured)


def _budget(
    config: Config,
    bundle: ModelBundle,
    spec: PreprocessSpec,
    backend: Backend,
    device: DeviceKind,
    pools: Pools,
    place: _Place,
    unit_rows: int,
    sample: DecodedSample | None,
) -> MemoryBudget:
    pixels = sample.decoded.widths.astype(int) * sample.decoded.heights if sample else np.zeros(0, int)
    return memory_budget(
        pools,
        spec,
        backend,
        unit_rows=unit_rows,
        batch_size=_batch_size(config, spec, backend, device, unit_rows),
        weight_bytes=float32_bytes(bundle),
        in_flight=config.fetch.in_flight,
        image_pixels=int(pixels.max(initial=0)) or _UNKNOWN_PIXELS,
        gpu_share=config.decode.gpu_share,
        on_cluster=place.is_cluster,
    )


def stage_rates(stage_s: Mapping[str, float], pools: Pools, device: DeviceKind, machine: Machine) -> dict[str, float]:
    """Images per second that each pool could do on its own, and on CPUs what the cores can do for both together.

    Args:
        stage_s: seconds per image in one process; fetch is waiting and takes no core.
    """
    if not stage_s:
        return {}
    rates = {"decode": pools.decoders / (stage_s["fetch"] + stage_s["decode"])}
    if "classify" in stage_s:
        # What runs at once on a GPU shares it.
        rates["classify"] = (pools.classifiers if device == "cpu" else pools.classify_actors) / stage_s["classify"]
        if device == "cpu":
            core_s = stage_s["decode"] + stage_s["classify"] * pools.classify_threads
            rates["cores"] = machine.num_cpus / core_s
    return rates


def unit_warnings(layout: UnitLayout, images_per_s: float | None, max_rows: int) -> list[str]:
    """Of units that are too many, or too small for what the pools do a second, where that costs more than a minute.

    Args:
        max_rows: of the largest unit whose pixels and results still fit; see ``core.units.max_unit_rows``.
    """
    warnings = []
    advice = f"raise classify.unit_rows, which is {layout.unit_rows}, to {max_rows:,} at most"
    if layout.unit_rows >= max_rows:
        advice = "larger ones would not fit: cut the manifest, and give each part an output of its own"
    if layout.num_units > _MANY_UNITS:
        warnings.append(f"{layout.num_units:,} units are many for one driver; {advice}")
    takes_minutes = layout.num_units > 60 * _UNITS_PER_S
    if takes_minutes and images_per_s and images_per_s > _UNITS_PER_S * layout.unit_rows:
        warnings.append(
            f"the pools could do {images_per_s / layout.unit_rows:,.0f} units a second, and a driver hands out "
            f"{_UNITS_PER_S}; {advice}"
        )
    return warnings


def gpu_warnings(pools: Pools, machine: Machine) -> list[str]:
    """Of classify actors that would wait for a GPU of their own; a cluster that starts from zero has none yet."""
    if pools.classify_gpus and 0 < machine.num_gpus < pools.classify_actors:
        return [
            f"resources.classify_actors is {pools.classify_actors} and there are {machine.num_gpus} GPUs for them: "
            f"those beyond wait until there are more"
        ]
    return []


def price_per_hour(plan: PlanConfig, given: float | None) -> float | None:
    """Of the nodes of ``plan.nodes`` at ``plan.prices``, else ``given``; raises :class:`UsageError`."""
    if not plan.nodes:
        return given
    for node_type in plan.nodes:
        if node_type not in plan.prices:
            raise UsageError(f"plan.prices: no price for {node_type}, of which plan.nodes has {plan.nodes[node_type]}")
    return sum(count * plan.prices[node_type] for node_type, count in plan.nodes.items())


def input_warnings(sample: DecodedSample | None, bundle: ModelBundle, spec: PreprocessSpec) -> list[str]:
    """What a look at some images says about the night to come."""
    if sample is None:
        return []
    warnings = []
    failed = [error for error in sample.decoded.errors if error is not None]
    if failed:
        warnings.append(
            f"{len(failed)} of {len(sample.rows)} sampled images have no pixels, like {failed[0].status}: "
            f"{failed[0].message}"
        )
    sides = np.minimum(sample.decoded.widths, sample.decoded.heights)
    sides = sides[sides > 0]
    if len(sides) and np.median(sides) >= _MUCH_LARGER * spec.resize_size and not spec.reducing_gap:
        warnings.append(
            f"the images' shorter side is {np.median(sides):,.0f} px, {np.median(sides) / spec.resize_size:.0f} times "
            f"the {spec.resize_size} px that the model sees: smaller copies would decode much faster, and JPEGs with "
            f"preprocess.reducing_gap"
        )
    named = {row[TARGET] for row in sample.rows if row.get(TARGET)}
    named |= {target for row in sample.rows for target in row.get(TARGETS) or ()}
    if unknown := sorted(named - set(bundle.class_names)):
        warnings.append(
            f"{len(unknown)} of {len(named)} sampled targets are no class of the model, like {unknown[0]!r}: "
            f"`evaluate` will not count them as right"
        )
    return warnings


def zone_warnings(cpu_zones: Sequence[str], gpu_zones: Sequence[str]) -> list[str]:
    """Pixels that cross between zones are slow and paid for."""
    if gpu_zones and set(cpu_zones) - set(gpu_zones):
        return [
            f"CPU nodes stand in {', '.join(cpu_zones)} and GPU nodes in {', '.join(gpu_zones)}: the pixels of every "
            f"image (150 KB at 224 px) cross between zones"
        ]
    return []


def to_json(result: Forecast) -> dict[str, Any]:
    """Everything, with the cost."""
    return {**result.__dict__, "cost": result.cost}
