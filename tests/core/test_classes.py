from __future__ import annotations

from pathlib import Path

import pytest

from imgbatch.core.classes import check_class_names, read_class_names
from imgbatch.errors import UsageError


@pytest.mark.parametrize("text", ["cat\ndog\n", "\ufeff cat \r\ndog\r\n\r\n", '["cat", "dog"]'])
def test_lines_and_json_lists_are_read(tmp_path: Path, text: str):
    (tmp_path / "classes").write_bytes(text.encode())
    assert read_class_names(str(tmp_path / "classes")) == ["cat", "dog"]


def test_imagenet_has_its_thousand():
    names = check_class_names(read_class_names("imagenet1k"), task="multiclass", where="w")
    assert len(names) == 1000
    assert names[0] == "tench"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"\xff\xfe", "not UTF-8"), (b"[1, ", "not a valid JSON list")]
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "classes"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"--classes {path}: .*{message}"):
        read_class_names(str(path))


@pytest.mark.parametrize(
    ("names", "task", "message"),
    [
        (["a", "b"], "regression", "unknown task 'regression'; one of binary, multiclass, multilabel"),
        ("ab", "multiclass", "must be a list"),
        (["a", ""], "multiclass", "class 1 has no name"),
        (["a", "  "], "multiclass", "class 1 has no name"),
        (["a", 3], "multiclass", r"class 1 has no name \(3\)"),
        (["a", "b\nc"], "multiclass", "control characters or line breaks"),
        (["a", "\ud800"], "multiclass", "control characters or line breaks"),
        (["a", "__HIVE_DEFAULT_PARTITION__"], "multiclass", "named like Hive's null partition"),
        (["a", "b", "a"], "multiclass", "class 'a' stands there twice"),
        ([], "multilabel", "0 classes are too few"),
        (["a"], "multiclass", "1 classes are too few for multiclass, which needs 2"),
        (["a", "b", "c"], "binary", "binary needs exactly two classes, not 3"),
    ],
)
def test_unfit_names_are_refused(names: object, task: str, message: str):
    with pytest.raises(UsageError, match=f"^here: .*{message}"):
        check_class_names(names, task=task, where="here")


def test_names_of_any_script_pass():
    assert check_class_names(["Käfer", "猫", "a/b=c d", "no\u00a0break"], task="multilabel", where="here")[1] == "猫"
