"""Settings of a chat client, shared by everything that calls a model behind an endpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from .budget import Prices
from .limits import resolve_num_processes

# Names of models that reason by default.
_REASONS = re.compile(
    r"\bo[1-9]\b|\bgpt-(?:5|oss)|\br1\b|\bqwq|magistral|reason|thinking|\bqwen3\b|\bgrok-[34]-mini|\bgrok-4"
    r"|\bgemini-(?:2\.5-pro|3)|\bglm-(?:4\.[5-9]|z1)|\bminimax-m"
)


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Model, endpoint, limits and sampling parameters of a `ChatClient`.

    `base_url`, `api_key`, `prices`, `max_cost` and `max_run_tokens` are checked when the client is built.

    Args:
        model: Name of the model at the endpoint.
        base_url: Address of the endpoint, as for `openai.OpenAI`. `None` reads `OPENAI_BASE_URL`, and means OpenAI if
            that is not set either. The query `?api-version=` sets `api_version`.
        api_key: API key, never written anywhere. `None` reads `OPENAI_API_KEY`. Optional if a `base_url` is given. A
            function that returns a key is called before each call.
        max_concurrency: Maximum number of calls in flight, over all threads. It is halved when the endpoint answers
            HTTP 429, and recovers slowly.
        rpm: Requests per minute, over all processes. `None` applies only the limits in the endpoint's headers.
        tpm: Tokens per minute, sent and received, over all processes. `None` applies only the limits in the
            endpoint's headers.
        num_processes: Number of processes that share the limits in equal parts. `None` reads `WORLD_SIZE`, and means
            1 if that is not set.
        prices: Prices of the endpoint in US dollars per million tokens: `input`, `output` and, if it differs,
            `cached_input`. `None` looks them up with the package `genai-prices`, if it is installed and knows the
            model at this endpoint. Otherwise they are unknown, unless the replies report their cost.
        max_cost: Maximum to spend in US dollars, over all processes, failed calls included. A call that could exceed
            it is not made and fails with the reason `"budget_exhausted"`. Requires `prices`. `None` means no cap.
        max_run_tokens: Maximum number of tokens to send and receive, over all processes, failed calls included. A
            call that could exceed it fails like one that exceeds `max_cost`. `None` means no cap.
        timeout: Seconds of wall-clock time for one call. A longer `Retry-After` fails the request instead of delaying
            it.
        max_retries: Maximum number of retries after errors that can be temporary and after invalid replies.
        temperature: Sampling temperature.
        max_tokens: Maximum number of tokens in a reply. The limit is 8 times as high for models that reason: those
            with a `reasoning_effort`, and those known by name. A truncated reply is requested again with twice the
            limit, up to 16 times `max_tokens`, and the client keeps a limit that was high enough.
        seed: Seed for sampling.
        extra_body: Additional fields of the request body, for endpoints with options beyond the standard ones.
        reasoning_effort: How much the model reasons before it replies, such as `"low"`. `None` means its default.
        extra_headers: Additional HTTP headers, for gateways. They are treated like the key, and do not identify stored
            answers.
        api_version: Version of the API, sent as `?api-version=`. With it, the key is also sent in the header
            `api-key`, as Azure requires.

    Raises:
        ValueError: If an argument is out of range.
    """

    model: str
    base_url: str | None = None
    api_key: str | Callable[[], Any] | None = field(default=None, repr=False)
    _: KW_ONLY
    max_concurrency: int = 32
    rpm: float | None = None
    tpm: float | None = None
    num_processes: int | None = None
    prices: Prices | Mapping[str, float] | None = None
    max_cost: float | None = None
    max_run_tokens: int | None = None
    timeout: float = 60.0
    max_retries: int = 3
    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int = 0
    extra_body: Mapping[str, Any] | None = field(default=None, repr=False)  # can contain secrets
    reasoning_effort: str | None = None
    extra_headers: Mapping[str, str] | None = field(default=None, repr=False)  # can contain secrets
    api_version: str | None = None

    @property
    def reasons(self) -> bool:
        """`True` if the model probably reasons before it replies."""
        if self.reasoning_effort is not None:
            return self.reasoning_effort not in ("none", "minimal")
        return _REASONS.search(self.model.lower()) is not None

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("`model` must be the name of a model at the endpoint, got an empty string.")
        if self.max_concurrency < 1:
            raise ValueError(f"`max_concurrency` must be at least 1, got {self.max_concurrency}.")
        if self.max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1, got {self.max_tokens}.")
        num_processes = resolve_num_processes(self.num_processes)
        if self.rpm is not None and not 0 < self.rpm < math.inf:
            raise ValueError(f"`rpm` must be positive and finite, or None for no limit, got {self.rpm}.")
        if self.tpm is not None and not num_processes * self.max_tokens <= self.tpm < math.inf:
            raise ValueError(
                f"`tpm` must be finite and allow each of {num_processes} processes one reply of "
                f"`max_tokens`={self.max_tokens} tokens per minute, got {self.tpm}. Raise `tpm`, lower `max_tokens`, "
                "or pass None for no limit."
            )
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"`timeout` must be a positive, finite number of seconds, got {self.timeout}.")
        if self.max_retries < 0:
            raise ValueError(f"`max_retries` must be at least 0, got {self.max_retries}.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` must be finite and at least 0, got {self.temperature}.")
        if self.extra_body is not None:  # later changes to the caller's dictionary must not change the settings
            object.__setattr__(self, "extra_body", dict(self.extra_body))
