"""Rows of prompts and completions: tokens, positions, masks, and where each token is predicted."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from cyclealign_trl.models.text_rows import Places, Row, SharedRows, by_length, padded_inputs, padded_rows

DEVICE = torch.device("cpu")
GROUPS = {(10, 11, 12): [[20, 21], [30], [40, 41]], (50,): [[60]]}


def shared_inputs(groups=GROUPS, **changes):
    layout = SharedRows.of(LlamaConfig(hidden_size=64, **{"attn_implementation": "sdpa"} | changes))
    return layout.inputs(layout.rows(groups), 0, DEVICE)


def predictions(rows, input_ids):
    """Return the token at each place that predicts a completion's token, and that token."""
    places = Places.of(rows, DEVICE)
    return list(zip(input_ids[places.rows, places.columns].tolist(), places.targets.tolist(), strict=True))


def test_padded_rows_repeat_the_prompt():
    rows = padded_rows(GROUPS)
    inputs = padded_inputs(rows, 0, DEVICE)
    assert inputs["input_ids"].tolist() == [
        [10, 11, 12, 20, 21], [10, 11, 12, 30, 0], [10, 11, 12, 40, 41], [50, 60, 0, 0, 0]
    ]  # fmt: skip
    assert inputs["attention_mask"].sum(1).tolist() == [5, 4, 5, 2]
    assert [row.texts for row in rows] == [[0], [1], [2], [3]]
    expected = [(12, 20), (20, 21), (12, 30), (12, 40), (40, 41), (50, 60)]
    assert predictions(rows, inputs["input_ids"]) == expected


def test_shared_rows_hold_the_prompt_once():
    layout = SharedRows.of(LlamaConfig(hidden_size=64, attn_implementation="sdpa"))
    rows = layout.rows(GROUPS)
    inputs = layout.inputs(rows, 0, DEVICE)
    assert inputs["input_ids"].tolist() == [[10, 11, 12, 20, 21, 30, 40, 41], [50, 60, 0, 0, 0, 0, 0, 0]]
    assert inputs["position_ids"].tolist()[0] == [0, 1, 2, 3, 4, 3, 3, 4]
    assert [row.texts for row in rows] == [[0, 1, 2], [3]]
    expected = [(12, 20), (20, 21), (12, 30), (12, 40), (40, 41), (50, 60)]
    assert predictions(rows, inputs["input_ids"]) == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_completion_sees_the_prompt_and_itself(attention):
    masks = shared_inputs(attn_implementation=attention)["attention_mask"]  # (2, 1, 8, 8)
    seen = masks if attention == "sdpa" else masks == 0
    assert [row.nonzero().flatten().tolist() for row in seen[0, 0]] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 2, 6], [0, 1, 2, 6, 7]
    ]  # fmt: skip
    assert seen[1, 0].any(dim=-1).all()  # padding sees something, so its softmax is finite


@pytest.mark.parametrize(
    ("layer_types", "masks"),
    [
        (None, "windowed"),
        (["sliding_attention"] * 2, "windowed"),
        (["full_attention"] * 2, "full"),
        (["full_attention", "sliding_attention"], {"full_attention": "full", "sliding_attention": "windowed"}),
    ],
)
def test_a_sliding_window_counts_positions(layer_types, masks):
    config = MistralConfig(hidden_size=64, sliding_window=2, attn_implementation="sdpa")
    config.layer_types = layer_types
    layout = SharedRows.of(config)
    inputs = layout.inputs(layout.rows(GROUPS), 0, DEVICE)
    full = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 2, 6], [0, 1, 2, 6, 7]]
    windowed = [[0], [0, 1], [1, 2], [2, 3], [3, 4], [2, 5], [2, 6], [6, 7]]
    expected = {"full": full, "windowed": windowed}
    found = inputs["attention_mask"]
    named = found if isinstance(found, dict) else {"": found}
    kinds = masks if isinstance(masks, dict) else {"": masks}
    assert named.keys() == kinds.keys()
    for name, mask in named.items():
        assert [row.nonzero().flatten().tolist() for row in mask[0, 0]] == expected[kinds[name]]


def test_the_length_of_rows_is_the_cheapest():
    hidden, prompt = 64, 30
    length = shared_inputs({tuple(range(prompt)): [[7]] * 400})["input_ids"].shape[1]

    def cost(completions):
        row = prompt + completions
        return (row + row**2 / (6 * hidden)) / completions

    best = min(range(1, 400), key=cost)
    assert abs(length - prompt - best) <= 1


def test_a_group_without_completions_has_one_token():
    rows = padded_rows({(10, 11): []})
    assert padded_inputs(rows, 0, DEVICE)["input_ids"].tolist() == [[10]]
    places = Places.of(rows, DEVICE)
    assert places.targets.tolist() == []
    assert places.targets.dtype == torch.long


@pytest.mark.parametrize(
    ("min_tokens", "passes"),
    [(1, [[9], [7], [7], [4], [2]]), (14, [[9, 7], [7, 4], [2]]), (27, [[9, 7, 7], [4, 2]]), (99, [[9, 7, 7, 4, 2]])],
)
def test_passes_have_texts_of_similar_length(min_tokens, passes):
    rows = [Row([5] * length, [], []) for length in (7, 2, 9, 4, 7)]
    assert [[row.length for row in own] for own in by_length(rows, min_tokens)] == passes
