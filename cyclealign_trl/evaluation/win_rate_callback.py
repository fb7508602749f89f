"""`WinRateCallback`: how often the policy beats the policy that the run began with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate.utils import gather_object
from transformers import TrainerControl, TrainerState, TrainingArguments

from .._files import atomic_write
from ..cycle.step_metrics import usage_counts
from ..data.formats import plain_prompt
from ..errors import CheckpointError
from ..models.batches import longest_first
from ..models.generation_backend import GenerationBackend, seeded
from ..models.transformers_backend import TransformersBackend
from ..offline.ranking_trainer import RankingTrainer
from ..rankers.base import Outcome, Ranker
from ..types import Prompt, RankingFailure, RankingRequest
from .intervals import bootstrap_ratios
from .periodic_evaluation import PeriodicEvaluation

N_RESAMPLES = 1000


class _Reply(NamedTuple):
    """A completion of a prompt, and its number of tokens."""

    text: str
    length: int


class WinRateCallback(PeriodicEvaluation):
    """Measure how often a ranker prefers the policy's completions to those of the policy that the run began with.

    Before the first step, the policy completes held-out prompts. Every `eval_steps` steps and at the end, it completes
    them again, and the ranker compares both completions of each prompt in both orders. The policy wins if it is
    preferred in both orders, or in one with a tie in the other. Preferences that contradict each other are a tie.
    Equal completions are a tie without a call. A prompt with a ranking that failed is left out and counted. The
    ranker is shown no demonstrations, so it judges alike throughout the run.

    The completions are greedy, and as long as the trainer's arguments allow. A `CycleAlignTrainer` with vLLM or a
    backend of your own samples them as in training. The random state of the training does not change.

    The completions and verdicts are written to `win_rate/completions` in the output directory as JSON lines. A resumed
    run compares with the same completions.

    Example:
        ```python
        trainer = CycleAlignTrainer(...)
        trainer.add_callback(WinRateCallback(trainer.ranker, trainer, held_out_prompts, eval_steps=100))
        ```

    Args:
        ranker: The judge, any ranker. `trainer.ranker` shares the cache and the budget of a `CycleAlignTrainer`.
        trainer: A `CycleAlignTrainer`, `RankingTrainer` or `DLMATrainer`.
        dataset: Rows of `prompt`, as for `CycleAlignTrainer`. Other columns are passed to the ranker as metadata.
        eval_steps: Number of optimiser steps from one evaluation to the next.
        patience: Number of evaluations without an improvement after which training stops. `None` never stops.
        min_delta: How much the win rate must rise above its best value to count as an improvement.
        generation_kwargs: Fields of `GenerationConfig` that override greedy decoding.
        confidence_level: Coverage of the interval.
        seed: Seed of the bootstrap.

    Raises:
        TypeError: If `trainer` is another trainer, or `ranker` not a ranker.
        ValueError: If an argument is out of range, or `dataset` has no rows or a row without a usable prompt.
    """

    name = "win_rate"
    target = "win_rate/rate"

    def __init__(
        self,
        ranker: Ranker,
        trainer: RankingTrainer,
        dataset: Iterable[Mapping[str, Any]],
        eval_steps: int,
        *,
        patience: int | None = None,
        min_delta: float = 0.0,
        generation_kwargs: Mapping[str, Any] | None = None,
        confidence_level: float = 0.95,
        seed: int = 0,
    ) -> None:
        super().__init__(ranker, trainer, eval_steps, patience, min_delta, confidence_level, seed)
        rows = list(dataset)
        if not rows or "prompt" not in rows[0]:
            raise ValueError(
                f"dataset needs rows with a column 'prompt', got {sorted(rows[0]) if rows else 'no rows'}."
            )
        self._prompts: list[Prompt] = [plain_prompt(row["prompt"]) for row in rows]
        self._metadata = [{name: value for name, value in row.items() if name != "prompt"} for row in rows]
        self._prompt_ids = [
            trainer.renderer.prompt(prompt, row.get("tools"))[0]
            for prompt, row in zip(self._prompts, rows, strict=True)
        ]
        self._start: list[_Reply] = []  # of the policy that the run began with
        if generation_kwargs and self._backend is not None:
            raise ValueError(
                f"generation_kwargs have no effect with {type(self._backend).__name__}, which samples as in training. "
                "Leave them out."
            )
        self._greedy = TransformersBackend(
            trainer.accelerator,
            1,
            trainer.renderer.eos_token_ids,
            trainer.renderer.tokenizer.pad_token_id,
            {"max_new_tokens": trainer.args.max_completion_length, "do_sample": False, **(generation_kwargs or {})},
            trainer.renderer.tokenizer,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Complete the prompts with the policy before its first step, or read these completions in a resumed run.

        Raises:
            CheckpointError: If a resumed run finds no completions of the same prompts.
        """
        if state.global_step > 0:
            self._start = self._read_start()
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            with seeded(args.seed + args.process_index, args.device):
                self._start = self._complete()
            self._write(
                self._start_path,
                [
                    {"prompt": prompt, "completion": reply.text, "length": reply.length}
                    for prompt, reply in zip(self._prompts, self._start, strict=True)
                ],
            )

    def evaluate(self) -> dict[str, float]:
        """Complete the prompts, have the ranker compare, and return the metrics."""
        replies = self._complete()
        pairs = list(zip(self._start, replies, strict=True))
        asked = [index for index, (start, reply) in enumerate(pairs) if start.text != reply.text]
        outcomes = self.rank([request for index in asked for request in self._both_orders(index, *pairs[index])])
        verdicts: list[_Verdict | None] = [_Verdict(0.5, False)] * len(pairs)
        for position, index in enumerate(asked):
            verdicts[index] = self._verdict(*outcomes[2 * position : 2 * position + 2])
        self._write(
            self._completions_folder / f"step-{self.trainer.state.global_step:06d}.jsonl",
            [
                {"prompt": prompt, "start": start.text, "policy": reply.text, "score": verdict and verdict.score}
                for prompt, (start, reply), verdict in zip(self._prompts, pairs, verdicts, strict=True)
            ],
        )
        judged = [verdict for verdict in verdicts if verdict is not None]
        metrics = {"failed": float(len(verdicts) - len(judged))}
        if judged:
            scores = np.array([[verdict.score] for verdict in judged])
            ((rate, interval),) = bootstrap_ratios(
                scores, np.ones_like(scores), N_RESAMPLES, self.confidence_level, self.seed
            )
            assert rate is not None
            assert interval is not None
            metrics |= {
                "rate": rate,
                "low": interval[0],
                "high": interval[1],
                "ties": float((scores == 0.5).mean()),
                "flipped": float(np.mean([verdict.flipped for verdict in judged])),
            }
        metrics |= {
            "length": float(np.mean([reply.length for reply in replies])),
            "start_length": float(np.mean([start.length for start in self._start])),
        }
        named = {f"{self.name}/{metric}": value for metric, value in metrics.items()}
        return named | usage_counts(self.name, [outcome.usage for outcome in outcomes])

    # Comparisons

    def _both_orders(self, index: int, start: _Reply, reply: _Reply) -> list[RankingRequest]:
        prompt, metadata = self._prompts[index], self._metadata[index]
        if getattr(self.ranker, "shuffle", False):  # its second pass shows the opposite order of the first
            texts = (start.text, reply.text)
            return [RankingRequest(prompt, texts, metadata=metadata, pass_index=number) for number in (0, 1)]
        return [
            RankingRequest(prompt, texts, metadata=metadata)
            for texts in ((start.text, reply.text), (reply.text, start.text))
        ]

    def _verdict(self, first: Outcome, second: Outcome) -> _Verdict | None:
        if isinstance(first, RankingFailure) or isinstance(second, RankingFailure):
            return None
        preferences = [
            int(np.sign(ranks[start] - ranks[1 - start]))
            for ranks, start in (
                (first.resolved_ranks, 0),
                (second.resolved_ranks, 0 if getattr(self.ranker, "shuffle", False) else 1),
            )
        ]
        return _Verdict((1 + np.sign(sum(preferences)).item()) / 2, preferences[0] * preferences[1] < 0)

    # Completions

    @property
    def _backend(self) -> GenerationBackend | None:
        """The trainer's backend if only that can sample from its policy, as with vLLM."""
        backend: GenerationBackend | None = getattr(self.trainer, "generation", None)
        return None if isinstance(backend, TransformersBackend) else backend

    def _complete(self) -> list[_Reply]:
        """Complete all prompts, divided among the processes."""
        trainer, args = self.trainer, self.trainer.args
        own = list(range(len(self._prompts)))[args.process_index :: args.world_size]
        # Policies that are sharded, and vLLM, need the same number of prompts on every process.
        own += [0] * (-(-len(self._prompts) // args.world_size) - len(own))
        replies: dict[int, _Reply] = {}
        for batch in longest_first([len(self._prompt_ids[index]) for index in own], args.per_device_eval_batch_size):
            indices = [own[position] for position in batch]
            groups = (self._backend or self._greedy).generate(
                trainer.model_wrapped, [self._prompt_ids[index] for index in indices]
            )
            for index, (ids, *_) in zip(indices, groups, strict=True):
                replies[index] = _Reply(trainer.renderer.decode(self._prompts[index], [ids])[0], len(ids))
        gathered: dict[int, _Reply] = {}
        for part in gather_object([replies]):
            gathered = part | gathered
        return [gathered[index] for index in range(len(self._prompts))]

    @property
    def _start_path(self) -> Path:
        return self._completions_folder / "start.jsonl"

    def _read_start(self) -> list[_Reply]:
        """Return the completions that the main process reads."""
        rows: list[dict[str, Any]] = []
        if self.trainer.is_world_process_zero() and self._start_path.is_file():
            rows = [json.loads(line) for line in self._start_path.read_text(encoding="utf-8").splitlines()]
        rows = gather_object([rows])[0]
        if [row["prompt"] for row in rows] != self._prompts:
            raise CheckpointError(
                f"{self._start_path} does not contain completions of the {len(self._prompts)} prompts of "
                f"WinRateCallback (it has {len(rows)} rows), so the policy that the run began with is unknown. Resume "
                "with the data set and the files of the run, or without the callback."
            )
        return [_Reply(row["completion"], row["length"]) for row in rows]

    def _write(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.trainer.is_world_process_zero():
            with atomic_write(path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class _Verdict(NamedTuple):
    """1 if the policy wins, 0 if it loses and 0.5 if it ties; and whether both orders contradict each other."""

    score: float
    flipped: bool
