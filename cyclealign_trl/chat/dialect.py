"""The parameters that not every OpenAI-compatible endpoint takes, and what to leave out where one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Dialect:
    """What is sent of the parameters that not every endpoint takes."""

    temperature: bool = True
    seed: bool = True
    limit_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    response_format: Literal["json_schema", "json_object"] | None = "json_schema"

    def steps(self) -> dict[str, Dialect]:
        """The dialects one step plainer, each under the name of the parameter that an endpoint would complain of."""
        steps = {}
        if self.response_format is not None:
            plainer: Literal["json_object"] | None = "json_object" if self.response_format == "json_schema" else None
            steps["response_format"] = replace(self, response_format=plainer)
        if self.limit_parameter == "max_tokens":
            steps["max_tokens"] = replace(self, limit_parameter="max_completion_tokens")
        if self.temperature:
            steps["temperature"] = replace(self, temperature=False)
        if self.seed:
            steps["seed"] = replace(self, seed=False)
        return steps

    def parameters(
        self, *, max_tokens: int, temperature: float, seed: int, schema_name: str, schema: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The request's fields in this dialect, for a reply in JSON that fits the schema."""
        parameters: dict[str, Any] = {self.limit_parameter: max_tokens}
        if self.temperature:
            parameters["temperature"] = temperature
        if self.seed:
            parameters["seed"] = seed
        if self.response_format == "json_schema":
            named = {"name": schema_name, "strict": True, "schema": dict(schema)}
            parameters["response_format"] = {"type": "json_schema", "json_schema": named}
        elif self.response_format == "json_object":
            parameters["response_format"] = {"type": "json_object"}
        return parameters
