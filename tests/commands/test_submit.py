from __future__ import annotations

import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from typer.exceptions import TyperException

from imgbatch.cli import run
from imgbatch.commands.submit import check_paths, endpoint_warning, parse_command, with_config
from imgbatch.core import storage
from imgbatch.errors import ExitCode, UsageError
from imgbatch.runtime.package import collect_package
from imgbatch.runtime.submit import read_token

CLASSIFY = ("classify", "-m", "s3://b/model", "--manifest", "s3://b/m.parquet", "-o", "s3://b/labels")


@pytest.fixture
def night(tmp_path, monkeypatch):
    """A working directory with a configuration, in which the test runs; no token."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "night.yaml").write_text("model: {path: s3://b/model}\noutput: {path: s3://b/labels}\n")
    return tmp_path


@pytest.fixture
def web_server():
    """URL of a web server that is no Ray dashboard."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>It works!</html>")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("night")
def test_a_command_is_read_as_the_cluster_will_read_it():
    command = parse_command(["classify", "-c", "night.yaml", "--manifest", "m.parquet", "--limit", "5"])
    assert command.config_file.name == "night.yaml"
    assert command.read == ("s3://b/model", "m.parquet")
    assert command.written == ("s3://b/labels",)


def test_a_configuration_in_an_object_store_is_read_there_and_by_the_job(s3_bucket):
    file = storage.join(s3_bucket, "night.yaml")
    storage.replace(file, b"model: {path: s3://b/model}\noutput: {path: s3://b/labels}\n")
    command = parse_command(["classify", "-c", file, "--manifest", "s3://b/m.parquet"])
    assert (command.config_file, command.read) == (None, ("s3://b/model", "s3://b/m.parquet"))
    assert with_config(command.words, None)[:3] == ["classify", "-c", file]


@pytest.mark.usefixtures("night")
@pytest.mark.parametrize("given", [["-c", "night.yaml"], ["--set", "classify.unit_rows=5"]])
def test_the_configuration_of_a_command_is_no_part_of_submit(given, capsys):
    assert run(["submit", "--address", "http://127.0.0.1:9", *given, "--", *CLASSIFY]) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "put them after the --" in line


@pytest.mark.usefixtures("night")
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["classify", "--bogus"], "--bogus"),
        (["classify", "--limit", "many"], "--limit"),
        (["classify", "-c", "gone.yaml"], "gone.yaml"),
        (["classify", "-c", "night.yaml", "--set", "classify.unit_row=5"], "classify.unit_row"),
        (["verify", "s3://b/labels", "--set", "fetch.retries=1"], "fetch.retries"),
        (["clasify"], "clasify"),
        (["manifest"], "manifest"),
        (["manifest", "bild", "x"], "bild"),
        (["submit", "--", "classify"], "submit"),
        (["jobs", "list"], "jobs"),
    ],
)
def test_a_command_that_the_cluster_would_refuse_is_not_sent(words, named, capsys):
    with pytest.raises((UsageError, TyperException)):
        parse_command(words)
    assert run(["submit", "--address", "http://127.0.0.1:9", "--", *words]) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert "127.0.0.1" not in line


