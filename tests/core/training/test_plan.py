from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from imgbatch.core.architectures import build_network
from imgbatch.core.bands import BandSpec
from imgbatch.core.model import load_network, save_bundle
from imgbatch.core.training import space
from imgbatch.core.training.job import load_job
from imgbatch.core.training.plan import initial_network, plan_training
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import ErrorBudgetExceeded, UsageError
from tests.conftest import changed
from tests.core.training.conftest import settle

TWO_BANDS = BandSpec((4, 2), (0.0, 0.0), (100.0, 100.0), "deviation")


@pytest.fixture
def start_from(tmp_path):
    """Makes a bundle of simple_cnn with the given classes."""

    def make(class_names=("blue", "green", "red"), bands=None):
        torch.manual_seed(1)
        network = build_network("simple_cnn", len(class_names), num_channels=len(bands.indices) if bands else 3)
        spec = PreprocessSpec(resize_size=18, crop_size=16)
        if bands:
            per_band = (0.5,) * len(bands.indices)
            spec = replace(spec, bands=bands, mean=per_band, std=per_band)
        return save_bundle(
            str(tmp_path / "start"),
            arch="simple_cnn",
            task="multiclass",
            class_names=class_names,
            preprocess=spec,
            state_dict=network.state_dict(),
        )

    return make


def test_a_job_survives_storing(colour_config):
    job, failed = settle(colour_config)
    assert failed == []
    loaded = load_job(job.paths.directory)
    assert loaded.config == job.config
    assert (loaded.arch, loaded.method, loaded.task, loaded.spec) == (
        "simple_cnn",
        "from_scratch",
        "multiclass",
        job.spec,
    )
    assert loaded.stores == job.stores
    for split, images in job.splits.items():
        np.testing.assert_array_equal(loaded.splits[split].row_ids_N, images.row_ids_N)
        np.testing.assert_array_equal(loaded.splits[split].truth, images.truth)
        np.testing.assert_array_equal(loaded.positions[split], job.positions[split])


def test_positions_point_at_the_images(colour_config):
    job, _ = settle(colour_config)
    crops = job.store_of("test").open()
    for position, truth in zip(job.positions["test"], job.splits["test"].truth, strict=True):
        mean_C = crops[int(position)].mean(axis=(0, 1))
        assert mean_C.argmax() == {"blue": 2, "green": 1, "red": 0}[job.class_names[truth]]


def test_what_decides_the_result_is_in_the_fingerprint(colour_config):
    fingerprint = plan_training(colour_config).fingerprint
    for same in ({"train__num_workers": 3}, {"train__max_failures": 0}, {"output__path": "elsewhere"}):
        assert plan_training(changed(colour_config, **same)).fingerprint == fingerprint
    for other in ({"train__seed": 1}, {"augment__min_scale": 0.5}, {"preprocess__crop_size": 14}, {"input__limit": 47}):
        assert plan_training(changed(colour_config, **other)).fingerprint != fingerprint


def test_how_much_of_a_tile_may_be_missing_is_in_the_fingerprint_of_rasters_only(colour_config, start_from):
    def fingerprint(config, max_nodata):
        return plan_training(changed(config, geo__max_nodata=max_nodata)).fingerprint

    assert fingerprint(colour_config, 0.1) == fingerprint(colour_config, 0.5)
    rasters = changed(colour_config, train__weights=start_from(bands=TWO_BANDS).path)
    assert fingerprint(rasters, 0.1) != fingerprint(rasters, 0.5)


def test_a_seed_decides_fresh_weights(colour_config):
    first, again = (initial_network(plan_training(colour_config)).head.weight for _ in range(2))
    other = initial_network(plan_training(changed(colour_config, train__seed=1))).head.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_bundle_of_the_same_classes_keeps_its_head_and_preprocessing(colour_config, start_from):
    bundle = start_from()
    config = changed(
        colour_config, train__weights=bundle.path, preprocess__resize_size=None, preprocess__crop_size=None
    )
    plan = plan_training(config)
    assert plan.spec == bundle.preprocess
    assert plan.method == "fine_tune"
    assert torch.equal(initial_network(plan).head.weight, load_network(bundle).head.weight)


def test_a_bundle_keeps_the_order_of_its_classes(colour_config, start_from):
    sorted_by_name = plan_training(colour_config).labelled
    bundle = start_from(("red", "blue", "green"))
    plan = plan_training(changed(colour_config, train__weights=bundle.path))
    assert plan.labelled.class_names == bundle.class_names
    for split, images in plan.labelled.splits.items():
        expected = np.array(sorted_by_name.class_names)[sorted_by_name.splits[split].truth]
        assert np.array(bundle.class_names)[images.truth].tolist() == expected.tolist()


def test_a_weights_file_gets_a_new_head(colour_config, start_from):
    weights = f"{start_from(('a', 'b')).path}/model.safetensors"
    network = initial_network(plan_training(changed(colour_config, train__weights=weights)))
    assert network.head.weight.shape[0] == 3


def test_a_bundle_of_other_classes_is_refused(colour_config, start_from):
    with pytest.raises(UsageError, match=r"has other classes \(a, b, …\) than the manifest \(blue, green, red, …\)"):
        plan_training(changed(colour_config, train__weights=start_from(("a", "b")).path))


