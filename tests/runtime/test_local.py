"""The main job through the local engine: what every engine promises, cheap enough to be tried from all sides."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import plan, rows, storage
from imgbatch.core.model import ModelBundle
from imgbatch.core.plan import plan_run
from imgbatch.core.runs import RunPaths
from imgbatch.core.stages import CommitStage
from imgbatch.core.verify import verify
from imgbatch.errors import ErrorBudgetExceeded, Interrupted, UsageError
from imgbatch.runtime.job import classify
from imgbatch.runtime.local import LocalEngine
from imgbatch.runtime.passes import Passes
from imgbatch.runtime.run_log import RunLog
from tests.conftest import changed
from tests.runtime.conftest import rows_of


def files_of(config: Config) -> dict[str, bytes]:
    out = Path(str(config.output.path))
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_every_row_comes_out_once(photo_config: Config) -> None:
    result = classify(photo_config)
    assert result.num_rows == 120
    assert result.counts["OK"] == 114
    assert result.num_errors == 6
    assert verify(result.out).ok
    assert not Path(RunPaths(result.out, result.run_id).units).exists()
    assert rows_of(photo_config, "select count(*), count(distinct image_id), min(width) >= 40 from predictions") == [
        (114, 114, True)
    ]
    statuses = rows_of(photo_config, "select distinct status, error_stage from errors order by 1")
    assert {stage for _, stage in statuses} == {"decode"}
    assert rows_of(photo_config, "select run_id, predictions, errors from runs") == [(result.run_id, 114, 6)]


def test_the_manifests_own_columns_and_order_come_through(photo_config: Config) -> None:
    result = classify(photo_config)
    (path,) = Path(result.out, "predictions").rglob("*.parquet")
    table = pq.read_table(path, partitioning=None)
    assert table.column_names[:4] == ["row_id", "image_id", "uri", "label"]
    assert table.column_names[-5:] == ["model_id", "predicted_at", "target", "shop", "price"]
    ids = table["row_id"].to_pylist()
    assert ids == sorted(ids)
    assert table["price"].to_pylist() == [row_id / 4 for row_id in ids]
    assert table.schema.metadata[b"imgbatch.schema_version"] == b"1"


def test_the_same_command_again_does_nothing(photo_config: Config) -> None:
    first = classify(photo_config)
    before = files_of(photo_config)
    second = classify(photo_config)
    assert (first.already_finished, second.already_finished) == (False, True)
    assert (first.run_id, first.counts) == (second.run_id, second.counts)
    assert files_of(photo_config) == before


def test_a_new_run_stands_beside_the_finished_one(photo_config: Config) -> None:
    first = classify(photo_config)
    second = classify(changed(photo_config, run__new_run=True))
    assert second.run_id == f"{first.run_id}-2"
    assert rows_of(photo_config, "select count(*) from all_predictions") == [(228,)]
    assert rows_of(photo_config, "select count(*), min(run_id) from predictions") == [(114, second.run_id)]
    assert rows_of(photo_config, "select count(*) from errors") == [(6,)]


def commit_only(config: Config, units: list[int]) -> RunPaths:
    """Leave the run as a driver that died after these units would."""
    run = plan_run(config, "cpu")
    engine = LocalEngine(run)
    receipts = list(engine.classify_units(units, defer=False))
    engine.close()
    assert [receipt.outcome for receipt in receipts] == ["committed"] * len(units)
    return run.paths


def test_an_unfinished_run_is_continued(photo_config: Config) -> None:
    config = changed(photo_config, output__keep_units=True)
    paths = commit_only(config, [0, 5])
    before = [Path(paths.unit_file(unit)).read_bytes() for unit in (0, 5)]
    result = classify(changed(config, resources__classify_threads=1, errors__max_rate=0.5))
    assert result.run_id == paths.run_id
    record = storage.read_json(paths.run_json)
    assert record["sessions"][-1]["units"] == 6
    assert [Path(paths.unit_file(unit)).read_bytes() for unit in (0, 5)] == before
    assert verify(result.out).ok


def test_other_settings_do_not_continue_an_unfinished_run(photo_config: Config) -> None:
    paths = commit_only(photo_config, [0])
    with pytest.raises(UsageError, match=r"output\.top_k: 5 -> 2") as refused:
        classify(changed(photo_config, output__top_k=2))
    assert paths.run_id in str(refused.value)
    result = classify(changed(photo_config, output__top_k=2, run__on_unfinished="abandon"))
    assert result.run_id != paths.run_id
    assert verify(result.out).ok


def test_another_fingerprint_after_a_finished_run_is_a_run_beside_it(photo_config: Config) -> None:
    first = classify(photo_config)
    second = classify(changed(photo_config, preprocess__crop_size=24))
    assert first.run_id != second.run_id
    assert rows_of(photo_config, "select count(*) from runs") == [(2,)]


def test_finalize_gives_the_same_bytes_from_the_same_units(photo_config: Config) -> None:
    from imgbatch.core.finalize import finalize
    from imgbatch.core.plan import open_inputs, open_run

    result = classify(changed(photo_config, output__keep_units=True, output__partition_by=("shop",)))
    paths = RunPaths(result.out, result.run_id)
    before = files_of(photo_config)
    for name in (paths.success, paths.files):
        storage.remove(name)
    stray = Path(paths.data("predictions"), "shop=north", "part-00009.parquet")
    stray.write_bytes(b"left by a crash")
    _, bundle, spec = open_inputs(photo_config)

    def elsewhere(*_: object) -> Iterator[Any]:
        raise AssertionError("a process started for eight units")

    finalize(open_run(paths, photo_config, bundle, spec), elsewhere)
    assert files_of(photo_config) == before


@pytest.mark.parametrize("partition_by", [("shop",), ("date", "bucket:3"), ("label",)])
def test_partitions(photo_config: Config, partition_by: tuple[str, ...]) -> None:
    config = changed(photo_config, output__partition_by=partition_by)
    result = classify(config)
    assert verify(result.out).ok
    names = [entry.split(":")[0] for entry in partition_by]
    for path in Path(result.out, "predictions").rglob("*.parquet"):
        assert [part.split("=")[0] for part in path.relative_to(result.out).parts[1:-1]] == ["run_id", *names]
        assert not set(names) & set(pq.read_schema(path).names)
    assert rows_of(config, f"select count({names[-1]}) > 0, count(*) from predictions") == [(True, 114)]
    if partition_by == ("shop",):
        found = rows_of(config, "select shop, count(*) from predictions group by 1 order by 1 nulls last")
        assert found == [("north", 38), ("sö/uth", 38), (None, 38)]


def test_small_files_are_cut_at_units(photo_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgbatch.core.finalize._rows_per_file", lambda *_: 40)
    result = classify(photo_config)
    files = sorted(Path(result.out, "predictions").rglob("*.parquet"))
    assert [path.name for path in files] == [f"part-{index:05d}.parquet" for index in range(4)]
    assert verify(result.out).ok


def test_embedded_images(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    manifest = tmp_path / "embedded.parquet"
    table = pa.table({"bytes": [path.read_bytes() for path in photos], "name": [path.name for path in photos]})
    pq.write_table(table, manifest, row_group_size=50)
    embedded = classify(changed(photo_config, input__manifest=str(manifest), output__path=str(tmp_path / "embedded")))
    by_uri = classify(photo_config)
    assert embedded.counts == by_uri.counts
    config = changed(photo_config, output__path=embedded.out)
    labels, probabilities = (
        f"select {name} from predictions order by row_id" for name in ("row_id, label", "probability")
    )
    assert rows_of(config, labels) == rows_of(photo_config, labels)
    # Units end with row groups, so batches differ, and with them the last digit on some processors.
    ours, theirs = (np.array(rows_of(each, probabilities), float) for each in (config, photo_config))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert rows_of(config, "select min(image_id), count(uri) from predictions") == [("0", 0)]
    plan = storage.read_json(RunPaths(embedded.out, embedded.run_id).plan)
    assert plan["segments"] == [50, 50, 20]
    assert verify(embedded.out).ok


def test_embeddings_stand_beside_the_predictions(photo_config: Config) -> None:
    config = changed(photo_config, output__embeddings=True, output__partition_by=("shop",))
    result = classify(config)
    assert verify(result.out).ok
    assert "embeddings" in {check.name for check in verify(result.out).checks}
    assert result.counts["OK"] == 114
    (path,) = Path(result.out, "embeddings").rglob("*.parquet")
    assert pq.read_schema(path).names == ["row_id", "image_id", "embedding"]
    lengths = "select count(*), min(len(embedding)), max(len(embedding)) from embeddings semi join predictions"
    (found,) = rows_of(config, f"{lengths} using (row_id, image_id)")
    assert found[0] == 114
    assert found[1] == found[2] > 3
    select = "select row_id, label, probability from predictions order by row_id"
    with_embeddings = rows_of(config, select)
    without = classify(photo_config)
    assert without.run_id != result.run_id
    assert rows_of(photo_config, select) == with_embeddings
    assert rows_of(photo_config, "select count(*) from embeddings") == [(0,)]
    assert rows_of(photo_config, "select count(*) from all_embeddings") == [(114,)]


def test_verify_finds_an_embedding_that_is_missing(photo_config: Config) -> None:
    result = classify(changed(photo_config, output__embeddings=True))
    (path,) = Path(result.out, "embeddings").rglob("*.parquet")
    table = pq.read_table(path, partitioning=None)
    pq.write_table(pa.concat_tables([table.slice(2), table.slice(2, 1)]), path)
    paths = RunPaths(result.out, result.run_id)
    record = storage.read_json(paths.files)
    for file in record["files"]:
        file["sha256"] = storage.sha256(str(Path(result.out, file["path"])))
    storage.write_json(paths.files, record)
    (failed,) = (check for check in verify(result.out).checks if not check.ok)
    assert (failed.name, failed.detail) == ("embeddings", "3 predictions and embeddings without a pair")


def test_limit_takes_the_first_rows(photo_config: Config) -> None:
    result = classify(changed(photo_config, input__limit=10))
    assert result.num_rows == 10
    assert rows_of(photo_config, "select max(row_id) from predictions") == [(9,)]


def test_an_image_id_may_stand_twice_only_if_allowed(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    manifest = tmp_path / "twice.parquet"
    pq.write_table(pa.table({"uri": [str(photos[0]), str(photos[1]), str(photos[0])]}), manifest)
    config = changed(photo_config, input__manifest=str(manifest))
    with pytest.raises(UsageError, match="stands there 2 times"):
        classify(config)
    result = classify(changed(config, input__duplicates="keep"))
    assert result.num_rows == 3
    assert rows_of(config, "select count(*) from all_predictions") == [(3,)]
    assert rows_of(config, "select count(*) from predictions") == [(2,)]


@pytest.mark.parametrize("partition_by", [(), ("bucket:4",)])
def test_a_run_without_one_prediction_fails(
    partition_by: tuple[str, ...], photo_config: Config, tmp_path: Path
) -> None:
    manifest = tmp_path / "nothing.parquet"
    text = tmp_path / "text.jpg"
    text.write_text("<html>not here</html>")
    pq.write_table(pa.table({"uri": [str(text)]}), manifest)
    config = changed(photo_config, input__manifest=str(manifest), output__partition_by=partition_by)
    for _ in range(2):
        with pytest.raises(ErrorBudgetExceeded, match="1 NOT_AN_IMAGE"):
            classify(config)
    assert rows_of(config, "select status from errors") == [("NOT_AN_IMAGE",)]
    assert rows_of(config, "select count(label) from predictions") == [(0,)]


def test_the_sample_stops_a_run_whose_images_are_nowhere(photo_config: Config, tmp_path: Path) -> None:
    manifest = tmp_path / "gone.parquet"
    pq.write_table(pa.table({"uri": [str(tmp_path / f"gone{index}.jpg") for index in range(100)]}), manifest)
    config = changed(photo_config, input__manifest=str(manifest), errors__max_rate=0.05)
    with pytest.raises(ErrorBudgetExceeded, match="none of 16 sampled images could be fetched"):
        classify(config)


def test_the_error_budget_stops_a_run_and_keeps_what_it_has(photo_config: Config) -> None:
    config = changed(photo_config, errors__max_rate=0.01, errors__min_rows=10)
    with pytest.raises(ErrorBudgetExceeded, match=r"failed, more than errors\.max_rate 0\.01: \d+ TRUNCATED"):
        classify(config)
    assert storage.read_json(RunPaths(str(config.output.path), plan_run(config, "cpu").run_id).run_json)["state"] == (
        "error_budget"
    )
    result = classify(photo_config)
    assert verify(result.out).ok


@pytest.mark.parametrize("again", [False, True])
def test_units_that_are_tried_again_are_judged_once(
    photo_config: Config, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Those that failed come together in the passes after the first, where they alone would look like an outage."""
    good, unreadable = str(photos[1]), "nul\0byte"
    uris = [uri for _ in range(5) for uri in [*([good] * 16), unreadable, unreadable, *([good] * 14)]]
    image_ids = [str(index) for index in range(len(uris))]
    pq.write_table(pa.table({"uri": uris, "image_id": image_ids}), tmp_path / "mixed.parquet")
    config = changed(
        photo_config, input__manifest=str(tmp_path / "mixed.parquet"), errors__max_rate=0.07, errors__min_rows=64
    )
    if again:
        one_pass, passes = Passes._one_pass, []

        def interrupted_in_the_second(self: Passes, units: list[int], *, defer: bool) -> bool:
            passes.append(units)
            if len(passes) == 2:
                raise Interrupted("as by a person")
            return one_pass(self, units, defer=defer)

        with monkeypatch.context() as patched:
            patched.setattr(Passes, "_one_pass", interrupted_in_the_second)
            with pytest.raises(Interrupted):
                classify(config)
    result = classify(config)
    assert result.counts == {"FETCH_FAILED": 10, "OK": 150}


