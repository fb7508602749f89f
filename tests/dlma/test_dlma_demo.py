"""DLMA improves the demo's policy by its own self-rewards; shuffled data does not."""

import pytest

from benchmarks.dlma_rise import measure, ordering_accuracy, pretrain_styled_policy


def test_self_reward_prefers_kind_completions_after_a_short_pretraining():
    model, tokenizer = pretrain_styled_policy(seed=0, num_steps=40)
    assert ordering_accuracy(model, tokenizer, seed=0) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "num_steps"), [(0, 500), (0, 800), (1, 800), (2, 800)])
def test_dlma_improves_a_policy_without_a_judge(seed, num_steps):
    figures = measure(seed, num_steps, ("DLMA", "shuffled"))
    assert figures["ordering"] >= 0.9
    assert figures["DLMA"] >= 0.2
    assert abs(figures["shuffled"]) < 0.08
