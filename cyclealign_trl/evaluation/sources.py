"""Sources of replies: models, adapters, endpoints, aligners and data sets, named by texts on the command line."""

from __future__ import annotations

import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ..aligner.aligner import Aligner
from ..aligner.upstreams import EndpointUpstream, FunctionUpstream, ModelUpstream, Upstream
from ..chat.endpoint import endpoint_url
from ..chat.store import digest
from ..data.formats import completion_text, file_format, plain_prompt
from ..data.hh_rlhf import prompt_text
from ..data.named_datasets import load_named_splits
from ..models.model_pool import ModelPool, ModelReference
from ..types import Prompt, valid_text

logger = logging.getLogger(__name__)

PromptFormat = Literal["auto", "chat", "text"]


@dataclass(frozen=True, slots=True)
class ReplySettings:
    """How replies are generated, greedily.

    Args:
        max_new_tokens: Longest reply in tokens. The paper uses 128.
        max_prompt_length: Longest prompt in tokens for a model in this process. A longer one loses its beginning. The
            paper's code uses 384. `None` means no limit.
        prompt_format: How a model in this process sees a conversation: `"chat"`, by its chat template; `"text"`, as
            HH-RLHF writes dialogues (`Human:` and `Assistant:`); or `"auto"`, by its chat template if it has one.
        batch_size: Number of prompts that a model in this process answers at once.
        device: Device of the models. `None` means the accelerator if there is one, else the CPU.
        model_init_kwargs: Keyword arguments for loading the models (`dtype`, ...).
        endpoint_kwargs: Keyword arguments of `EndpointUpstream`, such as `max_concurrency`, `prices` and `max_cost`.

    Raises:
        ValueError: If an argument is out of range.
    """

    max_new_tokens: int = 128
    max_prompt_length: int | None = 384
    prompt_format: PromptFormat = "auto"
    batch_size: int = 16
    device: str | None = None
    model_init_kwargs: Mapping[str, Any] = field(default_factory=dict)
    endpoint_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_prompt_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.prompt_format not in (known := ("auto", "chat", "text")):
            raise ValueError(f"prompt_format must be one of {known}, got {self.prompt_format!r}.")


class ReplySource(ABC):
    """A source of replies. Nothing is loaded before `open`.

    Args:
        name: Name in tables and files.
    """

    is_generated = True
    """Whether the replies are generated, and cut where they go on with the next turns."""

    upstream: ReplySource | None = None
    """Source whose replies this source needs."""

    def __init__(self, name: str) -> None:
        self.name = valid_text(name)

    @property
    def base(self) -> str | None:
        """Model that has to be in memory. Sources that share it are asked one after another."""
        return None

    @abstractmethod
    def identity(self, settings: ReplySettings) -> dict[str, Any]:
        """Return everything that determines the replies, as JSON-compatible data."""

    @abstractmethod
    def open(
        self, settings: ReplySettings, pool: ModelPool, upstream_replies: Mapping[str, str]
    ) -> AbstractContextManager[Upstream]:
        """Return what answers prompts, for a `with` block.

        Args:
            settings: How to generate.
            pool: Models in memory.
            upstream_replies: Replies of `upstream` by `match_key` of their prompts.
        """


class ModelSource(ReplySource):
    """A model or a PEFT adapter, by name or path."""

    def __init__(self, name: str, model: str) -> None:
        super().__init__(name)
        self.model = model

    @cached_property
    def reference(self) -> ModelReference:
        """The model and its base."""
        return ModelReference.find(self.model)

    @property
    def base(self) -> str:
        """See `ReplySource`."""
        return self.reference.base

    def identity(self, settings: ReplySettings) -> dict[str, Any]:
        """See `ReplySource`."""
        return {
            **self.reference.identity,
            "max_new_tokens": settings.max_new_tokens,
            "max_prompt_length": settings.max_prompt_length,
            "prompt_format": settings.prompt_format,
            "model_init_kwargs": {name: str(value) for name, value in settings.model_init_kwargs.items()},
        }

    @contextmanager
    def open(
        self, settings: ReplySettings, pool: ModelPool, upstream_replies: Mapping[str, str]
    ) -> Iterator[Upstream]:
        """Load the model. See `ReplySource`."""
        with pool.use(self.reference) as (model, tokenizer):
            upstream = ModelUpstream(
                model,
                tokenizer,
                batch_size=settings.batch_size,
                max_new_tokens=settings.max_new_tokens,
                max_prompt_length=settings.max_prompt_length,
                generation_kwargs={"do_sample": False, "repetition_penalty": 1.0},
            )
            has_template = tokenizer.chat_template is not None
            if settings.prompt_format == "text" or (settings.prompt_format == "auto" and not has_template):
                yield _TextUpstream(upstream)
            else:
                yield upstream


