from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.core.corrections import read_corrections
from imgbatch.core.evaluate import evaluate
from imgbatch.core.manifest import open_manifest
from imgbatch.core.review import export_review, join_labels
from imgbatch.core.targets import import_corrections
from imgbatch.core.training.labelled import read_labelled
from imgbatch.errors import UsageError

CLASSES = ("red", "green", "blue")
PROBS = np.array(
    [[0.9, 0.05, 0.05], [0.4, 0.35, 0.25], [0.1, 0.5, 0.4], [0.3, 0.35, 0.35], [0.05, 0.05, 0.9], [0.6, 0.3, 0.1]],
    np.float32,
)


def _margins(probs: np.ndarray) -> pa.Array:
    ordered = np.sort(probs, axis=1)
    return pa.array(ordered[:, -1] - ordered[:, -2])


@pytest.fixture
def out(store_run):
    columns = {
        "margin": _margins(PROBS),
        "target": ["red", "green", "green", "blue", "blue", None],
        "split": ["train", "train", "validation", "train", "train", "train"],
    }
    return str(store_run(CLASSES, PROBS, columns=columns))


@pytest.fixture
def multilabel_out(store_run):
    def make(keep: str = "all") -> str:
        probs = np.array([[0.9, 0.52, 0.1], [0.2, 0.05, 0.45], [0.99, 0.98, 0.7]], np.float32)
        margin = pa.nulls(3, pa.float32())
        return str(store_run(CLASSES, probs, task="multilabel", columns={"margin": margin}, keep=keep, out=keep))

    return make


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _fill(path: Path, corrected: dict[str, str]) -> None:
    rows = _read(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"corrected": corrected.get(row["image_id"], "")} for row in rows)


def test_the_least_certain_come_first(out, tmp_path):
    found = export_review(out, str(tmp_path / "review.csv"))
    rows = _read(tmp_path / "review.csv")
    assert found.num_images == len(rows) == 6
    assert [row["image_id"] for row in rows] == [f"image-{i}" for i in (3, 1, 2, 5, 0, 4)]
    assert list(rows[0]) == ["image_id", "uri", "label", "probability", "margin", "target", "corrected"]
    assert rows[1] | {"uri": ""} == {
        "image_id": "image-1",
        "uri": "",
        "label": "red",
        "probability": "0.400000",
        "margin": "0.050000",
        "target": "green",
        "corrected": "",
    }
    assert rows[3]["target"] == ""


def test_a_budget_per_class_and_in_all(out, tmp_path):
    path = tmp_path / "review.csv"
    export_review(out, str(path), per_class=1)
    assert [row["image_id"] for row in _read(path)] == ["image-3", "image-1", "image-4"]
    export_review(out, str(path), per_class=1, limit=2, overwrite=True)
    assert [row["image_id"] for row in _read(path)] == ["image-3", "image-1"]


@pytest.mark.parametrize("keep", ["all", "top_k"])
def test_multi_label_is_least_certain_at_the_threshold(multilabel_out, tmp_path, keep):
    path = tmp_path / "review.csv"
    export_review(multilabel_out(keep), str(path))
    rows = _read(path)
    assert [(row["image_id"], row["labels"], row["nearest_label"], row["margin"]) for row in rows] == [
        ("image-0", "red|green", "green", "0.020000"),
        ("image-1", "[]", "blue", "0.050000"),
        ("image-2", "red|green|blue", "blue", "0.200000"),
    ]


def test_multi_label_thresholds_come_from_the_bundle(store_run, make_bundle, tmp_path):
    bundle = make_bundle(class_names=CLASSES, task="multilabel", thresholds={"labels": {"red": 0.9}})
    probs = np.array([[0.2, 0.4, 0.1], [0.89, 0.1, 0.1]], np.float32)
    columns = {"margin": pa.nulls(2, pa.float32())}
    out = str(store_run(CLASSES, probs, task="multilabel", columns=columns, model_id=bundle.model_id))
    export_review(out, str(tmp_path / "review.csv"), model=bundle.path)
    assert [row["nearest_label"] for row in _read(tmp_path / "review.csv")] == ["red", "green"]
    with pytest.raises(UsageError, match="but the predictions come from"):
        export_review(out, str(tmp_path / "other.csv"), model=make_bundle("other", class_names=CLASSES).path)


