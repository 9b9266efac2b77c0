"""What importing the package and asking for help load, seen in ``sys.modules`` of a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "torchvision", "ray", "pyarrow", "duckdb", "pandas", "numpy", "PIL", "fsspec", "openvino"}

LIGHT_CORE = ["manifest", "storage", "images", "decoder", "fetch", "units", "results", "plan", "finalize", "verify"]

EVERY_HELP = """
import contextlib, io
import typer
from imgbatch.cli import app, run

def paths(command, path=()):
    yield path
    for name, sub in getattr(command, "commands", {}).items():
        yield from paths(sub, (*path, name))

all_paths = list(paths(typer.main.get_command(app)))
assert len(all_paths) > 5, all_paths
with contextlib.redirect_stdout(io.StringIO()):
    codes = {path: run([*path, "--help"]) for path in all_paths}
assert not any(codes.values()), codes
"""


def loaded_by(code: str) -> set[str]:
    """The top-level packages in ``sys.modules`` after a fresh interpreter has run ``code``."""
    report = "\nimport json, sys\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    process = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return set(json.loads(process.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import imgbatch") & HEAVY == set()


def test_the_help_of_every_command_loads_nothing_heavy():
    assert loaded_by(EVERY_HELP) & HEAVY == set()


def test_what_decode_processes_and_the_driver_import_loads_neither_torch_nor_ray():
    code = "\n".join(f"import imgbatch.core.{module}" for module in LIGHT_CORE)
    assert loaded_by(code) & {"torch", "torchvision", "ray"} == set()


def test_the_local_engine_loads_no_ray():
    assert "ray" not in loaded_by("import imgbatch.runtime.local")


@pytest.mark.parametrize("module", ["actors", "crop_pool"])
def test_what_decode_actors_load_brings_neither_torch_nor_a_database_nor_the_s3_client(module):
    unwanted = {"torch", "torchvision", "duckdb", "botocore", "s3fs"}
    assert loaded_by(f"import imgbatch.runtime.{module}") & unwanted == set()


def test_what_decoding_children_load_is_little():
    unwanted = {"torch", "ray", "duckdb", "fsspec", "pydantic", "rasterio"}
    assert loaded_by("import imgbatch.core.decode_child") & unwanted == set()
