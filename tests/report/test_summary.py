from __future__ import annotations

import contextlib

import numpy as np
import pytest

from imgbatch.core.views import open_views
from imgbatch.report import picks
from imgbatch.report.summary import Session, Summary, summarise

PROBS = np.array([[0.9, 0.1], [0.6, 0.4], [0.52, 0.48], [0.2, 0.8], [1.0, 0.0]], np.float32)


@pytest.fixture
def run(store_run) -> str:
    statuses = ["EMPTY", "CORRUPT", "CORRUPT", "CORRUPT", "CORRUPT", "CORRUPT"]
    failed = {
        "image_id": [f"bad-{i}" for i in range(6)],
        "status": statuses,
        "error_stage": ["decode"] * 6,
        "error_message": ["no bytes", "bad marker", "bad marker", "odd size", "odd depth", "odd colours"],
    }
    return str(store_run(("cat", "dog"), PROBS, failed=failed))


def test_labels_confidence_and_failures_are_counted(run):
    with contextlib.closing(open_views(run)) as connection:
        summary = summarise(connection, run, is_multilabel=False)
    assert [(each.label, each.count) for each in summary.labels] == [("cat", 4), ("dog", 1)]
    assert summary.labels[0].mean_probability == pytest.approx(0.755)
    assert sum(summary.confidence_bins) == 5
    assert (summary.confidence_bins[10], summary.confidence_bins[19]) == (1, 1)
    assert summary.num_rows == 11
    first, second = summary.failures
    assert (first.status, first.count, first.num_messages, first.messages[0]) == ("CORRUPT", 5, 4, ("bad marker", 2))
    assert (second.status, second.count, second.messages) == ("EMPTY", 1, (("no bytes", 1),))
    assert (summary.images_per_s, summary.cost, summary.slowest_stage, summary.fastest) == (None, None, None, None)


def test_multi_label_rows_count_for_each_of_their_labels(store_run):
    probs = np.array([[0.9, 0.8], [0.6, 0.1], [0.2, 0.3]], np.float32)
    out = str(store_run(("cat", "dog"), probs, task="multilabel"))
    with contextlib.closing(open_views(out)) as connection:
        summary = summarise(connection, out, is_multilabel=True)
        uncertain = picks.pick_least_certain(connection, 3, is_multilabel=True)
        galleries = picks.pick_per_label(connection, ["dog", "cat"], each=2, is_multilabel=True)
    assert [(each.label, each.count) for each in summary.labels] == [("cat", 2), ("dog", 1)]
    assert [each.mean_probability for each in summary.labels] == pytest.approx([0.75, 0.8])
    assert summary.num_predictions == 3
    assert [each.image_id for each in uncertain] == ["image-1", "image-2", "image-0"]
    assert [each.title for each in uncertain] == ["cat", "dog", "dog"]
    assert [(name.name, [pick.probability for pick in name.picks]) for name in galleries] == [
        ("dog", [pytest.approx(0.8)]),
        ("cat", [pytest.approx(0.9), pytest.approx(0.6)]),
    ]


def test_least_certain_is_closest_to_the_threshold_that_the_labels_tell(store_run):
    """Of a model whose labels apply from 0.2 and from 0.8 on."""
    probs = np.array([[0.25, 0.5], [0.01, 0.75], [0.9, 0.95]], np.float32)
    out = str(store_run(("cat", "dog"), probs, task="multilabel", columns={"labels": [["cat"], [], ["cat", "dog"]]}))
    with contextlib.closing(open_views(out)) as connection:
        uncertain = picks.pick_least_certain(connection, 3, is_multilabel=True)
    assert [each.title for each in uncertain] == ["dog", "dog", "cat"]
    assert uncertain[2].image_id == "image-0"
    assert uncertain[2].probability == 0.25


