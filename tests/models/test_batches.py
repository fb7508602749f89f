"""Batches of similar lengths, and padding on both sides."""

import pytest
import torch

from cyclealign_trl.models.batches import longest_first, pad

CPU = torch.device("cpu")


def test_the_first_batch_has_the_longest_rows():
    assert list(longest_first([3, 9, 5, 1, 7], batch_size=2)) == [[1, 4], [2, 0], [3]]


def test_rows_of_equal_length_keep_their_order():
    assert list(longest_first([2, 2, 2], batch_size=2)) == [[0, 1], [2]]
    assert list(longest_first([], batch_size=2)) == []


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[5, 6, 7], [8, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 0, 0], [0, 0, 0]]),
        ("left", [[5, 6, 7], [0, 0, 8], [0, 0, 0]], [[1, 1, 1], [0, 0, 1], [0, 0, 0]]),
    ],
)
def test_rows_are_padded_to_the_longest(side, ids, mask):
    padded, attention_mask = pad([[5, 6, 7], [8], []], pad_token_id=0, device=CPU, side=side)
    assert padded.tolist() == ids
    assert attention_mask.tolist() == mask


def test_rows_are_padded_on_the_right_by_default():
    assert pad([[5, 6], [7]], pad_token_id=0, device=CPU)[0].tolist() == [[5, 6], [7, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_includes_real_tokens_that_equal_the_pad_token(side):
    _, mask = pad([[5, 1, 1], [1, 6, 1]], pad_token_id=1, device=CPU, side=side)
    assert mask.tolist() == [[1, 1, 1], [1, 1, 1]]
