from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from imgbatch.core import current, rank_sample, storage
from imgbatch.core.runs import RunPaths
from imgbatch.core.scored import read_labeller
from imgbatch.core.views import open_views
from imgbatch.errors import UsageError
from imgbatch.report.page import write_report
from imgbatch.report.quality import Quality, measure, round_up

from .conftest import alpha_of, softmax

pytest.importorskip("jinja2", reason="the report extra is not installed")
pytest.importorskip("matplotlib", reason="the report extra is not installed")

HOSTILE = "<script>alert(1)</script>"


def test_the_first_screen_says_what_was_labelled_what_failed_and_how_good_it_is(photo_run, read_page):
    page = read_page(write_report(str(photo_run())))
    head = " ".join(page.text.split())
    for text in ("114 of 120 images labelled", "Failed 6", "6 TRUNCATED", "Right", "95% interval"):
        assert text in head
    for section in ("labels", "failures", "quality", "images", "speed", "made"):
        assert ("section", "id", section) in page.attributes


def test_the_page_is_where_the_run_is_unless_it_is_asked_for_elsewhere(photo_run, tmp_path):
    out = photo_run()
    assert write_report(str(out), max_thumbnails=0) == RunPaths(str(out), "r000000000001").report
    assert write_report(str(out), file=str(tmp_path / "x" / "page.html"), max_thumbnails=0) == str(
        tmp_path / "x" / "page.html"
    )
    assert (tmp_path / "x" / "page.html").exists()


def test_it_shows_images_and_tiles_for_those_that_cannot_be_shown(photo_run, read_page):
    page = read_page(write_report(str(photo_run())))
    assert len(page.pictures) > 60
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in page.pictures)
    assert page.text.count("TRUNCATED") >= 7  # the first screen, the table, a tile for each of six images


def test_no_thumbnails_where_none_are_wanted(photo_run, read_page):
    assert read_page(write_report(str(photo_run()), max_thumbnails=0)).pictures == []


def test_the_same_output_gives_the_same_page(photo_run):
    out = str(photo_run())
    assert Path(write_report(out)).read_bytes() == Path(write_report(out)).read_bytes()


def test_nothing_is_loaded_and_nothing_runs(photo_run, read_page):
    page = read_page(write_report(str(photo_run()), max_thumbnails=20))
    loading = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert loading
    assert not [value for value in loading if not value.startswith(("data:image/", "#"))]
    assert not {"script", "link", "iframe", "object", "embed", "form"} & set(page.tags)
    styles = [page.text, *(value for _, _, value in page.attributes)]
    assert not [style for style in styles if "url(" in style.replace("url(#", "")]
    [policy] = [value for tag, name, value in page.attributes if name == "content" and "default-src" in value]
    assert "default-src 'none'" in policy


def test_hostile_names_uris_and_messages_stay_text(store_run, read_page):
    uri = f'/nowhere/{HOSTILE}" onerror="alert(2)/x\'.jpg'
    names = (HOSTILE, "a\"b'c & $x_1$", "_\u202edrow\n\t𒀀 </svg><style>*{}</style>")
    failed = {
        "image_id": [HOSTILE],
        "uri": [uri],
        "target": [names[0]],
        "site": [HOSTILE],
        "status": ["CORRUPT"],
        "error_message": [f"{HOSTILE} </td></table>"],
    }
    columns = {
        "uri": [uri] * 60,
        "target": [names[k % 3] for k in range(59)] + [f"unknown {HOSTILE}"],
        "site": [HOSTILE, "</table>"] * 30,
    }
    probs = softmax(np.random.default_rng(0).normal(size=(60, 3)) * 2)
    page = read_page(write_report(str(store_run(names, probs, columns=columns, failed=failed))))
    assert "script" not in page.tags
    assert page.tags.count("style") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.text
    assert "$x_1$" in page.text
    assert ("figure", "title", uri) in page.attributes


