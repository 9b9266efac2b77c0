"""Planning a run: its identity, its units and its rows, settled once and created if absent."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from imgbatch.config import Config, parse_config
from imgbatch.core import storage
from imgbatch.core.architectures import check_crop_size
from imgbatch.core.backends import Backend, begun_backend, choose_backend, planned_backend
from imgbatch.core.bands import require_rasterio
from imgbatch.core.database import spilling
from imgbatch.core.failpoints import failpoint
from imgbatch.core.fingerprint import ProbabilityMode, fingerprint_of, result_fields
from imgbatch.core.geoparquet import carried_metadata
from imgbatch.core.gpu_share import check_gpu_share
from imgbatch.core.incremental import unlabelled_rows
from imgbatch.core.layout import choose_layout, cut_rows
from imgbatch.core.machine import Gpu
from imgbatch.core.manifest import Manifest, open_manifest
from imgbatch.core.model import ModelBundle, load_bundle
from imgbatch.core.partitions import Partition, PartitionCheck, check_class_names, parse_partitions
from imgbatch.core.row_decoder import reads_rasters
from imgbatch.core.rows import RowsReader, normalise_columns, read_selected, write_rows
from imgbatch.core.runs import RunEntry, RunPaths, choose_run_id, heartbeat, list_runs, runs_in_the_way, utc_now
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.units import UnitLayout
from imgbatch.errors import NothingToDo, UsageError
from imgbatch.schema import IMAGE_ID, ROW_ID

DeviceKind = Literal["cpu", "cuda"]

_CHECK_MEMORY_MB = 512
_MAX_SUSPECTS = 1000
"""Hashes of 64 bits that stand twice: of 100,000,000 distinct ids, one in 3,700 manifests has a single one."""


@dataclass(frozen=True)
class RunPlan:
    """What is settled about a run for good (``plan.json``)."""

    run_id: str
    fingerprint: str
    fields: dict[str, Any]
    """What the fingerprint was taken of."""
    layout: UnitLayout
    predicted_at: str
    """The one ``predicted_at`` of the run, UTC, ISO 8601."""
    probabilities: ProbabilityMode
    device: DeviceKind
    backend: str
    has_bytes: bool
    parent: str | None
    config: Config

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "fingerprint": self.fingerprint,
            "fields": self.fields,
            "num_rows": self.layout.num_rows,
            "num_units": self.layout.num_units,
            "unit_rows": self.layout.unit_rows,
            "segments": list(self.layout.segments),
            "predicted_at": self.predicted_at,
            "probabilities": self.probabilities,
            "device": self.device,
            "backend": self.backend,
            "has_bytes": self.has_bytes,
            "parent": self.parent,
            "config": self.config.model_dump(mode="json"),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunPlan:
        return cls(
            run_id=values["run_id"],
            fingerprint=values["fingerprint"],
            fields=values["fields"],
            layout=UnitLayout(values["unit_rows"], tuple(values["segments"])),
            predicted_at=values["predicted_at"],
            probabilities=values["probabilities"],
            device=values["device"],
            backend=values["backend"],
            has_bytes=values["has_bytes"],
            parent=values["parent"],
            config=parse_config(values["config"]),
        )


@dataclass(frozen=True)
class Run:
    """Everything a stage needs to know about the run it works for; small, and the same in every process."""

    paths: RunPaths
    plan: RunPlan
    config: Config
    """Of this command: its ``resources``, ``fetch`` and ``errors`` may differ from the plan's."""
    bundle: ModelBundle
    spec: PreprocessSpec
    partitions: tuple[Partition, ...]
    backend: Backend = field(default_factory=Backend)
    remark: str = ""
    """What a person should know of how it was planned, in a line."""

    @property
    def run_id(self) -> str:
        return self.plan.run_id

    def pending_units(self) -> list[int]:
        """Indices of the units without a unit file, in order."""
        committed = self.paths.committed_units(self.plan.layout.num_units)
        pending = [index for index in range(self.plan.layout.num_units) if index not in committed]
        # Another driver that finished the run meanwhile has removed the unit files.
        return [] if pending and self.paths.is_finished() else pending