@pytest.mark.parametrize("keep", ["all", "top_k"])
def test_without_the_bundle_the_labels_tell_the_thresholds(store_run, tmp_path, keep):
    """Of a model whose labels apply from 0.2 and from 0.8 on."""
    probs = np.array([[0.25, 0.5, 0.01], [0.01, 0.77, 0.01], [0.9, 0.95, 0.01]], np.float32)
    columns = {"margin": pa.nulls(3, pa.float32()), "labels": [["red"], [], ["red", "green"]]}
    out = str(store_run(CLASSES, probs, task="multilabel", columns=columns, keep=keep))
    export_review(out, str(tmp_path / "review.csv"))
    rows = {row["image_id"]: (row["nearest_label"], row["margin"]) for row in _read(tmp_path / "review.csv")}
    assert rows == {
        "image-0": ("red", "0.120000"),
        "image-1": ("green", "0.090000"),
        "image-2": ("green", "0.090000"),
    }


def test_a_cell_of_labels_survives_names_with_the_separator():
    assert join_labels(["a", "b"]) == "a|b"
    assert json.loads(join_labels(["a|b", "c"])) == ["a|b", "c"]


def test_corrections_become_a_manifest_that_evaluate_and_train_take(out, tmp_path):
    review, targets = tmp_path / "review.csv", tmp_path / "targets.parquet"
    export_review(out, str(review))
    _fill(review, {"image-1": "green", "image-3": "green", "image-2": "green", "image-0": "red"})
    found = import_corrections(str(review), str(targets), out=out)
    assert (found.num_rows, found.num_corrections, found.num_changed, found.num_empty) == (4, 4, 1, 2)
    table = pq.read_table(targets)
    assert table.column_names == ["uri", "image_id", "target", "split"]
    by_id = {row["image_id"]: row for row in table.to_pylist()}
    assert by_id["image-1"] == {
        "uri": "s3://bucket/image-1.jpg",
        "image_id": "image-1",
        "target": "green",
        "split": "train",
    }
    metrics = evaluate(out, manifest=str(targets), directory=str(tmp_path / "eval")).metrics
    assert metrics["rows"]["measured"] == 4
    assert metrics["top1"] == 0.75
    labelled = read_labelled(open_manifest(str(targets)), task="auto")
    assert labelled.class_names == ("green", "red")
    assert len(labelled.splits["validation"]) == 1


def test_rows_left_empty_can_be_taken_as_right(out, tmp_path):
    review = tmp_path / "review.csv"
    export_review(out, str(review))
    _fill(review, {"image-3": "blue"})
    found = read_corrections(str(review), accept_empty=True)
    assert len(found.by_image_id) == 6
    assert found.by_image_id["image-3"].truth == ("blue",)
    assert [each.image_id for each in found.by_image_id.values() if each.changed] == ["image-3"]


def test_corrections_within_the_manifest_that_they_correct(out, tmp_path):
    review, manifest, targets = tmp_path / "review.csv", tmp_path / "manifest.parquet", tmp_path / "new.parquet"
    rows = {
        "uri": [f"s3://bucket/image-{i}.jpg" for i in (7, 1, 3)],
        "image_id": [f"image-{i}" for i in (7, 1, 3)],
        "target": ["blue", "red", None],
        "split": ["validation", "train", "test"],
        "price": [1.5, 2.5, 3.5],
    }
    pq.write_table(pa.table(rows), manifest)
    export_review(out, str(review))
    _fill(review, {"image-1": "green", "image-3": "blue", "image-2": "green"})
    found = import_corrections(str(review), str(targets), out=out, manifest=str(manifest))
    assert found.num_rows == 4
    table = pq.read_table(targets)
    assert table["image_id"].to_pylist() == ["image-7", "image-1", "image-3", "image-2"]
    assert table["target"].to_pylist() == ["blue", "green", "blue", "green"]
    assert table["split"].to_pylist() == ["validation", "train", "test", "validation"]
    assert table["price"].to_pylist() == [1.5, 2.5, 3.5, None]


