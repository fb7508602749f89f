"""Parse responses of OpenAI-compatible endpoints without trusting their content."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..types import Usage

_TOO_LONG = ("context_length_exceeded", "context length", "context window", "maximum context", "prompt is too long")
# Words that error messages use in place of a parameter's name.
_SYNONYMS = {"response_format": r"response_format|json_schema|json_object|structured output"}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)")
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Response(NamedTuple):
    """An HTTP response of any status. `body` is its JSON, or `None` if it is not JSON."""

    status: int
    headers: Mapping[str, str]
    text: str
    body: Any


class ReplyMessage(NamedTuple):
    """The message of a chat completion, and why it ended."""

    content: str
    refusal: object
    finish_reason: object


class RateLimit(NamedTuple):
    """One limit in a response's headers: its size, what remains of it, and the seconds until it is reset."""

    limit: float | None
    remaining: float
    resets_in: float


@dataclass(frozen=True, slots=True)
class CallError:
    """The reason why a call brought no usable reply, and how to retry it.

    Args:
        reason: The kind of failure, as a single word to count by.
        detail: Text for people.
        note: Note for the model about its bad reply, sent with the retry: at temperature 0, the same request would
            bring the same reply. `None` for a call that failed, which is retried unchanged after a pause.
        retry_after: Seconds that the endpoint asks to wait before the retry.
        final: Whether a retry cannot help.
        unsent: Whether the request never reached the endpoint, and so costs nothing.
    """

    reason: str
    detail: str
    note: str | None = None
    retry_after: float = 0.0
    final: bool = False
    unsent: bool = False


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """The body of an error response, as far as it follows OpenAI's format."""

    message: str
    code: str = ""
    param: str = ""

    @property
    def reports_length(self) -> bool:
        """True if the request is too long for the model."""
        text = f"{self.code} {self.message}".lower()
        return any(sign in text for sign in _TOO_LONG)

    def refused_parameter(self, names: Iterable[str]) -> str | None:
        """Return the parameter that the error names in `param`, else the first one that its message mentions."""
        names = list(names)
        if self.param in names:
            return self.param
        text = f"{self.code} {self.message}"
        return next((name for name in names if re.search(_SYNONYMS.get(name, rf"\b{name}\b"), text)), None)


def read_json(text: str) -> Any:
    """Parse a text as JSON. Return `None` if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_error_body(response: Response) -> ErrorBody:
    """Read the error in a response. A body of unknown form becomes the message."""
    body = response.body
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return ErrorBody(response.text if error is None else str(error))
    message = error.get("message")
    return ErrorBody(
        message if isinstance(message, str) else json.dumps(error),
        str(error.get("code") or ""),
        str(error.get("param") or ""),
    )


def read_message(body: Any) -> ReplyMessage | None:
    """Read the message of the first choice. Return `None` if the body is not a chat completion with a text."""
    try:
        choice = body["choices"][0]
        refusal, content = choice["message"].get("refusal"), choice["message"].get("content") or ""
        finish_reason = choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError):
        return None
    return ReplyMessage(content, refusal, finish_reason) if isinstance(content, str) else None


def read_usage(body: object) -> Usage | None:
    """Read what a call used, including its price if the endpoint reports one. Return `None` if nothing is reported."""
    usage = _field(body, "usage")
    prompt_tokens, completion_tokens = (_amount(_field(usage, f"{kind}_tokens")) for kind in ("prompt", "completion"))
    if not isinstance(usage, dict) or (prompt_tokens is None and completion_tokens is None):
        return None
    return Usage(
        prompt_tokens=int(prompt_tokens or 0),
        completion_tokens=int(completion_tokens or 0),
        cached_tokens=int(_amount(_field(usage.get("prompt_tokens_details"), "cached_tokens")) or 0),
        cost=_amount(usage.get("cost")),  # OpenRouter reports it
    )


def read_retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that the endpoint asks to wait, or 0 if it gives none in a known format."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        return seconds if 0 <= seconds < math.inf else 0.0
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return 0.0
    return max(0.0, date.timestamp() - time.time())


def read_rate_limit(headers: Mapping[str, str], resource: str) -> RateLimit | None:
    """Read the `x-ratelimit-*` headers of a resource, `"requests"` or `"tokens"`. Return `None` if there are none."""
    remaining = _number(headers.get(f"x-ratelimit-remaining-{resource}"))
    resets_in = read_duration(headers.get(f"x-ratelimit-reset-{resource}"))
    if remaining is None or resets_in is None:
        return None
    return RateLimit(_number(headers.get(f"x-ratelimit-limit-{resource}")), remaining, resets_in)


def read_duration(text: str | None) -> float | None:
    """Parse a duration such as `6m0s`, `120ms` or `7.5` into seconds. Return `None` if the text is not a duration."""
    parts = _DURATION.findall(text or "")
    if not parts or "".join(map("".join, parts)) != text:
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None


def _field(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None


def _amount(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        return None
    return float(value)
