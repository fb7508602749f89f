"""Token ids of prompts and completions in both formats, and the length limits."""

import pytest

from cyclealign_trl.models.renderer import Renderer

MULTI_TURN = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture
def renderer(tokenizer):
    return Renderer(tokenizer, (1,), max_prompt_length=100, max_completion_length=20)


def test_a_text_prompt_has_no_end_token_and_its_completion_has_one(renderer, tokenizer):
    ids, truncated = renderer.prompt("Question:")
    assert (tokenizer.decode(ids), truncated) == ("Question:", False)
    ids, truncated = renderer.completion("Question:", " Answer")
    assert (tokenizer.decode(ids), truncated) == (" Answer</s>", False)


def test_a_conversational_prompt_opens_the_turn_that_the_completion_ends(renderer, tokenizer):
    ids, _ = renderer.prompt(MULTI_TURN)
    assert tokenizer.decode(ids) == (
        "<system>Be kind.</s>\n<user>Hi</s>\n<assistant>Hello.</s>\n<user>Bye</s>\n<assistant>"
    )
    # The policy never samples the template's line break after the end of the turn, so training leaves it out.
    assert tokenizer.decode(renderer.completion(MULTI_TURN, "See you")[0]) == "See you</s>"


def test_a_completion_continues_a_prefilled_turn(renderer, tokenizer):
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    assert tokenizer.decode(renderer.prompt(prompt)[0]) == "<user>Hi</s>\n<assistant>Well, "
    assert tokenizer.decode(renderer.completion(prompt, "hello")[0]) == "hello</s>"


def test_a_template_can_render_open_and_finished_turns_differently(renderer, tokenizer):
    tokenizer.chat_template += "{% if add_generation_prompt %}<think></think>{% endif %}"
    assert tokenizer.decode(renderer.completion(MULTI_TURN, "See you")[0]) == "See you</s>"


def test_a_prompt_that_is_too_long_keeps_its_last_tokens(tokenizer):
    renderer = Renderer(tokenizer, (1,), max_prompt_length=4, max_completion_length=20)
    ids, truncated = renderer.prompt("0123456")
    assert (tokenizer.decode(ids), truncated) == ("3456", True)
    assert renderer.prompt("3456") == (ids, False)


def test_a_completion_that_is_too_long_keeps_its_first_tokens_and_gets_no_end_token(tokenizer):
    renderer = Renderer(tokenizer, (1,), max_prompt_length=None, max_completion_length=4)
    ids, truncated = renderer.completion("Q", "012345")
    assert (tokenizer.decode(ids), truncated) == ("0123", True)
    assert tokenizer.decode(renderer.completion("Q", "012")[0]) == "012</s>"


def test_an_empty_prompt_raises(renderer):
    with pytest.raises(ValueError, match=r"The prompt '' has no tokens to continue\. Remove it from the dataset"):
        renderer.prompt("")