def open_inputs(config: Config) -> tuple[Manifest, ModelBundle, PreprocessSpec]:
    """The manifest, the bundle and the preprocessing after overrides; raises :class:`UsageError`."""
    if config.input.manifest is None:
        raise UsageError("input.manifest: not given; name one with --manifest")
    if config.model.path is None:
        raise UsageError("model.path: not given; name a model bundle with -m")
    if config.output.path is None:
        raise UsageError("output.path: not given; name a directory with -o")
    manifest = open_manifest(config.input.manifest)
    bundle = load_bundle(config.model.path)
    overrides = config.preprocess
    try:
        spec = bundle.preprocess.overridden(**overrides.model_dump())
    except ValueError as error:
        raise UsageError(f"preprocess: {error}") from error
    check_crop_size(bundle.arch, spec.crop_size)
    if reads_rasters(manifest.schema.names, spec):
        require_rasterio()
    check_gpu_share(config.decode, spec)
    return manifest, bundle, spec


def plan_run(config: Config, device: DeviceKind, gpus: Sequence[Gpu] | None = None) -> Run:
    """The run that ``config`` means, planned now or earlier.

    Args:
        gpus: as for :func:`choose_backend`.

    Raises:
        NothingToDo: only unlabelled rows are wanted, and there are none.
        UsageError: bad input, or an unfinished run with other settings stands in the way.
    """
    manifest, bundle, spec = open_inputs(config)
    backend = choose_backend(config, bundle, spec, device, gpus)
    now = Settled(device, backend, result_fields(config, manifest, bundle, spec, device, backend))
    out = storage.absolute(str(config.output.path))
    _check_readable(out)
    storage.check_writable(out)
    device, backend, fields, remark = as_begun(config, manifest, bundle, spec, now, out)
    fingerprint = fingerprint_of(fields)
    new_run = wants_new_run(config, manifest, bundle, out, fingerprint)
    abandon = config.run.on_unfinished == "abandon"
    paths = RunPaths(out, choose_run_id(out, fingerprint, fields, new_run=new_run, abandon=abandon))
    if not storage.exists(paths.plan):
        wanted = wanted_rows(config, manifest, bundle, out)
        layout = choose_layout(config, manifest, wanted, bundle, spec, on_cpus=device == "cpu")
        tables = (normalise_columns(table) for table in _manifest_rows(manifest, wanted))
        plan = _new_plan(
            config, fields, paths.run_id, layout, bundle, has_bytes=manifest.has_bytes, parent=None, device=device
        )
        _create(paths, plan, tables, check_duplicates=config.input.duplicates == "error")
    return replace(open_run(paths, config, bundle, spec), backend=backend, remark=remark)


class Settled(NamedTuple):
    """What a run has for device and backend, and is the same run by."""

    device: DeviceKind
    backend: Backend
    fields: dict[str, Any]
    """For its fingerprint."""
    remark: str = ""


def as_begun(
    config: Config, manifest: Manifest, bundle: ModelBundle, spec: PreprocessSpec, now: Settled, out: str
) -> Settled:
    """``now``, or what the unfinished run has that ``config`` means but for what ``auto`` would be now.

    Only of a run of which something is done, and on a cluster, whose nodes come and go; what is named is no ``auto``.
    """
    if not config.on_cluster:
        return now
    for entry in runs_in_the_way(list_runs(out), fingerprint_of(now.fields)):
        device = entry.plan["device"]
        backend = begun_backend(config, bundle, spec, entry.plan["fields"], device)
        if backend is None or config.resources.device not in ("auto", device):
            continue
        fields = result_fields(config, manifest, bundle, spec, device, backend)
        is_same = fingerprint_of(fields) == entry.plan["fingerprint"]
        if is_same and entry.paths.committed_units(entry.plan["num_units"]):
            remark = (
                f"the run goes on as it was begun, on {device} with {backend.name}, though auto would now be "
                f"{now.device} with {now.backend.name}; to have that, name it and give --set run.on_unfinished=abandon"
            )
            return Settled(device, backend, fields, remark)
    return now


def _check_readable(out: str) -> None:
    """What readers take for a pattern, or for a column of all files below, is no name for a directory of output."""
    if odd := next((part for part in out.split("/") if re.search(r"[*?\[\]=]", part)), None):
        raise UsageError(
            f"output {out}: readers take {odd!r} for a pattern or a partition; choose a directory without any of *?[]="
        )


