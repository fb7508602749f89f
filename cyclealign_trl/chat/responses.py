"""What comes back over the wire from an OpenAI-compatible endpoint, read without trusting it."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..types import Usage

_TOO_LONG = ("context_length_exceeded", "context length", "context window", "maximum context", "prompt is too long")
# What a message says in place of a parameter's name.
_MENTIONS = {"response_format": r"response_format|json_schema|json_object|structured output"}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)")
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Response(NamedTuple):
    """What came over the wire, whatever its status; `body` is its JSON, `None` where it is none."""

    status: int
    headers: Mapping[str, str]
    text: str
    body: Any


class RateLimit(NamedTuple):
    """What a response's headers say of one limit: what is left of it, and the seconds until all of it is."""

    limit: float | None
    remaining: float
    resets_in: float


@dataclass(frozen=True, slots=True)
class Setback:
    """Why a call brought no answer, and what may help.

    A setback with a `note` is a bad reply: asking the same again would bring the same, so the model is told. One
    without is a bad call, repeated as it was, after a pause; a `final` one is not repeated. One that is `unsent` never
    reached the endpoint, and so costs nothing.
    """

    reason: str
    detail: str
    note: str | None = None
    retry_after: float = 0.0
    final: bool = False
    unsent: bool = False


@dataclass(frozen=True, slots=True)
class Complaint:
    """The error body of an endpoint, as far as it is in the shape that OpenAI's has."""

    message: str
    code: str = ""
    param: str = ""

    @property
    def is_about_length(self) -> bool:
        """Whether the request was too long for the model."""
        text = f"{self.code} {self.message}".lower()
        return any(sign in text for sign in _TOO_LONG)

    def names(self, parameters: Mapping[str, object]) -> list[str]:
        """The one of the parameters that is complained of, if any: the `param`, else the first that is mentioned."""
        if self.param in parameters:
            return [self.param]
        text = f"{self.code} {self.message}"
        mentioned = [name for name in parameters if re.search(_MENTIONS.get(name, rf"\b{name}\b"), text)]
        return mentioned[:1]


def read_json(text: str) -> Any:
    """The value that the text is; `None` where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_complaint(response: Response) -> Complaint:
    """The complaint in an error response, whatever its body is."""
    body = response.body
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return Complaint(response.text if error is None else str(error))
    message = error.get("message")
    return Complaint(
        message if isinstance(message, str) else json.dumps(error),
        str(error.get("code") or ""),
        str(error.get("param") or ""),
    )


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the endpoint asks to wait; 0 where it does not, or not in a form that is known."""
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
    """What the `x-ratelimit-*` headers say of a resource (`"requests"`, `"tokens"`); `None` where they do not."""
    remaining = _number(headers.get(f"x-ratelimit-remaining-{resource}"))
    resets_in = read_duration(headers.get(f"x-ratelimit-reset-{resource}"))
    if remaining is None or resets_in is None:
        return None
    return RateLimit(_number(headers.get(f"x-ratelimit-limit-{resource}")), remaining, resets_in)


def read_duration(text: str | None) -> float | None:
    """Seconds of a duration such as `6m0s`, `120ms` or `7.5`; `None` where it is none."""
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


def read_usage(body: object) -> Usage | None:
    """What the endpoint says that one call took; `None` where it does not. Some (OpenRouter) say the price, too."""
    told = _field(body, "usage")
    prompt_tokens, completion_tokens = (_amount(_field(told, f"{kind}_tokens")) for kind in ("prompt", "completion"))
    if not isinstance(told, dict) or (prompt_tokens is None and completion_tokens is None):
        return None
    return Usage(
        prompt_tokens=int(prompt_tokens or 0),
        completion_tokens=int(completion_tokens or 0),
        cached_tokens=int(_amount(_field(told.get("prompt_tokens_details"), "cached_tokens")) or 0),
        cost=_amount(told.get("cost")),
    )


def _field(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None


def _amount(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        return None
    return float(value)
