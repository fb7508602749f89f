"""Parse the bodies of chat-completions requests without trusting them, and build the bodies of responses."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...chat.messages import sendable

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that would change the form or content of the completion, with the values that leave it unchanged.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# Fields that identify a request without an effect on its completion.
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
_SUPPORTED = (
    "model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "max_completion_tokens",
    "seed",
)  # fmt: skip


class BadRequestError(Exception):
    """Error to report to the client, in the format of OpenAI's API.

    Args:
        message: What is wrong, and how to fix it.
        param: Name of the field at fault.
        code: Machine-readable code.
        status: HTTP status.
        retry_after: Seconds to wait before another request.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status, self.retry_after = param, code, status, retry_after


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """Messages to answer, each with a role and a text, and the sampling parameters to use.

    Args:
        messages: The messages.
        sampling: The sampling parameters.
        stream: Whether to send the completion as a stream of chunks.
        include_usage: Whether the stream ends with the usage.
    """

    messages: list[dict[str, str]]
    sampling: Mapping[str, float]
    stream: bool = False
    include_usage: bool = False


def read_request(text: bytes, served_model: str) -> ChatRequest:
    """Parse and validate the body of a request.

    Args:
        text: The body.
        served_model: Name of the only model of the server.

    Raises:
        BadRequestError: If the body is invalid, or asks for another model or an unsupported feature.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise BadRequestError("The body must be a JSON object.")
    body = {name: value for name, value in body.items() if value is not None}
    model = body.get("model")
    if not isinstance(model, str):
        raise BadRequestError(f"`model` must be a string. This server has {served_model!r}.", "model")
    if model != served_model:
        raise BadRequestError(
            f"The model {model[:100]!r} does not exist. This server only has {served_model!r}.",
            "model",
            "model_not_found",
            404,
        )
    for name, allowed in _UNSUPPORTED.items():
        # Compare types too, because True == 1 and False == 0.
        if name in body and not any(type(body[name]) is type(value) and body[name] == value for value in allowed):
            raise BadRequestError(f"`{name}` is not supported. Leave it out.", name, "unsupported_value")
    for name in body:
        if name not in (*_SUPPORTED, *_UNSUPPORTED, *_LABELS):
            raise BadRequestError(
                f"`{name[:100]}` has no effect here. Leave it out.", name[:100], "unsupported_parameter"
            )
    return ChatRequest(_messages(body.get("messages")), _sampling(body), *_stream(body))


def _stream(body: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether to stream, and whether to include the usage."""
    stream, options = body.get("stream", False), body.get("stream_options")
    if not isinstance(stream, bool):
        raise BadRequestError("`stream` must be true or false.", "stream")
    if options is None:
        return stream, False
    if not stream:
        raise BadRequestError("`stream_options` needs `stream`: true.", "stream_options")
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise BadRequestError("`stream_options` must be an object with `include_usage`.", "stream_options")
    if not all(isinstance(value, bool) for value in options.values()):
        raise BadRequestError("The values of `stream_options` must be true or false.", "stream_options")
    return True, options.get("include_usage", False)


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise BadRequestError("`messages` must be an array with at least one message.", "messages")
    parsed = []
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        if not isinstance(message, dict):
            raise BadRequestError(f"`{param}` must be an object with `role` and `content`.", param)
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRequestError(f"`{param}.role` must be one of {', '.join(_ROLES)}.", f"{param}.role")
        parsed.append({"role": _ROLES[role], "content": _content(message.get("content"), f"{param}.content")})
    if parsed[-1]["role"] != "user":
        raise BadRequestError(f"The last message must have role user, got {parsed[-1]['role']}.", "messages")
    return parsed


def _content(content: Any, param: str) -> str:
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRequestError(f"`{param}` must be a string or an array of text parts.", param)
    return sendable(content)  # JSON can spell out lone surrogates


def _sampling(body: Mapping[str, Any]) -> dict[str, float]:
    sampling = {}
    for name, lowest, highest in (("temperature", 0, 2), ("top_p", 0, 1)):
        if name in body:
            value = body[name]
            if not (isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest):
                raise BadRequestError(f"`{name}` must be a number from {lowest} to {highest}.", name)
            sampling[name] = value
    for name in ("max_tokens", "max_completion_tokens"):
        if name in body:
            value = body[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadRequestError(f"`{name}` must be an integer of at least 1.", name)
            sampling[name] = value
    if "seed" in body:
        if not isinstance(body["seed"], int) or isinstance(body["seed"], bool):
            raise BadRequestError("`seed` must be an integer.", "seed")
        sampling["seed"] = body["seed"]
    return sampling


def completion_chunks(body: Mapping[str, Any], *, include_usage: bool) -> list[dict[str, Any]]:
    """Return the chunks that stream the completion in the body of a response.

    Args:
        body: The body, from `completion_body`.
        include_usage: Whether to add a chunk with the usage.
    """
    shared = {name: body[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    [choice] = body["choices"]

    def chunk(delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        part = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**shared, "choices": [part], **({"usage": None} if include_usage else {})}

    chunks = [
        chunk({"role": "assistant", "content": "", "refusal": None}),
        chunk({"content": choice["message"]["content"]}),
        chunk({}, choice["finish_reason"]),
    ]
    return [*chunks, {**shared, "choices": [], "usage": body["usage"]}] if include_usage else chunks


def completion_body(
    model: str, content: str, prompt_tokens: int, completion_tokens: int, finish_reason: str = "stop"
) -> dict[str, Any]:
    """Return the body of a successful response."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, "refusal": None},
                "logprobs": None,
                "finish_reason": finish_reason,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def error_body(message: str, error_type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error response."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}