class EndpointSource(ReplySource):
    """A model behind an OpenAI-compatible endpoint. The key is read from `OPENAI_API_KEY`."""

    def __init__(self, name: str, model: str, base_url: str | None) -> None:
        super().__init__(name)
        self.model, self.base_url = model, base_url

    def identity(self, settings: ReplySettings) -> dict[str, Any]:
        """See `ReplySource`.

        Raises:
            ValueError: If an argument in `endpoint_kwargs` is wrong, or there is no key.
        """
        self._connect(settings)
        return {"endpoint": endpoint_url(self.base_url), "model": self.model, "sampling": self._sampling(settings)}

    def open(
        self, settings: ReplySettings, pool: ModelPool, upstream_replies: Mapping[str, str]
    ) -> AbstractContextManager[Upstream]:
        """See `ReplySource`."""
        return nullcontext(self._connect(settings))

    def _connect(self, settings: ReplySettings) -> EndpointUpstream:
        kwargs = {**settings.endpoint_kwargs, "sampling": self._sampling(settings)}
        try:
            return EndpointUpstream(self.model, self.base_url, **kwargs)
        except TypeError as error:
            raise ValueError(f"The endpoint_kwargs are wrong: {error}") from error

    @staticmethod
    def _sampling(settings: ReplySettings) -> dict[str, Any]:
        own = settings.endpoint_kwargs.get("sampling", {})
        return {"temperature": 0.0, "max_tokens": settings.max_new_tokens, **own}


class AlignedSource(ReplySource):
    """An aligner that corrects the replies of another source. These are collected first, so that neither waits."""

    def __init__(self, name: str, aligner: str, upstream: ReplySource) -> None:
        super().__init__(name)
        self.aligner = aligner
        self.upstream: ReplySource = upstream

    def identity(self, settings: ReplySettings) -> dict[str, Any]:
        """See `ReplySource`."""
        reference = ModelReference.find(self.aligner)
        return {"aligner": reference.identity, "upstream": self.upstream.identity(settings)}

    @contextmanager
    def open(
        self, settings: ReplySettings, pool: ModelPool, upstream_replies: Mapping[str, str]
    ) -> Iterator[Upstream]:
        """Load the aligner. See `ReplySource`."""
        pool.free()
        aligner = Aligner.from_pretrained(
            self.aligner,
            device=settings.device,
            model_init_kwargs=settings.model_init_kwargs,
            batch_size=settings.batch_size,
            generation_kwargs={"do_sample": False},
        )

        def correct(prompts: Sequence[Prompt]) -> list[str]:
            return aligner.correct(prompts, [upstream_replies[match_key(prompt)] for prompt in prompts])

        upstream = FunctionUpstream(correct)
        upstream.batch_size = settings.batch_size
        yield upstream


class DatasetSource(ReplySource):
    """Replies in a data set with columns `prompt` and `completion`, found by their prompts."""

    is_generated = False

    def __init__(self, name: str, dataset: str, split: str = "test") -> None:
        super().__init__(name)
        self.dataset = dataset
        self.split = split

    @cached_property
    def completions(self) -> dict[str, str]:
        """Completions by `match_key` of their prompts.

        Raises:
            ValueError: If a column is missing, or a row cannot be read.
        """
        splits = load_named_splits(self.dataset, None, self.split, "models")
        rows = splits[self.split if self.split in splits else next(iter(splits))]
        if not {"prompt", "completion"} <= set(rows.column_names):
            raise ValueError(
                f"Replies need columns 'prompt' and 'completion'; {self.dataset} has {', '.join(rows.column_names)}."
            )
        completions: dict[str, str] = {}
        num_others = 0
        for row in rows:
            key, completion = match_key(plain_prompt(row["prompt"])), completion_text(row["completion"])
            num_others += completions.setdefault(key, completion) != completion
        if num_others:
            logger.warning(
                "%s has several replies to some prompts. The first one counts, and %d others do not.",
                self.dataset,
                num_others,
            )
        return completions

    def identity(self, settings: ReplySettings) -> dict[str, Any]:
        """See `ReplySource`."""
        return {"completions": digest(self.completions).hex()[:16]}

    def open(
        self, settings: ReplySettings, pool: ModelPool, upstream_replies: Mapping[str, str]
    ) -> AbstractContextManager[Upstream]:
        """See `ReplySource`."""
        return nullcontext(FunctionUpstream(self._find))

    def _find(self, prompts: Sequence[Prompt]) -> list[str]:
        keys = [match_key(prompt) for prompt in prompts]
        if missing := [index for index, key in enumerate(keys) if key not in self.completions]:
            raise ValueError(
                f"{self.dataset} has {len(self.completions)} replies, and none to this prompt: "
                f"{str(prompts[missing[0]])[:200]!r}. Evaluate on the prompts that its replies belong to."
            )
        return [self.completions[key] for key in keys]