def test_embedded_images_are_corrected_in_their_manifest(store_run, tmp_path):
    out = str(store_run(CLASSES, PROBS, columns={"margin": _margins(PROBS)}, image_ids=[str(i) for i in range(6)]))
    review, manifest, targets = tmp_path / "review.csv", tmp_path / "manifest.parquet", tmp_path / "new.parquet"
    pq.write_table(pa.table({"bytes": [bytes([i]) for i in range(6)]}), manifest)
    export_review(out, str(review))
    _fill(review, {"3": "blue"})
    import_corrections(str(review), str(targets), out=out, manifest=str(manifest))
    table = pq.read_table(targets)
    assert table["bytes"].to_pylist() == [bytes([i]) for i in range(6)]
    assert table["target"].to_pylist() == [None, None, None, "blue", None, None]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("image_id,label,corrected\na,red,violet\n", "row 2: unknown class 'violet'"),
        ("image_id,label,corrected\na,red,red\nb,red,\na,red,blue\n", "row 4: image_id 'a' stands in row 2 too"),
        ("image_id,label,corrected\n,red,red\n", "row 2: image_id is empty"),
        ("image_id,label,corrected\na,red,\n", "nothing is filled in"),
        ("image_id,label\na,red\n", "row 1: no column 'corrected'"),
        ("image_id,label,corrected\na,red\n", "row 2: 2 cells where the header has 3"),
        ("", "row 1: no column 'image_id'"),
        ("image_id,labels,corrected\na,red,red|red\n", "row 2: class 'red' stands there twice"),
        ("image_id,labels,corrected\na,red,[red]\n", "row 2: '[red]' is no JSON list"),
        ("[]", "no tasks"),
        ("[{", "not valid JSON"),
        ('[{"image": "a", "choice": "red"}]', "task 1: no 'data' and 'annotations'"),
    ],
)
def test_a_list_at_fault_is_one_line_with_file_and_row(tmp_path, rows, message):
    path = tmp_path / "review.csv"
    path.write_text(rows)
    with pytest.raises(UsageError) as raised:
        read_corrections(str(path), class_names=CLASSES)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_spreadsheet_with_semicolons_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "review.csv"
    path.write_bytes("﻿image_id;label;corrected\r\na,b;red; blue \r\n".encode())
    assert read_corrections(str(path)).by_image_id["a,b"].truth == ("blue",)


def test_images_that_the_output_does_not_have_are_refused(out, tmp_path):
    path = tmp_path / "review.csv"
    path.write_text("image_id,uri,label,corrected\nstranger,x.jpg,red,red\n")
    with pytest.raises(UsageError, match="row 2: image_id 'stranger' is not among"):
        import_corrections(str(path), str(tmp_path / "t.parquet"), out=out)
    assert not (tmp_path / "t.parquet").exists()


def test_label_studio_gets_tasks_with_predictions_that_fit_its_interface(out, tmp_path):
    path = tmp_path / "tasks.json"
    found = export_review(out, str(path), review_format="label-studio", limit=2)
    tasks = json.loads(path.read_text())
    assert [task["data"]["image_id"] for task in tasks] == ["image-3", "image-1"]
    prediction = tasks[1]["predictions"][0]
    assert prediction["result"] == [
        {"from_name": "choices", "to_name": "image", "type": "choices", "value": {"choices": ["red"]}}
    ]
    assert prediction["score"] == pytest.approx(0.4)
    interface = ElementTree.fromstring(found.interface)
    assert interface.find("Choices").attrib == {"name": "choices", "toName": "image", "choice": "single"}
    assert [choice.attrib["value"] for choice in interface.iter("Choice")] == list(CLASSES)
    assert interface.find("Image").attrib["value"] == "$image"


