from __future__ import annotations

import errno

import pytest
import torch
from safetensors.torch import save_file

from imgbatch.core import storage
from imgbatch.core.architectures import build_network
from imgbatch.core.baselines import fit_head
from imgbatch.core.training import checkpoint
from imgbatch.core.training.checkpoint import load_best, load_last, load_weights, read_epochs, save_best
from imgbatch.core.training.loop import Trainer, run_training
from imgbatch.core.training.workers import Worker
from imgbatch.errors import ImgbatchError
from tests.conftest import changed
from tests.core.training.conftest import settle

ALONE = Worker(torch.device("cpu"))


class Stop(Exception):
    pass


def train(config, report=lambda _: None):
    """A whole training; returns the job and its outcome."""
    job, _ = settle(config)
    run_training(job, ALONE, report)
    return job, storage.read_json(job.paths.outcome)


def last_weights(job):
    """The network's own weights after the last epoch."""
    state, _ = load_last(job.paths)
    return state["network"]


def best_weights(job):
    """Of the epoch that became the model."""
    return load_best(job.paths, storage.read_json(job.paths.outcome)["best_epoch"])


def stop_after(epoch):
    def report(record):
        if record["epoch"] == epoch:
            raise Stop

    return report


def test_colours_are_learnt(colour_config):
    seen = []
    job, outcome = train(changed(colour_config, train__epochs=8), seen.append)
    assert [record["epoch"] for record in seen] == list(range(9))
    assert read_epochs(job.paths) == seen
    assert outcome["steps"] == 8 * 3
    assert outcome["metrics"]["test"]["top1"] > 0.8
    assert seen[-1]["train_loss"] < seen[1]["train_loss"]


@pytest.mark.parametrize("loss", ["focal", "hinge"])
def test_colours_are_learnt_from_other_losses_too(colour_config, loss):
    _, outcome = train(changed(colour_config, train__epochs=8, train__loss=loss))
    assert outcome["metrics"]["test"]["top1"] > 0.8


def test_an_l1_penalty_leaves_fewer_weights(colour_config):
    job, _ = train(changed(colour_config, train__l1=2.0))
    weights = last_weights(job)["features.0.weight"]
    assert 0 < (weights == 0).float().mean() < 1


def test_a_killed_training_ends_as_if_nothing_had_happened(colour_config, tmp_path):
    config = changed(colour_config, train__epochs=3, train__ema_decay=0.9, train__dropout=0.2, augment__mixup=0.2)
    undisturbed, expected = train(changed(config, train__storage=str(tmp_path / "other")))
    job, _ = settle(config)
    with pytest.raises(Stop):
        run_training(job, ALONE, stop_after(2))
    run_training(job, ALONE, lambda _: None)
    outcome = storage.read_json(job.paths.outcome)
    assert outcome["steps"] == expected["steps"]
    assert outcome["metrics"] == expected["metrics"]
    torch.testing.assert_close(best_weights(job), best_weights(undisturbed), rtol=0, atol=0)


def test_weights_that_no_record_tells_of_are_not_the_best(colour_config):
    job, _ = settle(changed(colour_config, train__epochs=1))
    with pytest.raises(Stop):
        run_training(job, ALONE, stop_after(1))
    expected = job.paths.best_of(max(record["epoch"] for record in read_epochs(job.paths) if record["is_best"]))
    # As a worker leaves them that is killed before the checkpoint of the epoch.
    save_best(job.paths, 2, {name: torch.zeros_like(tensor) for name, tensor in last_weights(job).items()})
    run_training(job, ALONE, lambda _: None)
    torch.testing.assert_close(best_weights(job), load_weights(expected), rtol=0, atol=0)


def test_the_best_weights_alone_are_kept_also_where_their_name_had_no_epoch(colour_config):
    config = changed(colour_config, train__epochs=8)
    job, _ = settle(config)
    with pytest.raises(Stop):
        run_training(job, ALONE, stop_after(0))
    storage.local_path(job.paths.best_of(0)).rename(storage.local_path(job.paths.directory) / "best.safetensors")
    assert load_best(job.paths, 0).keys() == load_weights(job.paths.initial).keys()
    _, outcome = train(config)
    assert outcome["best_epoch"] > 0
    assert list(storage.list_stems(job.paths.directory, ["best"])) == [f"best-{outcome['best_epoch']:05d}.safetensors"]


