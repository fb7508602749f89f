"""Upstreams, which write the answers that an aligner corrects: models, pipelines, endpoints and functions.

An upstream is called with prompts, and with the sampling parameters of a chat-completions request as keywords:
`temperature`, `top_p`, and `max_tokens` or `max_completion_tokens`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import Pipeline, PreTrainedModel, PreTrainedTokenizerBase

from ..chat.budget import Budget
from ..chat.client import ChatClient, ChatFailure, ChatTask
from ..chat.messages import Messages
from ..chat.settings import ChatSettings
from ..errors import PromptError, RankerError, UpstreamError
from ..models.batched_generator import BatchedGenerator
from ..models.loading import check_positions, load_causal_lm, place_model
from ..models.renderer import Renderer
from ..types import Prompt

if TYPE_CHECKING:
    import torch

    from .aligner import Aligner

# The paper's sampling parameters for answers.
UPSTREAM_SAMPLING: Mapping[str, Any] = {
    "do_sample": True, "temperature": 0.5, "top_p": 0.95, "top_k": 10, "repetition_penalty": 1.1
}  # fmt: skip
_GENERATION_PARAMETERS = {"temperature", "top_p", "max_tokens", "max_completion_tokens"}
_CLIENT_KWARGS = {"rpm", "tpm", "prices", "max_cost", "max_run_tokens", "extra_headers", "api_version"}
_FINISH_REASONS = {"length": "length", "max_tokens": "length", "content_filter": "content_filter"}


class Answer(str):
    """An answer that states why it ended.

    Args:
        text: The answer.
        finish_reason: `"length"` if it reached its token limit, `"content_filter"` if a filter ended it, and `"stop"`
            otherwise.
    """

    finish_reason: str

    def __new__(cls, text: str, finish_reason: str = "stop") -> Answer:
        answer = super().__new__(cls, text)
        answer.finish_reason = finish_reason
        return answer


def finish_reason_of(answer: str) -> str:
    """Return why an answer ended, `"stop"` if it does not state that."""
    return answer.finish_reason if isinstance(answer, Answer) else "stop"


class Upstream(ABC):
    """Base class of upstreams. Subclass it to correct the answers of another source."""

    batch_size: int = 16  # preferred number of prompts per call
    max_concurrency: int = 1  # maximum number of calls in flight

    @abstractmethod
    def __call__(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        """Return one answer per prompt, each a text or an `Answer`.

        Args:
            prompts: Prompts, as texts or messages.
            sampling: Sampling parameters of a chat-completions request, such as `temperature`.

        Raises:
            PromptError: If a prompt is too long, or the upstream does not support its format or a sampling parameter.
            UpstreamError: If the upstream fails.
        """


class ModelUpstream(Upstream):
    """Answer with a causal language model in this process. Calls from several threads take turns.

    Args:
        model: The model, or its name or path.
        tokenizer: Its tokenizer. Defaults to the one of the model's name.
        batch_size: Number of prompts to answer at once.
        max_new_tokens: Maximum length of an answer. Defaults to half of the model's positions, but no more than 2048.
        max_prompt_length: Longest prompt in tokens; a longer one loses its beginning. `None` means that a prompt which
            does not fit into the model's positions raises `PromptError`.
        generation_kwargs: Fields of `GenerationConfig` that override the default sampling. The defaults are
            temperature 0.5, top-p 0.95, top-k 10 and a repetition penalty of 1.1 on the answer alone, as in the
            Aligner paper.
        chat_template_kwargs: Keyword arguments for the chat template of conversational prompts.
        seed: Seed for sampling. Equal calls get equal answers. `None` draws new answers in each call.
        device: Device to run on. Defaults to the accelerator of this process if there is one, else the CPU.
        model_init_kwargs: Keyword arguments for loading the model by name.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        max_prompt_length: int | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        seed: int | None = None,
        device: str | torch.device | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        model, tokenizer = load_causal_lm(model, tokenizer, model_init_kwargs)
        place_model(model, model.name_or_path or type(model).__name__, device)
        self.batch_size = batch_size
        self._generator = BatchedGenerator(model, tokenizer, batch_size, max_new_tokens)
        check_positions(model, max_prompt_length=max_prompt_length, max_new_tokens=self._generator.max_new_tokens)
        self._sampling = {**UPSTREAM_SAMPLING, **(generation_kwargs or {})}
        self._seed = seed
        self._renderer = Renderer(
            tokenizer,
            self._generator.eos_token_ids,
            max_prompt_length,
            self._generator.max_new_tokens,
            dict(chat_template_kwargs or {}),
        )

    def __call__(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        """Answer each prompt; see `Upstream`."""
        seed = sampling.pop("seed", self._seed)
        requested = _generation_kwargs(sampling)
        limit = self._generator.max_new_tokens
        requested["max_new_tokens"] = min(requested.get("max_new_tokens", limit), limit)
        settings = _without_unused({**self._sampling, **requested})
        generated = self._generator.generate([self._encode(prompt) for prompt in prompts], settings, seed)
        answers = [self._renderer.decode(prompt, [ids])[0] for prompt, ids in zip(prompts, generated, strict=True)]
        eos_token_ids = self._generator.eos_token_ids
        return [
            Answer(
                answer if isinstance(prompt, str) else answer.strip(),
                "stop" if ids and ids[-1] in eos_token_ids else "length",
            )
            for prompt, answer, ids in zip(prompts, answers, generated, strict=True)
        ]

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str) and self._generator.tokenizer.chat_template is None:
            raise PromptError("The upstream model has no chat template, so it can only answer plain text.")
        try:
            ids, _ = self._renderer.prompt(prompt)
        except (TemplateError, ValueError) as error:
            raise PromptError(f"The upstream model cannot use the prompt: {error}") from error
        limit = self._generator.max_prompt_length
        if limit is not None and len(ids) > limit:
            raise PromptError(f"The prompt has {len(ids)} tokens, but the upstream model accepts {limit} at most.")
        return ids


