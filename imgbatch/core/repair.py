"""Repair: which output files of a finished run are damaged or missing, and writing them anew from unit files.

What a file is made of stands in ``finalize.json``, so only damaged files are written, and only their units are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imgbatch.core import current, storage
from imgbatch.core.finalize import FilesToWrite, count_statuses, group_files, write_files
from imgbatch.core.output_files import OutputFile, find_strays
from imgbatch.core.plan import Run
from imgbatch.core.runs import RunPaths, find_run
from imgbatch.core.verify import check_rows
from imgbatch.errors import RowsDiffer, UsageError


@dataclass(frozen=True)
class Damage:
    """What is wrong with the files of a run."""

    files: list[OutputFile]
    """Missing, or of other content than files.json records."""
    strays: list[str]
    """URIs of files that are not the run's."""

    def __bool__(self) -> bool:
        return bool(self.files or self.strays)

    @property
    def units(self) -> list[int]:
        """Indices of the units whose rows the damaged files held, in order."""
        return sorted({index for file in self.files for index in file.unit_indices()})


def find_damage(paths: RunPaths) -> Damage:
    """Compare the files of a finished run with what files.json says of them.

    Raises:
        UsageError: the records of the run are damaged themselves.
    """
    try:
        recorded = {file["path"]: file["sha256"] for file in storage.read_json(paths.files)["files"]}
        laid_out = _laid_out(paths)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"run {paths.run_id}: files.json or finalize.json cannot be read ({error}), so nothing tells which files "
            f"are whole; classify the manifest anew with --new-run"
        ) from error
    files = [file for file in laid_out if _sha256(storage.join(paths.out, file.path)) != recorded.get(file.path)]
    return Damage(files, find_strays(paths, recorded.keys()))


def _laid_out(paths: RunPaths) -> list[OutputFile]:
    return [OutputFile(**file) for file in storage.read_json(paths.finalize)["files"]]


def _sha256(uri: str) -> str | None:
    try:
        return storage.sha256(uri)
    except FileNotFoundError:
        return None


def rebuild(run: Run, damage: Damage) -> None:
    """Write the damaged files from their unit files, remove the strays, and bring the records up to date.

    From the unit files of then a file gets the bytes of then. From units that were classified again it may differ in
    the last digits of probabilities, and in why a row failed: files.json then records what is there now.

    Raises:
        RowsDiffer: the unit files hold other rows than the files did.
        ImgbatchError: a unit file is missing or damaged, or cannot be read now.
    """
    damaged = {file.path for file in damage.files}
    written = []
    for group in group_files(run, _laid_out(run.paths)):
        if files := [file for file in group if file.path in damaged]:
            written += write_files(run, FilesToWrite(files, len(group)))
    if written:
        _check_rows(run, damage.files)
    for uri in damage.strays:
        storage.remove(uri)
    record = storage.read_json(run.paths.files)
    new = {entry["path"]: entry for entry in written}
    record["files"] = [new.get(entry["path"], entry) for entry in record["files"]]
    record["counts"] = count_statuses(record["files"])
    storage.write_json(run.paths.files, record)
    current.update(run.paths.out)


def _check_rows(run: Run, files: Sequence[OutputFile]) -> None:
    """Raise :class:`RowsDiffer` where a row came out twice or not at all, as one that went from prediction to error
    while another went the other way: then each file has as many rows as ever."""
    failed = [check.detail for check in check_rows(find_run(run.paths.out, run.run_id), None) if not check.ok]
    if failed:
        for file in files:  # no reader is to take them for whole
            storage.remove(storage.join(run.paths.out, file.path))
        raise RowsDiffer(f"run {run.run_id}: {', '.join(failed)}")


def missing_units(run: Run, units: Sequence[int]) -> list[int]:
    """Those of ``units`` whose file is not there any more."""
    committed = run.paths.committed_units(run.plan.layout.num_units)
    return [index for index in units if index not in committed]
