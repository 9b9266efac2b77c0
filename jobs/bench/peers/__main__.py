"""imgbatch beside its peers, on the same files with the same weights.

    python -m jobs.bench.peers [--images 360] [--repeats 1] [--model BUNDLE] [--folder IMAGES] [--calibration MANIFEST]
                               [--only NAME,...] [--workload NAME] [--s3 s3://BUCKET/PREFIX] [-o RESULT]

Peers are written in our own words in the shape in which they are published (see ``task``), each in a module of this
package. The clock starts when an engine is up, and stops after the write. Loading the model is in everyone's time but
the process pool's, whose processes have it before. Workers of Ray Data, Daft, Spark and the pool have run 64 empty
tasks before; the DataLoader, which has no engine, starts its workers in its time. imgbatch is the installed command,
from when its Ray is up to ``finished_at`` in run.json: starting its actors, probabilities and error rows count in its
time, though no peer writes any of these. (In results up to 2026-11-30 its clock starts with the first unit, 3 to 4 s
later.) It runs with torch, and with each variant that ``imgbatch model optimize`` makes before the contest;
on large images once more, with reduced decoding.

``--images`` is for Ray Data; the others get so many times as many (``SHARES``) that all take about as long, because in
a short run the start of processes, which is in everyone's time, would decide.

With ``--s3`` the images are put there first, and everybody reads them from there: credentials and endpoint from the
environment, as botocore has them. Daft, which has a client of its own, is left out then.

Daft and Spark are the extra ``peers``, and left out where they are not installed; Daft wants an older pyarrow than
ours, so give them an environment of their own. Without ``--model`` the network has random weights: the time is the
same, labels say nothing. ``--workload`` takes other images or another network; see ``workloads``.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.core import storage
from imgbatch.core.machine import has_bfloat16
from imgbatch.runtime.pools import this_machine
from jobs.bench.common import find_photographs, save_random_model
from jobs.bench.contest import Contestant, Outcome, compete, write_result
from jobs.bench.peers.task import BATCH_SIZE
from jobs.bench.peers.workloads import WORKLOADS

OBJECT_STORE_MB = 1000
OURS = {
    "imgbatch": {"classify.backend": "torch"},
    "imgbatch openvino-fp32": {"classify.backend": "openvino_fp32"},
    "imgbatch mnn-fp32": {"classify.backend": "mnn_fp32"},
    "imgbatch openvino-bf16": {"classify.backend": "openvino_bf16"},
    "imgbatch openvino-int8": {"classify.backend": "openvino_int8"},
    "imgbatch openvino-int8 reduced": {"classify.backend": "openvino_int8", "preprocess.reducing_gap": "3"},
}
"""Options of each."""
ON_LARGE_IMAGES = "imgbatch openvino-int8 reduced"
"""Elsewhere it is the same as without."""
IN_BFLOAT16 = "imgbatch openvino-bf16"
"""Of processors that multiply in it."""
PEERS = {
    "Ray Data": "ray_data",
    "Ray Data tuned": "ray_data_tuned",
    "Daft": "daft_frame",
    "Spark": "spark_udf",
    "DataLoader": "data_loader",
    "processes": "process_pool",
}
"""Module of each."""
NEEDS = {
    "Daft": "daft",
    "Spark": "pyspark",
    "imgbatch mnn-fp32": "MNN",
    **{name: "openvino" for name in OURS if "openvino" in name},
}
"""Package of each that does with more than ours and torch."""
TIMEOUT_S = 3600
"""Of one run, in which one that hangs is ended."""
YARDSTICK = "Ray Data"
SHARES = {
    "Ray Data tuned": 3,
    "Daft": 2,
    "Spark": 2,
    "DataLoader": 3.5,
    "processes": 3.5,
    "imgbatch": 3.5,
    "imgbatch openvino-fp32": 6,
    "imgbatch mnn-fp32": 8,
    "imgbatch openvino-bf16": 20,
    "imgbatch openvino-int8": 40,
    "imgbatch openvino-int8 reduced": 40,
}
"""Images of a contestant as a multiple of Ray Data's, in the first workload."""
ENOUGH_S = 120
"""That the fastest contestant should take, so that getting started decides nothing."""


