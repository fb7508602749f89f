"""What goes first when a request is too long for the judge's window, and how texts are counted."""

import pytest

from cyclealign_trl.chat.messages import BYTES_PER_TOKEN, estimate_tokens, message_bytes
from cyclealign_trl.cycle.demonstrations import DEFAULT
from cyclealign_trl.rankers.context import Fit, fit
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
    """The smallest window that these fit into, with replies of 100 tokens."""
    return 100 + -(-(message_bytes(build(request)(demonstrations, max_characters)) + 400) // 3)


def fit_into(window, request=REQUEST):
    return fit(request, build(request), window, max_tokens=100)


def test_what_fits_is_left_alone():
    assert fit_into(needed(REQUEST, REQUEST.demonstrations)) == Fit(REQUEST.demonstrations)
    assert fit_into(10**9) == Fit(REQUEST.demonstrations)


def test_the_oldest_dynamic_demonstration_goes_first_and_the_static_ones_after_all_dynamic():
    kept = [
        (*STATIC, *DYNAMIC[1:]),
        (*STATIC, DYNAMIC[2]),
        STATIC,
        STATIC[:1],
        (),
    ]
    for dropped, demonstrations in enumerate(kept, start=1):
        expected = Fit(demonstrations, None, Trimmed(demonstrations=dropped))
        window = needed(REQUEST, demonstrations)
        assert fit_into(window) == expected
        assert fit_into(window - 1) != expected


def test_then_the_completions_are_cut_to_one_length_as_large_as_fits():
    for window in range(needed(REQUEST, (), 100), needed(REQUEST, ()), 50):
        fitted = fit_into(window)
        assert fitted.demonstrations == ()
        length = fitted.max_characters
        cut = sum(len(completion) > length for completion in COMPLETIONS)
        assert fitted.trimmed == Trimmed(demonstrations=5, completions=cut)
        assert needed(REQUEST, (), length) <= window < needed(REQUEST, (), length + 1)


def test_what_cannot_be_ranked_any_more_does_not_fit():
    assert fit_into(needed(REQUEST, (), 100)).max_characters in (100, 101)  # a token is 3 bytes
    assert fit_into(needed(REQUEST, (), 100) - 1) is None
    assert fit_into(101) is None
    long_prompt = RankingRequest("Why? " * 2000, ("a", "b"))
    assert fit_into(2000, long_prompt) is None


def test_completions_that_are_cut_to_the_same_text_do_not_fit():
    request = RankingRequest("Why?", ("same " * 200 + "good", "same " * 200 + "bad"))
    assert fit_into(needed(request, ()), request) == Fit(())
    assert fit_into(needed(request, ()) - 50, request) is None


def test_the_order_of_the_completions_changes_nothing():
    backwards = RankingRequest("Why?", COMPLETIONS[::-1], REQUEST.demonstrations, num_static=2)
    for window in range(needed(REQUEST, (), 100), needed(REQUEST, REQUEST.demonstrations), 97):
        assert fit_into(window) == fit_into(window, backwards)


def test_without_a_word_on_what_is_static_every_demonstration_is_dynamic():
    request = RankingRequest("Why?", COMPLETIONS, REQUEST.demonstrations)
    assert fit_into(needed(request, STATIC[1:] + DYNAMIC), request).demonstrations == STATIC[1:] + DYNAMIC


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 0), ("a", 1), ("abcd", 1), ("abcde", 2), ("Straße", 2), ("你好吗", 3), ("🙂", 1)]
)
def test_tokens_are_estimated_from_bytes(text, tokens):
    assert estimate_tokens(len(text.encode())) == tokens
    assert BYTES_PER_TOKEN == 4


def test_a_lone_surrogate_can_be_counted():
    request = RankingRequest("Why \ud83d?", ("\ud83d" * 500, "b" * 500), (DEFAULT,), num_static=1)
    assert fit(request, build(request), 800, max_tokens=100).max_characters is not None
