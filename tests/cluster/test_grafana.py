"""The dashboard asks for metrics, and for labels of theirs, that a run counts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from ray.util.metrics import Counter

from imgbatch.runtime import metrics
from tests.cluster.conftest import CLUSTER

DASHBOARD = json.loads((CLUSTER / "grafana.json").read_text())
METRIC = re.compile(r"\b(ray_imgbatch_\w+)(?:\{([^}]*)\})?")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
GROUPED = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
LEGEND = re.compile(r"\{\{(\w+)\}\}")


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Every metric under the name that Prometheus sees, and its labels, as the counters were made."""
    made: dict[str, set[str]] = {}

    class Recorded(Counter):
        def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None) -> None:
            made[f"ray_{name}"] = set(tag_keys or ())
            super().__init__(name, description, tag_keys)

    monkeypatch.setattr(metrics, "Counter", Recorded)
    metrics.RunMetrics("r1")
    metrics.WaitMetric("r1")
    return made


def targets() -> list[tuple[str, dict[str, Any]]]:
    return [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def queries() -> list[str]:
    variables = [entry["query"]["query"] for entry in DASHBOARD["templating"]["list"] if entry["type"] == "query"]
    return [*(target["expr"] for _, target in targets()), *variables]


def test_every_query_names_metrics_and_labels_that_are_there(exported: dict[str, set[str]]) -> None:
    for query in queries():
        asked = METRIC.findall(query)
        assert asked, query
        for name, matchers in asked:
            assert name in exported, query
            assert set(LABEL.findall(matchers)) <= exported[name], query
        labels = set.union(*(exported[name] for name, _ in asked))
        grouped = {label.strip() for group in GROUPED.findall(query) for label in group.split(",")}
        assert grouped <= labels, query


def test_every_metric_is_shown(exported: dict[str, set[str]]) -> None:
    assert {name for query in queries() for name, _ in METRIC.findall(query)} == set(exported)


@pytest.mark.parametrize(("title", "target"), targets(), ids=[title for title, _ in targets()])
def test_legends_show_labels_that_the_query_keeps(title: str, target: dict[str, Any]) -> None:
    kept = {label.strip() for group in re.findall(r"\bby\s*\(([^)]*)\)", target["expr"]) for label in group.split(",")}
    assert set(LEGEND.findall(target["legendFormat"])) <= kept, title


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
