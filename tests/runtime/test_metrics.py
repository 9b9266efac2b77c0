"""The metrics of a run as Prometheus would scrape them."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import pytest

from imgbatch.config import Config
from imgbatch.runtime.job import classify
from tests.conftest import changed

SCRAPED_WITHIN_S = 60

pytestmark = [pytest.mark.soak, pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def scrape() -> str:
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def value(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    total = 0.0
    for line in text.splitlines():
        found = re.match(rf"ray_{name}\{{(.*)\}} (\S+)", line)
        if found and all(f'{key}="{wanted}"' in found[1] for key, wanted in labels.items()):
            total += float(found[2])
    return total


def test_rows_units_seconds_and_waiting_are_counted(photo_config: Config, tmp_path: Path) -> None:
    config = changed(
        photo_config,
        classify__engine="ray",
        output__path=str(tmp_path / "on_ray"),
        resources__decode_actors=1,
        resources__classify_actors=1,
    )
    result = classify(config)
    run = {"run_id": result.run_id}
    deadline = time.monotonic() + SCRAPED_WITHIN_S
    while value(text := scrape(), "imgbatch_rows_total", **run) < 120 and time.monotonic() < deadline:
        time.sleep(1)
    assert value(text, "imgbatch_rows_total", **run, status="OK") == 114
    assert value(text, "imgbatch_rows_total", **run) == 120
    assert value(text, "imgbatch_units_total", **run, outcome="committed") == 8
    assert value(text, "imgbatch_stage_seconds_total", **run, stage="classify") > 0
    assert value(text, "imgbatch_classify_wait_seconds_total", **run) > 0