def test_binary(store_run, read_page):
    targets = np.arange(80) % 2
    probs = softmax(np.random.default_rng(0).normal(size=(80, 2)) + 2 * (targets[:, None] == np.arange(2)))
    out = store_run(("no", "yes"), probs, task="binary", columns={"target": [("no", "yes")[k] for k in targets]})
    page = read_page(write_report(str(out), max_thumbnails=0))
    assert "All 80 images labelled" in page.text
    for text in ("ROC area", "Most confused", "Not to be had: top5"):
        assert text in page.text


def test_multilabel(store_run, read_page):
    rng = np.random.default_rng(0)
    truth = rng.random((80, 4)) < 0.4
    probs = (1 / (1 + np.exp(-(rng.normal(size=(80, 4)) + 3 * (truth - 0.5))))).astype(np.float32)
    names = ("road", "water", "forest", "field")
    targets = [[names[k] for k in np.flatnonzero(row)] for row in truth]
    out = store_run(
        names, probs, task="multilabel", columns={"targets": targets, "uri": ["/nowhere/image.jpg"] * len(probs)}
    )
    page = read_page(write_report(str(out)))
    for text in ("All labels right", "best F1 from", "Most confident mistakes", "Least certain", "NOT_FOUND"):
        assert text in page.text
    assert "Confusion" not in page.text


def test_images_of_which_nothing_is_true_and_nothing_was_said(store_run, read_page):
    columns = {"targets": pa.array([[]] * 6, pa.list_(pa.string()))}
    out = store_run(("road", "water"), np.full((6, 2), 0.1, np.float32), task="multilabel", columns=columns)
    page = read_page(write_report(str(out), max_thumbnails=0))
    assert "6 rows measured" in page.text
    assert "worst F1 first" not in page.text


def test_a_rank_that_is_too_dear_to_draw_again_and_again_says_so(photo_run, read_page, monkeypatch):
    monkeypatch.setattr(rank_sample, "_BOOTSTRAP_VALUES", 1000)
    page = read_page(write_report(str(photo_run()), max_thumbnails=0))
    assert "The ROC area has none: 114 rows of 3 classes are too many to draw again and again." in page.text


def test_many_classes_with_top_k_only(store_run, read_page):
    names = [f"class {k}" for k in range(150)]
    targets = np.random.default_rng(1).integers(0, 150, 400)
    logits = np.random.default_rng(0).normal(size=(400, 150))
    logits[np.arange(400), targets] += 3
    out = store_run(names, softmax(logits), keep="top_k", columns={"target": [names[k] for k in targets]})
    page = read_page(write_report(str(out), max_thumbnails=0))
    assert "The 40 classes with the most mistakes" in page.text
    assert "log loss, brier, rank, label errors (needs every class's probability" in page.text


def test_the_matrix_of_a_part_of_the_classes_keeps_the_shares_of_all_rows(store_run):
    """Class 0 is right in 10 rows of 40; its mistakes are spread over classes that the part leaves out."""
    wrong = [(0, k) for k in range(60, 90)] + [(k, k + 1) for k in range(1, 40, 2) for _ in range(3)]
    pairs = [(0, 0)] * 10 + wrong
    names = [f"class {k:03d}" for k in range(101)]
    probs = np.full((len(pairs), 101), 0.001, np.float32)
    probs[np.arange(len(pairs)), [label for _, label in pairs]] = 0.9
    out = str(store_run(names, probs, keep="top_k", columns={"target": [names[target] for target, _ in pairs]}))
    with contextlib.closing(open_views(out)) as connection:
        labeller = read_labeller(connection, out)
        found = measure(connection, out, labeller, manifest=None, split=None, slice_by=())
    assert isinstance(found, Quality)
    assert found.matrix is not None
    assert alpha_of(found.matrix.svg)[0, 0] == pytest.approx(0.12 + 0.68 * 0.5, abs=0.01)


@pytest.mark.parametrize(
    ("threshold", "shown"),
    [(0.0, "0.0000"), (0.5, "0.5000"), (0.99725, "0.9973"), (1 - 2**-15, "0.999970"), (1.0, "1")],
)
def test_a_threshold_is_rounded_so_that_no_row_below_it_is_accepted(threshold, shown):
    assert round_up(threshold) == shown


