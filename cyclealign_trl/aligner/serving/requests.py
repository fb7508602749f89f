"""The bodies of chat-completions requests, read without trusting them, and what is sent back."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that would change the answer's form or content, with the values that ask for nothing special.
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
    """A request that is answered with an error of OpenAI's shape.

    Args:
        message: What is wrong, and what to do.
        param: The field at fault.
        code: A word for programs.
        status: HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What is asked: messages of a role and a text each, and how to sample."""

    messages: list[dict[str, str]]
    sampling: Mapping[str, float]


def read_request(text: bytes, served_model: str) -> ChatRequest:
    """Reads a body.

    Args:
        text: The body.
        served_model: The one model there is.

    Raises:
        BadRequestError: If it cannot be answered.
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
        raise BadRequestError(f"`model` must be a text: {served_model!r}.", "model")
    if model != served_model:
        raise BadRequestError(
            f"There is no model {model[:100]!r} here, only {served_model!r}.", "model", "model_not_found", 404
        )
    for name, neutral in _UNSUPPORTED.items():
        # By type too: True is no 1 here, and 0 no False.
        if name in body and not any(type(body[name]) is type(value) and body[name] == value for value in neutral):
            raise BadRequestError(f"`{name}` is not supported here: leave it out.", name, "unsupported_value")
    return ChatRequest(_messages(body.get("messages")), _sampling(body))


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise BadRequestError("`messages` must be an array of at least one message.", "messages")
    read = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise BadRequestError(f"`{where}` must be an object of `role` and `content`.", where)
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRequestError(f"`{where}.role` must be one of {', '.join(_ROLES)}.", f"{where}.role")
        read.append({"role": _ROLES[role], "content": _content(message.get("content"), f"{where}.content")})
    if read[-1]["role"] != "user":
        raise BadRequestError("The last message must be the user's: it is what is answered.", "messages")
    return read


def _content(content: Any, where: str) -> str:
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRequestError(f"`{where}` must be a text, or an array of text parts.", where)
    # Lone surrogates can be written in JSON, but not in UTF-8.
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
                raise BadRequestError(f"`{name}` must be a whole number of at least 1.", name)
            sampling[name] = value
    return sampling


def completion(model: str, content: str, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The body of a reply."""
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


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