def _annotation(*classes: str, at: str = "2026-01-01T00:00:00Z", **more: object) -> dict[str, object]:
    result = [{"from_name": "choices", "to_name": "image", "type": "choices", "value": {"choices": list(classes)}}]
    return {"result": result if classes else [], "updated_at": at, "was_cancelled": False, **more}


def test_label_studio_gives_back_the_annotation_that_counts(out, tmp_path):
    path = tmp_path / "tasks.json"
    export_review(out, str(path), review_format="label-studio")
    tasks = json.loads(path.read_text())
    later = "2026-02-01T00:00:00Z"
    given = {
        "image-0": [_annotation("blue")],
        "image-1": [_annotation("blue", at=later), _annotation("green")],
        "image-2": [_annotation("blue", at=later), _annotation("green", ground_truth=True)],
        "image-3": [_annotation("red", was_cancelled=True)],
        "image-4": [_annotation()],
    }
    for number, task in enumerate(tasks):
        task |= {"id": number + 100, "annotations": given.get(task["data"]["image_id"], [])}
    path.write_text(json.dumps(tasks))
    found = read_corrections(str(path), class_names=CLASSES)
    truths = {image_id: correction.truth for image_id, correction in found.by_image_id.items()}
    assert truths == {"image-0": ("blue",), "image-1": ("blue",), "image-2": ("green",)}
    assert found.num_empty == 3


def test_label_studio_with_several_labels_or_none(multilabel_out, tmp_path):
    path, targets = tmp_path / "tasks.json", tmp_path / "targets.parquet"
    out = multilabel_out()
    export_review(out, str(path), review_format="label-studio")
    tasks = json.loads(path.read_text())
    assert tasks[1]["predictions"][0]["result"] == []
    tasks[0]["annotations"] = [_annotation("red", "blue")]
    tasks[1]["annotations"] = [_annotation()]
    tasks[2]["annotations"] = []
    path.write_text(json.dumps(tasks))
    import_corrections(str(path), str(targets), out=out)
    assert pq.read_table(targets)["targets"].to_pylist() == [["red", "blue"], []]
    assert read_corrections(str(path)).multilabel


def test_a_corrected_tile_keeps_its_window(store_run, tmp_path):
    windows = [{"col_off": 64 * i, "row_off": 0, "width": 64, "height": 64} for i in range(len(PROBS))]
    ids = [f"a.tif#{64 * i},0,64,64" for i in range(len(PROBS))]
    columns = {"margin": _margins(PROBS), "window": windows, "bands": [[3, 2, 1]] * len(PROBS)}
    out = str(store_run(CLASSES, PROBS, columns=columns, image_ids=ids))
    review, targets = tmp_path / "review.csv", tmp_path / "targets.parquet"
    export_review(out, str(review))
    _fill(review, {ids[1]: "green", ids[3]: "green"})
    import_corrections(str(review), str(targets), out=out)
    rows = {row["image_id"]: row for row in pq.read_table(targets).to_pylist()}
    assert {key: row["window"]["col_off"] for key, row in rows.items()} == {ids[1]: 64, ids[3]: 192}
    assert rows[ids[1]]["bands"] == [3, 2, 1]
    open_manifest(str(targets))
    with pytest.raises(UsageError, match=r"is a tile; name the output that was reviewed with --out"):
        import_corrections(str(review), str(tmp_path / "others.parquet"))


def test_what_a_person_has_filled_in_is_not_replaced(out, tmp_path):
    review = tmp_path / "review.csv"
    export_review(out, str(review))
    _fill(review, {"image-1": "green"})
    filled = review.read_bytes()
    with pytest.raises(UsageError, match="exists; choose another name or give --overwrite"):
        export_review(out, str(review))
    with pytest.raises(UsageError, match="exists"):
        import_corrections(str(review), str(review), out=out)
    assert review.read_bytes() == filled
    export_review(out, str(review), overwrite=True)
    assert review.read_bytes() != filled