def main() -> None:
    arguments = parse_arguments()
    names = choose(arguments)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        workload = WORKLOADS[arguments.workload]
        photographs = workload.prepare(find_photographs(arguments.folder, scratch), scratch / "images")
        locations = upload(photographs, arguments.s3) if arguments.s3 else [str(path.resolve()) for path in photographs]
        manifest = scratch / "manifest.parquet"
        longest = max(_limit(name, arguments) for name in names)
        repeated = [locations[index % len(locations)] for index in range(longest)]
        table = pa.table({"uri": repeated, "image_id": [str(index) for index in range(longest)]})
        # Ray Data makes at most one task of a row group.
        pq.write_table(table, manifest, row_group_size=BATCH_SIZE)
        given = arguments.model or save_random_model(
            scratch / "random", workload.arch, 10, resize_size=workload.resize_size, crop_size=workload.crop_size
        )
        model = str(shutil.copytree(given, scratch / "model"))
        for backend in sorted({OURS[name]["classify.backend"] for name in names if name in OURS} - {"torch"}):
            optimize(model, backend.replace("_", "-"), arguments.calibration or str(manifest))
        runs = scratch / "runs"
        contestants = [contestant(name, manifest, model, arguments) for name in names]
        outcomes = compete(
            contestants,
            repeats=arguments.repeats,
            scratch=runs,
            timeout_s=TIMEOUT_S,
            save=arguments.output.with_suffix(".json"),
        )
        labels = {name: read_labels(runs / name / "0") for name in names}
    intro = (
        f"    python -m jobs.bench.peers {' '.join(sys.argv[1:])}\n\n"
        f"{workload.what} from {'S3' if arguments.s3 else 'local disk'} "
        f"({len(photographs):,} different ones, repeated), "
        f"{arguments.repeats} round(s) in turn: {', '.join(f'{name} {_limit(name, arguments):,}' for name in names)} "
        f"images. Object stores of {OBJECT_STORE_MB:,} MB. Variants that the model came without were calibrated on "
        f"{arguments.calibration or 'every second one of these images'}."
    )
    yardstick = YARDSTICK if YARDSTICK in names else names[0]
    notes = describe_lengths(outcomes) + describe_labels(labels)
    write_result(arguments.output, "imgbatch and its peers", intro, outcomes, yardstick=yardstick, notes=notes)
    print(arguments.output.with_suffix(".md").read_text())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=360)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--workload", choices=WORKLOADS, default="photographs")
    parser.add_argument("--model", help="a bundle of the workload's network and size")
    parser.add_argument("--folder", type=Path, help="JPEG files, in folders named after their class")
    parser.add_argument("--s3", metavar="s3://BUCKET/PREFIX", help="put the images there and read them from there")
    parser.add_argument("--calibration", help="manifest for the variants; default: the images themselves")
    parser.add_argument("--only", help=f"some of {', '.join([*PEERS, *OURS])}")
    parser.add_argument("-o", "--output", type=Path, default=Path(tempfile.gettempdir(), "peers"))
    return parser.parse_args()


