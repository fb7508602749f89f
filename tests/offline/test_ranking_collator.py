"""Texts to token ids: both formats, both limits, holes."""

import pytest

from cyclealign_trl.cycle.rollout import PromptCollator
from cyclealign_trl.models.renderer import Renderer
from cyclealign_trl.offline.ranking_collator import RankingCollator

MULTI_TURN = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture
def renderer(tokenizer):
    return Renderer(tokenizer, (1,), max_prompt_length=100, max_completion_length=20)


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def test_standard_prompt_and_completion(renderer, tokenizer):
    ids, cut = renderer.prompt("Question:")
    assert (text(tokenizer, ids), cut) == ("Question:", False)
    ids, cut = renderer.completion("Question:", " Answer")
    assert (text(tokenizer, ids), cut) == (" Answer</s>", False)


def test_conversational_prompt_opens_the_turn_that_the_completion_closes(renderer, tokenizer):
    ids, _ = renderer.prompt(MULTI_TURN)
    assert text(tokenizer, ids) == (
        "<system>Be kind.</s>\n<user>Hi</s>\n<assistant>Hello.</s>\n<user>Bye</s>\n<assistant>"
    )
    # The template's line break after the end of the turn is never sampled, so it is not trained on.
    assert text(tokenizer, renderer.completion(MULTI_TURN, "See you")[0]) == "See you</s>"


def test_a_prefilled_reply_is_continued(renderer, tokenizer):
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    assert text(tokenizer, renderer.prompt(prompt)[0]) == "<user>Hi</s>\n<assistant>Well, "
    assert text(tokenizer, renderer.completion(prompt, "hello")[0]) == "hello</s>"


def test_a_template_that_renders_finished_turns_otherwise(renderer, tokenizer):
    tokenizer.chat_template += "{% if add_generation_prompt %}<think></think>{% endif %}"
    assert text(tokenizer, renderer.completion(MULTI_TURN, "See you")[0]) == "See you</s>"


def test_an_overlong_prompt_loses_its_beginning(tokenizer):
    renderer = Renderer(tokenizer, (1,), max_prompt_length=4, max_completion_length=20)
    ids, cut = renderer.prompt("0123456")
    assert (text(tokenizer, ids), cut) == ("3456", True)
    assert renderer.prompt("3456") == (ids, False)


def test_an_overlong_completion_loses_its_end_and_its_eos(tokenizer):
    renderer = Renderer(tokenizer, (1,), max_prompt_length=None, max_completion_length=4)
    ids, cut = renderer.completion("Q", "012345")
    assert (text(tokenizer, ids), cut) == ("0123", True)
    assert text(tokenizer, renderer.completion("Q", "012")[0]) == "012</s>"


def test_an_empty_prompt_raises(renderer):
    with pytest.raises(ValueError, match="no tokens"):
        renderer.prompt("")


def test_prompt_collator_keeps_the_other_columns_as_metadata(renderer):
    batch = PromptCollator(renderer)([{"prompt": "A", "topic": "tea"}, {"prompt": "B", "topic": "milk"}])
    assert batch.prompts == ["A", "B"]
    assert batch.metadata == [{"topic": "tea"}, {"topic": "milk"}]
    assert [len(ids) for ids in batch.prompt_ids] == [1, 1]


def test_ranking_collator_fills_rows_up_with_absent_completions(renderer):
    batch = RankingCollator(renderer)(
        [
            {"prompt": "A", "completions": ["x", "y", "z"], "rewards": [0.0, 2.0, 0.0]},
            {
                "prompt": MULTI_TURN,
                "completions": [[{"role": "assistant", "content": "x"}], "y"],
                "rewards": [1.0, 0.5],
            },
        ]
    )
    assert batch.ranks == [[1, 0, 1], [0, 1, -1]]
    assert batch.rewards == [[0.0, 2.0, 0.0], [1.0, 0.5, 0.0]]
    assert [len(ids) for ids in batch.completion_ids[1]] == [2, 2, 0]


def test_given_ranks_win_and_rewards_are_optional(renderer):
    batch = RankingCollator(renderer)([{"prompt": "A", "completions": ["x", "y"], "ranks": [1, 0]}])
    assert (batch.ranks, batch.rewards) == ([[1, 0]], None)


def test_rows_that_do_not_fit_raise(renderer):
    with pytest.raises(ValueError, match="2 completions but 3 ranks"):
        RankingCollator(renderer)([{"prompt": "A", "completions": ["x", "y"], "ranks": [1, 0, 2]}])
    with pytest.raises(ValueError, match="one assistant message"):
        RankingCollator(renderer)([{"prompt": "A", "completions": [7, "y"], "ranks": [1, 0]}])
