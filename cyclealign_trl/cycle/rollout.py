"""The sampling half of a step: prompts in, completions out, requests on their way to the ranker."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..errors import RankerError
from ..models.generation_backend import GenerationBackend
from ..models.transformers_backend import TransformersBackend
from ..rankers.base import CANCELLED, Outcome, Ranker, StreamingRanker, cancel
from ..types import RankingFailure, RankingRequest

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from ..models.renderer import Renderer
    from .cyclealign_config import CycleAlignConfig


@dataclass(frozen=True)
class PromptCollator:
    """Batches prompt-only rows into `{"prompt", "metadata", "prompt_ids", "prompt_cut"}`, a list of B entries each."""

    renderer: Renderer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        encoded = [self.renderer.prompt(row["prompt"]) for row in rows]
        return {
            "prompt": [row["prompt"] for row in rows],
            "metadata": [{name: value for name, value in row.items() if name != "prompt"} for row in rows],
            "prompt_ids": [ids for ids, _ in encoded],
            "prompt_cut": [cut for _, cut in encoded],
        }


def make_backend(
    args: CycleAlignConfig, model: PreTrainedModel, accelerator: Accelerator, renderer: Renderer
) -> GenerationBackend:
    """The backend that the arguments describe."""
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
    further = cast("dict[str, Any]", args.generation_kwargs or {})
    if args.generation_backend == "transformers":
        return TransformersBackend(
            accelerator,
            args.num_generations,
            renderer.eos_token_ids,
            renderer.tokenizer.pad_token_id,
            {"max_new_tokens": args.max_completion_length, **sampling, **further},
        )

    from ..models.vllm_backend import VLLMBackend  # imports vLLM

    settings = {
        "mode": args.vllm_mode,
        "server_base_url": args.vllm_server_base_url,
        "tensor_parallel_size": args.vllm_tensor_parallel_size,
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        # Without it, vLLM reserves memory for one text of the model's full length.
        "max_model_length": args.max_prompt_length and args.max_prompt_length + args.max_completion_length,
        "max_completion_length": args.max_completion_length,
        "generation_kwargs": further,
        **sampling,
    }
    return VLLMBackend(model, accelerator, renderer.tokenizer, args.num_generations, renderer.eos_token_ids, settings)


class PendingRanking:
    """The ranker's answers to some requests, taken in by a thread of its own, which keeps no program from ending.

    Args:
        ranker: The ranker.
        requests: What it is asked.
    """

    def __init__(self, ranker: Ranker, requests: Sequence[RankingRequest]) -> None:
        self._ranker = ranker
        self._requests = requests
        self._answers: dict[int, Outcome] = {}
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._work, name="cyclealign-ranking", daemon=True).start()

    def outcomes(self, deadline: float) -> list[Outcome]:
        """Waits for the answers, in the order of the requests; raises what the ranker raised.

        Args:
            deadline: When to stop waiting, as `time.monotonic` has it. What has not arrived by then is cancelled where
                the ranker can, and a `RankingFailure("deadline")`.
        """
        if not self._done.wait(max(0.0, deadline - time.monotonic())):
            cancel(self._ranker)
        if self._error is not None:
            raise self._error
        answers = dict(self._answers)
        late = RankingFailure("deadline", "It had not arrived when the step stopped waiting (`ranking_timeout`).")
        outcomes = [answers.get(position, late) for position in range(len(self._requests))]
        # Only a step that stops waiting cancels, and it cancels all of its parts at once.
        return [
            late if isinstance(outcome, RankingFailure) and outcome.reason == CANCELLED else outcome
            for outcome in outcomes
        ]

    def _work(self) -> None:
        try:
            if self._requests:
                self._ask()
        except BaseException as error:  # handed to whoever waits
            self._error = error
        finally:
            self._done.set()

    def _ask(self) -> None:
        if isinstance(self._ranker, StreamingRanker):
            for position, answer in self._ranker.stream(self._requests):
                self._answers[position] = answer
            num_answers = len(self._answers)
        else:
            answers = self._ranker.rank(self._requests)
            self._answers.update(enumerate(answers))
            num_answers = len(answers)
        if num_answers != len(self._requests):
            raise RankerError(
                f"{type(self._ranker).__name__} was given {len(self._requests)} requests and answered {num_answers}."
            )