def choose(arguments: argparse.Namespace) -> list[str]:
    """The contestants that were named, or else all that have something to do and are installed here."""
    only = arguments.only
    left_out = {ON_LARGE_IMAGES} if arguments.workload != "large" else set()
    left_out |= {"Daft"} if arguments.s3 else set()
    left_out |= set() if has_bfloat16() else {IN_BFLOAT16}
    names = only.split(",") if only else [name for name in (*PEERS, *OURS) if name not in left_out]
    if unknown := [name for name in names if name not in (*PEERS, *OURS)]:
        raise SystemExit(f"--only {unknown[0]}: none of {', '.join([*PEERS, *OURS])}")
    missing = [name for name in names if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    if missing:
        message = f"{', '.join(missing)}: not installed here; pip install 'imgbatch[peers]'"
        if only:
            raise SystemExit(message)
        print(message)
    return [name for name in names if name not in missing]


def upload(photographs: Sequence[Path], prefix: str) -> list[str]:
    """Their locations in the object store; folders are classes there too."""
    uris = [f"{prefix}/{path.parent.name}/{index}{path.suffix}" for index, path in enumerate(photographs)]
    for uri, path in zip(uris, photographs, strict=True):
        storage.replace(uri, path.read_bytes())
    return uris


def optimize(model: str, target: str, calibration: str) -> None:
    """Makes a variant, unless the bundle came with one."""
    if Path(model, "variants", target).exists():
        return
    command = [str(Path(sys.executable).with_name("imgbatch")), "model", "optimize", model]
    subprocess.run([*command, "--target", target, "--calibration", calibration], check=True)


def contestant(name: str, manifest: Path, model: str, arguments: argparse.Namespace) -> Contestant:
    settings = OURS.get(name)
    module = "imgbatch_command" if settings else PEERS[name]
    command = [sys.executable, "-m", f"jobs.bench.peers.{module}", "--out", "{out}", "--result", "{result}"]
    command += ["--manifest", str(manifest), "--model", model, "--limit", str(_limit(name, arguments))]
    command += ["--object-store-mb", str(OBJECT_STORE_MB)]
    if settings:
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    else:
        command += ["--cores", str(this_machine().num_cpus)]
    environment = {"RAY_AUTH_MODE": "disabled", "DO_NOT_TRACK": "true", "DAFT_PROGRESS_BAR": "0"}
    return Contestant(name, command, {**environment, "PYSPARK_PYTHON": sys.executable})


def _limit(name: str, arguments: argparse.Namespace) -> int:
    """Images of one run: whole batches on every core, so that at the end none of them waits for another."""
    ours = WORKLOADS[arguments.workload].shares if name in OURS else 1
    round_of_batches = BATCH_SIZE * this_machine().num_cpus
    return round_of_batches * max(1, round(arguments.images * SHARES.get(name, 1) * ours / round_of_batches))


@dataclass(frozen=True)
class Labels:
    """By location; a repeated one counts once."""

    by_uri: Mapping[str, str]

    def right(self, uris: Collection[str]) -> set[str]:
        """Of ``uris``, those labelled with the name of the image's folder."""
        return {uri for uri in uris if Path(uri).parent.name == self.by_uri[uri]}

    def agreement(self, other: Labels, uris: Collection[str]) -> float:
        return sum(self.by_uri[uri] == other.by_uri[uri] for uri in uris) / len(uris)


def read_labels(out: Path) -> Labels:
    """What a contestant wrote, ours or a peer's."""
    root = out / "predictions" if (out / "predictions").exists() else out
    tables = [pq.ParquetFile(path).read(columns=["uri", "label"]) for path in root.rglob("*.parquet")]
    rows = pa.concat_tables(tables).to_pylist()
    return Labels({row["uri"]: row["label"] for row in rows})


def describe_labels(labels: Mapping[str, Labels]) -> str:
    """A table of agreement and, where the folders are classes, of accuracy, on the images that all have labelled."""
    common = set.intersection(*(set(value.by_uri) for value in labels.values()))
    reference = labels.get("imgbatch")
    right = {name: value.right(common) for name, value in labels.items()}
    known = any(right.values())
    lines = [
        f"On the {len(common):,} different images that every contestant had:",
        "",
        "| | same label as imgbatch in torch | accuracy | right where it is wrong, wrong where it is right |",
        "| --- | --- | --- | --- |",
    ]
    for name, value in labels.items():
        agreement = f"{value.agreement(reference, common):.2%}" if reference else "–"
        accuracy = f"{len(right[name]) / len(common):.2%}" if known else "–"
        paired = "–"
        if reference and known:
            paired = f"{len(right[name] - right['imgbatch'])}, {len(right['imgbatch'] - right[name])}"
        lines.append(f"| {name} | {agreement} | {accuracy} | {paired} |")
    return "\n".join(lines)


def describe_lengths(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """A warning where the fastest contestant was done too soon; else nothing."""
    seconds = {name: statistics.median(run.seconds for run in runs) for name, runs in outcomes.items()}
    fastest = max(outcomes, key=lambda name: statistics.median(run.rate for run in outcomes[name]))
    if seconds[fastest] >= ENOUGH_S:
        return ""
    return (
        f"{fastest}, the fastest, took {seconds[fastest]:.0f} s, less than the {ENOUGH_S} s in which starting would "
        "decide nothing: more `--images` would be fairer.\n\n"
    )


if __name__ == "__main__":
    main()
