"""Parse the bodies of chat-completions requests without trusting them, and build the bodies of responses."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that would change the form or content of the completion, with the values that leave it unchanged.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "n": (1,),
    "stop": ([],),
    "logprobs": (False,),
    "tools": ([],),
    "functions": ([],),
    "audio": (),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}


class BadRequestError(Exception):
    """Error to report to the client, in the format of OpenAI's API.

    Args:
        message: What is wrong, and how to fix it.
        param: Name of the field at fault.
        code: Machine-readable code.
        status: HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """Messages to answer, each with a role and a text, and the sampling parameters to use."""

    messages: list[dict[str, str]]
    sampling: Mapping[str, float]


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
    return ChatRequest(_messages(body.get("messages")), _sampling(body))


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
    # JSON can contain lone surrogates, which cannot be encoded as UTF-8.
    return content.encode("utf-8", "replace").decode("utf-8")


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
    return sampling


def completion_body(model: str, content: str, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
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
                "finish_reason": "stop",
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