def plan_retry(config: Config, parent: RunEntry, failed_rows: pa.Array, device: DeviceKind, *, attempt: int) -> Run:
    """A child run over the rows of ``parent`` whose row_id is in ``failed_rows``, in order; row_ids stay the parent's.

    Args:
        attempt: the how many-eth retry of the parent, from 1.
    """
    manifest, bundle, spec = open_inputs(config)
    parent_plan = RunPlan.from_json(dict(parent.plan))
    backend = planned_backend(parent_plan.fields, bundle, device)
    fields = result_fields(config, manifest, bundle, spec, device, backend)
    if fields["manifest"] != parent_plan.fields["manifest"]:
        raise UsageError(f"manifest {manifest.path}: changed since run {parent.run_id}; classify it as a new run")
    if fields["model"] != parent_plan.fields["model"]:
        raise UsageError(
            f"model {bundle.path}: not the one of run {parent.run_id} ({parent_plan.fields['model']}); name that with "
            f"--set model.path=…, or classify as a new run"
        )
    rows_digest = hashlib.sha256(np.sort(failed_rows.to_numpy()).tobytes()).hexdigest()
    fields |= {"parent": parent.run_id, "attempt": attempt, "rows": rows_digest}
    out = parent.paths.out
    run_id = choose_run_id(
        out, fingerprint_of(fields), fields, new_run=config.run.new_run, abandon=True, parent=parent.run_id
    )
    paths = RunPaths(out, run_id)
    if not storage.exists(paths.plan):
        reader = RowsReader(parent.paths)
        tables = read_selected(reader, parent_plan.layout, failed_rows)
        plan = _new_plan(
            config,
            fields,
            run_id,
            cut_rows(config, (len(failed_rows),), bundle, spec, on_cpus=device == "cpu"),
            bundle,
            has_bytes=manifest.has_bytes,
            parent=parent.run_id,
            device=device,
        )
        _create(paths, plan, tables, check_duplicates=False)
        reader.close()
    return open_run(paths, config, bundle, spec)


def open_run(paths: RunPaths, config: Config, bundle: ModelBundle, spec: PreprocessSpec) -> Run:
    """The planned run at ``paths``, to be worked on with this command's ``config``.

    Raises:
        UsageError: it was planned with a variant that the bundle does not hold any more.
    """
    plan = RunPlan.from_json(storage.read_json(paths.plan))
    reader = RowsReader(paths)
    partitions = parse_partitions(plan.config.output.partition_by, reader.schema)
    reader.close()
    return Run(paths, plan, config, bundle, spec, partitions, planned_backend(plan.fields, bundle, plan.device))


def _create(paths: RunPaths, plan: RunPlan, tables: Iterator[pa.Table], *, check_duplicates: bool) -> None:
    with heartbeat(paths):
        left = _leftovers(paths)  # looked for before the plan is: none of them is of a run planned meanwhile
        # Another driver may have planned the run meanwhile, in other units, and be at work on its rows.
        if not storage.exists(paths.plan):
            for uri in left:
                storage.remove(uri)
            _write(paths, plan, tables, check_duplicates=check_duplicates)


def _leftovers(paths: RunPaths) -> list[str]:
    """What would pass for the work of a new run, and is of one whose plan is gone: perhaps of other rows."""
    names = storage.list_names(paths.root)
    works = (paths.units, paths.finalize, paths.files, paths.success, paths.abandoned)
    return [uri for uri in works if uri.rsplit("/", 1)[1] in names]


def _write(paths: RunPaths, plan: RunPlan, tables: Iterator[pa.Table], *, check_duplicates: bool) -> None:
    first = next(tables)
    check = PartitionCheck(parse_partitions(plan.config.output.partition_by, first.schema))

    def checked() -> Iterator[pa.Table]:
        yield check(first)
        for table in tables:
            yield check(table)

    write_rows(paths, plan.layout, checked())
    failpoint("plan.after_rows")
    if check_duplicates:
        refuse_duplicates(paths)
    storage.create_if_absent(paths.plan, storage.json_bytes(plan.to_json()))
    failpoint("plan.after_plan")


