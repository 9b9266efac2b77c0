from __future__ import annotations

import sys
from pathlib import Path

import pytest

import imgbatch
from imgbatch.cli import run
from imgbatch.commands.common import read_config, this_command
from imgbatch.config import StorageConfig
from imgbatch.core import storage
from imgbatch.errors import ExitCode, UsageError


def test_a_configuration_lies_in_an_object_store_too(
    s3_server: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = storage.join(s3_bucket, "night.yaml")
    storage.replace(file, b"output: {top_k: 3}\nstorage: {read_timeout_s: 7}\n")
    storage.replace(storage.join(s3_bucket, "wrong.yaml"), b"output: {path: [}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    before = StorageConfig(region="eu-west-1")
    storage.configure(before)
    config = read_config(file, [f"storage.endpoint_url={s3_server}"], {"output.path": "labels"})
    assert (config.output.top_k, config.output.path, config.storage.read_timeout_s) == (3, "labels", 7)
    assert storage.settings() is before
    for name, reason in (("gone.yaml", ""), ("wrong.yaml", "not valid YAML")):
        with pytest.raises(UsageError, match=rf"{s3_bucket}/{name}: {reason}"):
            read_config(storage.join(s3_bucket, name), [f"storage.endpoint_url={s3_server}"])


def test_python_reads_a_configuration_from_an_object_store_too(s3_bucket: str, tmp_path: Path) -> None:
    storage.replace(storage.join(s3_bucket, "night.yaml"), b"output: {top_k: 3}\n")
    config = imgbatch.load_config(storage.join(s3_bucket, "night.yaml"), ["output.path=labels"])
    assert (config.output.top_k, config.output.path) == (3, "labels")
    local = tmp_path / "night.yaml"
    local.write_text("output: {top_k: 4}\n")
    for file in (local, str(local), f"file://{local}"):
        assert imgbatch.load_config(file).output.top_k == 4
    assert imgbatch.load_config({"output": {"top_k": 5}}).output.top_k == 5


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["manifest", "build", "photos", "--outputs", "m.parquet"], "manifest build "),
        (["query", "labels"], "query "),
        (["classify", "--limit", "many"], "classify "),
        (["manifest", "bild"], "manifest "),
        (["clasify"], ""),
    ],
)
def test_a_wrong_word_points_to_the_help_of_its_command(
    words: list[str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == ExitCode.USAGE
    assert capsys.readouterr().err.rstrip().endswith(f"(see imgbatch {command}--help)")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["verify", "OUT"], "only storage of"),
        (["jobs", "list"], "only storage of"),
        (["compact", "OUT"], "only output and storage of"),
        (["model", "init", "--weights", "w", "--classes", "c", "-o", "m"], "only preprocess and storage of"),
    ],
)
def test_a_setting_that_a_command_does_not_read_is_refused(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--set", "fetch.retries=1"]) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "--set fetch.retries=1: " in line
    assert named in line


@pytest.mark.parametrize(
    ("started", "path", "typed"),
    [
        (".venv/bin/imgbatch", "", ".venv/bin/imgbatch"),
        ("/with space/imgbatch", "", "'/with space/imgbatch'"),
        (".venv/bin/imgbatch", str(Path(sys.executable).parent), "imgbatch"),
        ("-c", "", "imgbatch"),
    ],
)
def test_what_is_said_to_be_typed_can_be(started: str, path: str, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [started])
    monkeypatch.setenv("PATH", path)
    assert this_command() == typed


def test_a_file_may_serve_several_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "night.yaml").write_text("fetch: {retries: 1}\nstorage: {region: eu-west-1}\n")
    assert run(["verify", str(tmp_path / "gone"), "-c", str(tmp_path / "night.yaml")]) == ExitCode.USAGE
    assert "gone" in capsys.readouterr().err
