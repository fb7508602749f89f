"""The text of a reply, read without trusting it."""

from __future__ import annotations

import json
import re
from typing import Any


def printable(text: str) -> str:
    """The text less what would drive a terminal: control characters other than line breaks and tabs."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


class InvalidReply(ValueError):  # noqa: N818 - it names a kind of reply, not a fault of the program
    """A reply that is not what was asked for. Its message can be shown to the model.

    Attributes:
        reason: The kind of failure that it is, one word to count by.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


# Not strict: a raw line break inside a string is common in replies, and harmless.
_DECODER = json.JSONDecoder(strict=False)


_OBJECT_START = re.compile(r'\{\s*"')


# Each break costs a scan of the text before it (the decoder counts its lines), and no honest reply has this many.
_MAX_BROKEN_OBJECTS = 500


def without_thoughts(text: str) -> str:
    """The text behind the last `</think>` (templates often swallow the opening tag), up to an unfinished thought."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def last_object(text: str, key: str) -> dict[str, Any]:
    """The last JSON object of a text that has a key; raises `InvalidReply` where there is none."""
    found: dict[str, Any] | None = None
    broken = 0
    start = _OBJECT_START.search(text)
    while start is not None and broken < _MAX_BROKEN_OBJECTS:
        try:
            value, end = _DECODER.raw_decode(text, start.start())
        except RecursionError:
            raise InvalidReply("unparsable", "the JSON is nested too deeply") from None
        except json.JSONDecodeError as error:
            # Whatever stands before the break belongs to the broken object: going on behind it keeps a part from
            # passing for the whole.
            broken += 1
            end = max(error.pos, start.end())
            if f'"{key}"' in text[start.start() : end]:
                found = None  # it was to replace the one before it
        else:
            if key in value:
                if found is not None and found[key] != value[key]:
                    raise InvalidReply(f"invalid_{key}", f"it holds more than one {key}")
                found = value
        start = _OBJECT_START.search(text, end)
    if found is None or start is not None:
        raise InvalidReply("unparsable", f'it holds no complete JSON object with the key "{key}"')
    return found
