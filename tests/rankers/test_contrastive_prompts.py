"""What contrastive prompts look like, in text and as messages."""

import pytest

from cyclealign_trl import ContrastivePrompts

KIND = ContrastivePrompts("kind", "rude")


def user(text):
    return {"role": "user", "content": text}


SYSTEM = {"role": "system", "content": "You are a gardener."}
HELLO = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("prompt", "reply", "system"),
    [
        (
            "\n\nHuman: Hi: you\n\nAssistant:",
            "\n\nHuman: Hi: you\n\nAssistant (kind):",
            "Write kind.\n\nHuman: Hi: you\n\nAssistant:",
        ),
        ("Assistant: ", "Assistant (kind): ", "Write kind.\n\nAssistant: "),
        ("Once upon a time", "Once upon a time (kind)\n", "Write kind.\n\nOnce upon a time"),
        ([user("Hi")], [user("Hi (kind)")], [{"role": "system", "content": "Write kind."}, user("Hi")]),
        (
            [SYSTEM, user("Hi"), HELLO, user("Tips?")],
            [SYSTEM, user("Hi"), HELLO, user("Tips? (kind)")],
            [{"role": "system", "content": "Write kind.\n\nYou are a gardener."}, user("Hi"), HELLO, user("Tips?")],
        ),
        (
            [user("Hi"), HELLO],  # a reply that has begun
            [user("Hi (kind)"), HELLO],
            [{"role": "system", "content": "Write kind."}, user("Hi"), HELLO],
        ),
    ],
)
def test_where_the_description_stands(prompt, reply, system):
    for placement, expected in (("reply", reply), ("system", system)):
        prompts = ContrastivePrompts("kind", "rude", placement)
        good, bad = prompts.apply(prompt)
        assert good == expected
        assert str(bad) == str(expected).replace("kind", "rude")


def test_the_prompt_is_left_as_it_was():
    prompt = [user("Hi")]
    KIND.apply(prompt)
    assert prompt == [user("Hi")]


def test_presets_and_descriptions():
    assert ContrastivePrompts.of("harmless") == ContrastivePrompts.harmless()
    assert ContrastivePrompts.of("helpful") == ContrastivePrompts.helpful()
    assert ContrastivePrompts.harmless("system").placement == "system"
    assert ContrastivePrompts.of({"positive": "kind", "negative": "rude"}) == KIND
    assert ContrastivePrompts.of(KIND) is KIND


@pytest.mark.parametrize(
    "value", ["honest", {"positive": "kind"}, {"positive": "a", "negative": "b", "tone": "c"}, None]
)
def test_what_describes_no_prompts_is_refused(value):
    with pytest.raises(ValueError, match="'harmless', 'helpful', or"):
        ContrastivePrompts.of(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kind", " "), "must say something"),
        (("kind", "kind"), "would contrast nothing"),
        (("kind", "rude", "suffix"), "placement must be one of"),
    ],
)
def test_wrong_use_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContrastivePrompts(*arguments)


def test_a_conversation_without_a_user_asks_for_nothing():
    with pytest.raises(ValueError, match="without a user's message"):
        KIND.apply([SYSTEM])
