from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from imgbatch.config import Config
from imgbatch.core.images import decode_image
from imgbatch.core.training.images import AugmentedImages, iter_evaluation_batches
from imgbatch.core.training.labelled import TRAIN, VALIDATION
from imgbatch.core.training.workers import Worker
from tests.conftest import changed
from tests.core.training.conftest import WriteManifest, settle


def test_features_of_every_split_are_of_the_zoom_that_the_model_will_see(
    colour_config: Config, write_manifest: WriteManifest, tmp_path: Path
) -> None:
    """Training images are stored larger, with room for random crops."""
    uris = []
    for index in range(24):
        rows, columns = np.mgrid[0:64, 0:64] * 255 / 63
        pixels = np.stack([rows, columns, np.full((64, 64), 10 * index)], axis=-1)
        uris.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(pixels.astype(np.uint8)).save(uris[-1])
    splits = [[TRAIN, TRAIN, VALIDATION][index % 3] for index in range(24)]
    manifest = write_manifest("zoom.parquet", uri=uris, target=["even", "odd"] * 12, split=splits)
    config = changed(colour_config, input__manifest=str(manifest), preprocess__resize_size=24, preprocess__crop_size=20)
    job, _ = settle(config)
    assert job.store_of(TRAIN).spec.crop_size > job.spec.crop_size
    for split in (TRAIN, VALIDATION):
        (images_BCHW,) = iter_evaluation_batches(job, split, Worker(torch.device("cpu")), 100)
        rows_N = job.splits[split].row_ids_N
        assert images_BCHW.shape == (len(rows_N), 3, 20, 20)
        for image_CHW, row in zip(images_BCHW.numpy(), rows_N, strict=True):
            expected = decode_image(Path(uris[row]).read_bytes(), job.spec, max_pixels=10**6)
            difference = image_CHW.transpose(1, 2, 0).astype(int) - expected.pixels_HWC
            assert np.abs(difference).max() <= 2


def test_an_image_comes_with_its_truth_and_no_process_holds_a_table_of_all(colour_config: Config) -> None:
    job, _ = settle(colour_config)
    images = AugmentedImages(replace(job, class_names=tuple(str(k) for k in range(100_000))))
    assert len(pickle.dumps(images)) < 100_000
    for index in (0, 29):
        _, truth_K, row_id = images[1, index, 0]
        assert truth_K.dtype == torch.float32
        assert truth_K.nonzero().tolist() == [[job.splits[TRAIN].truth[index]]]
        assert row_id == job.splits[TRAIN].row_ids_N[index]
