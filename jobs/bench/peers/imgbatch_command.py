"""Ours: the installed command; everything it writes besides labels counts too.

The clock starts at the line that names the pools, which comes when Ray is up and no worker has been asked for yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

_TAKE_ROWS = """
import sys
import pyarrow.parquet as pq

pq.write_table(pq.read_table(sys.argv[1]).slice(0, int(sys.argv[3])), sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("manifest", "model", "out", "result"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("object-store-mb", "limit"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the command")
    arguments = parser.parse_args()
    manifest = Path(arguments.result).with_suffix(".parquet")
    # In a process of its own: this one is there all the time, and its memory counts as the command's.
    subprocess.run([sys.executable, "-c", _TAKE_ROWS, arguments.manifest, manifest, str(arguments.limit)], check=True)
    settings = [
        *arguments.set,
        "classify.min_agreement=0",
        "resources.device=cpu",
        f"ray.object_store_mb={arguments.object_store_mb}",
    ]
    command = [str(Path(sys.executable).with_name("imgbatch")), "classify", "-m", arguments.model]
    command += ["--manifest", str(manifest), "-o", arguments.out]
    command += [part for setting in settings for part in ("--set", setting)]
    started = time.time()
    ready = None
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", flush=True)
            if ready is None and "decode actors" in line:
                ready = time.time()
    if process.returncode != 0 or ready is None:
        raise SystemExit(f"imgbatch classify ended with exit code {process.returncode}")
    (path,) = Path(arguments.out).glob("runs/*/run.json")
    run = json.loads(path.read_text())
    counts = json.loads(path.with_name("files.json").read_text())["counts"]
    if counts != {"OK": arguments.limit}:
        raise SystemExit(f"{counts} of {arguments.limit} images")
    finished = datetime.fromisoformat(run["finished_at"]).timestamp()
    values = {"images": arguments.limit, "seconds": finished - ready, "startup_seconds": ready - started}
    Path(arguments.result).write_text(json.dumps(values))


if __name__ == "__main__":
    main()
