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

# Signs in the code, type and message of an error, in lower case.
_TOO_LONG = re.compile(
    r"context.?(?:length|window|size|limit)|(?:maximum|model) context"
    r"|(?:prompt|input|request|messages?) (?:is|are) too long"
    r"|(?:prompt|input|request).too.(?:long|large)|too many (?:input )?tokens|number of (?:input )?tokens"
    r"|tokens? (?:count )?.{0,40}exceed|exceed.{0,40}\btokens|input length|above_max_length|reduce the length"
    r"|inputs`? tokens|must have less than \d+ tokens"
)
_FILTERED = re.compile(
    r"content.?(?:filter|polic|management|moderation|safety)|moderation|flagged|data.?inspection|invalid_prompt"
    r"|inappropriate|responsible.?ai|usage polic|safety.(?:system|filter|setting|polic|reason|check)|unsafe"
    r"|prohibited.content|sensitive|harmful|violat.{0,80}polic|guardrail|\u654f\u611f"
)
_ABOUT_ACCOUNT = re.compile(r"\baccount|\borgani[sz]ation|\bapi.?key|\bbilling|\bcredential")
_INVALID_GENERATION = re.compile(
    r"json_(?:validate|generat)\w*_failed|fail\w* to (?:generate|produce|validate|parse) .{0,40}json"
    r"|(?:generated|generation|output|completion|reply|response)\b.{0,40}(?:not|n't|fail\w*|invalid)\b.{0,40}"
    r"(?:json|schema)"
)
_QUOTA = re.compile(r"insufficient_quota|billing_hard_limit|credit balance|insufficient (?:credit|balance|fund)")
# Words that error messages use in place of a parameter's name.
_SYNONYMS = {
    "response_format": r"response_format|json_schema|json_object|structured output",
    "reasoning_effort": r"reasoning_effort|reasoning\.effort|reasoning effort",
    "system": r"(?i:system (?:role|messages?|prompts?|instructions?)|roles?\W+system|developer instruction"
    r"|roles must alternate|only user and assistant)",
}
# HTTP statuses of the error codes that replace them in the bodies of Google, Anthropic and OpenAI.
_STATUS_OF_CODE = {
    "invalid_argument": 400, "failed_precondition": 400, "invalid_request_error": 400, "bad_request": 400,
    "unauthenticated": 401, "authentication_error": 401, "invalid_api_key": 401, "unauthorized": 401,
    "billing_error": 402, "insufficient_quota": 402, "insufficient_credits": 402, "payment_required": 402,
    "permission_denied": 403, "permission_error": 403, "forbidden": 403,
    "not_found": 404, "not_found_error": 404, "model_not_found": 404,
    "request_timeout": 408, "request_too_large": 413,
    "resource_exhausted": 429, "rate_limit_error": 429, "rate_limit_exceeded": 429, "too_many_requests": 429,
    "internal": 500, "api_error": 500, "server_error": 500, "internal_server_error": 500,
    "bad_gateway": 502, "unavailable": 503, "service_unavailable": 503, "overloaded": 503,
    "deadline_exceeded": 504, "gateway_timeout": 504, "overloaded_error": 529,
}  # fmt: skip
_TRUNCATED = ("length", "max_tokens")
_WITHHELD = (
    "content_filter", "content_filtered", "safety", "prohibited_content", "recitation", "blocklist", "spii", "refusal",
    "guardrail_intervened", "sensitive",
)  # fmt: skip
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)")
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Response(NamedTuple):
    """An HTTP response of any status. `body` is its JSON, or `None` if it is not JSON.

    Some gateways answer HTTP 200 with an error in the body. `status` is then the status that the error states.
    """

    status: int
    headers: Mapping[str, str]
    text: str
    body: Any