def test_a_label_whose_probability_was_not_stored_has_no_mean(store_run):
    out = str(store_run(("cat", "dog"), np.array([[0.9, 0.8]], np.float32), task="multilabel", keep="none"))
    with contextlib.closing(open_views(out)) as connection:
        summary = summarise(connection, out, is_multilabel=True)
        [uncertain] = picks.pick_least_certain(connection, 3, is_multilabel=True)
    assert [each.mean_probability for each in summary.labels] == [None, None]
    assert (uncertain.title, uncertain.probability) == ("cat", pytest.approx(0.9))


def test_rows_of_a_retry_count_once(store_run):
    failed = {"image_id": ["a", "b"], "status": ["FETCH_FAILED"] * 2}
    out = str(store_run(("cat", "dog"), PROBS, failed=failed))
    later = {"run_id": "r000000000002", "predicted_at": "2026-01-03T00:00:00.000000+00:00"}
    store_run(("cat", "dog"), PROBS[:1], image_ids=["a"], **later)
    with contextlib.closing(open_views(out)) as connection:
        summary = summarise(connection, out, is_multilabel=False)
    assert (summary.num_predictions, summary.num_errors) == (6, 1)


def test_an_image_that_an_older_run_labelled_is_no_failure_of_a_newer_one(store_run):
    out = str(store_run(("cat", "dog"), PROBS))
    later = {"run_id": "r000000000002", "predicted_at": "2026-01-03T00:00:00.000000+00:00"}
    failed = {"image_id": ["image-0", "image-1", "new"], "status": ["FETCH_FAILED", "FETCH_FAILED", "EMPTY"]}
    store_run(("cat", "dog"), PROBS[:0], failed=failed, **later)
    with contextlib.closing(open_views(out)) as connection:
        summary = summarise(connection, out, is_multilabel=False)
        shown = picks.pick_failed(connection, limit=9, each=9)
    assert (summary.num_predictions, summary.num_errors, summary.num_rows) == (5, 1, 6)
    assert [(each.status, each.count) for each in summary.failures] == [("EMPTY", 1)]
    assert [each.image_id for each in shown] == ["new"]


def test_the_least_certain_come_first_and_name_the_runner_up(run):
    with contextlib.closing(open_views(run)) as connection:
        found = picks.pick_least_certain(connection, 2, is_multilabel=False)
    assert [(each.image_id, each.title, each.note) for each in found] == [
        ("image-2", "cat", "or dog 0.48"),
        ("image-1", "cat", "or dog 0.40"),
    ]


def test_samples_are_of_each_label_and_of_each_status(run):
    with contextlib.closing(open_views(run)) as connection:
        galleries = picks.pick_per_label(connection, ["dog", "cat", "owl"], each=2)
        failed = picks.pick_failed(connection, limit=3, each=2)
    assert [(gallery.name, len(gallery.picks)) for gallery in galleries] == [("dog", 1), ("cat", 2)]
    assert [each.title for each in failed] == ["CORRUPT", "CORRUPT", "EMPTY"]
    assert failed[-1].note == "no bytes"


def session(**parts: object) -> Session:
    known = {
        "run_id": "r1",
        "started_at": "2026-01-02T03:04:05+00:00",
        "machine": "2 CPUs",
        "rows": 100,
        "images_per_s": 50.0,
        "busy_s": 2.0,
        "hours": 0.5,
        "stage_seconds": {"classify": 3.0, "decode": 1.0},
        "price_per_hour": 4.0,
    }
    return Session(**known | parts)


def summary_of(*sessions: Session) -> Summary:
    return Summary(1, 0, (), (1,), 0.5, {}, (), sessions)


def test_speed_and_cost_are_summed_over_sessions():
    idle = session(rows=0, images_per_s=None, busy_s=0.0, stage_seconds={})
    summary = summary_of(idle, session(), session(rows=300, busy_s=6.0))
    assert summary.images_per_s == 50
    assert summary.stage_seconds == {"decode": 2.0, "classify": 6.0}
    assert list(summary.stage_seconds) == ["decode", "classify"]
    assert summary.slowest_stage == "classify"
    assert summary.cost == 6


def test_there_is_no_cost_where_one_price_is_missing():
    assert summary_of(session(), session(price_per_hour=None)).cost is None
