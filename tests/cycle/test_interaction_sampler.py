"""Order of prompts: windows, their repetition, and epochs."""

from collections import Counter

import pytest

from cyclealign_trl.cycle.interaction_sampler import InteractionSampler


def make_sampler(num_prompts=10, window=4, num_interactions=3, seed=0, epoch=0):
    return InteractionSampler(num_prompts, window, num_interactions, seed, lambda: epoch)


def test_each_window_is_repeated_once_per_interaction():
    indices = list(make_sampler())
    assert len(indices) == len(make_sampler()) == 3 * 4 * 3
    for start in range(0, len(indices), 12):
        window = indices[start : start + 4]
        assert indices[start : start + 12] == window * 3
        assert len(set(window)) == 4


def test_the_last_window_is_filled_from_the_start_of_the_order():
    indices = list(make_sampler(num_interactions=1))
    assert set(indices) == set(range(10))
    assert indices[10:] == indices[:2]


def test_every_prompt_has_all_interactions():
    assert Counter(make_sampler(num_prompts=8)) == dict.fromkeys(range(8), 3)


def test_every_epoch_and_every_seed_has_another_order():
    orders = {tuple(make_sampler(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert list(make_sampler(seed=1, epoch=2)) == list(make_sampler(seed=1, epoch=2))


def test_the_epoch_is_read_when_iteration_starts():
    epoch = 0
    sampler = InteractionSampler(10, 4, 1, 0, lambda: epoch)
    first = list(sampler)
    epoch = 1
    assert list(sampler) != first


def test_fewer_prompts_than_one_window_raise():
    with pytest.raises(ValueError, match="3 prompts, but one optimiser step needs 4 different ones"):
        make_sampler(num_prompts=3)