class ReplyMessage(NamedTuple):
    """The message of a chat completion, and why it ended. The finish reason is in lower case, "" if there is none."""

    content: str
    refusal: str
    finish_reason: str

    @property
    def truncated(self) -> bool:
        """True if the reply reached its token limit."""
        return self.finish_reason in _TRUNCATED

    @property
    def withheld(self) -> bool:
        """True if a content filter ended the reply."""
        return self.finish_reason in _WITHHELD


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
    """The body of an error response, as far as it follows OpenAI's format or one of the other common ones.

    Args:
        message: Text for people.
        code: Code and type of the error.
        param: Name of the parameter at fault.
        retry_after: Seconds that the body asks to wait before a retry.
        failed_generation: Whether the error quotes a reply that the endpoint itself found invalid.
    """

    message: str
    code: str = ""
    param: str = ""
    retry_after: float = 0.0
    failed_generation: bool = False

    @property
    def reports_length(self) -> bool:
        """True if the request is too long for the model."""
        return _TOO_LONG.search(self._text) is not None

    @property
    def reports_content(self) -> bool:
        """True if a filter rejects the content of the request."""
        return _FILTERED.search(self._text) is not None and _ABOUT_ACCOUNT.search(self._text) is None

    @property
    def reports_quota(self) -> bool:
        """True if the account has no credit left, so that waiting does not help."""
        return _QUOTA.search(self._text) is not None

    @property
    def reports_invalid_reply(self) -> bool:
        """True if the endpoint enforces a schema, and the model's reply did not follow it."""
        return self.failed_generation or _INVALID_GENERATION.search(self._text) is not None

    def refused_parameter(self, names: Iterable[str]) -> str | None:
        """Return the parameter that the error names in `param`, else the first one that its message mentions."""
        names = list(names)
        if self.param in names:
            return self.param
        text = f"{self.code} {self.message}"
        return next((name for name in names if re.search(_SYNONYMS.get(name, rf"\b{name}\b"), text)), None)

    @property
    def _text(self) -> str:
        return f"{self.code} {self.message}".lower()


def read_json(text: str) -> Any:
    """Parse a text as JSON. Return `None` if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_response(status: int, headers: Mapping[str, str], text: str) -> Response:
    """Read a response, unwrap a body in a list, and find the status of an error in the body of a success."""
    body = read_json(text)
    if isinstance(body, list) and len(body) == 1:  # Gemini
        body = body[0]
    if 200 <= status < 300:
        status = _stated_status(_find_error(body)) or status
    return Response(status, headers, text, body)


def holds_error(body: object) -> bool:
    """Return whether a body reports an error, also in place of its first choice."""
    return _find_error(body) is not None


def _find_error(body: object) -> object:
    """Return the error in a body, or `None` if it reports none."""
    if not isinstance(body, dict):
        return None
    choices = body.get("choices")
    errors = body.get("errors")
    choice = choices[0] if isinstance(choices, list) and choices else None
    for error in (body.get("error"), errors[0] if isinstance(errors, list) and errors else errors):
        if any(error.values()) if isinstance(error, dict) else error:
            return error
    if choice is not None:
        return _field(choice, "error") or _field(_field(choice, "message"), "error") or None
    if "error" in (body.get("object"), body.get("type")) or _stated_status(body) is not None:
        return body
    return None


def _stated_status(error: object) -> int | None:
    """Return the HTTP status that an error states as a number or as a known code."""
    for name in ("code", "status", "status_code", "type"):
        value = _field(error, name)
        if isinstance(value, str):
            value = int(value) if value.isdecimal() else _STATUS_OF_CODE.get(value.lower())
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 400 <= value < 600:
            return int(value)
    return None


def read_error_body(response: Response) -> ErrorBody:
    """Read the error in a response. A body of unknown form becomes the message."""
    error = _find_error(response.body)
    if error is None:
        error = response.body
    if not isinstance(error, dict):
        return ErrorBody(response.text if error is None else str(error))
    message = next(
        (error[name] for name in ("message", "detail", "error", "msg") if isinstance(error.get(name), str)), None
    )
    inner = error.get("innererror")  # Azure
    codes = (error.get("code"), error.get("type"), error.get("status"), _field(inner, "code"))
    return ErrorBody(
        json.dumps(error) if message is None else message,
        " ".join(str(code) for code in codes if code),
        str(error.get("param") or ""),
        _read_retry_delay(error),
        "failed_generation" in error,
    )


def _read_retry_delay(error: Mapping[str, Any]) -> float:
    """Return the seconds that an error asks to wait: Google's `retryDelay` in `details`, or a field `retry_after`."""
    details = error.get("details")
    for part in (error, error.get("metadata"), *(details if isinstance(details, list) else [details])):
        for name in ("retryDelay", "retry_delay", "retry_after"):
            value = _field(part, name)
            if isinstance(value, dict):
                value = value.get("seconds")
            seconds = read_duration(value) if isinstance(value, str) else _amount(value)
            if seconds is not None and seconds < math.inf:
                return seconds
    return 0.0


