from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the report extra is not installed")

from imgbatch.report import figures

from .conftest import alpha_of

NAMES = ["$\\frac{1}$", "<b>&amp;", "_private", "猫", "a" * 60]


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_a_figure_stands_inside_html_in_the_colours_of_the_page():
    svg = figures.confidence_histogram([0, 3, 40_000, 7])
    assert svg.startswith('<svg role="img" aria-label="Histogram of confidence over 40,010 images"')
    assert svg.endswith("</svg>")
    assert "var(--accent)" in svg
    assert not re.search(r"#0a0b0\d|xmlns|<style|http", svg)
    assert "40k" in texts(svg)


def test_names_are_drawn_as_they_are():
    svg = figures.confusion_matrix(NAMES, np.eye(5, dtype=np.int64))
    shown = texts(svg)
    assert shown.count("$\\frac{1}$") == 2
    assert shown.count("&lt;b&gt;&amp;amp;") == 2
    assert shown.count("猫") == 2
    assert "a" * 60 not in svg


def test_every_class_of_a_hundred_is_named_and_counts_are_left_out():
    confusion_KK = np.diag(np.full(100, 123))
    shown = texts(figures.confusion_matrix([f"class {k}" for k in range(100)], confusion_KK))
    assert {f"class {k}" for k in range(100)} <= set(shown)
    assert "123" not in shown


def test_small_matrices_show_their_counts():
    shown = texts(figures.confusion_matrix(["a", "b"], np.array([[12_345, 0], [7, 20]])))
    assert {"12.3k", "7", "20"} <= set(shown)
    assert "0" not in shown


def test_the_shade_is_the_share_of_all_rows_of_the_target_also_of_those_left_out():
    confusion_KK = np.array([[10, 0], [0, 5]])
    of_sums = alpha_of(figures.confusion_matrix(["a", "b"], confusion_KK))
    of_all = alpha_of(figures.confusion_matrix(["a", "b"], confusion_KK, np.array([40, 5])))
    assert of_sums == pytest.approx(np.diag([0.8, 0.8]), abs=0.01)
    assert of_all == pytest.approx(np.diag([0.12 + 0.68 * 0.5, 0.8]), abs=0.01)


def test_the_worst_curves_are_named():
    curve = {"recall": [0.0, 0.5, 1.0], "precision": [1.0, 0.9, 0.2]}
    per_class = [{"class_name": n, "average_precision": k / 10, "pr_curve": curve} for k, n in enumerate(NAMES, 1)]
    per_class.append({"class_name": "absent", "average_precision": None, "pr_curve": curve})
    shown = texts(figures.precision_recall(per_class))
    assert [text for text in shown if text.endswith(("0.10", "0.20", "0.30"))]
    assert not [text for text in shown if "absent" in text or text.endswith("0.40")]


def test_reliability_leaves_empty_bins_out():
    empty = {"low": 0.0, "high": 0.5, "count": 0, "confidence": None, "accuracy": None}
    full = {"low": 0.5, "high": 1.0, "count": 9, "confidence": 0.8, "accuracy": 0.7}
    assert figures.reliability_diagram([empty, full]).startswith("<svg")


@pytest.mark.parametrize(
    ("text", "short"),
    [("abc", "abc"), ("a\nb\tc\x00", "a b c"), ("abcdefghijkl", "abcde…ijkl"), ("", "")],
)
def test_names_are_shortened_to_one_line(text, short):
    assert figures.shorten(text, 10) == short