def test_a_store_that_is_away_does_not_hide_why_a_run_ended(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise PermissionError("the credentials have expired")

    config = changed(photo_config, errors__max_rate=0.0, errors__min_rows=16)
    plan_run(config, "cpu")
    monkeypatch.setattr(storage, "check_writable", lambda _: None)
    monkeypatch.setattr(RunLog, "write", away)
    monkeypatch.setattr(storage, "remove", away)
    with pytest.raises(ErrorBudgetExceeded):
        classify(config)


def test_rows_of_a_plan_that_was_never_finished_are_removed(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "UNITS_PER_FILE", 2)
    config = changed(photo_config, classify__unit_rows=8)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(plan, "refuse_duplicates", lambda _: sys.exit("killed"))
        with pytest.raises(SystemExit):
            plan_run(config, "cpu")
    run = plan_run(changed(config, classify__unit_rows=32), "cpu")
    found = [pq.read_table(info.uri) for info in storage.list_files(run.paths.rows)]
    assert sum(table.num_rows for table in found) == run.plan.layout.num_rows


def test_verify_says_that_the_record_is_gone(photo_config: Config) -> None:
    result = classify(photo_config)
    storage.remove(RunPaths(result.out, result.run_id).files)
    (check,) = [check for check in verify(result.out).checks if not check.ok]
    assert (check.name, "files.json" in check.detail) == ("records", True)


@pytest.mark.parametrize("name", ["night[1]", "date=2026-10-01", "what?"])
def test_a_directory_that_readers_take_for_a_pattern_is_refused(
    photo_config: Config, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match="for a pattern or a partition"):
        classify(changed(photo_config, output__path=str(tmp_path / name / "out")))
    assert not (tmp_path / name).exists()


def test_verify_finds_what_was_damaged(photo_config: Config) -> None:
    result = classify(photo_config)
    (path,) = Path(result.out, "errors").rglob("*.parquet")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    assert not verify(result.out).ok
    path.unlink()
    assert "missing" in next(check.detail for check in verify(result.out).checks if not check.ok)
    path.write_bytes(content)
    assert verify(result.out).ok
    path.with_name("part-00001.parquet").write_bytes(content)
    assert "not in files.json" in next(check.detail for check in verify(result.out).checks if not check.ok)


def test_verify_finds_rows_that_are_there_twice_or_missing(photo_config: Config) -> None:
    result = classify(photo_config)
    (path,) = Path(result.out, "errors").rglob("*.parquet")
    table = pq.read_table(path, partitioning=None)
    pq.write_table(pa.concat_tables([table.slice(1), table.slice(1, 1)]), path)
    files = RunPaths(result.out, result.run_id).files
    record = json.loads(Path(files).read_text())
    for file in record["files"]:
        if file["kind"] == "errors":
            file["sha256"] = storage.sha256(str(path))
    Path(files).write_text(json.dumps(record))
    failed = {check.name for check in verify(result.out).checks if not check.ok}
    assert failed == {"distinct", "missing"}


def test_verify_says_that_a_run_is_unfinished(photo_config: Config) -> None:
    commit_only(photo_config, [0, 1, 2])
    (check,) = verify(str(photo_config.output.path)).checks
    assert not check.ok
    assert "3 of 8 units" in check.detail


def test_a_second_driver_is_refused_while_the_first_lives(photo_config: Config) -> None:
    paths = plan_run(photo_config, "cpu").paths
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        import socket
        import time

        alive = {"host": socket.gethostname(), "pid": sleeper.pid, "time": time.time()}
        storage.write_json(paths.heartbeat, alive)
        with pytest.raises(UsageError, match="another driver works on it"):
            classify(photo_config)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert verify(classify(photo_config).out).ok


def test_killed_half_way_and_run_again(photo_config: Config, tmp_path: Path) -> None:
    """SIGKILL between two units, wherever the driver then is."""
    script = tmp_path / "driver.py"
    script.write_text(
        "import os, signal, sys\n"
        "from imgbatch.config import parse_config\n"
        "from imgbatch.core import stages\n"
        "from imgbatch.runtime.job import classify\n"
        "import json\n"
        "committed = 0\n"
        "call = stages.CommitStage.__call__\n"
        "def counted(self, block):\n"
        "    global committed\n"
        "    receipt = call(self, block)\n"
        "    committed += 1\n"
        "    if committed == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return receipt\n"
        "stages.CommitStage.__call__ = counted\n"
        "classify(parse_config(json.loads(sys.argv[1])))\n"
    )
    killed = subprocess.run(
        [sys.executable, str(script), photo_config.model_dump_json()], env=os.environ, check=False, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(plan_run(photo_config, "cpu").paths.committed_units(8)) == 3
    result = classify(photo_config)
    assert verify(result.out).ok
    assert result.counts["OK"] == 114


def test_a_unit_that_kills_the_engine_ends_in_isolation(photo_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit of unit 2 fails whenever the engine tries it; the rest goes through and unit 2 ends all the same."""
    commit = CommitStage.__call__
    tries = []

    def failing(self: CommitStage, block: pa.Table) -> object:
        if block["unit"][0].as_py() == 2 and len(tries) < 2:
            tries.append(1)
            raise RuntimeError("the machine went away")
        return commit(self, block)

    monkeypatch.setattr(CommitStage, "__call__", failing)
    result = classify(photo_config)
    assert verify(result.out).ok
    sessions = storage.read_json(RunPaths(result.out, result.run_id).run_json)["sessions"]
    assert sessions[-1]["isolated_units"] == 1
    assert result.counts["OK"] == 114


def test_the_model_may_not_change_under_a_bundle_path(
    photo_config: Config, make_bundle: Callable[..., ModelBundle]
) -> None:
    bundle = make_bundle()
    config = changed(photo_config, model__path=bundle.path)
    run = plan_run(config, "cpu")
    assert run.plan.fields["model"] == bundle.model_id
    other = make_bundle(seed=1)
    assert other.path == bundle.path
    with pytest.raises(UsageError, match="not the weights that model"):
        LocalEngine(run)
    with pytest.raises(UsageError, match=f"model: {bundle.model_id} -> {other.model_id}"):
        classify(config)
    assert make_bundle().model_id == bundle.model_id
    assert classify(config).run_id == run.run_id
    assert rows_of(config, "select distinct model_id from predictions") == [(bundle.model_id,)]
