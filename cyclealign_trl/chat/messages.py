"""Build chat messages: fence untrusted text and estimate the length of a request."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence

from ..types import Prompt

Messages = list[dict[str, str]]

BYTES_PER_TOKEN = 4
"""Average bytes of UTF-8 text per token, the usual rule for English.

Measured on ranking requests with prompts of OpenAssistant and HH-RLHF: 3.8 and 3.6 with a vocabulary of 131 thousand
tokens, 3.5 and 3.2 with one of 32 thousand.
"""

_ROLES = ("system", "developer", "user", "assistant", "tool")


def instruction_lines(prompt: Prompt, tag: str) -> list[str]:
    """Return the lines that show a prompt, with each text inside a fence."""
    if isinstance(prompt, str):
        return [fenced(prompt, tag)]
    lines = []
    for message in prompt:
        # The role is shown outside the fence, so a role that the prompt invents must not appear.
        role = message["role"] if message["role"] in _ROLES else "participant"
        lines += [f"# Turn of the {role}", fenced(message["content"], tag)]
    return lines


def fenced(text: str, tag: str) -> str:
    """Enclose a text in its fence."""
    return f"<{tag}>\n{text}\n</{tag}>"


def fence_tag(prompt: Prompt, completions: Sequence[str]) -> str:
    """Return a fence tag that does not occur in the texts.

    The tag is a hash of these texts alone. A demonstration is therefore the same in every request, and a text cannot
    predict the tag of its own fence.
    """
    content = json.dumps([prompt, list(completions)])
    tags = ("data-" + hashlib.sha256(f"{salt} {content}".encode()).hexdigest()[:12] for salt in itertools.count())
    return next(tag for tag in tags if tag not in content)


def sendable(text: str) -> str:
    """Replace lone surrogates, which occur in datasets and cannot be encoded as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def message_bytes(messages: Messages) -> int:
    """Return the length of the messages' contents in bytes of UTF-8."""
    return sum(len(message["content"].encode()) for message in messages)


def estimate_tokens(num_bytes: int) -> int:
    """Estimate the number of tokens in a text from its length in bytes of UTF-8."""
    return -(-num_bytes // BYTES_PER_TOKEN)