class UpstreamSource(ReplySource):
    """An `Upstream` of the caller. Its identity is only its name, so each one needs an `output_dir` of its own."""

    def __init__(self, name: str, upstream: Upstream) -> None:
        super().__init__(name)
        self._answerer = upstream

    def identity(self, settings: ReplySettings) -> dict[str, Any]:
        """See `ReplySource`."""
        return {"upstream": type(self._answerer).__name__}

    def open(
        self, settings: ReplySettings, pool: ModelPool, upstream_replies: Mapping[str, str]
    ) -> AbstractContextManager[Upstream]:
        """See `ReplySource`."""
        return nullcontext(self._answerer)


class _TextUpstream(Upstream):
    """Show conversations to another upstream as HH-RLHF writes them."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self.batch_size, self.max_concurrency = upstream.batch_size, upstream.max_concurrency

    def __call__(self, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
        texts: list[Prompt] = [prompt if isinstance(prompt, str) else prompt_text(prompt) for prompt in prompts]
        return self._upstream(texts, **sampling)


def parse_source(text: str) -> ReplySource:
    """Return the source that a text names.

    - `NAME`: a model or a PEFT adapter, as a folder or a name on the Hub.
    - `FILE.jsonl` (or `.json`, `.parquet`, `.csv`, optionally `.gz`): replies in columns `prompt` and `completion`.
      `dataset:NAME` names a folder or a data set on the Hub.
    - `endpoint:MODEL@URL`: a model behind a chat endpoint. Without `@URL`, the one of `OPENAI_BASE_URL`, or OpenAI.
    - `ALIGNER+SOURCE`: an aligner that corrects the replies of a source.
    - `LABEL=SOURCE`: a source with a name for tables and files.

    Raises:
        ValueError: If the text is empty or incomplete.
        FileNotFoundError: If a file is missing.
    """
    label, source = None, text
    if not os.path.exists(text) and (match := re.fullmatch(r"([^:/=+]+)=(.*)", text, re.DOTALL)):
        label, source = match[1], match[2]
    parsed = _parse(source)
    parsed.name = valid_text(label or parsed.name)
    return parsed


_GRAMMAR = (
    "Pass a model or an adapter (name or folder), a file of replies, dataset:NAME, endpoint:MODEL@URL, or "
    "ALIGNER+SOURCE, optionally with LABEL= in front."
)


def _parse(source: str) -> ReplySource:
    kind, _, rest = source.partition(":")
    if kind == "endpoint" and rest and not rest.startswith("@"):
        model, _, base_url = rest.partition("@")
        return EndpointSource(model, model, base_url or None)
    if kind == "dataset" and rest:
        return DatasetSource(rest, rest)
    if not os.path.exists(source) and "+" in source:
        aligner, _, corrected = source.partition("+")
        if aligner:
            upstream = _parse(corrected)
            return AlignedSource(f"{aligner}+{upstream.name}", aligner, upstream)
    if source.startswith(("-", "+", "endpoint:", "dataset:")) or not source.strip():
        raise ValueError(f"{source!r} names no model. {_GRAMMAR}")
    if file_format(source) is not None:
        if not os.path.isfile(source):
            raise FileNotFoundError(f"There is no file {source}.")
        return DatasetSource(source, source)
    return ModelSource(source, source)


def match_key(prompt: Prompt) -> str:
    """Return a text that a prompt shares with its other format: messages, or the dialogue that HH-RLHF publishes."""
    if isinstance(prompt, str):
        return prompt.strip()
    if all(message["role"] in ("user", "assistant") for message in prompt):
        return prompt_text(prompt).strip()
    return json.dumps(prompt, sort_keys=True)
