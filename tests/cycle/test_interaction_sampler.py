"""Windows, repetition, epochs."""

from collections import Counter

import pytest

from cyclealign_trl.cycle.interaction_sampler import InteractionSampler


def sampler(num_prompts=10, window=4, num_interactions=3, seed=0, epoch=0):
    return InteractionSampler(num_prompts, window, num_interactions, seed, lambda: epoch)


def test_each_window_is_repeated_for_all_its_interactions():
    indices = list(sampler())
    assert len(indices) == len(sampler()) == 3 * 4 * 3
    for start in range(0, len(indices), 12):
        window = indices[start : start + 4]
        assert indices[start : start + 12] == window * 3
        assert len(set(window)) == 4


def test_the_last_window_is_filled_from_the_start_of_the_order():
    indices = list(sampler(num_interactions=1))
    assert set(indices) == set(range(10))
    assert indices[10:] == indices[:2]


def test_every_prompt_has_all_its_interactions():
    assert Counter(sampler(num_prompts=8)) == dict.fromkeys(range(8), 3)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(sampler(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert list(sampler(seed=1, epoch=2)) == list(sampler(seed=1, epoch=2))


def test_the_epoch_is_read_when_it_is_iterated():
    epoch = 0
    walker = InteractionSampler(10, 4, 1, 0, lambda: epoch)
    first = list(walker)
    epoch = 1
    assert list(walker) != first


def test_a_dataset_smaller_than_a_window_raises():
    with pytest.raises(ValueError, match="3 prompts, but one optimiser step takes 4"):
        sampler(num_prompts=3)
