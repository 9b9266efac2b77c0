from __future__ import annotations

import numpy as np
import pytest

from imgbatch.core.manifest import open_manifest
from imgbatch.core.training.labelled import describe_counts, read_labelled
from imgbatch.errors import UsageError

SPLIT = ["train", "train", "train", "train", "val", "test", None]


@pytest.fixture
def read(write_manifest):
    """Writes a manifest and reads its labels."""

    def read(task="auto", split=SPLIT, **columns):
        uris = [f"{i}.jpg" for i in range(len(split))]
        path = write_manifest(uri=uris, split=split, **columns)
        return read_labelled(open_manifest(str(path)), task=task)

    return read


def test_classes_splits_and_targets(read):
    labelled = read(target=["b", "a", "c", "a", "c", "b", None])
    assert labelled.task == "multiclass"
    assert labelled.class_names == ("a", "b", "c")
    assert labelled.splits["train"].row_ids_N.tolist() == [0, 1, 2, 3]
    assert labelled.splits["train"].truth.tolist() == [1, 0, 2, 0]
    assert labelled.splits["train"].dense_truth(3).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert labelled.splits["validation"].truth.tolist() == [2]
    assert labelled.splits["test"].truth.tolist() == [1]
    assert labelled.num_unused == 1
    assert describe_counts(labelled)["train_images_by_class"] == {"a": 2, "b": 1, "c": 1}
    turned = labelled.in_order(("c", "a", "b"))
    assert turned.splits["train"].truth.tolist() == [2, 1, 0, 1]
    assert describe_counts(turned)["train_images_by_class"] == {"a": 2, "b": 1, "c": 1}


def test_two_classes_are_binary_unless_told_otherwise(read):
    target = ["b", "a", "b", "a", "a", "b", "a"]
    assert read(target=target).task == "binary"
    assert read(target=target, task="multiclass").task == "multiclass"


def test_lists_of_targets_are_multilabel(read):
    labelled = read(targets=[["a", "b"], [], ["b"], ["a"], ["b"], ["a", "b"], []])
    assert labelled.task == "multilabel"
    assert labelled.splits["train"].truth.tolist() == [[True, True], [False, False], [False, True], [True, False]]
    assert labelled.splits["train"].dense_truth(2).dtype == np.float32
    turned = labelled.in_order(("b", "a"))
    assert turned.class_names == ("b", "a")
    assert turned.splits["train"].truth.tolist() == [[True, True], [False, False], [True, False], [False, True]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "targets missing"),
        ({"target": ["a"] * 7}, "a single class, 'a'"),
        ({"target": ["a", "b", None, "a", "b", "a", None]}, "row 2 (from 0): target is null"),
        ({"target": ["a", "b", "a", "a", "c", "a", None]}, "class 'c' has no images in split 'train', but split"),
        ({"target": ["a", "b", "a", "a", "b", "a", None], "task": "multilabel"}, "no column 'targets'"),
        (
            {"target": ["a", "b"] * 3 + ["a"], "split": ["train"] * 6 + ["test"]},
            "no rows of split 'validation'; 'imgbatch manifest build",
        ),
        (
            {"targets": [["a"], ["a", None], ["b"], ["a"], ["b"], [], [None]]},
            "row 1 (from 0): targets holds a null; take it out of the list",
        ),
        ({"targets": [["a"], ["a"], ["a"], ["a"], ["a"], [], []]}, "class 'a' is in all train images but 0"),
    ],
)
def test_what_cannot_be_learnt_is_one_line(read, columns, message):
    with pytest.raises(UsageError) as caught:
        read(**columns)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_without_splits_says_how_to_get_them(write_manifest):
    path = write_manifest(uri=["a.jpg", "b.jpg"], target=["a", "b"])
    with pytest.raises(UsageError, match=r"no column 'split'; 'imgbatch manifest build --split"):
        read_labelled(open_manifest(str(path)), task="auto")
