"""Shorten requests that exceed the judge's context window.

The judge's tokenizer is unknown, so tokens are estimated from UTF-8 bytes with constant factors. The estimate must not
adapt to earlier replies: a request has to be shortened the same way every time, because its ranking is cached.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..chat.messages import Messages, message_bytes
from ..types import Demonstration, RankingRequest, Trimmed

# Lower than the usual 4, to be safe. Of 300 requests with real prompts, 2 had fewer bytes per token than this with a
# vocabulary of 131 thousand tokens, and 8 with one of 32 thousand.
_SAFE_BYTES_PER_TOKEN = 3
_NOTE_BYTES = 400  # reserved for the note on an invalid reply, which a retry appends
_MIN_CHARACTERS = 100  # a shorter beginning of a completion says too little to be ranked


@dataclass(frozen=True, slots=True)
class FittedRequest:
    """The part of a request that fits into the judge's context window.

    Args:
        demonstrations: Demonstrations to show.
        max_characters: Length to which longer completions are truncated. `None` shows them whole.
        trimmed: What is left out. `None` if nothing is.
    """

    demonstrations: tuple[Demonstration, ...]
    max_characters: int | None = None
    trimmed: Trimmed | None = None


def tokens_left(messages: Messages, context_window: int) -> int:
    """Return the number of tokens that a request leaves for its reply."""
    return context_window - -(-(message_bytes(messages) + _NOTE_BYTES) // _SAFE_BYTES_PER_TOKEN)


def fit_request(
    request: RankingRequest,
    build: Callable[[Sequence[Demonstration], int | None], Messages],
    context_window: int,
    max_tokens: int,
) -> FittedRequest | None:
    """Shorten a request until it fits into a context window.

    Dynamic demonstrations are dropped first, the oldest before newer ones. Static demonstrations follow, the last
    before earlier ones. Then all completions are truncated to one common length, the largest that fits. The prompt is
    never truncated.

    Args:
        request: Request to fit.
        build: Builds the chat messages from the demonstrations to show and the maximum length of a completion in
            characters.
        context_window: Size of the window in tokens, shared by request and reply.
        max_tokens: Number of these tokens that are reserved for the reply.

    Returns:
        What to show, or `None` if the request cannot fit: the prompt alone is too long, or the completions would be
        truncated to fewer than 100 characters or become identical.
    """
    max_bytes = (context_window - max_tokens) * _SAFE_BYTES_PER_TOKEN - _NOTE_BYTES
    static, dynamic = request.demonstrations[: request.num_static], request.demonstrations[request.num_static :]
    candidates = [static + dynamic[dropped:] for dropped in range(len(dynamic) + 1)]
    candidates += [static[:kept] for kept in reversed(range(len(static)))]
    for dropped, demonstrations in enumerate(candidates):
        if message_bytes(build(demonstrations, None)) <= max_bytes:
            return FittedRequest(demonstrations, trimmed=Trimmed(demonstrations=dropped) if dropped else None)

    lengths = range(_MIN_CHARACTERS, max(map(len, request.completions)))
    num_fitting = bisect_left(lengths, True, key=lambda length: message_bytes(build((), length)) > max_bytes)
    if not num_fitting:
        return None
    max_characters = lengths[num_fitting - 1]
    truncated = {completion[:max_characters] for completion in request.completions}
    if len(truncated) < len(set(request.completions)):
        return None  # the judge could only guess an order of identical texts
    num_truncated = sum(len(completion) > max_characters for completion in request.completions)
    trimmed = Trimmed(demonstrations=len(request.demonstrations), completions=num_truncated)
    return FittedRequest((), max_characters, trimmed)
