"""From the command to its first committed unit: where the seconds go, and which processes take the cores.

    python -m jobs.bench.startup [--repeats 1] [--set section.key=value ...]

A trivial model and twelve units of 64 images, so that every process of a real run comes up. The clock is the command's:
``planned`` is its first line, ``Ray is up`` the line that names the pools, ``first unit begun`` and ``first unit
committed`` are the times of run.json and of the first unit file. Beside it, the CPU seconds of every process until
then, by its name, and the memory that it holds (PSS).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bench.common import describe_machine, find_photographs, save_trivial_model, spread

UNIT_ROWS, NUM_UNITS = 64, 12
MOMENTS = ("planned", "Ray is up", "first unit begun", "first unit committed")
_SAMPLE_S = 0.1
_RAYS = (
    "dashboard/agent",
    "dashboard/dashboard",
    "runtime_env/agent",
    "log_monitor",
    "monitor",
    "gcs_server",
    "raylet",
)


@dataclass
class Start:
    """One start: seconds from the command to each of :data:`MOMENTS`, and what each process took until the last."""

    moments: dict[str, float] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)
    pss_mb: dict[str, float] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="section.key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        photographs = find_photographs(None, scratch, num_drawn=UNIT_ROWS)
        paths = [str(photographs[index % len(photographs)]) for index in range(UNIT_ROWS * NUM_UNITS)]
        manifest = scratch / "manifest.parquet"
        ids = [str(index) for index in range(len(paths))]
        pq.write_table(pa.table({"uri": paths, "image_id": ids}), manifest)
        model = save_trivial_model(scratch / "model")
        machine = describe_machine()
        measure_start(manifest, model, scratch / "warm-up", arguments.settings)
        starts = [
            measure_start(manifest, model, scratch / f"run{number}", arguments.settings)
            for number in range(arguments.repeats)
        ]
    report(starts, machine)


def measure_start(manifest: Path, model: str, out: Path, settings: Sequence[str]) -> Start:
    """One run of the installed command to its end, watched until its first unit is committed."""
    command = [str(Path(sys.executable).with_name("imgbatch")), "classify", "-m", model, "--manifest", str(manifest)]
    wanted = [f"classify.unit_rows={UNIT_ROWS}", "output.keep_units=true", "run.log_format=json", *settings]
    command += ["-o", str(out), *(part for setting in wanted for part in ("--set", setting))]
    started, start = time.time(), Start()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        watching = threading.Thread(target=_watch, args=(psutil.Process(process.pid), out, start), daemon=True)
        watching.start()
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            start.moments.setdefault("planned", time.time() - started)
            if "decode actors" in line:
                start.moments["Ray is up"] = time.time() - started
        watching.join()
    if process.returncode != 0:
        raise SystemExit("".join(lines))
    (record,) = out.glob("runs/*/run.json")
    begun = datetime.fromisoformat(json.loads(record.read_text())["engine_ready_at"]).timestamp()
    committed = min(path.stat().st_mtime for path in out.glob("runs/*/units/unit-*.parquet"))
    start.moments |= {"first unit begun": begun - started, "first unit committed": committed - started}
    return start


def _watch(root: psutil.Process, out: Path, start: Start) -> None:
    """Keeps the last CPU seconds and memory of everything below ``root`` until a unit is committed."""
    cpu_s: dict[tuple[int, str], float] = {}
    while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
        for process in [root, *root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                cpu_s[process.pid, _name(process)] = times.user + times.system
            except psutil.Error:
                continue  # it has ended since
        if next(out.glob("runs/*/units/unit-*.parquet"), None):
            break
        time.sleep(_SAMPLE_S)
    found: dict[str, list[float]] = defaultdict(list)
    memory: dict[str, float] = defaultdict(float)
    # A worker is renamed when it becomes an actor: its last name has it all.
    last = {pid: (name, seconds) for (pid, name), seconds in cpu_s.items()}
    for pid, (name, seconds) in last.items():
        found[name].append(seconds)
        try:
            memory[name] += psutil.Process(pid).memory_full_info().pss / 1e6
        except psutil.Error:
            continue
    start.cpu_s = {f"{len(values)} x {name}": sum(values) for name, values in found.items()}
    start.pss_mb = {f"{len(values)} x {name}": memory[name] for name, values in found.items()}


def _name(process: psutil.Process) -> str:
    """What a process is, in a word."""
    command = " ".join(process.cmdline())
    if actor := re.match(r"ray::(?:MapWorker\(\w*\((\w+)\)\)|([\w]+))", command):
        return actor[1] or actor[2]
    known = {"decode_child": "decoding child", "imgbatch classify": "command"}
    ours = next((name for word, name in known.items() if word in command), None)
    return ours or next((f"Ray's {word}" for word in _RAYS if word in command), process.name())


def report(starts: Sequence[Start], machine: str) -> None:
    """Prints moments and processes as Markdown."""
    print(f"{len(starts)} starts after one to warm up; {machine}\n\n| | seconds from the command |\n| --- | --- |")
    for moment in MOMENTS:
        print(f"| {moment} | {spread([start.moments[moment] for start in starts])} |")
    print(
        "\n| process, until the first unit is committed | CPU seconds, all of them | memory, MB |\n| --- | --- | --- |"
    )
    last = starts[-1]
    for name, seconds in sorted(last.cpu_s.items(), key=lambda pair: -pair[1]):
        print(f"| {name} | {seconds:.1f} | {last.pss_mb[name]:,.0f} |")
    print(f"| all | {sum(last.cpu_s.values()):.1f} | {sum(last.pss_mb.values()):,.0f} |")
    print(f"\nfirst committed unit: {statistics.median(s.moments['first unit committed'] for s in starts):.1f} s")


if __name__ == "__main__":
    main()