@pytest.mark.usefixtures("night")
def test_the_help_of_a_command_is_shown_instead_of_sent(capsys):
    assert run(["submit", "--address", "http://127.0.0.1:9", "--", "classify", "--help"]) == ExitCode.DONE
    assert "--manifest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["classify", "-c", "night.yaml", "-o", "labels"], "labels"),
        (["train", "--manifest", "s3://b/m", "-o", "model"], "model"),
        (["evaluate", "labels"], "labels"),
        (["classify", "-c", "night.yaml", "--manifest", "gone.parquet"], "gone.parquet"),
        (["classify", "-c", "night.yaml", "-m", "model"], "model"),
        (["model", "optimize", "bundle", "--target", "torch-bf16", "--calibration", "s3://b/m"], "bundle: would be"),
        (
            ["model", "optimize", "s3://b/x", "--target", "torch-bf16", "--calibration", "cal.parquet"],
            "cal.parquet: not among",
        ),
        (["model", "export", "s3://b/x", "--format", "onnx", "-o", "x.onnx", "--manifest", "s3://b/m"], "x.onnx"),
        (["review", "export", "s3://b/labels", "-o", "review.csv"], "review.csv: would be"),
        (["review", "import", "review.csv", "-o", "s3://b/targets.parquet"], "review.csv: not among"),
        (["report", "s3://b/labels", "-o", "page.html"], "page.html: would be"),
        (["query", "s3://b/labels", "select 1", "-o", "rows.csv"], "rows.csv: would be"),
        (["publish", "s3://b/labels", "--delta", "table"], "table: would be"),
        (["compare", "s3://b/labels", "other"], "other: not among"),
        (["manifest", "build", "s3://b/x", "photos", "-o", "s3://b/m.parquet"], "photos: the manifest would name"),
        (["manifest", "build", "photos/*.jpg", "-o", "s3://b/m.parquet"], "the manifest would name"),
        (["manifest", "build", "s3://b/l.csv", "--root", "photos", "-o", "s3://b/m.parquet"], "photos: the manifest"),
        (["manifest", "build", "s3://b/x", "-o", "m.parquet"], "m.parquet: would be"),
        (["manifest", "tile", "scenes", "-o", "s3://b/m.parquet"], "scenes: the manifest would name"),
        (
            ["manifest", "tile", "s3://b/x", "--labels", "fields.geojson", "-o", "s3://b/m.parquet"],
            "fields.geojson: not among",
        ),
        (["train", "--manifest", "s3://b/m", "-o", "s3://b/n", "--weights", "resnet18.pth"], "resnet18.pth: not among"),
        (
            ["train", "--manifest", "s3://b/m", "-o", "s3://b/n", "--set", "train.weights=bundle"],
            "bundle: not among",
        ),
        (
            ["model", "init", "--weights", "imagenet", "--classes", "names.txt", "-o", "s3://b/n"],
            "names.txt: not among",
        ),
        (["mosaic", "s3://b/labels", "-o", "maps"], "maps: rasters are written to local folders"),
        (["mosaic", "s3://b/labels", "-o", "s3://b/maps"], "s3://b/maps: rasters are written to local folders"),
    ],
)
def test_paths_that_the_nodes_do_not_share_are_refused(night, words, named):
    command = parse_command(words)
    with pytest.raises(UsageError, match=named):
        check_paths(command, collect_package(night, command.config_file))


def test_what_is_packed_or_shared_may_be_read(night):
    (night / "m.parquet").touch()
    command = parse_command(["classify", "-c", "night.yaml", "--manifest", "m.parquet", "-m", "/efs/model"])
    check_paths(command, collect_package(night, command.config_file))


@pytest.mark.parametrize(
    "words",
    [
        ["manifest", "build", "./list.csv", "s3://b/images", "-o", "s3://b/m.parquet", "--root", "s3://b"],
        ["manifest", "tile", "/efs/scenes", "list.csv", "-o", "s3://b/m.parquet"],
        ["train", "--manifest", "s3://b/m", "-o", "s3://b/n", "--weights", "imagenet"],
        ["train", "--manifest", "s3://b/m", "-o", "s3://b/n", "--weights", "IMAGENET1K_V2"],
        ["train", "--manifest", "s3://b/m", "-o", "s3://b/n", "--set", "train.weights=s3://b/bundle"],
        ["model", "init", "--weights", "imagenet", "--classes", "imagenet1k", "-o", "s3://b/n"],
        ["classify", "-c", "night.yaml", "--manifest", "s3://b/m.parquet", "--set", "train.weights=bundle"],
        ["mosaic", "s3://b/labels", "-o", "/efs/maps"],
    ],
)
def test_names_lists_and_what_is_shared_are_sent(night, words):
    (night / "list.csv").touch()
    command = parse_command(words)
    check_paths(command, collect_package(night, command.config_file))


def test_a_copy_with_a_variant_leaves_the_model_where_it_is(night):
    (night / "model").mkdir()
    (night / "model" / "model.json").touch()
    (night / "cal.parquet").touch()
    words = ["model", "optimize", "model", "--target", "torch-bf16", "--calibration", "cal.parquet", "-o", "s3://b/new"]
    command = parse_command(words)
    assert (command.read, command.written) == (("model", "cal.parquet"), ("s3://b/new",))
    check_paths(command, collect_package(night, None))


