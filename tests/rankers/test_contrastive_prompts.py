"""`ContrastivePrompts`: insertion into plain text and conversations, presets, invalid arguments."""

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
            [user("Hi"), HELLO],  # a prefilled reply
            [user("Hi (kind)"), HELLO],
            [{"role": "system", "content": "Write kind."}, user("Hi"), HELLO],
        ),
    ],
)
def test_inserts_the_description(prompt, reply, system):
    for placement, expected in (("reply", reply), ("system", system)):
        prompts = ContrastivePrompts("kind", "rude", placement)
        good, bad = prompts.apply(prompt)
        assert good == expected
        assert str(bad) == str(expected).replace("kind", "rude")


def test_does_not_modify_the_prompt():
    prompt = [user("Hi")]
    KIND.apply(prompt)
    assert prompt == [user("Hi")]


def test_converts_names_and_mappings():
    assert ContrastivePrompts.of("harmless") == ContrastivePrompts.harmless()
    assert ContrastivePrompts.of("helpful") == ContrastivePrompts.helpful()
    assert ContrastivePrompts.harmless("system").placement == "system"
    assert ContrastivePrompts.of({"positive": "kind", "negative": "rude"}) == KIND
    assert ContrastivePrompts.of(KIND) is KIND


@pytest.mark.parametrize(
    "value", ["honest", {"positive": "kind"}, {"positive": "a", "negative": "b", "tone": "c"}, None]
)
def test_unknown_names_and_incomplete_mappings_raise(value):
    with pytest.raises(ValueError, match="'harmless', 'helpful', or"):
        ContrastivePrompts.of(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kind", " "), "must not be empty"),
        (("kind", "kind"), "must differ"),
        (("kind", "rude", "suffix"), "placement must be one of"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContrastivePrompts(*arguments)


def test_a_conversation_without_a_user_message_raises():
    with pytest.raises(ValueError, match="needs a user message"):
        KIND.apply([SYSTEM])
