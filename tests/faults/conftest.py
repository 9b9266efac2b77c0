"""A tiny collection, what becomes of it without faults, and the one statement that every fault must leave true."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from imgbatch.config import load_config
from imgbatch.core import storage
from imgbatch.core.failpoints import ONCE_VARIABLE, VARIABLE
from imgbatch.core.finalize import finalize
from imgbatch.core.model import ModelBundle
from imgbatch.core.plan import open_inputs, open_run
from imgbatch.core.runs import RunPaths, list_runs
from imgbatch.core.verify import verify
from tests.conftest import s3_environment
from tests.faults.drivers import Driver, driver

UNIT_ROWS = 16
SETTINGS = {
    "classify.engine": "local",
    "classify.unit_rows": UNIT_ROWS,
    "classify.batch_size": 8,
    "resources.device": "cpu",
    "resources.classify_threads": 1,
    "errors.max_rate": 1.0,
    "output.partition_by": "[shop]",
    "output.keep_units": True,
}


@dataclass(frozen=True)
class Job:
    """One classification: inputs, output and settings, to be run as often as it takes."""

    manifest: Path
    model: str
    out: Path
    folder: Path
    """For logs and markers."""
    settings: dict[str, object] = field(default_factory=lambda: dict(SETTINGS))

    def arguments(self, **changed: object) -> list[str]:
        """Of ``imgbatch``; ``section__key=value`` changes settings."""
        settings = self.settings | {name.replace("__", "."): value for name, value in changed.items()}
        given = ["classify", "-m", self.model, "--manifest", str(self.manifest), "-o", str(self.out)]
        return [*given, *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))]

    def environment(self, failpoints: str = "", *, once: bool = False) -> dict[str, str]:
        """``once``: each failpoint acts in one process only."""
        markers = self.folder / "markers"
        markers.mkdir(exist_ok=True)
        given = {**s3_environment(), VARIABLE: failpoints, "RAY_AUTH_MODE": "disabled"}
        return given | ({ONCE_VARIABLE: str(markers)} if once else {})

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def run(self, failpoints: str = "", **changed: object) -> int:
        """The command's exit code."""
        with driver(self.arguments(**changed), self.log, self.environment(failpoints)) as started:
            return started.wait()

    def last_line(self) -> str:
        """What the last command said last."""
        return self.log.read_text().strip().splitlines()[-1]

    @property
    def paths(self) -> RunPaths:
        """Of the one run there is."""
        (entry,) = (run for run in list_runs(str(self.out)) if not run.abandoned)
        return entry.paths


@pytest.fixture
def job(photo_manifest: Path, tiny_model: ModelBundle, tmp_path: Path) -> Job:
    """120 photos, six of them cut short, in units of 16."""
    return Job(photo_manifest, tiny_model.path, tmp_path / "out", tmp_path)


@pytest.fixture
def start(job: Job) -> Iterator[Callable[..., Driver]]:
    """Starts the job's command beside others; ended after the test."""
    with ExitStack() as stack:

        def started(failpoints: str = "", **changed: object) -> Driver:
            return stack.enter_context(driver(job.arguments(**changed), job.log, job.environment(failpoints)))

        yield started


@pytest.fixture(scope="session")
def oracle(photo_manifest: Path, tiny_model: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The same job, run without a fault."""
    folder = tmp_path_factory.mktemp("oracle")
    undisturbed = Job(photo_manifest, tiny_model.path, folder / "out", folder)
    assert undisturbed.run() == 0
    return undisturbed


def outcomes(job: Job) -> list[tuple[object, ...]]:
    """row_id, image_id, status, label and shop of every row in the job's output files, by row_id."""
    return _read(
        job,
        "select row_id, image_id, 'OK' status, label, shop from read_parquet({predictions}, hive_partitioning=true) "
        "union all select row_id, image_id, status, null, shop from read_parquet({errors}) order by row_id",
    )


def _read(job: Job, sql: str) -> list[tuple[object, ...]]:
    paths = {kind: f"'{job.out}/{kind}/**/*.parquet'" for kind in ("predictions", "errors")}
    with duckdb.connect() as connection:
        return connection.execute(sql.format(**paths)).fetchall()


def assert_exactly_once(job: Job, oracle: Job) -> None:
    """Every row of the manifest once, as without faults; and finalize would give the same bytes again."""
    found = outcomes(job)
    expected_ids = range(pq.read_metadata(job.manifest).num_rows)
    row_ids = [row[0] for row in found]
    assert len(row_ids) == len(set(row_ids)) == len(expected_ids)
    assert set(row_ids) - set(expected_ids) == set(expected_ids) - set(row_ids) == set()
    assert found == outcomes(oracle)
    probabilities = "select unnest(probabilities)::double from read_parquet({predictions}) order by row_id"
    ours, theirs = _read(job, probabilities), _read(oracle, probabilities)
    assert len(ours) == len(theirs)
    assert max(abs(a - b) for (a,), (b,) in zip(ours, theirs, strict=True)) < 1e-5  # type: ignore[operator]
    result = verify(str(job.out))
    assert result.ok, [check for check in result.checks if not check.ok]
    assert all(path.endswith(".parquet") for path in output_bytes(job) if path.startswith(("predictions", "errors")))
    assert Path(job.paths.query_sql).exists()
    if Path(job.paths.units).exists():
        assert_finalize_repeats(job)


def assert_finalize_repeats(job: Job) -> None:
    """Finalize from the same unit files: the same files, byte for byte."""
    before = output_bytes(job)
    paths = job.paths
    for name in (paths.success, paths.files):
        storage.remove(name)
    flags = {"input.manifest": str(job.manifest), "model.path": job.model, "output.path": str(job.out)}
    config = load_config(assignments=job.arguments()[8::2], flags=flags)
    _, bundle, spec = open_inputs(config)
    finalize(open_run(paths, config, bundle, spec))
    assert output_bytes(job) == before


def output_bytes(job: Job) -> dict[str, bytes]:
    """The files that readers see, and the record of them."""
    files = [path for kind in ("predictions", "errors") for path in (job.out / kind).rglob("*") if path.is_file()]
    files += [Path(job.paths.files), Path(job.paths.success)]
    return {str(path.relative_to(job.out)): path.read_bytes() for path in files}


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_stopped(pid: int) -> bool:
    """Whether a process stands still, as after SIGSTOP."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
