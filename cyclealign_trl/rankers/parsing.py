"""Parse the ranking in a judge's reply. An invalid ranking is rejected, never repaired.

The accepted forms, after `<think>` text is removed:

1. The JSON object `{"ranking": ["B", "A", "C"], "improved_response": "..."}`, anywhere in the text.
2. If no JSON object begins in the text: a bracketed list (`[B, A, C]`) or a chain (`B > A > C`) of the labels, on the
   last line that has one. A text with broken JSON is not searched, because a list in it can be half of a ranking.

A reply with two different rankings is rejected: the judge may have quoted a ranking that a completion made up.

Replies are untrusted and can be long. The time to parse any text of 1 MB is about a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..chat.replies import InvalidReply, last_object, without_thoughts

# A brace that opens a JSON object or an attempt at one. Other braces are set notation, code or LaTeX.
_ATTEMPTED_OBJECT = re.compile(r"""\{\s*(?:["']|ranking\b|$)""")
_LABEL_LIKE = re.compile(r'[\["]*\w{1,3}[\]"]*')
_BRACKETED = re.compile(r"\[([^\[\]]*)\]")
# Characters around a label that are not part of it: quotes, markdown, the brackets of "[[B>A]]".
_DECORATION = " \t\"'`*_[]()."


@dataclass(frozen=True, slots=True)
class ParsedRanking:
    """Content of a valid reply.

    Args:
        order: Indices into the labels, best first. Always a full permutation.
        improved_completion: Improved response, if the reply contains one.
    """

    order: tuple[int, ...]
    improved_completion: str | None = None


class InvalidRanking(InvalidReply):
    """A reply without a valid ranking of the labels.

    Its `reason` is `"unparsable"` if no ranking was found, and `"invalid_ranking"` if one was found but is not valid.
    """


def parse_ranking(text: str, labels: Sequence[str]) -> ParsedRanking:
    """Parse a judge's reply.

    Args:
        text: Text of the reply.
        labels: Labels of the completions, in the order in which they were shown.

    Raises:
        InvalidRanking: If the text has no ranking that names each label exactly once. The message is safe to send to
            the judge.
    """
    text = without_thoughts(text)
    if not _ATTEMPTED_OBJECT.search(text):
        return ParsedRanking(_order_from_labels(_find_plain_ranking(text, labels), labels))
    try:
        reply = last_object(text, "ranking")
    except InvalidReply as error:
        raise InvalidRanking(error.reason, str(error)) from None
    ranking = reply["ranking"]
    if not isinstance(ranking, list):
        raise InvalidRanking("invalid_ranking", f'"ranking" must be an array of labels, not {_quotable(ranking)}')
    improved = reply.get("improved_response")
    if improved is not None and not isinstance(improved, str):
        raise InvalidRanking("unparsable", f'"improved_response" must be a string, not {_quotable(improved)}')
    return ParsedRanking(_order_from_labels(ranking, labels), (improved or "").strip() or None)


def _find_plain_ranking(text: str, labels: Sequence[str]) -> list[str]:
    """Return the ranking on the last line that has one, unless a full ranking on an earlier line contradicts it."""
    found: list[str] | None = None
    for line in reversed(text.splitlines()):
        for candidate in (*_find_lists(line, labels), *_find_chains(line, labels)):
            if found is None:
                found, last_line = candidate, line
            elif candidate != found and (line is last_line or sorted(candidate) == sorted(labels)):
                raise InvalidRanking("invalid_ranking", "it holds more than one ranking")
    if found is None:
        raise InvalidRanking("unparsable", "it holds no ranking")
    return found


def _find_lists(line: str, labels: Sequence[str]) -> Iterator[list[str]]:
    """Yield the bracketed lists of the line that contain at least one label."""
    for match in _BRACKETED.finditer(line):
        items = [item.strip(" \t\"'`") for item in match[1].split(",")]
        if len(items) > 1 and not set(labels).isdisjoint(items):
            yield items


def _find_chains(line: str, labels: Sequence[str]) -> Iterator[list[str]]:
    """Yield the chain of the line, if it has one that contains at least one label. Text around it is ignored."""
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


def _order_from_labels(ranking: Sequence[object], labels: Sequence[str]) -> tuple[int, ...]:
    """Convert a ranking to indices into the labels, after a check that it names each label once."""
    index_of = {label: index for index, label in enumerate(labels)}
    order: list[int] = []
    for item in ranking:
        if not isinstance(item, str) or item not in index_of:
            raise InvalidRanking(
                "invalid_ranking", f"it ranks {_quotable(item)}, which is none of the labels {', '.join(labels)}"
            )
        if index_of[item] in order:
            raise InvalidRanking("invalid_ranking", f"it ranks {item} more than once")
        order.append(index_of[item])
    if len(order) < len(labels):
        missing = ", ".join(label for label in labels if index_of[label] not in order)
        raise InvalidRanking("invalid_ranking", f"it leaves out {missing}")
    return tuple(order)


def _quotable(value: object) -> str:
    """Return a value of the reply in a form that is safe to send back to the judge.

    The judge may have copied the value from a completion, and messages to the judge quote completions only inside
    fences. Only texts that look like a label are quoted.
    """
    text = json.dumps(value)
    return text if _LABEL_LIKE.fullmatch(text) else "something else"
