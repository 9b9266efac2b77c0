"""Contestants side by side: in turn, several rounds, each in a process of its own, with the memory of all it starts.

A contestant is a command that writes ``{"images": N, "seconds": S, "startup_seconds": T}`` to a file when it is done;
``seconds`` is its own steady time, and the rate follows from it. One that fails ends the contest.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from jobs.bench.common import describe_machine, spread

_SAMPLE_S = 0.5


@dataclass(frozen=True)
class Contestant:
    """One way to do the work."""

    name: str
    command: Sequence[str]
    """Takes the place of ``{out}`` and ``{result}`` by a fresh directory's name and the file to write."""
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """Of one contestant in one round."""

    images: int
    seconds: float
    """In which they were labelled and written, the engine being up."""
    startup_seconds: float
    """From the start of the process to the beginning of ``seconds``."""
    peak_mb: float
    """Summed PSS of the process and everything below it, at most, MB."""

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds


def compete(
    contestants: Sequence[Contestant], *, repeats: int, scratch: Path, timeout_s: float, save: Path
) -> dict[str, list[Outcome]]:
    """Every contestant once a round, every other round in reverse, so that a drift of the machine favours none.

    Args:
        timeout_s: of one run.
        save: JSON, written after each run, so that what was measured outlives one that fails.

    Raises:
        SystemExit: one failed or took too long.
    """
    outcomes: dict[str, list[Outcome]] = {contestant.name: [] for contestant in contestants}
    for number in range(repeats):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            outcome = run(contestant, scratch / contestant.name / str(number), timeout_s)
            outcomes[contestant.name].append(outcome)
            _save(save, outcomes)
            print(
                f"round {number + 1}, {contestant.name}: {outcome.rate:.1f} images/s ({outcome.images:,} in "
                f"{outcome.seconds:.0f} s, up after {outcome.startup_seconds:.0f} s, {outcome.peak_mb:,.0f} MB)",
                flush=True,
            )
    return outcomes


def run(contestant: Contestant, out: Path, timeout_s: float) -> Outcome:
    """One run.

    Raises:
        SystemExit: it failed or took longer than ``timeout_s``; the end of what it printed is in the message.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    result, log = out.with_suffix(".json"), out.with_suffix(".log")
    command = [part.format(out=out, result=result) for part in contestant.command]
    environment = {**os.environ, **contestant.environment}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        memory = PeakMemory(process.pid)
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            code = None
        peak_mb = memory.stop()
    if code != 0 or not result.exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        how = f"took longer than {timeout_s:.0f} s" if code is None else f"failed with exit code {code}"
        raise SystemExit(f"{contestant.name} {how}:\n{tail}")
    return Outcome(**json.loads(result.read_text()), peak_mb=peak_mb)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With everything below it."""
    for below in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            below.kill()
    process.kill()
    process.wait()


class PeakMemory:
    """Watches a process and everything below it, or with ``below`` only that."""

    def __init__(self, pid: int, *, below: bool = False) -> None:
        self._root, self._below = psutil.Process(pid), below
        self._peak = 0
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def stop(self) -> float:
        """The peak so far, MB."""
        self._ended.set()
        self._watching.join()
        return self._peak / 1e6

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            self._peak = max(self._peak, self._summed_pss())

    def _summed_pss(self) -> int:
        try:
            below = self._root.children(recursive=True)
        except psutil.NoSuchProcess:
            return 0
        return _summed_pss(below if self._below else [self._root, *below])


def _summed_pss(processes: Sequence[psutil.Process]) -> int:
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has ended since
    return total


def write_result(
    target: Path, title: str, intro: str, outcomes: Mapping[str, Sequence[Outcome]], *, yardstick: str, notes: str = ""
) -> None:
    """TARGET.md, TARGET.json, TARGET.png: rates, ratios to ``yardstick`` round by round, start-up, memory.

    The picture needs matplotlib, and is left out without it.
    """
    today = time.strftime("%Y-%m-%d")
    lines = [f"# {title}, {today}", "", intro, f"Machine: {describe_machine()}.", ""]
    lines += [
        f"| | images/s | times {yardstick} | seconds a run | up after, s | peak memory, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base = [outcome.rate for outcome in outcomes[yardstick]]
    for name, runs in outcomes.items():
        ratios = [run.rate / other for run, other in zip(runs, base, strict=True)]
        lines.append(
            f"| {name} | {spread([run.rate for run in runs])} | {spread(ratios)} | "
            f"{statistics.median(run.seconds for run in runs):.0f} | "
            f"{spread([run.startup_seconds for run in runs])} | "
            f"{statistics.median(run.peak_mb for run in runs):,.0f} "
            f"({min(run.peak_mb for run in runs):,.0f} to {max(run.peak_mb for run in runs):,.0f}) |"
        )
    lines += ["", "Medians, with the lowest and highest in brackets; ratios are taken within a round.", "", notes]
    target.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
    _save(target.with_suffix(".json"), outcomes)
    if importlib.util.find_spec("matplotlib") is not None:
        _draw(target.with_suffix(".png"), outcomes)


def _save(target: Path, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    rows = {name: [asdict(run) for run in runs] for name, runs in outcomes.items()}
    values = {"at": time.strftime("%Y-%m-%d"), "machine": describe_machine(), "runs": rows}
    target.write_text(json.dumps(values, indent=1) + "\n")


def _draw(path: Path, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 + 0.4 * len(outcomes)), dpi=100, layout="constrained")
    axes = figure.subplots()
    names = list(outcomes)[::-1]
    medians = [statistics.median(run.rate for run in outcomes[name]) for name in names]
    axes.barh(names, medians, color="#4878a8")
    for place, name in enumerate(names):
        axes.plot([run.rate for run in outcomes[name]], [place] * len(outcomes[name]), "k|", markersize=8)
        axes.annotate(f" {medians[place]:.1f}", (max(run.rate for run in outcomes[name]), place), va="center")
    axes.set_xlabel("images/s (bar: median, strokes: runs)")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
