"""What a Ray of our own does without, seen in its processes while it does its work."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from imgbatch.config import Config

SPARED = ("monitor.py", "dashboard.py", "_StatsActor", "ActorLocationTracker", "AutoscalingCoordinator")

CLASSIFY_IN_A_RAY_OF_OUR_OWN = """
import contextlib, json, psutil, ray, sys, time
from imgbatch.config import Config
from imgbatch.core.plan import plan_run
from imgbatch.runtime.job import open_engine
from imgbatch.runtime.ray_data import units_done_by_stage
from imgbatch.runtime.session import ray_session

def running():
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            yield " ".join(process.cmdline()), process.environ().get("MALLOC_ARENA_MAX")


config = Config.model_validate_json(sys.argv[1])
run = plan_run(config, "cpu")
with ray_session(config) as is_our_own, open_engine(run) as engine:
    units = [receipt.unit for receipt in engine.classify_units(range(run.plan.layout.num_units), defer=False)]
    done = units_done_by_stage()
    processes = list(running())
    time.sleep(3)  # a process would report what it did within one
    events = ray.timeline()
print(json.dumps({"is_our_own": is_our_own, "units": units, "done": done, "processes": processes, "events": events}))
"""


@pytest.mark.ray
def test_a_job_works_without_what_nobody_asks(photo_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    tree = photo_config.model_dump(mode="json")
    tree["classify"]["engine"] = "ray"
    code = [sys.executable, "-c", CLASSIFY_IN_A_RAY_OF_OUR_OWN, json.dumps(tree)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["is_our_own"]
    assert sorted(seen["units"]) == list(range(8))
    assert seen["done"] == {"decode": 8, "classify": 8}
    [arenas] = {arenas for command, arenas in seen["processes"] if "raylet/raylet" in command}
    assert arenas == "1"
    assert [command for command, _ in seen["processes"] if any(name in command for name in SPARED)] == []
    assert seen["events"] == []