def refuse_duplicates(paths: RunPaths) -> None:
    """Raise :class:`UsageError` if an ``image_id`` stands twice in the run's rows; memory is bounded."""
    with spilling(paths.rows, memory_mb=_CHECK_MEMORY_MB) as connection:
        # Of their hashes first, which are small: two thirds of the time and memory of grouping the ids themselves.
        found = connection.execute(
            f"""with ids as (select {IMAGE_ID} as image_id, hash({IMAGE_ID}) as hashed from read_parquet($files)),
            suspects as (select hashed from ids group by hashed having count(*) > 1 limit {_MAX_SUSPECTS})
            select image_id, count(*) from ids semi join suspects using (hashed)
            group by image_id having count(*) > 1 limit 1""",
            {"files": storage.join(paths.rows, "*.parquet")},
        ).fetchone()
    if found:
        raise UsageError(
            f"manifest: image_id {found[0]!r} stands there {found[1]} times; "
            f"make it unique or allow it with --set input.duplicates=keep"
        )


def wanted_rows(config: Config, manifest: Manifest, bundle: ModelBundle, out: str) -> np.ndarray:
    """Which of the manifest's rows, up to ``input.limit``, are to be labelled: bool, one per row.

    Raises:
        NothingToDo: only unlabelled rows are wanted, and there are none.
    """
    num_rows = _num_rows(config, manifest)
    if not _wants_unlabelled(config):
        return np.ones(num_rows, dtype=bool)
    wanted = unlabelled_rows(config, manifest, out, num_rows=num_rows, model_id=bundle.model_id)
    if not wanted.any():
        raise NothingToDo(
            f"nothing to do: this model has labelled, or cannot read, all {num_rows:,} rows in {out} already"
        )
    return wanted


def _num_rows(config: Config, manifest: Manifest) -> int:
    return min(manifest.num_rows, config.input.limit or manifest.num_rows)


def _wants_unlabelled(config: Config) -> bool:
    return config.input.skip_existing or config.input.since_run is not None


def wants_new_run(config: Config, manifest: Manifest, bundle: ModelBundle, out: str, fingerprint: str) -> bool:
    """Whether the command is to start a run beside one of its fingerprint that has finished: asked for, or needed.

    Needed where only unlabelled rows are wanted, and there are some that no finished run of the fingerprint took: a
    run of others was removed since. Rows that failed in a finished run are for a retry.
    """
    if config.run.new_run or not _wants_unlabelled(config):
        return config.run.new_run
    same = [run.run_id for run in list_runs(out) if run.finished and run.plan["fingerprint"] == fingerprint]
    if not same:
        return False
    num_rows, model_id = _num_rows(config, manifest), bundle.model_id
    left = unlabelled_rows(config, manifest, out, num_rows=num_rows, model_id=model_id, taken_by=same)
    return bool(left.any())


def _manifest_rows(manifest: Manifest, wanted: np.ndarray) -> Iterator[pa.Table]:
    """The wanted rows with row_id and image_id; batches without one are left out."""
    metadata = carried_metadata(manifest)
    first_row = 0
    for table in manifest.iter_batches(limit=len(wanted)):
        end = first_row + table.num_rows
        row_ids = pa.array(np.arange(first_row, end, dtype=np.int64))
        rows = manifest.with_image_id(table, first_row).add_column(0, ROW_ID, row_ids)
        rows = rows.replace_schema_metadata(metadata)
        chosen = wanted[first_row:end]
        if chosen.all():
            yield rows
        elif chosen.any():
            yield rows.filter(pa.array(chosen))
        first_row = end


def _new_plan(
    config: Config,
    fields: dict[str, Any],
    run_id: str,
    layout: UnitLayout,
    bundle: ModelBundle,
    *,
    has_bytes: bool,
    parent: str | None,
    device: DeviceKind,
) -> RunPlan:
    check_class_names(config.output.partition_by, bundle.class_names)
    # A retry may be asked for from another directory.
    manifest = config.input.model_copy(update={"manifest": storage.absolute(str(config.input.manifest))})
    model = config.model.model_copy(update={"path": bundle.path})
    config = config.model_copy(update={"input": manifest, "model": model})
    return RunPlan(
        run_id=run_id,
        fingerprint=fingerprint_of(fields),
        fields=fields,
        layout=layout,
        predicted_at=utc_now(),
        probabilities=fields["output.probabilities"],
        device=device,
        backend=fields["backend"],
        has_bytes=has_bytes,
        parent=parent,
        config=config,
    )


def read_plan(entry: RunEntry) -> RunPlan:
    """The plan of a listed run."""
    return RunPlan.from_json(dict(entry.plan))