def test_a_training_repeats_itself_and_a_seed_changes_it(colour_config, tmp_path):
    config = changed(colour_config, augment__color_jitter=0.2, train__deterministic=True)
    try:
        losses = [
            read_epochs(train(changed(config, train__storage=str(tmp_path / name), train__seed=seed))[0].paths)[-1]
            for name, seed in (("a", 0), ("b", 0), ("c", 1))
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses[0]["train_loss"] == losses[1]["train_loss"]
    assert losses[0]["train_loss"] != losses[2]["train_loss"]


def test_accumulating_changes_nothing(colour_config, tmp_path):
    config = changed(colour_config, train__batch_norm="frozen")
    once, _ = train(config)
    twice, _ = train(changed(config, train__accumulate=2, train__storage=str(tmp_path / "twice")))
    torch.testing.assert_close(last_weights(once), last_weights(twice))


def test_training_stops_when_nothing_gets_better(colour_config):
    config = changed(colour_config, train__epochs=30, train__learning_rate=1e-9, train__patience=2)
    job, outcome = train(changed(config, train__batch_norm="frozen"))
    assert outcome["epochs"] < 30
    assert not any(record["is_best"] for record in read_epochs(job.paths)[-2:])


@pytest.mark.parametrize(
    "flags",
    [
        {"train__optimizer": "sgd", "train__imbalance": "sampler"},
        {"train__imbalance": "weights", "train__label_smoothing": 0.1, "train__precision": "bfloat16"},
        {"augment__rand_augment": 5, "augment__cutmix": 1.0, "augment__erasing": 0.3, "augment__flip": "all"},
        {"train__task": "multiclass", "train__metric": "loss", "train__clip_norm": 0.0, "augment__min_scale": 1.0},
    ],
)
def test_every_choice_trains(colour_config, flags):
    _, outcome = train(changed(colour_config, train__epochs=1, **flags))
    assert outcome["metrics"]["validation"]["images"] == 9


def test_several_labels_of_an_image_are_learnt(colour_config, colour_images, write_manifest):
    uris = [uri for name in ("blue", "red") for uri in colour_images[name]]
    targets = [["cold"] if name == "blue" else ["warm", "loud"] for name in ("blue", "red") for _ in range(16)]
    split = (["train"] * 10 + ["validation"] * 3 + ["test"] * 3) * 2
    manifest = write_manifest("labels.parquet", uri=uris, targets=targets, split=split)
    job, outcome = train(changed(colour_config, input__manifest=str(manifest), train__epochs=8))
    assert job.class_names == ("cold", "loud", "warm")
    assert outcome["metrics"]["test"]["mean_average_precision"] > 0.8


@pytest.fixture
def pretrained(colour_config, tmp_path):
    """Weights of a short training, to start from."""
    job, outcome = train(changed(colour_config, train__storage=str(tmp_path / "pretrained"), train__epochs=4))
    return job.paths.best_of(outcome["best_epoch"])


def test_fine_tuning_starts_from_a_fitted_head(colour_config, pretrained):
    job, _ = train(changed(colour_config, train__weights=pretrained, train__epochs=1, train__ema_decay=0.9))
    first = read_epochs(job.paths)[0]
    assert first["stage"] == "head"
    assert first["validation"]["top1"] > 0.8


@pytest.mark.parametrize(("method", "num_features"), [("fine_tune", 12), ("linear_probe", 30)])
def test_a_head_that_is_only_a_start_is_fitted_to_some_images(
    colour_config, pretrained, method, num_features, monkeypatch
):
    monkeypatch.setattr("imgbatch.core.training.job._MOST_HEAD_IMAGES", 12)
    fitted: list[tuple[int, list[float]]] = []

    def fit(kind, train_ND, train_NK, *rest, **task):
        fitted.append((len(train_ND), train_NK.sum(dim=0).tolist()))
        return fit_head(kind, train_ND, train_NK, *rest, **task)

    monkeypatch.setattr("imgbatch.core.training.loop.fit_head", fit)
    job, _ = train(changed(colour_config, train__weights=pretrained, train__method=method))
    assert fitted == [(num_features, [num_features / 3] * 3)]
    assert read_epochs(job.paths)[0]["validation"]["top1"] > 0.6


def test_a_linear_probe_leaves_the_backbone_alone(colour_config, pretrained):
    job, _ = train(changed(colour_config, train__weights=pretrained, train__method="linear_probe"))
    before, after = load_weights(job.paths.initial), last_weights(job)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("baseline", ["logistic_regression", "prototypes", "linear_svm"])
def test_baselines_are_fitted_without_an_epoch(colour_config, pretrained, baseline):
    flags = {"train__arch": baseline, "train__backbone": "simple_cnn", "train__weights": pretrained}
    job, outcome = train(changed(colour_config, **flags))
    assert outcome["steps"] == 0
    assert outcome["metrics"]["test"]["top1"] > 0.8
    before, after = load_weights(job.paths.initial), best_weights(job)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.weight", "head.bias"}


def test_a_forest_survives_a_killed_training(colour_config, pretrained):
    config = changed(colour_config, train__arch="random_forest", train__weights=pretrained)
    config = changed(config, train__backbone="simple_cnn")
    job, _ = settle(config)
    with pytest.raises(Stop):
        run_training(job, ALONE, stop_after(0))
    _, outcome = train(config, lambda _: pytest.fail("it was fitted already"))
    assert outcome["metrics"]["test"]["top1"] > 0.8
    assert "head.shares" in best_weights(job)


def test_a_head_that_is_a_convolution_needs_no_features(colour_config, tmp_path):
    weights = tmp_path / "squeezenet1_1.safetensors"
    save_file(build_network("squeezenet1_1", 3).state_dict(), weights)
    job, _ = settle(changed(colour_config, train__arch="squeezenet1_1", train__weights=str(weights)))
    storage.remove(job.store_of("train").directory)
    Trainer(job, ALONE)._fit_head()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_device_need_not_hold_the_features_of_all_images(colour_config):
    job, _ = settle(colour_config)
    trainer = Trainer(job, Worker(torch.device("cuda")))
    features_ND = trainer._gather("train", lambda images_BCHW: images_BCHW.flatten(1))
    assert features_ND.shape == (30, 3 * 16 * 16)
    assert features_ND.device.type == "cpu"


def test_a_loss_that_is_not_finite_is_one_line(colour_config):
    config = changed(colour_config, train__learning_rate=1e30, train__clip_norm=0.0, train__optimizer="sgd")
    with pytest.raises(ImgbatchError, match=r"the loss of epoch \d is not finite; lower train.learning_rate"):
        train(changed(config, train__batch_norm="frozen"))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_validation_loss_that_is_not_finite_is_one_line(colour_config, colour_images, write_manifest, task):
    flags = {"train__learning_rate": 1e30, "train__clip_norm": 0.0, "train__optimizer": "sgd"}
    if task == "multilabel":
        uris = colour_images["blue"] + colour_images["red"]
        split = (["train"] * 10 + ["validation"] * 6) * 2
        manifest = write_manifest("labels.parquet", uri=uris, targets=[["b"]] * 16 + [["r"]] * 16, split=split)
        flags["input__manifest"] = str(manifest)
    # All images in one step: the loss is taken before the weights are lost.
    config = changed(colour_config, train__batch_size=30, train__batch_norm="frozen", **flags)
    with pytest.raises(ImgbatchError, match=r"the validation loss of epoch 1 is not finite; lower train.learning_rate"):
        train(config)


def test_weights_that_give_no_numbers_are_one_line(colour_config, make_bundle):
    network = build_network("simple_cnn", 3)
    network.features[1].running_mean.fill_(torch.nan)
    bundle = make_bundle("start", class_names=("blue", "green", "red"), state_dict=network.state_dict())
    config = changed(colour_config, train__weights=bundle.path)
    with pytest.raises(ImgbatchError, match=r"the validation loss of epoch 0 is not finite; start from other weights"):
        train(config)


def test_no_space_for_a_checkpoint_is_one_line(colour_config, monkeypatch):
    job, _ = settle(colour_config)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.storage, "replace", full)
    with pytest.raises(ImgbatchError, match=r"train\.storage: no space for .*best-00000\.safetensors"):
        run_training(job, ALONE, lambda _: None)
