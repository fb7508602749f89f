"""The first half of an interaction: prompts, their completions, and the rankings that the ranker works on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from ..data.formats import plain_prompt
from ..models.generation_backend import GenerationBackend
from ..models.transformers_backend import TransformersBackend
from ..offline.ranking_collator import Batch, TokenIds
from ..rankers.base import Outcome
from ..types import Demonstration, Prompt, RankingFailure
from .interaction import ALREADY_AGREED, Interaction, InteractionResult, resolve
from .pending_rankings import PendingRankings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from ..models.renderer import Renderer
    from .cyclealign_config import CycleAlignConfig


@dataclass(frozen=True)
class PromptBatch(Batch):
    """B prompts.

    Args:
        prompts: The prompts.
        metadata: The other columns of each prompt's row.
        prompt_ids: Token ids of each prompt.
        prompt_truncated: Whether each prompt was longer than `max_prompt_length`.
    """

    prompts: list[Prompt]
    metadata: list[dict[str, Any]]
    prompt_ids: list[TokenIds]
    prompt_truncated: list[bool]


@dataclass(frozen=True)
class PromptCollator:
    """Collate rows of `prompt` and other columns into a `PromptBatch`."""

    renderer: Renderer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PromptBatch:
        """Tokenise the prompts."""
        prompts = [plain_prompt(row["prompt"]) for row in rows]
        encoded = [self.renderer.prompt(prompt, row.get("tools")) for prompt, row in zip(prompts, rows, strict=True)]
        return PromptBatch(
            prompts=prompts,
            metadata=[{name: value for name, value in row.items() if name != "prompt"} for row in rows],
            prompt_ids=[ids for ids, _ in encoded],
            prompt_truncated=[truncated for _, truncated in encoded],
        )


@dataclass(frozen=True, slots=True)
class Context:
    """Demonstrations and agreement that an interaction starts from.

    Args:
        demonstrations: Demonstrations to show to the ranker.
        already_agreed: Whether policy and ranker have ordered the prompt's completions alike, so it is not ranked.
    """

    demonstrations: tuple[Demonstration, ...]
    already_agreed: bool


@dataclass(frozen=True)
class Rollout(Batch):
    """B prompts with K sampled completions each, whose rankings are pending.

    Args:
        prompt_ids: Token ids of B prompts.
        prompt_truncated: Whether each prompt was longer than `max_prompt_length`.
        completion_ids: Token ids of B x K completions.
        interactions: The interaction of each prompt.
        rankings: Answers to the requests of those interactions that have one, in this order.
    """

    prompt_ids: list[TokenIds]
    prompt_truncated: list[bool]
    completion_ids: list[list[TokenIds]]
    interactions: list[Interaction]
    rankings: PendingRankings

    @property
    def scored_ids(self) -> list[list[TokenIds]]:
        """Token ids of the completions to score: those of a prompt that is not ranked count as absent."""
        return [
            group if interaction.request is not None else [[]] * len(group)
            for group, interaction in zip(self.completion_ids, self.interactions, strict=True)
        ]

    def state(self) -> list[dict[str, Any]]:
        """Return completions and contexts as JSON, from which `saved_completions` and `saved_contexts` read them."""
        return [
            {
                "completion_ids": ids,
                "demonstrations": [asdict(each) for each in interaction.request.demonstrations]
                if interaction.request
                else [],
                "already_agreed": interaction.skipped == ALREADY_AGREED,
            }
            for ids, interaction in zip(self.completion_ids, self.interactions, strict=True)
        ]

    def wait(self, deadline: float) -> list[Outcome | None]:
        """Return the outcome of each interaction, `None` for skipped ones; see `PendingRankings.wait`."""
        answers = iter(self.rankings.wait(deadline))
        return [None if interaction.request is None else next(answers) for interaction in self.interactions]

    def fail(self, reason: str) -> list[Outcome | None]:
        """Return the outcomes if every ranking failed for one reason."""
        failure = RankingFailure(reason)
        return [None if interaction.request is None else failure for interaction in self.interactions]

    def resolve(
        self, outcomes: Sequence[Outcome | None], scores: Sequence[Sequence[float]], min_agreement: int
    ) -> list[InteractionResult]:
        """Return the result of each interaction, from its outcome and the policy's `(B, K)` scores."""
        return [
            resolve(interaction, outcome, row, min_agreement)
            for interaction, outcome, row in zip(self.interactions, outcomes, scores, strict=True)
        ]


def saved_completions(state: Sequence[Mapping[str, Any]]) -> list[list[TokenIds]]:
    """Return the token ids of the completions in a `Rollout.state`."""
    return [entry["completion_ids"] for entry in state]


def saved_contexts(state: Sequence[Mapping[str, Any]]) -> list[Context]:
    """Return the contexts in a `Rollout.state`."""
    return [
        Context(tuple(Demonstration(**each) for each in entry["demonstrations"]), entry["already_agreed"])
        for entry in state
    ]


def in_chunks(batches: Sequence[PromptBatch], args: CycleAlignConfig) -> Iterator[list[PromptBatch]]:
    """Divide the micro-batches of a step into chunks that are sampled at once.

    A chunk takes whole micro-batches. With too few completions at once, a device waits for its memory and the host.
    With too many, the ranker waits for them, and the cache of keys and values may not fit.
    """
    size = args.generation_batch_size
    if size is None and args.generation_backend == "transformers":
        size = 32 if args.device.type == "cpu" else 128
    chunk: list[PromptBatch] = []
    for batch in batches:
        num_prompts = sum(len(each.prompts) for each in (*chunk, batch))
        if chunk and size is not None and num_prompts * args.num_generations > size:
            yield chunk
            chunk = []
        chunk.append(batch)
    if chunk:
        yield chunk


def make_backend(
    args: CycleAlignConfig, model: PreTrainedModel, accelerator: Accelerator, renderer: Renderer
) -> GenerationBackend:
    """Return the generation backend that the arguments describe."""
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
    generation_kwargs = cast("dict[str, Any]", args.generation_kwargs or {})
    if args.generation_backend == "transformers":
        return TransformersBackend(
            accelerator,
            args.num_generations,
            renderer.eos_token_ids,
            renderer.tokenizer.pad_token_id,
            {"max_new_tokens": args.max_completion_length, **sampling, **generation_kwargs},
            renderer.tokenizer,
        )

    from ..models.vllm_backend import VLLMBackend  # imports vLLM

    settings = {
        "mode": args.vllm_mode,
        "server_base_url": args.vllm_server_base_url,
        "tensor_parallel_size": args.vllm_tensor_parallel_size,
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        # If it is not set, vLLM reserves memory for one text of the model's full length.
        "max_model_length": args.max_prompt_length and args.max_prompt_length + args.max_completion_length,
        "max_completion_length": args.max_completion_length,
        "generation_kwargs": generation_kwargs,
        **sampling,
    }
    return VLLMBackend(model, accelerator, renderer.tokenizer, args.num_generations, renderer.eos_token_ids, settings)
