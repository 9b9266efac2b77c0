"""Two real processes that train together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import distributed, multiprocessing

from imgbatch.core.training.job import TrainingJob
from imgbatch.core.training.labelled import VALIDATION
from imgbatch.core.training.loop import Trainer
from imgbatch.core.training.workers import _ROWS_AT_ONCE, Worker
from tests.conftest import changed
from tests.core.training.conftest import settle

_NUM_ROWS = 2 * _ROWS_AT_ONCE + 1


def measure_on_both(job: TrainingJob, out: Path) -> list[dict[str, Any]]:
    """What each of two workers makes of a network whose statistics are the first one's only."""
    multiprocessing.spawn(_measure, (job, out), nprocs=2)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _measure(rank: int, job: TrainingJob, out: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    trainer = Trainer(job, Worker.current(torch.device("cpu")))
    if rank == 1:
        for name, buffer in trainer.network.named_buffers():
            if "running" in name:
                buffer.zero_()
    trainer.start(lambda _: None)
    probs = {split: torch.from_numpy(trainer._probs(split, exact=True)) for split in job.splits}
    measured = {"validation": trainer.history[0]["validation"], "probs": probs, "fitted": "sklearn" in sys.modules}
    measured["rows"] = trainer.worker.gather_rows(torch.arange(rank, _NUM_ROWS, 2), _NUM_ROWS)
    torch.save(measured | {"weights": trainer.network.state_dict()}, out / f"{rank}.pt")
    distributed.destroy_process_group()


def test_workers_measure_with_the_first_ones_statistics_even_a_split_of_one_image(colour_config, tmp_path):
    manifest = pq.read_table(str(colour_config.input.manifest))
    split = manifest["split"].to_pylist()
    split = ["validation" if name == "test" and i < len(split) - 1 else name for i, name in enumerate(split)]
    moved = manifest.set_column(manifest.schema.get_field_index("split"), "split", [split])
    pq.write_table(moved, tmp_path / "moved.parquet")
    job, _ = settle(changed(colour_config, input__manifest=str(tmp_path / "moved.parquet")))
    alone = Trainer(job, Worker(torch.device("cpu")))
    expected = {name: torch.from_numpy(alone._probs(name, exact=True)) for name in job.splits}
    assert len(expected["test"]) == 1
    for measured in measure_on_both(job, tmp_path):
        torch.testing.assert_close(measured["probs"], expected)
        assert torch.equal(measured["rows"], torch.arange(_NUM_ROWS))
        assert measured["validation"]["loss"] == pytest.approx(alone._measure(VALIDATION)["loss"], rel=1e-5)


def test_the_first_worker_fits_the_head_of_all(colour_config, tmp_path):
    job, _ = settle(changed(colour_config, train__arch="random_forest", train__backbone="hog_color"))
    first, second = measure_on_both(job, tmp_path)
    assert (first["fitted"], second["fitted"]) == (True, False)
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    torch.testing.assert_close(first["probs"], second["probs"], rtol=0, atol=0)
    assert first["validation"]["top1"] > 0.5


def test_a_head_is_fitted_with_threads_of_its_own():
    before = torch.get_num_threads()
    with Worker(torch.device("cpu"), fit_threads=before + 1).fitting():
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
