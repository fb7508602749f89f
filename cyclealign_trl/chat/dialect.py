"""Request parameters that some OpenAI-compatible endpoints refuse, and what to send instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from .messages import Messages


class ReplySchema(NamedTuple):
    """Schema of a reply in JSON.

    Args:
        name: Name of the schema, in letters, digits, `_` and `-`.
        schema: JSON schema, within the limits of strict structured output.
    """

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Dialect:
    """Selection of the optional parameters that an endpoint accepts."""

    temperature: bool = True
    seed: bool = True
    limit_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    response_format: Literal["json_schema", "json_object"] | None = "json_schema"
    reasoning_effort: bool = True
    system: bool = True

    def fallbacks(self, *, reasoning_effort: bool = False) -> dict[str, Dialect]:
        """Return the dialects with one parameter dropped or replaced, by the name of that parameter.

        The last one has no system role.

        Args:
            reasoning_effort: Whether requests contain this parameter.
        """
        fallbacks = {}
        if reasoning_effort and self.reasoning_effort:
            fallbacks["reasoning_effort"] = replace(self, reasoning_effort=False)
        if self.response_format is not None:
            weaker: Literal["json_object"] | None = "json_object" if self.response_format == "json_schema" else None
            fallbacks["response_format"] = replace(self, response_format=weaker)
        if self.limit_parameter == "max_tokens":
            fallbacks["max_tokens"] = replace(self, limit_parameter="max_completion_tokens")
        if self.temperature:
            fallbacks["temperature"] = replace(self, temperature=False)
        if self.seed:
            fallbacks["seed"] = replace(self, seed=False)
        if self.system:
            fallbacks["system"] = replace(self, system=False)
        return fallbacks

    def messages(self, messages: Messages) -> Messages:
        """Return the messages. Without a system role, its text begins the first message of the user."""
        if self.system or not any(message["role"] == "system" for message in messages):
            return messages
        instructions = [message["content"] for message in messages if message["role"] == "system"]
        others = [message for message in messages if message["role"] != "system"]
        position = next((index for index, message in enumerate(others) if message["role"] == "user"), 0)
        texts = [*instructions, *(message["content"] for message in others[position : position + 1])]
        return [
            *others[:position],
            {"role": "user", "content": "\n\n".join(texts)},
            *others[position + 1 :],
        ]

    def parameters(
        self,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        schema: ReplySchema,
        reasoning_effort: str | None = None,
    ) -> dict[str, Any]:
        """Return the request parameters for a reply that follows the schema."""
        parameters: dict[str, Any] = {self.limit_parameter: max_tokens}
        if reasoning_effort is not None and self.reasoning_effort:
            parameters["reasoning_effort"] = reasoning_effort
        if self.temperature:
            parameters["temperature"] = temperature
        if self.seed:
            parameters["seed"] = seed
        if self.response_format == "json_schema":
            json_schema = {"name": schema.name, "strict": True, "schema": dict(schema.schema)}
            parameters["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        elif self.response_format == "json_object":
            parameters["response_format"] = {"type": "json_object"}
        return parameters