@pytest.mark.parametrize(
    ("targets", "uses_gpu"),
    [(["onnx-int8"], True), (["openvino-int8", "torch-compile"], True), (["openvino-int8", "mnn-fp32"], False)],
)
def test_what_is_made_for_gpus_is_made_on_one(targets, uses_gpu):
    named = [word for target in targets for word in ("--target", target)]
    assert parse_command(["model", "optimize", "s3://b/x", *named, "--calibration", "s3://b/m"]).uses_gpu == uses_gpu
    assert not parse_command(list(CLASSIFY)).uses_gpu


@pytest.mark.usefixtures("night")
@pytest.mark.parametrize(
    ("setting", "variable", "address", "named"),
    [
        ("http://127.0.0.1:9000", None, "http://10.0.0.5:8265", "storage.endpoint_url"),
        (None, "http://localhost:9000", "http://head.example:8265", "AWS_ENDPOINT_URL"),
        ("http://127.0.0.1:9000", None, "http://localhost:8265", None),
        ("http://s3.example:9000", "http://localhost:9000", "http://10.0.0.5:8265", None),
        (None, "http://10.0.0.9:9000", "http://10.0.0.5:8265", None),
        (None, None, "http://10.0.0.5:8265", None),
    ],
)
def test_a_store_of_this_machine_is_none_of_another_cluster(setting, variable, address, named, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    if variable:
        monkeypatch.setenv("AWS_ENDPOINT_URL", variable)
    given = ["--set", f"storage.endpoint_url={setting}"] if setting else []
    warning = endpoint_warning(parse_command([*CLASSIFY, *given]), address)
    assert (warning is None) == (named is None)
    if warning:
        assert named in warning
        assert warning.count("\n") == 0
    local = parse_command(["classify", "-m", "/m", "--manifest", "/m.parquet", "-o", "/out", *given])
    assert endpoint_warning(local, address) is None


@pytest.mark.parametrize("given", [["-c", "x/n.yaml"], ["--config", "x/n.yaml"], ["--config=x/n.yaml"], ["-cx/n.yaml"]])
def test_the_job_finds_its_configuration_where_it_was_packed(given):
    words = with_config(("classify", *given, "--limit", "5"), "packed/n.yaml")
    assert [word for word in words if "x/n.yaml" in word] == []
    assert any("packed/n.yaml" in word for word in words)
    assert words[-2:] == ["--limit", "5"]


@pytest.mark.usefixtures("night")
@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "http://"])
def test_an_address_that_is_no_url_is_one_line(address, capsys):
    assert run(["submit", "--address", address, "--", *CLASSIFY]) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "--address" in line


@pytest.mark.usefixtures("night")
@pytest.mark.parametrize(
    "words", [["submit", "--", *CLASSIFY], ["jobs", "list"], ["jobs", "stop", "x"], ["jobs", "logs", "x"]]
)
def test_nobody_at_the_address_is_one_line(words, capsys, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert run(words) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "no cluster answers" in line


@pytest.mark.usefixtures("night")
def test_something_else_at_the_address_is_one_line(web_server, capsys):
    assert run(["submit", "--address", web_server, "--", *CLASSIFY]) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "no Ray dashboard" in line


def test_a_secret_in_the_working_directory_is_refused(night, capsys):
    (night / ".env").write_text("PASSWORD=x")
    assert run(["submit", "--address", "http://127.0.0.1:9", "--", *CLASSIFY]) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert ".env" in line


def test_the_token_is_found_where_ray_finds_it(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home\n")
    assert read_token() == "from-home"
    (tmp_path / "token").write_text("from-path\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert read_token() == "from-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-variable")
    assert read_token() == "from-variable"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert read_token() is None


def test_a_token_path_that_leads_nowhere_is_one_line(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    with pytest.raises(UsageError, match="RAY_AUTH_TOKEN_PATH"):
        read_token()


@pytest.mark.parametrize(
    ("name", "option"), [("classify", "--manifest"), ("finetune", "--arch"), ("evaluate", "--split")]
)
def test_the_entry_points_are_scripts_with_the_options_of_their_commands(name, option, tmp_path):
    script = Path(__file__).resolve().parents[2] / "jobs" / f"{name}.py"
    help_text = subprocess.run(
        [sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert option in help_text.stdout
    refused = subprocess.run(
        [sys.executable, script, "--bogus"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert refused.returncode == ExitCode.USAGE
