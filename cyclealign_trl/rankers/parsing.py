"""What a judge's reply says: a full ranking, or what is wrong with it. Nothing is ever repaired.

The grammar, after `<think>` text is cut off:

1. The JSON object `{"ranking": ["B", "A", "C"], "improved_response": "..."}`, wherever it stands in the text.
2. In a text without the start of an object: a bracketed list (`[B, A, C]`) or a chain (`B > A > C`) of the labels, on
   the last line that has one. Elsewhere, a list may be half of a ranking in broken JSON.

A reply with two rankings that differ says none: a judge that quotes a completion may quote a ranking that this one
made up, before its own or after it.

A reply is untrusted and may be long: a megabyte of anything is read within a second or so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..chat.replies import InvalidReply, last_object, without_thoughts

# A brace that opens an object, or something that was meant as one; other braces are set notation, code, LaTeX.
_MEANT_AS_OBJECT = re.compile(r"""\{\s*(?:["']|ranking\b|$)""")
_LIKE_A_LABEL = re.compile(r'[\["]*\w{1,3}[\]"]*')
_BRACKETED = re.compile(r"\[([^\[\]]*)\]")
# What may stand around a label without being part of it: quotes, markdown, the brackets of "[[B>A]]".
_DECORATION = " \t\"'`*_[]()."


@dataclass(frozen=True, slots=True)
class ParsedRanking:
    """A valid reply.

    Args:
        order: Indices into the labels, best first; a full permutation.
        improved_completion: The improved response, where the reply has one.
    """

    order: tuple[int, ...]
    improved_completion: str | None = None


class InvalidRanking(InvalidReply):
    """A reply that is no ranking of the labels.

    Its `reason` is `"unparsable"` where no ranking was found, `"invalid_ranking"` where the one found is not valid.
    """


def parse_ranking(text: str, labels: Sequence[str]) -> ParsedRanking:
    """Reads a judge's reply.

    Args:
        text: The reply.
        labels: The labels of the completions, in the order in which they were shown.

    Raises:
        InvalidRanking: If the text holds no ranking that names each label exactly once. The message can be shown to
            the judge.
    """
    text = without_thoughts(text)
    if not _MEANT_AS_OBJECT.search(text):
        return ParsedRanking(_order(_last_line_ranking(text, labels), labels))
    try:
        found = last_object(text, "ranking")
    except InvalidReply as error:
        raise InvalidRanking(error.reason, str(error)) from None
    ranking = found["ranking"]
    if not isinstance(ranking, list):
        raise InvalidRanking("invalid_ranking", f'"ranking" must be an array of labels, not {_shown(ranking)}')
    improved = found.get("improved_response")
    if improved is not None and not isinstance(improved, str):
        raise InvalidRanking("unparsable", f'"improved_response" must be a string, not {_shown(improved)}')
    return ParsedRanking(_order(ranking, labels), (improved or "").strip() or None)


def _last_line_ranking(text: str, labels: Sequence[str]) -> list[str]:
    found: list[str] | None = None
    for line in reversed(text.splitlines()):
        for candidate in (*_lists(line, labels), *_chains(line, labels)):
            if found is None:
                found, last_line = candidate, line
            elif candidate != found and (line is last_line or sorted(candidate) == sorted(labels)):
                raise _several()
    if found is None:
        raise InvalidRanking("unparsable", "it holds no ranking")
    return found


def _lists(line: str, labels: Sequence[str]) -> Iterator[list[str]]:
    """The bracketed lists of the line that name a label at all."""
    for match in _BRACKETED.finditer(line):
        items = [item.strip(" \t\"'`") for item in match[1].split(",")]
        if len(items) > 1 and not set(labels).isdisjoint(items):
            yield items


def _chains(line: str, labels: Sequence[str]) -> Iterator[list[str]]:
    """The line read as one chain, where it is one that names a label at all; text may stand before and after it."""
    if ">" not in line:
        return
    first, *middle, last = line.split(">")
    items = [
        _label_at_end(first, labels),
        *(item if (item := part.strip()) in labels else item.strip(_DECORATION) for part in middle),
        _label_at_start(last, labels),
    ]
    if not set(labels).isdisjoint(items):
        yield items


def _label_at_end(text: str, labels: Sequence[str]) -> str:
    for candidate in (text.rstrip(), text.rstrip(_DECORATION)):
        for label in sorted(labels, key=len, reverse=True):
            if candidate.endswith(label) and not candidate[: -len(label)][-1:].isalnum():
                return label
    return text.strip()[-20:]


def _label_at_start(text: str, labels: Sequence[str]) -> str:
    for candidate in (text.lstrip(), text.lstrip(_DECORATION)):
        for label in sorted(labels, key=len, reverse=True):
            if candidate.startswith(label) and not candidate[len(label) :][:1].isalnum():
                return label
    return text.strip()[:20]


def _order(ranking: Sequence[object], labels: Sequence[str]) -> tuple[int, ...]:
    """The ranking as indices into the labels."""
    index = {label: position for position, label in enumerate(labels)}
    order: list[int] = []
    for item in ranking:
        if not isinstance(item, str) or item not in index:
            raise InvalidRanking(
                "invalid_ranking", f"it ranks {_shown(item)}, which is none of the labels {', '.join(labels)}"
            )
        if index[item] in order:
            raise InvalidRanking("invalid_ranking", f"it ranks {item} more than once")
        order.append(index[item])
    if len(order) < len(labels):
        missing = ", ".join(label for label in labels if index[label] not in order)
        raise InvalidRanking("invalid_ranking", f"it leaves out {missing}")
    return tuple(order)


def _several() -> InvalidRanking:
    return InvalidRanking("invalid_ranking", "it holds more than one ranking")


def _shown(value: object) -> str:
    """A value of the reply as it may be quoted back to the judge: a label at most. A judge may have copied it from a
    completion, and outside of the fences no text but ours is to be read.
    """
    text = json.dumps(value)
    return text if _LIKE_A_LABEL.fullmatch(text) else "something else"