@pytest.mark.parametrize(
    ("bands", "flags"),
    [
        (TWO_BANDS, {"geo__bands": (2, 4)}),
        (TWO_BANDS, {"geo__stretch": "physical"}),
        (replace(TWO_BANDS, stretch="physical"), {"geo__value_range": (0.0, 50.0)}),
        (None, {"geo__bands": "all"}),
        (None, {"geo__stretch": "deviation"}),
        (None, {"geo__value_range": (0.0, 100.0)}),
    ],
)
def test_other_bands_than_the_bundles_are_refused(colour_config, start_from, bands, flags):
    start = start_from(bands=bands)
    (option,) = flags
    message = rf"{option.replace('__', '.')}: the model at .*start keeps its own preprocessing \("
    with pytest.raises(UsageError, match=message):
        plan_training(changed(colour_config, train__weights=start.path, **flags))


def test_the_bands_of_the_bundle_may_be_said_again(colour_config, start_from):
    same = {"geo__bands": (4, 2), "geo__stretch": "deviation", "geo__value_range": (0.0, 100.0)}
    for flags in (same, {"geo__bands": "all"}):
        start = start_from(bands=TWO_BANDS)
        assert plan_training(changed(colour_config, train__weights=start.path, **flags)).spec.bands == TWO_BANDS


def test_position_embeddings_of_a_bundle_follow_the_crop(colour_config, tmp_path):
    network = build_network("vit_b_32", 3, crop_size=96)
    start = save_bundle(
        str(tmp_path / "start"),
        arch="vit_b_32",
        task="multiclass",
        class_names=("blue", "green", "red"),
        preprocess=PreprocessSpec(resize_size=96, crop_size=96),
        state_dict={name: tensor.half() for name, tensor in network.state_dict().items()},
    )
    flags = {"train__weights": start.path, "preprocess__resize_size": 64, "preprocess__crop_size": 64}
    network = initial_network(plan_training(changed(colour_config, train__arch="vit_b_32", **flags)))
    assert network.encoder.pos_embedding.shape[1] == 1 + (64 // 32) ** 2


@pytest.mark.parametrize(
    ("file_name", "backbone"),
    [("resnet34-b627a593.safetensors", "resnet34"), ("efficientnet_v2_s.safetensors", "efficientnet_v2_s")],
)
def test_the_backbone_is_what_the_name_of_its_weights_begins_with(colour_config, tmp_path, file_name, backbone):
    (tmp_path / file_name).touch()
    flags = {"train__arch": "linear_svm", "train__weights": str(tmp_path / file_name)}
    assert plan_training(changed(colour_config, **flags)).arch == backbone


def test_the_backbone_is_that_of_the_bundle(colour_config, start_from):
    config = changed(colour_config, train__arch="random_forest", train__weights=start_from().path)
    assert plan_training(config).arch == "simple_cnn"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"input__manifest": None}, "input.manifest: not given"),
        ({"output__path": None}, "output.path: not given"),
        ({"train__arch": "resnet19"}, "--arch resnet19: unknown architecture"),
        ({"train__arch": "prototypes"}, "train.weights: prototypes needs a trained backbone"),
        ({"train__method": "linear_probe"}, "train.weights: linear_probe starts from weights"),
        (
            {"train__method": "from_scratch", "train__weights": "x"},
            "train.weights: from_scratch starts without weights",
        ),
        ({"train__weights": "nowhere.safetensors"}, "--weights nowhere.safetensors: No such file"),
        ({"train__metric": "mean_average_precision"}, "train.metric: multiclass has no mean_average_precision"),
        ({"preprocess__crop_size": 20}, "preprocess: resize_size 16 must be at least crop_size 20"),
    ],
)
def test_a_wrong_configuration_is_one_line(colour_config, flags, message):
    with pytest.raises(UsageError) as caught:
        plan_training(changed(colour_config, **flags))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_too_few_images_of_a_class(colour_config, colour_images, write_manifest):
    uris = colour_images["red"][:4] + colour_images["blue"][:2]
    path = write_manifest(
        "few.parquet",
        uri=uris,
        target=["red"] * 4 + ["blue"] * 2,
        split=["train", "train", "train", "validation", "train", "validation"],
    )
    with pytest.raises(UsageError, match="class 'blue' has 1 train images, fewer than 2"):
        plan_training(changed(colour_config, input__manifest=str(path)))


@pytest.fixture
def with_broken(colour_images, write_manifest, tmp_path):
    """A manifest of which one train image is broken."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    uris = [*colour_images["red"][:5], str(broken), *colour_images["blue"][:6]]
    split = ["train", "train", "train", "validation", "test", "train"] + ["train"] * 4 + ["validation", "test"]
    return write_manifest("broken.parquet", uri=uris, target=["red"] * 6 + ["blue"] * 6, split=split)


def test_an_image_that_cannot_be_decoded_is_left_out(colour_config, with_broken):
    config = changed(colour_config, input__manifest=str(with_broken), errors__max_rate=0.2)
    job, failed = settle(config)
    assert [image.row_id for image in failed] == [5]
    assert job.splits["train"].row_ids_N.tolist() == [0, 1, 2, 6, 7, 8, 9]
    assert job.positions["train"].tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_too_many_of_them_stop_the_job(colour_config, with_broken):
    with pytest.raises(ErrorBudgetExceeded, match=r"1 of 12 images cannot be used.*broken\.png: NOT_AN_IMAGE"):
        settle(changed(colour_config, input__manifest=str(with_broken), errors__max_rate=0.05))


def test_a_batch_that_is_too_small_for_the_workers(colour_config):
    with pytest.raises(UsageError, match=r"train\.batch_size: 10 images are too few for 6 workers and accumulate 1"):
        settle(changed(colour_config, train__num_workers=6))


def test_no_space_is_said_before_anything_is_decoded(colour_config, monkeypatch):
    plan = plan_training(colour_config)
    stores = plan.stores()
    space.check_space(plan, stores)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match=r"train\.storage .*: 0\.0 GB free"):
        space.check_space(plan, stores)
