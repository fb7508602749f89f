"""Fitting requests into a context window, and estimating tokens."""

import pytest

from cyclealign_trl.chat.messages import BYTES_PER_TOKEN, estimate_tokens, message_bytes
from cyclealign_trl.cycle.demonstrations import DEFAULT
from cyclealign_trl.rankers.context import FittedRequest, fit_request
from cyclealign_trl.rankers.prompts import build_messages
from cyclealign_trl.types import Demonstration, RankingRequest, Trimmed

COMPLETIONS = ("short", "a" * 1000 + "A", "b" * 3000)


def demonstration(name):
    return Demonstration(name, (f"{name}: {'x' * 300}", "No."), (0, 1))


STATIC = (demonstration("static one"), demonstration("static two"))
DYNAMIC = tuple(demonstration(f"dynamic {index}") for index in range(3))
REQUEST = RankingRequest("Why?", COMPLETIONS, (*STATIC, *DYNAMIC), num_static=2)


def build(request):
    def messages(demonstrations, max_characters):
        return build_messages(request.prompt, request.completions, demonstrations, max_characters=max_characters)

    return messages


def needed(request, demonstrations, max_characters=None):
    """Return the smallest window that fits the messages and a reply of 100 tokens."""
    return 100 + -(-(message_bytes(build(request)(demonstrations, max_characters)) + 400) // 3)


def fit_into(window, request=REQUEST):
    return fit_request(request, build(request), window, max_tokens=100)


def test_a_request_that_fits_is_unchanged():
    assert fit_into(needed(REQUEST, REQUEST.demonstrations)) == FittedRequest(REQUEST.demonstrations)
    assert fit_into(10**9) == FittedRequest(REQUEST.demonstrations)


def test_drops_the_oldest_dynamic_demonstrations_first_and_the_static_ones_last():
    kept = [
        (*STATIC, *DYNAMIC[1:]),
        (*STATIC, DYNAMIC[2]),
        STATIC,
        STATIC[:1],
        (),
    ]
    for dropped, demonstrations in enumerate(kept, start=1):
        expected = FittedRequest(demonstrations, None, Trimmed(demonstrations=dropped))
        window = needed(REQUEST, demonstrations)
        assert fit_into(window) == expected
        assert fit_into(window - 1) != expected


def test_then_truncates_completions_to_the_largest_common_length_that_fits():
    for window in range(needed(REQUEST, (), 100), needed(REQUEST, ()), 50):
        fitted = fit_into(window)
        assert fitted.demonstrations == ()
        length = fitted.max_characters
        num_truncated = sum(len(completion) > length for completion in COMPLETIONS)
        assert fitted.trimmed == Trimmed(demonstrations=5, completions=num_truncated)
        assert needed(REQUEST, (), length) <= window < needed(REQUEST, (), length + 1)


def test_returns_none_if_nothing_fits():
    assert fit_into(needed(REQUEST, (), 100)).max_characters in (100, 101)  # one token is counted as 3 bytes
    assert fit_into(needed(REQUEST, (), 100) - 1) is None
    assert fit_into(101) is None
    long_prompt = RankingRequest("Why? " * 2000, ("a", "b"))
    assert fit_into(2000, long_prompt) is None


def test_returns_none_if_completions_become_identical():
    request = RankingRequest("Why?", ("same " * 200 + "good", "same " * 200 + "bad"))
    assert fit_into(needed(request, ()), request) == FittedRequest(())
    assert fit_into(needed(request, ()) - 50, request) is None


def test_does_not_depend_on_the_order_of_the_completions():
    reverse = RankingRequest("Why?", COMPLETIONS[::-1], REQUEST.demonstrations, num_static=2)
    for window in range(needed(REQUEST, (), 100), needed(REQUEST, REQUEST.demonstrations), 97):
        assert fit_into(window) == fit_into(window, reverse)


def test_demonstrations_are_dynamic_by_default():
    request = RankingRequest("Why?", COMPLETIONS, REQUEST.demonstrations)
    assert fit_into(needed(request, STATIC[1:] + DYNAMIC), request).demonstrations == STATIC[1:] + DYNAMIC


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 0), ("a", 1), ("abcd", 1), ("abcde", 2), ("Straße", 2), ("你好吗", 3), ("🙂", 1)]
)
def test_estimates_tokens_from_bytes(text, tokens):
    assert estimate_tokens(len(text.encode())) == tokens
    assert BYTES_PER_TOKEN == 4


def test_fits_texts_with_lone_surrogates():
    request = RankingRequest("Why \ud83d?", ("\ud83d" * 500, "b" * 500), (DEFAULT,), num_static=1)
    assert fit_request(request, build(request), 800, max_tokens=100).max_characters is not None
