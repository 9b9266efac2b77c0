from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from imgbatch.core.training.sampling import (
    BatchPlan,
    balancing_weights,
    epoch_order,
    spread_over_classes,
    times_before,
)


def steps_of(plan: BatchPlan, epoch: int) -> list[list[int]]:
    """The positions of each step of one worker."""
    passes = list(plan.passes(epoch))
    return [
        [position for one in passes[first : first + plan.accumulate] for _, position, _ in one]
        for first in range(0, len(passes), plan.accumulate)
    ]


def test_an_epoch_shows_every_image_once_but_for_the_rest():
    plan = BatchPlan(num_images=23, batch_size=5, seed=0)
    shown = [position for step in steps_of(plan, 1) for position in step]
    assert plan.steps_per_epoch == 4
    assert len(set(shown)) == len(shown) == 20
    assert steps_of(plan, 1) == steps_of(plan, 1)
    assert steps_of(plan, 1) != steps_of(plan, 2)


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (3, 1), (1, 2), (2, 2)])
def test_the_images_of_a_step_do_not_depend_on_who_takes_them(world_size, accumulate):
    alone = steps_of(BatchPlan(num_images=50, batch_size=13, seed=1), 3)
    plans = [
        BatchPlan(50, 13, 1, world_size=world_size, rank=rank, accumulate=accumulate) for rank in range(world_size)
    ]
    for step, together in enumerate(zip(*(steps_of(plan, 3) for plan in plans), strict=True)):
        assert sorted(position for share in together for position in share) == sorted(alone[step])
        assert all(together)


def test_pairs_stay_together():
    alone = steps_of(BatchPlan(num_images=16, batch_size=8, seed=0), 1)[0]
    pairs = {tuple(alone[first : first + 2]) for first in range(0, 8, 2)}
    share = steps_of(BatchPlan(16, 8, 0, world_size=2, rank=1), 1)[0]
    assert {tuple(share[first : first + 2]) for first in range(0, 4, 2)} < pairs


def test_fewer_images_than_a_batch_are_one_step():
    plan = BatchPlan(num_images=6, batch_size=64, seed=0)
    assert [len(step) for step in steps_of(plan, 1)] == [6]


def test_balancing_draws_classes_equally_often():
    truth_N = np.repeat([0, 1], [90, 10])
    weights_N = balancing_weights(truth_N, np.array([90, 10]))
    drawn = np.concatenate([epoch_order(100, seed=0, epoch=epoch, weights_N=weights_N) for epoch in range(20)])
    assert (drawn >= 90).mean() == pytest.approx(0.5, abs=0.05)


def test_an_image_of_several_classes_weighs_as_its_rarest_and_one_of_none_as_the_commonest():
    truth_NK = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1], [0, 0, 0]], bool)
    weights_N = balancing_weights(truth_NK, np.array([20, 4, 10]))
    assert weights_N.tolist() == [1 / 20, 1 / 4, 1 / 10, 1 / 20]


def test_weights_of_many_classes_take_no_more_memory_than_a_few_times_their_own():
    truth_N = np.random.default_rng(0).integers(0, 10_000, 100_000)
    counts_K = np.bincount(truth_N, minlength=10_000)
    tracemalloc.start()
    try:
        balancing_weights(truth_N, counts_K)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10e6  # images by classes are 4 GB


def test_some_images_are_as_many_of_each_class_as_there_are():
    truth = np.repeat([0, 1, 2], [80, 15, 3])
    counts_K = np.bincount(truth)
    chosen = spread_over_classes(truth, counts_K, most=30, seed=0)
    assert (np.bincount(truth[chosen]) == [14, 13, 3]).all() or (np.bincount(truth[chosen]) == [13, 14, 3]).all()
    assert (chosen == spread_over_classes(truth, counts_K, most=30, seed=0)).all()
    assert (np.diff(chosen) > 0).all()
    assert (spread_over_classes(truth, counts_K, most=200, seed=0) == np.arange(98)).all()


def test_an_image_of_several_labels_is_chosen_for_its_rarest():
    truth_NK = np.zeros((100, 2), bool)
    truth_NK[:90, 0] = truth_NK[85:90, 1] = True
    chosen = spread_over_classes(truth_NK, truth_NK.sum(axis=0), most=15, seed=0)
    assert truth_NK[chosen, 1].sum() == 5
    assert (~truth_NK[chosen].any(axis=1)).sum() == 5


def test_an_image_that_is_drawn_again_is_told_from_the_first_time():
    assert times_before(np.array([2, 0, 2, 2, 1, 0])).tolist() == [0, 0, 1, 2, 0, 1]
    weights_N = np.array([0.9, *[0.1 / 19] * 19])
    drawn = [draw for one in BatchPlan(num_images=20, batch_size=4, seed=0).passes(1, weights_N) for draw in one]
    assert len({*drawn}) == len(drawn) == 20
    assert max(times for _, _, times in drawn) > 10
    assert {times for _, _, times in next(BatchPlan(20, 20, 0).passes(1))} == {0}
