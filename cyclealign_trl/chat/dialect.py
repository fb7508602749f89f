"""Request parameters that some OpenAI-compatible endpoints refuse, and what to send instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple


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

    def fallbacks(self) -> dict[str, Dialect]:
        """Return the dialects with one parameter dropped or replaced, by the name of that parameter."""
        fallbacks = {}
        if self.response_format is not None:
            weaker: Literal["json_object"] | None = "json_object" if self.response_format == "json_schema" else None
            fallbacks["response_format"] = replace(self, response_format=weaker)
        if self.limit_parameter == "max_tokens":
            fallbacks["max_tokens"] = replace(self, limit_parameter="max_completion_tokens")
        if self.temperature:
            fallbacks["temperature"] = replace(self, temperature=False)
        if self.seed:
            fallbacks["seed"] = replace(self, seed=False)
        return fallbacks

    def parameters(self, *, max_tokens: int, temperature: float, seed: int, schema: ReplySchema) -> dict[str, Any]:
        """Return the request parameters for a reply that follows the schema."""
        parameters: dict[str, Any] = {self.limit_parameter: max_tokens}
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
