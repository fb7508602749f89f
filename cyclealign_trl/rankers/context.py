"""What of a request fits into the judge's context window, and how many tokens a text is likely to be.

The judge's tokenizer is not known here, and a request must come out the same whenever it is made, for its answer is
cached: so tokens are estimated from bytes of UTF-8, by constants, never from what earlier replies took.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..chat.messages import Messages, message_bytes
from ..types import Demonstration, RankingRequest, Trimmed

# For the window: 2 of 300 such requests took more with the larger vocabulary, 8 with the smaller one.
_SAFE_BYTES_PER_TOKEN = 3
_NOTE_BYTES = 400  # room for a remark on a bad reply, which is asked again with it
_MIN_CHARACTERS = 100  # a completion cut to less is none any more


@dataclass(frozen=True, slots=True)
class Fit:
    """How much of a request is shown.

    Args:
        demonstrations: Those shown.
        max_characters: The length to which longer completions are cut; `None` leaves them whole.
        trimmed: What that leaves out; `None` if nothing.
    """

    demonstrations: tuple[Demonstration, ...]
    max_characters: int | None = None
    trimmed: Trimmed | None = None


def fit(
    request: RankingRequest,
    build: Callable[[Sequence[Demonstration], int | None], Messages],
    context_window: int,
    max_tokens: int,
) -> Fit | None:
    """Fits a request into a context window.

    The oldest dynamic demonstration goes first, then the next one; then the static ones, the last first. Then all
    completions are cut to one common length, the largest that fits. The prompt is never cut.

    Args:
        request: What is asked.
        build: Makes the chat messages that show some demonstrations, and completions of so many characters at most.
        context_window: Tokens of request and reply together.
        max_tokens: Those of them that the reply may take.

    Returns:
        What is shown; `None` if nothing helps: the prompt is too long by itself, or the completions would be cut to
        less than 100 characters or to the same text.
    """
    room = (context_window - max_tokens) * _SAFE_BYTES_PER_TOKEN - _NOTE_BYTES
    shown = request.demonstrations
    static, dynamic = shown[: request.num_static], shown[request.num_static :]
    fewer = [static + dynamic[dropped:] for dropped in range(len(dynamic) + 1)]
    fewer += [static[:kept] for kept in reversed(range(len(static)))]
    for dropped, demonstrations in enumerate(fewer):
        if message_bytes(build(demonstrations, None)) <= room:
            return Fit(demonstrations, trimmed=Trimmed(demonstrations=dropped) if dropped else None)

    lengths = range(_MIN_CHARACTERS, max(map(len, request.completions)))
    fitting = bisect_left(lengths, True, key=lambda length: message_bytes(build((), length)) > room)
    if not fitting:
        return None
    longest = lengths[fitting - 1]
    if len({completion[:longest] for completion in request.completions}) < len(set(request.completions)):
        return None  # whatever order the judge gave them, it would be made up
    cut = sum(len(completion) > longest for completion in request.completions)
    return Fit((), longest, Trimmed(demonstrations=len(shown), completions=cut))
