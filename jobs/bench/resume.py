"""How long a run with many finished units takes to see what is left: 200,000 synthetic unit files, all but one there.

    python -m jobs.bench.resume [--units 200000] [--out FOLDER or s3://BUCKET/PREFIX]

Prints the seconds from opening the planned run to the list of pending units, in a fresh process and over again. The
unit files are empty: resuming lists names and opens none.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from imgbatch.core import storage
from imgbatch.core.runs import RunPaths
from jobs.bench.common import describe_machine, spread

RUN_ID = "r000000000000"


def write_units(paths: RunPaths, num_units: int) -> None:
    """All units but the last; on a disk without the fsync of each that a run waits for."""
    if storage.is_local(paths.out):
        storage.local_path(paths.units).mkdir(parents=True)
        for index in range(num_units - 1):
            storage.local_path(paths.unit_file(index)).touch()
        return
    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(lambda index: storage.replace(paths.unit_file(index), b""), range(num_units - 1)):
            pass


def resume(out: str, num_units: int, repeats: int) -> None:
    """List what is committed, as a resumed run does, and say what it took."""
    paths = RunPaths(out, RUN_ID)
    seconds = []
    for _ in range(repeats):
        started, cpu = time.perf_counter(), time.process_time()
        committed = paths.committed_units(num_units)
        pending = [index for index in range(num_units) if index not in committed]
        seconds.append(time.perf_counter() - started)
        if pending != [num_units - 1]:
            raise SystemExit(f"{len(pending)} units pending, not one")
        print(f"{num_units:,} units: {seconds[-1]:.2f} s, of which {time.process_time() - cpu:.2f} s of CPU here")
    print(f"seconds to the list of pending units: {spread(seconds)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=200_000)
    parser.add_argument("--out", help="default: a temporary folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only-resume", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_resume:
        resume(arguments.out, arguments.units, arguments.repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = storage.absolute(arguments.out or folder)
        print(describe_machine())
        write_units(RunPaths(out, RUN_ID), arguments.units)
        command = [sys.executable, "-m", "jobs.bench.resume", "--only-resume", "--out", out]
        subprocess.run([*command, "--units", str(arguments.units), "--repeats", str(arguments.repeats)], check=True)


if __name__ == "__main__":
    main()