def read_message(body: Any) -> ReplyMessage | None:
    """Read the message of the first choice. Return `None` if the body is not a chat completion with a text.

    The text parts of a content in parts are joined, and parts of other types, such as thoughts, are left out.
    """
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content, refusal, finish_reason = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError):
        return None
    texts = _read_parts(content)
    if texts is None:
        return None
    refusal = refusal if isinstance(refusal, str) else _read_refusal(content)
    # Some gateways send the name of an enumeration, such as "FinishReason.STOP".
    reason = finish_reason.rpartition(".")[2].lower() if isinstance(finish_reason, str) else ""
    return ReplyMessage("".join(texts), refusal, reason)


def _read_parts(content: object) -> list[str] | None:
    """Return the texts of a content: a text, one part, or a list of parts. Return `None` for anything else."""
    texts = []
    for part in content if isinstance(content, list) else [] if content is None else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict):
            return None
        elif part.get("type", "text") in ("text", "output_text") and not part.get("thought"):
            text = part.get("text")
            text = text.get("value") if isinstance(text, dict) else text
            if not isinstance(text, str):
                return None
            texts.append(text)
    return texts


def _read_refusal(content: object) -> str:
    parts = content if isinstance(content, list) else [content]
    return "".join(text for part in parts if isinstance(text := _field(part, "refusal"), str))


def read_usage(body: object) -> Usage | None:
    """Read what a call used, including its price if the endpoint reports one. Return `None` if nothing is reported."""
    usage = _field(body, "usage")
    prompt_tokens, completion_tokens = (_amount(_field(usage, f"{kind}_tokens")) for kind in ("prompt", "completion"))
    if not isinstance(usage, dict) or (prompt_tokens is None and completion_tokens is None):
        return None
    # Some endpoints count reasoning tokens in the total alone.
    total_tokens = _amount(usage.get("total_tokens")) or 0
    return Usage(
        prompt_tokens=int(prompt_tokens or 0),
        completion_tokens=int(max(completion_tokens or 0, total_tokens - (prompt_tokens or 0))),
        cached_tokens=int(_amount(_field(usage.get("prompt_tokens_details"), "cached_tokens")) or 0),
        cost=_read_cost(usage),
    )


def _read_cost(usage: Mapping[str, Any]) -> float | None:
    """Return the cost in US dollars that a gateway such as OpenRouter reports, or `None` if it is unknown.

    A call with a key of one's own at the provider is billed by both: `cost` is then the gateway's fee alone, and
    `upstream_inference_cost` the provider's bill.
    """
    stated = usage.get("cost")
    fee = _amount(stated.get("total_cost") if isinstance(stated, dict) else stated)
    upstream = _amount(_field(usage.get("cost_details"), "upstream_inference_cost"))
    if upstream is None:
        upstream = _amount(usage.get("upstream_inference_cost"))
    if upstream is None:
        return None if usage.get("is_byok") else fee
    return max(fee or 0.0, upstream) if usage.get("is_byok") is False else (fee or 0.0) + upstream


def read_reasoning_tokens(body: object) -> int:
    """Return how many of the completion tokens went into reasoning, 0 if that is not reported."""
    usage = _field(body, "usage")
    details = _field(usage, "completion_tokens_details")
    return int(_amount(_field(details, "reasoning_tokens")) or _amount(_field(usage, "reasoning_tokens")) or 0)


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
