"""Read the text of a reply without trusting it."""

from __future__ import annotations

import json
import re
from typing import Any

# Not strict: raw line breaks inside strings are common in replies, and harmless.
_DECODER = json.JSONDecoder(strict=False)
_OBJECT_START = re.compile(r'\{\s*"')
# Each broken object costs a scan of the text before it, because the decoder counts lines for its error message.
_MAX_BROKEN_OBJECTS = 500


class InvalidReply(ValueError):  # noqa: N818 - it names a kind of reply, not a fault of the program
    """A reply that does not have the requested form.

    Args:
        reason: The kind of failure, as a single word to count by.
        message: What is wrong with the reply. It is sent to the model with the next attempt.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def printable(text: str) -> str:
    """Replace control characters other than line breaks and tabs, so that the text cannot drive a terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def without_thoughts(text: str) -> str:
    """Return the text after the last `</think>`, up to an unfinished `<think>`.

    The opening tag of the last thought is not required: chat templates often add it to the prompt.
    """
    return text.rpartition("</think>")[2].partition("<think>")[0]


def last_object(text: str, key: str) -> dict[str, Any]:
    """Return the last JSON object in a text that has a key.

    Args:
        text: The text. It can contain more than the object.
        key: A key of the object.

    Raises:
        InvalidReply: If the text has no such object, several with different values for the key, or a broken one as
            its last.
    """
    found: dict[str, Any] | None = None
    broken = 0
    start = _OBJECT_START.search(text)
    while start is not None and broken < _MAX_BROKEN_OBJECTS:
        try:
            value, end = _DECODER.raw_decode(text, start.start())
        except RecursionError:
            raise InvalidReply("unparsable", "the JSON is nested too deeply") from None
        except json.JSONDecodeError as error:
            # The text before the error belongs to the broken object. Continuing after it keeps an inner object from
            # being read as the whole one.
            broken += 1
            end = max(error.pos, start.end())
            if f'"{key}"' in text[start.start() : end]:
                found = None  # the broken object was meant to replace the previous one
        else:
            if key in value:
                if found is not None and found[key] != value[key]:
                    raise InvalidReply(f"invalid_{key}", f"it holds more than one {key}")
                found = value
        start = _OBJECT_START.search(text, end)
    if found is None or start is not None:
        raise InvalidReply("unparsable", f'it holds no complete JSON object with the key "{key}"')
    return found
