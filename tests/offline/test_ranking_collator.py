"""Batches of ranked completions."""

import pytest

from cyclealign_trl.models.renderer import Renderer
from cyclealign_trl.offline.ranking_collator import RankingCollator

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def collator(tokenizer):
    return RankingCollator(Renderer(tokenizer, (1,), max_prompt_length=100, max_completion_length=20))


def test_rows_with_fewer_completions_are_filled_up_with_absent_ones(collator):
    batch = collator(
        [
            {"prompt": "A", "completions": ["x", "y", "z"], "rewards": [0.0, 2.0, 0.0]},
            {"prompt": CHAT, "completions": [[{"role": "assistant", "content": "x"}], "y"], "rewards": [1.0, 0.5]},
        ]
    )
    assert batch.ranks == [[1, 0, 1], [0, 1, -1]]
    assert batch.rewards == [[0.0, 2.0, 0.0], [1.0, 0.5, 0.0]]
    assert [len(ids) for ids in batch.completion_ids[1]] == [2, 2, 0]


def test_truncation_is_flagged_for_every_prompt_and_every_present_completion(collator):
    batch = collator(
        [
            {"prompt": "A" * 101, "completions": ["x" * 20, "y" * 19, "z"], "ranks": [0, 1, 2]},
            {"prompt": "B", "completions": ["x", "y" * 21], "ranks": [0, 1]},
        ]
    )
    assert batch.prompt_truncated == [True, False]
    assert batch.completion_truncated == [True, False, False, False, True]


def test_given_ranks_are_kept_and_rewards_are_optional(collator):
    batch = collator([{"prompt": "A", "completions": ["x", "y"], "ranks": [1, 0]}])
    assert (batch.ranks, batch.rewards) == ([[1, 0]], None)


def test_rows_that_cannot_be_read_raise(collator):
    with pytest.raises(ValueError, match="2 completions but 3 ranks"):
        collator([{"prompt": "A", "completions": ["x", "y"], "ranks": [1, 0, 2]}])
    with pytest.raises(ValueError, match="one assistant message"):
        collator([{"prompt": "A", "completions": [7, "y"], "ranks": [1, 0]}])


def test_a_batch_with_rewards_for_some_rows_only_raises(collator):
    row = {"prompt": "A", "completions": ["x", "y"], "ranks": [0, 1]}
    with pytest.raises(ValueError, match="Of 3 rows, 2 have no rewards: give rewards for all rows, or for none"):
        collator([row, {**row, "rewards": [1.0, 0.0]}, row])


def test_the_trainer_finds_no_tensor_in_a_batch(collator):
    batch = collator([{"prompt": "A", "completions": ["x", "y"], "ranks": [1, 0]}])
    assert "labels" not in batch
    assert "ranks" not in batch
