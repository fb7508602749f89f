"""Whose answers an aligner corrects: a model, a pipeline, an endpoint, or anything that turns prompts into answers.

Every upstream is called with prompts and, by keyword, with what a chat-completions request may say of sampling:
`temperature`, `top_p`, `max_tokens` or `max_completion_tokens`.
"""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import Pipeline, PreTrainedModel, PreTrainedTokenizerBase

from ..chat.responses import Response, read_complaint, read_json
from ..errors import PromptError, UpstreamError
from ..models.batched_generator import BatchedGenerator
from ..models.loading import load_causal_lm, place_model
from ..models.renderer import Renderer
from ..types import Prompt

if TYPE_CHECKING:
    import torch

    from .aligner import Aligner

# How the paper samples answers.
SAMPLING: Mapping[str, Any] = {
    "do_sample": True, "temperature": 0.5, "top_p": 0.95, "top_k": 10, "repetition_penalty": 1.1
}  # fmt: skip


class Upstream(ABC):
    """Answers prompts."""

    batch_size: int = 16  # how many prompts one call takes best
    max_concurrency: int = 1  # how many calls at once

    @abstractmethod
    def __call__(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        """Answers each prompt.

        Raises:
            PromptError: If a prompt cannot be answered as it is.
            UpstreamError: If the upstream cannot answer at all.
        """


class ModelUpstream(Upstream):
    """A causal language model in this process. Calls from several threads take turns.

    Args:
        model: The model, or its name or path.
        tokenizer: Its tokenizer; by default the one of the model's name.
        batch_size: Prompts answered at once.
        max_new_tokens: Longest answer. `None`: half of the model's positions, at most 2048.
        generation_kwargs: Changes of how answers are sampled, as fields of `GenerationConfig`. By default temperature
            0.5, top-p 0.95, top-k 10 and a repetition penalty of 1.1 over the answer alone, as in Aligner's paper.
        chat_template_kwargs: Keyword arguments for the chat template of conversational prompts.
        seed: Makes the answers depend on the prompts alone. `None`: they differ from call to call.
        device: Where to run. `None`: this process's accelerator, else the CPU.
        model_init_kwargs: Keyword arguments for loading the model by name.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
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
        self._sampling = {**SAMPLING, **(generation_kwargs or {})}
        self._seed = seed
        self._renderer = Renderer(
            tokenizer,
            self._generator.eos_token_ids,
            None,
            self._generator.max_new_tokens,
            dict(chat_template_kwargs or {}),
        )

    def __call__(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        """Answers each prompt; see `Upstream`."""
        asked = _generation_kwargs(sampling)
        limit = self._generator.max_new_tokens
        asked["max_new_tokens"] = min(asked.get("max_new_tokens", limit), limit)
        settings = _without_idle({**self._sampling, **asked})
        written = self._generator.generate([self._encode(prompt) for prompt in prompts], settings, self._seed)
        answers = self._generator.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [
            answer if isinstance(prompt, str) else answer.strip()
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str) and self._generator.tokenizer.chat_template is None:
            raise PromptError("The upstream model has no chat template, so it answers plain text only.")
        try:
            ids, _ = self._renderer.prompt(prompt)
        except (TemplateError, ValueError) as error:
            raise PromptError(f"The upstream model cannot read the prompt: {error}") from error
        limit = self._generator.max_prompt_length
        if limit is not None and len(ids) > limit:
            raise PromptError(f"The prompt has {len(ids)} tokens, and the upstream model reads at most {limit}.")
        return ids


class PipelineUpstream(Upstream):
    """A text-generation pipeline of transformers, with whatever it was set up with.

    Args:
        pipeline: The pipeline.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def __call__(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        """Answers each prompt; see `Upstream`."""
        outputs = self._pipeline(list(prompts), return_full_text=False, **_generation_kwargs(sampling))
        return [str(output[0]["generated_text"]) for output in outputs]


class EndpointUpstream(Upstream):
    """A model behind any OpenAI-compatible chat endpoint.

    Args:
        model: Name of the model at the endpoint.
        base_url: The endpoint, as for `openai.OpenAI`. `None` reads `OPENAI_BASE_URL`, else means OpenAI.
        api_key: The key. `None` reads `OPENAI_API_KEY`; with a `base_url`, none is needed. Written nowhere.
        max_concurrency: Calls in flight at once.
        timeout: Seconds that one call may take.
        max_retries: Further attempts after one that failed in a way that may pass.
        sampling: Fields of every request, such as `max_tokens`, unless a call says otherwise.
    """

    batch_size = 1

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        max_concurrency: int = 32,
        timeout: float = 60.0,
        max_retries: int = 3,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        from openai import OpenAI

        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        self._key = api_key or os.environ.get("OPENAI_API_KEY")
        if self._key is None and base_url is None:
            raise ValueError("No API key: set OPENAI_API_KEY, or name the `base_url` of a server that needs none.")
        self.model = model
        self.max_concurrency = max_concurrency
        self._client = OpenAI(
            base_url=base_url, api_key=self._key or "no-key", timeout=timeout, max_retries=max_retries
        )
        self._sampling = dict(sampling or {})
        self._threads = ThreadPoolExecutor(max_concurrency, thread_name_prefix="cyclealign-upstream")

    def __call__(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        """Answers each prompt; see `Upstream`."""
        if len(prompts) == 1:  # the caller's own thread is as good as one more
            return [self._answer(prompts[0], sampling)]
        return list(self._threads.map(lambda prompt: self._answer(prompt, sampling), prompts))

    def _answer(self, prompt: Prompt, sampling: Mapping[str, Any]) -> str:
        import openai

        messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        settings: Any = {**self._sampling, **sampling}
        try:
            completion = self._client.chat.completions.create(model=self.model, messages=messages, **settings)
            message = completion.choices[0].message
            return str(message.content or getattr(message, "refusal", None) or "")
        except openai.APIStatusError as error:
            raise self._error(error) from None  # what it came from may hold the key
        except openai.APIError as error:
            raise UpstreamError(f"The upstream {self.model} does not answer: {type(error).__name__}.") from None
        except (AttributeError, LookupError, TypeError) as error:
            raise UpstreamError(f"The upstream {self.model} sent no chat completion.") from error

    def _error(self, error: Any) -> Exception:  # openai.APIStatusError
        text = error.response.text
        complaint = read_complaint(Response(error.status_code, error.response.headers, text, read_json(text)))
        said = complaint.message if self._key is None else complaint.message.replace(self._key, "[API key]")
        if error.status_code == 413 or (error.status_code in (400, 422) and complaint.is_about_length):
            return PromptError("The prompt is too long for the upstream model.")
        return UpstreamError(f"The upstream {self.model} answered HTTP {error.status_code}: {said[:500]}")


class FunctionUpstream(Upstream):
    """Any function from prompts to answers, with or without keywords for sampling.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[..., Sequence[str]]) -> None:
        self._function = function
        parameters = inspect.signature(function).parameters.values()
        self._takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self._takes = {parameter.name for parameter in parameters}

    def __call__(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        """Answers each prompt; see `Upstream`."""
        refused = [] if self._takes_any else sorted(sampling.keys() - self._takes)
        if refused:
            raise PromptError(f"The upstream does not take {', '.join(refused)}.")
        answers = list(self._function(list(prompts), **sampling))
        if len(answers) != len(prompts):
            raise UpstreamError(f"The upstream gave {len(answers)} answers to {len(prompts)} prompts.")
        return answers


def make_upstream(upstream: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> Upstream:
    """An upstream from a model (with its tokenizer), a pipeline, a function, or an upstream itself."""
    if isinstance(upstream, Upstream):
        return upstream
    if isinstance(upstream, PreTrainedModel):
        return ModelUpstream(upstream, tokenizer)
    if isinstance(upstream, Pipeline):
        return PipelineUpstream(upstream)
    if callable(upstream):
        return FunctionUpstream(upstream)
    raise TypeError(
        f"An upstream is a model, a pipeline, a function from prompts to answers, ModelUpstream(name) or "
        f"EndpointUpstream(name, base_url); got {upstream!r}."
    )


class AlignedUpstream(Upstream):
    """An upstream whose answers an aligner corrects: itself an upstream.

    Args:
        upstream: A model (with its tokenizer), a pipeline, a function from prompts to answers, or an `Upstream`.
        aligner: The aligner.
        tokenizer: The tokenizer of a model that is given.

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
        """The corrected answers; `sampling` is the upstream's."""
        return self.aligner.correct(prompts, self.upstream(prompts, **sampling))


def _generation_kwargs(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat-completions request says of sampling, in the words of `GenerationConfig`."""
    kwargs = {name: sampling[name] for name in ("temperature", "top_p") if sampling.get(name) is not None}
    for name in ("max_tokens", "max_completion_tokens"):
        if sampling.get(name) is not None:
            kwargs["max_new_tokens"] = sampling[name]
    if (temperature := kwargs.get("temperature")) is not None:
        kwargs["do_sample"] = temperature > 0
    return _without_idle(kwargs)


def _without_idle(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what says nothing where nothing is sampled, and would be warned of."""
    idle = () if kwargs.get("do_sample", True) else ("temperature", "top_p", "top_k")
    return {name: value for name, value in kwargs.items() if name not in idle}