class PipelineUpstream(Upstream):
    """Answer with a text-generation pipeline of transformers, with its own settings as defaults.

    Args:
        pipeline: The pipeline.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def __call__(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        """Answer each prompt; see `Upstream`."""
        outputs = self._pipeline(list(prompts), return_full_text=False, **_generation_kwargs(sampling))
        return [str(output[0]["generated_text"]) for output in outputs]


class EndpointUpstream(Upstream):
    """Answer prompts with a model behind an OpenAI-compatible chat endpoint.

    Only the sampling parameters that are given here or in a call are sent. A refusal of the model is returned as its
    answer.

    Args:
        model: Name of the model at the endpoint.
        base_url: Address of the endpoint, as for `openai.OpenAI`. `None` reads `OPENAI_BASE_URL`, and means OpenAI if
            that is not set either.
        api_key: API key, never written anywhere. `None` reads `OPENAI_API_KEY`. Optional if a `base_url` is given.
        max_concurrency: Maximum number of calls in flight, over all threads.
        timeout: Seconds of wall-clock time for one call.
        max_retries: Maximum number of retries after errors that can be temporary.
        sampling: Fields of every request, such as `max_tokens`. Those given in a call take precedence. As for
            `openai.OpenAI`, `extra_body` contains fields beyond the standard ones.
        client_kwargs: Limits and headers, as for `LLMRanker`: `rpm`, `tpm`, `prices`, `max_cost`, `max_run_tokens`,
            `extra_headers`, `api_version`. Without `max_tokens`, a call reserves 1,024 tokens of reply.

    Raises:
        ValueError: If neither an API key nor a `base_url` is given, or an argument is out of range.
    """

    batch_size = 1

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | Callable[[], Any] | None = None,
        *,
        max_concurrency: int = 32,
        timeout: float = 60.0,
        max_retries: int = 3,
        sampling: Mapping[str, Any] | None = None,
        **client_kwargs: Any,
    ) -> None:
        if unknown := sorted(client_kwargs.keys() - _CLIENT_KWARGS):
            raise TypeError(
                f"EndpointUpstream has no argument {unknown[0]!r}. Pass fields of the request in `sampling`."
            )
        settings = ChatSettings(
            model,
            base_url,
            api_key,
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_retries=max_retries,
            **client_kwargs,
        )
        try:
            self._client = ChatClient(settings)
        except RankerError as error:
            raise ValueError(str(error)) from None
        self.model = model
        self.max_concurrency = max_concurrency
        self._sampling = dict(sampling or {})

    @property
    def budget(self) -> Budget:
        """Spending limits and the amounts spent so far."""
        return self._client.budget

    def __call__(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        """Answer each prompt. See `Upstream`."""
        fields = {**self._sampling, **sampling}
        fields |= fields.pop("extra_body", None) or {}
        tasks = [ChatTask(partial(_endpoint_messages, prompt), read=str, fields=fields) for prompt in prompts]
        answers: dict[int, str] = {}
        try:
            with closing(self._client.stream(tasks)) as stream:
                for position, outcome in stream:
                    if isinstance(outcome, ChatFailure):
                        raise self._error(outcome)
                    reason = _FINISH_REASONS.get(outcome.finish_reason, "stop")
                    answers[position] = Answer(outcome.value, reason)
        except RankerError as error:
            raise UpstreamError(str(error)) from None
        return [answers[position] for position in range(len(prompts))]

    def _error(self, failure: ChatFailure) -> PromptError | UpstreamError:
        if failure.reason == "too_long":
            return PromptError("The prompt is too long for the upstream model.", "context_length_exceeded")
        if failure.reason == "refusal":
            return PromptError(
                "The endpoint of the upstream model rejected the content of the prompt.", "content_filter"
            )
        return UpstreamError(
            f"The upstream {self.model} did not answer ({failure.reason}): {failure.detail}",
            retry_after=failure.retry_after if failure.reason == "rate_limited" else None,
        )


def _endpoint_messages(prompt: Prompt, _note: str | None) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


class FunctionUpstream(Upstream):
    """Answer with a function from prompts to answers.

    Args:
        function: The function. The sampling parameters it supports are those it accepts as keywords.
    """

    def __init__(self, function: Callable[..., Sequence[str]]) -> None:
        self._function = function
        parameters = inspect.signature(function).parameters.values()
        self._accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self._accepted = {parameter.name for parameter in parameters}

    def __call__(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        """Answer each prompt; see `Upstream`."""
        unsupported = [] if self._accepts_any else sorted(sampling.keys() - self._accepted)
        if unsupported:
            raise PromptError(f"The upstream does not support {', '.join(unsupported)}.")
        answers = list(self._function(list(prompts), **sampling))
        if len(answers) != len(prompts):
            raise UpstreamError(f"The upstream returned {len(answers)} answers to {len(prompts)} prompts.")
        return answers


def make_upstream(upstream: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> Upstream:
    """Wrap a model (with its tokenizer), a pipeline or a function as an upstream. Return an `Upstream` as it is."""
    if isinstance(upstream, Upstream):
        return upstream
    if isinstance(upstream, PreTrainedModel):
        return ModelUpstream(upstream, tokenizer)
    if isinstance(upstream, Pipeline):
        return PipelineUpstream(upstream)
    if callable(upstream):
        return FunctionUpstream(upstream)
    raise TypeError(
        "An upstream must be a model, a pipeline, a function from prompts to answers, ModelUpstream(name) or "
        f"EndpointUpstream(name, base_url), got {upstream!r}."
    )


class AlignedUpstream(Upstream):
    """Answer with an upstream, and correct the answers with an aligner.

    The result is an upstream too, so several aligners can be stacked.

    Args:
        upstream: A model (with its tokenizer), a pipeline, a function from prompts to answers, or an `Upstream`.
        aligner: The aligner.
        tokenizer: Tokenizer of `upstream`, if that is a model.

    Example:
        ```python
        aligned = AlignedUpstream(EndpointUpstream("gpt-5-mini"), Aligner.from_pretrained("outputs/aligner"))
        aligned(["How do I keep basil alive?"])
        ```
    """

    def __init__(self, upstream: Any, aligner: Aligner, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.upstream = make_upstream(upstream, tokenizer)
        self.aligner = aligner
        self.batch_size = self.upstream.batch_size

    def __call__(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        """Return the corrected answers. The sampling parameters apply to the upstream only."""
        answers = self.upstream(prompts, **sampling)
        return [
            Answer(corrected, finish_reason_of(answer))
            for corrected, answer in zip(self.aligner.correct(prompts, answers), answers, strict=True)
        ]


def _generation_kwargs(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the sampling parameters of a chat-completions request to fields of `GenerationConfig`.

    Raises:
        PromptError: If one of them is not supported.
    """
    if unsupported := sorted(sampling.keys() - _GENERATION_PARAMETERS):
        raise PromptError(f"The upstream does not support {', '.join(unsupported)}.")
    kwargs = {name: sampling[name] for name in ("temperature", "top_p") if sampling.get(name) is not None}
    for name in ("max_tokens", "max_completion_tokens"):
        if sampling.get(name) is not None:
            kwargs["max_new_tokens"] = sampling[name]
    if (temperature := kwargs.get("temperature")) is not None:
        kwargs["do_sample"] = temperature > 0
    return _without_unused(kwargs)


def _without_unused(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the fields without those that greedy decoding ignores, because transformers would warn of them."""
    unused = () if kwargs.get("do_sample", True) else ("temperature", "top_p", "top_k")
    return {name: value for name, value in kwargs.items() if name not in unused}