def test_the_threshold_advised_is_one_that_the_advice_is_true_of(store_run, read_page):
    probs = np.array([[0.99731, 0.00269]] * 50 + [[0.9, 0.1]] * 50, np.float32)
    out = store_run(("a", "b"), probs, columns={"target": ["a"] * 50 + ["b"] * 50})
    page = read_page(write_report(str(out), max_thumbnails=0))
    assert "From 0.9974 up, 50% are accepted and at most 1% of them wrong." in page.text


def test_without_targets_it_says_why_nothing_was_measured(photo_run, read_page):
    page = read_page(write_report(str(photo_run(columns=False)), max_thumbnails=0))
    assert "no column target: nothing to measure against" in page.text
    assert ("section", "id", "quality") not in page.attributes


def test_targets_that_the_model_does_not_know_are_named(store_run, read_page):
    probs = softmax(np.random.default_rng(0).normal(size=(10, 2)))
    out = store_run(("a", "b"), probs, columns={"target": ["violet"] * 10})
    page = read_page(write_report(str(out), max_thumbnails=0))
    assert "violet (10)" in page.text


def test_targets_of_another_manifest_and_columns_to_compare(photo_run, read_page, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    targets = pa.table(
        {
            "uri": [f"x{i}" for i in range(114)],
            "image_id": [f"image-{i}" for i in range(114)],
            "target": ["red", "green", "blue"] * 38,
            "shop": ["one", "two"] * 57,
        }
    )
    pq.write_table(targets, tmp_path / "targets.parquet")
    out = str(photo_run(columns=False))
    written = write_report(out, manifest=str(tmp_path / "targets.parquet"), slice_by=["shop"], max_thumbnails=0)
    assert "By shop, worst first" in read_page(written).text
    with pytest.raises(UsageError, match="--slice-by colour: no such column"):
        write_report(out, manifest=str(tmp_path / "targets.parquet"), slice_by=["colour"])


def test_columns_with_few_values_are_compared_unasked(photo_run, read_page):
    assert "By site, worst first" in read_page(write_report(str(photo_run()), max_thumbnails=0)).text


def test_rows_that_the_model_was_trained_on_are_pointed_out(store_run, read_page):
    probs = softmax(np.random.default_rng(0).normal(size=(40, 2)))
    columns = {"target": ["a", "b"] * 20, "split": ["train"] * 30 + ["test"] * 10}
    failed = {"image_id": ["x"], "target": ["a"], "split": ["test"], "status": ["EMPTY"]}
    out = str(store_run(("a", "b"), probs, columns=columns, failed=failed))
    notices = ("30 of them are of the split “train”, which a model may know by heart", "training rows included")
    of_all = read_page(write_report(out, max_thumbnails=0)).text
    of_test = read_page(write_report(out, max_thumbnails=0, split="test")).text
    for notice in notices:
        assert notice in of_all
        assert notice not in of_test


def test_speed_and_cost_are_those_of_the_sessions(photo_run, read_page):
    out = photo_run()
    session = {
        "engine": "local",
        "pools": "2 decode actors",
        "started_at": "2026-01-02T03:00:00+00:00",
        "engine_ready_at": "2026-01-02T03:20:00+00:00",
        "finished_at": "2026-01-02T03:30:00+00:00",
        "rows": 120,
        "images_per_s": 0.2,
        "stage_seconds": {"decode": 60.0, "classify": 240.0},
        "config": {"report": {"price_per_hour": 3.0}},
    }
    record = {"machine": {"cpus": 2, "gpus": 0}, "sessions": [session]}
    storage.write_json(RunPaths(str(out), "r000000000001").run_json, record)
    text = " ".join(read_page(write_report(str(out), max_thumbnails=0)).text.split())
    assert "0.2 images/s" in text
    assert "most work in classify; cost 1.5" in text
    assert "decode602" in text  # cells: the stage, 60 seconds, two images a second
    text = " ".join(read_page(write_report(str(out), max_thumbnails=0, price_per_hour=8)).text.split())
    assert "4 in all for 30 min" in text


@pytest.mark.parametrize(("rows", "rate"), [(60, "25,000 per million images"), (0, None)])
def test_the_cost_per_million_is_that_of_the_rows_which_the_sessions_classified(photo_run, read_page, rows, rate):
    out = photo_run()
    session = {
        "pools": None,
        "started_at": "2026-01-02T03:00:00+00:00",
        "engine_ready_at": "2026-01-02T03:20:00+00:00",
        "finished_at": "2026-01-02T03:30:00+00:00",
        "rows": rows,
        "images_per_s": rows / 600 or None,
        "stage_seconds": {},
        "config": {"report": {"price_per_hour": 3.0}},
    }
    record = {"machine": {"cpus": 2, "gpus": 0}, "sessions": [session]}
    storage.write_json(RunPaths(str(out), "r000000000001").run_json, record)
    text = " ".join(read_page(write_report(str(out), max_thumbnails=0)).text.split())
    assert "1.5 in all for 30 min" in text
    assert rate in text if rate else "per million images" not in text


def test_an_output_without_one_prediction_has_a_page(store_run, read_page):
    failed = {"image_id": ["a", "b"], "status": ["EMPTY", "NOT_FOUND"], "error_stage": ["decode", "fetch"]}
    out = store_run(("a", "b"), np.zeros((0, 2), np.float32), failed=failed)
    page = read_page(write_report(str(out), max_thumbnails=0))
    assert "0 of 2 images labelled" in page.text


def test_the_page_of_a_run_reads_no_other_night(photo_run, store_run):
    out = photo_run()
    alone = Path(write_report(str(out))).read_bytes()
    store_run(("red", "green"), np.full((2, 2), 0.5), run_id="r000000000002", predicted_at="2026-01-03T00:00:00+00:00")
    (out / "predictions/run_id=r000000000002/part-00000.parquet").unlink()
    assert Path(write_report(str(out), run_id="r000000000001")).read_bytes() == alone


def test_the_page_of_a_retry_shows_the_run_that_it_completes(store_run, read_page):
    failed = {"image_id": ["late"], "status": ["NOT_FOUND"]}
    nights = {"r000000000001": (3, failed), "r000000000002": (1, None), "r000000000003": (20, None)}
    for day, (run_id, (count, missing)) in enumerate(nights.items(), 1):
        ids = ["late"] if run_id == "r000000000002" else [f"{run_id}-{i}" for i in range(count)]
        probs_NK = np.full((count, 2), 0.5, np.float32)
        at = f"2026-01-0{day}T00:00:00+00:00"
        out = store_run(("hat", "mug"), probs_NK, run_id=run_id, predicted_at=at, image_ids=ids, failed=missing)
    plan = RunPaths(str(out), "r000000000002").plan
    storage.write_json(plan, storage.read_json(plan) | {"parent": "r000000000001"})
    current.update(str(out))
    for run_id in ("r000000000001", "r000000000002"):
        page = write_report(str(out), run_id=run_id, max_thumbnails=0)
        assert page == RunPaths(str(out), "r000000000002").report
        assert "All 4 images labelled" in read_page(page).text


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="no finished run there"):
        write_report(str(tmp_path))


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_one_line_that_says_what_to_install(photo_run, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"needs {package}, which pip install 'imgbatch\[report\]' brings"):
        write_report(str(photo_run()))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_renders_it(photo_run, tmp_path, scheme):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on the PATH")
    written = write_report(str(photo_run()), max_thumbnails=10)
    screenshot = tmp_path / "page.png"
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=800,1200", f"--screenshot={screenshot}"]
    subprocess.run([*command, Path(written).as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(screenshot) as image:
        pixels = np.asarray(image.convert("L"))
    corner, spread = int(pixels[2, 2]), np.unique(pixels).size
    assert corner > 200 if scheme == "light" else corner < 60
    assert spread > 50
