"""A run under fire: its processes are killed at random, the driver among them, until every image has its row.

    python -m jobs.bench.random_kills [--images 100000] [--kills 100] [--driver-kills 5] [--minutes 5 --folder DIR]

Tiny images, of which every 50th is broken, are labelled by the installed command on a Ray of its own. Victims are
drawn with a seed from what runs at that moment: decode actors, the child processes that decode, classify actors,
the raylet with everything on it, the driver. The time between two kills is longer than an actor
takes to start and a unit to pass; ``--pace`` slows units down so that the work lasts for all of them. Whenever the
driver is gone the same command is run again.

In the end every row of the manifest has to be there once, with the status, the label and the probability (within
1e-5) that its image has without faults. Anything else fails the benchmark.

With ``--minutes`` the driver is killed after that time, which counts; the same call with the same ``--folder``
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from imgbatch.config import load_config
from imgbatch.core.failpoints import VARIABLE
from imgbatch.core.verify import verify
from imgbatch.runtime.job import classify
from jobs.bench.common import describe_machine

NUM_FILES = 1000
BROKEN_EVERY = 50
UNIT_ROWS = 128
POOLS = {"resources.decode_actors": 1, "resources.classify_actors": 1, "resources.classify_threads": 1}
ACTORS = ("DecodeActor", "ClassifyActor")
TOLERANCE = 1e-5
MARK = "IMGBATCH_RANDOM_KILLS"
"""In the environment of everything that the command starts."""


@dataclass(frozen=True)
class Kill:
    """One line of the diary."""

    at: float
    """Seconds since 1970."""
    victim: str
    units_done: int


class Diary:
    """What was killed and how often the command was started, kept in a file so that a later call goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, **entry: Any) -> None:
        self.entries.append(entry)
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    @property
    def kills(self) -> list[Kill]:
        return [Kill(**entry) for entry in self.entries if "victim" in entry]

    @property
    def starts(self) -> int:
        return sum("started" in entry for entry in self.entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--driver-kills", type=int, default=5, help="of them, at least")
    parser.add_argument("--every", type=float, default=12.0, help="seconds between two kills, at least; at most twice")
    parser.add_argument("--pace", type=float, default=2.0, help="seconds that classifying a unit takes longer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "manifest.parquet").exists():
            make_collection(folder, arguments.images)
        diary = Diary(folder / "diary.jsonl")
        deadline = time.time() + 60 * arguments.minutes
        if not fire(folder, diary, arguments, deadline):
            print(f"time is up after {len(diary.kills)} kills; the same call goes on")
            return
        print(describe_machine() + "\n")
        report(folder, diary)


def make_collection(folder: Path, num_images: int) -> None:
    """Files, a model, a manifest that names each file many times, and what each file becomes without faults."""
    import torch

    from imgbatch.core.architectures import SIMPLE_CNN, build_network
    from imgbatch.core.model import save_bundle
    from imgbatch.core.transforms import PreprocessSpec

    rng = np.random.default_rng(0)
    uris = []
    for index in range(min(NUM_FILES, num_images)):
        path = folder / f"image{index:04d}.png"
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
        if index % BROKEN_EVERY == 7:
            path.write_bytes(path.read_bytes()[:200])
        uris.append(str(path))
    torch.manual_seed(0)
    save_bundle(
        str(folder / "model"),
        arch=SIMPLE_CNN,
        task="multiclass",
        class_names=("one", "two", "three"),
        preprocess=PreprocessSpec(resize_size=24, crop_size=24),
        state_dict=build_network(SIMPLE_CNN, 3).state_dict(),
    )
    pq.write_table(pa.table({"uri": uris}), folder / "files.parquet")
    once = {"input.manifest": str(folder / "files.parquet"), "output.path": str(folder / "expected")}
    classify(load_config(flags={**_settings(folder), **once, "classify.engine": "local"}))
    names = [uris[index % len(uris)] for index in range(num_images)]
    ids = [str(index) for index in range(num_images)]
    pq.write_table(pa.table({"uri": names, "image_id": ids}), folder / "manifest.parquet")


def _settings(folder: Path) -> dict[str, Any]:
    return {
        "model.path": str(folder / "model"),
        "input.manifest": str(folder / "manifest.parquet"),
        "output.path": str(folder / "out"),
        "classify.unit_rows": UNIT_ROWS,
        "resources.device": "cpu",
        "errors.max_rate": 1.0,
        "run.no_progress_s": 300.0,
        **POOLS,
    }


def fire(folder: Path, diary: Diary, arguments: argparse.Namespace, deadline: float) -> bool:
    """Run and kill until the command ends well; false: time was up first."""
    rng = random.Random(f"{arguments.seed}/{len(diary.entries)}")
    while True:
        diary.add(started=time.time())
        with _command(folder, arguments.pace) as driver:
            next_kill = None
            while driver.poll() is None:
                time.sleep(0.5)
                processes = find_processes(driver.pid)
                if time.time() > deadline:
                    kill("driver", processes, folder, diary)
                    return False
                # The clock of the first kill starts when there is something of every kind to kill.
                if next_kill is None and all(processes.get(name) for name in ACTORS):
                    next_kill = time.time() + arguments.every * rng.uniform(1, 2)
                if next_kill is not None and time.time() > next_kill and len(diary.kills) < arguments.kills:
                    kill(choose_victim(processes, diary, arguments, rng), processes, folder, diary)
                    next_kill = time.time() + arguments.every * rng.uniform(1, 2)
        diary.add(ended=time.time(), code=driver.returncode)
        if driver.returncode == 0:
            return True


@contextlib.contextmanager
def _command(folder: Path, pace_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """The installed command; whatever it leaves behind is ended with the block."""
    command = [str(Path(sys.executable).with_name("imgbatch")), "classify"]
    command += [part for key, value in _settings(folder).items() for part in ("--set", f"{key}={value}")]
    environment = os.environ | {VARIABLE: f"classify.unit=delay:{pace_s}", MARK: str(folder)}
    with (folder / "log.txt").open("ab") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield driver
    finally:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(folder):
                    process.kill()
        driver.wait()


def find_processes(driver: int) -> dict[str, list[psutil.Process]]:
    """What can be killed now, by kind; Ray writes the class of an actor into the title of its process."""
    found: dict[str, list[psutil.Process]] = {}
    with contextlib.suppress(psutil.Error):
        found["driver"] = [psutil.Process(driver)]
        for process in found["driver"][0].children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                kinds = {"imgbatch.core.decode_child": "decoding child", "raylet/raylet": "raylet"}
                kinds |= {name: name for name in ACTORS if title.startswith("ray::")}
                for words, kind in kinds.items():
                    if words in title:
                        found.setdefault(kind, []).append(process)
                        break
    return found


def choose_victim(
    processes: dict[str, list[psutil.Process]], diary: Diary, arguments: argparse.Namespace, rng: random.Random
) -> str:
    """The driver often enough, the raylet rarely, anything else alike."""
    left = arguments.kills - len(diary.kills)
    drivers_left = arguments.driver_kills - sum(kill.victim == "driver" for kill in diary.kills)
    if rng.random() < max(0, drivers_left) / left:
        return "driver"
    weights = {kind: 1 if kind == "raylet" else 8 for kind in processes if kind != "driver"}
    return rng.choices(list(weights), list(weights.values()))[0] if weights else "driver"


def kill(victim: str, processes: dict[str, list[psutil.Process]], folder: Path, diary: Diary) -> None:
    """SIGKILL to one process of a kind; to the raylet with all that runs on its node. Counts if there was one."""
    chosen = processes.get(victim, [])[:1]
    if victim == "raylet":
        chosen += [child for process in chosen for child in process.children(recursive=True)]
    num_killed = 0
    for process in chosen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            num_killed += 1
    if num_killed == 0:
        return
    units_done = len(list(folder.glob("out/runs/*/units/*.parquet")))
    diary.add(**asdict(Kill(time.time(), victim, units_done)))


def report(folder: Path, diary: Diary) -> None:
    """Hold the output to what each file becomes without faults, and print what happened as Markdown."""
    rows = compare(folder)
    result = verify(str(folder / "out"))
    kills = Counter(kill.victim for kill in diary.kills)
    started = min(entry["started"] for entry in diary.entries if "started" in entry)
    ended = max(entry["ended"] for entry in diary.entries if "ended" in entry)
    ended_alone = Counter(entry["code"] for entry in diary.entries if entry.get("code", 0) not in (0, -9))
    print("| | |\n| --- | --- |")
    print(f"| images | {rows['planned']:,} in units of {UNIT_ROWS} |")
    print(f"| kills | {len(diary.kills)}: " + ", ".join(f"{n} {victim}" for victim, n in kills.most_common()) + " |")
    print(f"| starts of the command | {diary.starts}; exit codes of its own: {dict(ended_alone) or 'none'} |")
    print(f"| from the first start to the end | {(ended - started) / 60:.0f} minutes |")
    for name in ("written", "distinct", "missing", "unknown", "other status", "other label", "other probability"):
        print(f"| rows {name} | {rows[name]:,} |")
    print(f"| imgbatch verify | {'ok' if result.ok else [check for check in result.checks if not check.ok]} |")
    wrong = [name for name in ("missing", "unknown", "other status", "other label", "other probability") if rows[name]]
    if wrong or not result.ok or not rows["planned"] == rows["written"] == rows["distinct"]:
        raise SystemExit(f"not exactly once: {wrong or result.checks}")


def compare(folder: Path) -> dict[str, int]:
    """Counts of rows, and of those that are not what their file becomes without faults."""
    with duckdb.connect() as connection:
        for name in ("out", "expected"):
            connection.execute(
                f"create view {name} as select row_id, image_id, uri, 'OK' status, label, probability from "
                f"read_parquet('{folder}/{name}/predictions/**/*.parquet') union all select row_id, image_id, uri, "
                f"status, null, null from read_parquet('{folder}/{name}/errors/**/*.parquet')"
            )
        connection.execute(f"create view rows as select * from '{folder}/manifest.parquet'")
        pairs = "from out join expected using (uri) where"
        queries = {
            "planned": "from rows",
            "written": "from out",
            "distinct": "from (select distinct row_id from out)",
            "missing": "from rows anti join out on rows.image_id = out.image_id",
            "unknown": "from out anti join rows on rows.image_id = out.image_id",
            "other status": f"{pairs} out.status <> expected.status",
            "other label": f"{pairs} out.label is distinct from expected.label",
            "other probability": f"{pairs} abs(out.probability - expected.probability) > {TOLERANCE}",
        }
        found = {name: connection.execute(f"select count(*) {query}").fetchone() for name, query in queries.items()}
    return {name: int(row[0]) if row else 0 for name, row in found.items()}


if __name__ == "__main__":
    main()
