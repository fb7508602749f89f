"""Estimate the calls, tokens and cost of a run before it asks the ranker for anything.

The estimate rehearses the cycle on a few prompts and scales up. It uses real prompts, completions of the policy and a
real pool of demonstrations. Only the two orders are assumed: opposite, random, or equal.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from datasets import Dataset, IterableDataset
from transformers import DefaultFlowCallback, TrainerControl, TrainerState

from ..chat.messages import BYTES_PER_TOKEN
from ..data.formats import plain_prompt
from ..models.generation_backend import seeded
from ..rankers.base import Outcome, Ranker, estimate
from ..types import Prompt, RankingRequest, RankingResult, Usage, prompt_key
from .cyclealign_config import CycleAlignConfig, make_pool
from .cyclealign_trainer import CycleAlignTrainer
from .demonstrations import DemonstrationPool
from .interaction import Interaction, open_interaction, resolve
from .interaction_sampler import InteractionSampler

Agreement = Literal["never", "by chance", "always"]

Means = tuple[float, ...]
"""Prompt tokens, completion tokens, calls and US dollars of one ranking. Dollars are nan if no price is known."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with K completions.

    Args:
        prompt: The prompt.
        completions: The completions.
        longest: The same completions, extended to `max_completion_length`.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    longest: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """Estimated usage of a run, including evaluations and without retries. `Usage.attempts` is the number of calls.

    Args:
        num_steps: Number of optimiser steps.
        num_evaluations: Number of evaluations.
        low: Usage if policy and ranker never agree, so that there are no dynamic demonstrations.
        expected: Usage if they agree at random, with completions of the sampled lengths.
        high: Usage if they always agree, with completions of `max_completion_length` tokens.
    """

    num_steps: int
    num_evaluations: int
    low: Usage
    expected: Usage
    high: Usage


def sample_completions(trainer: CycleAlignTrainer, num_prompts: int) -> list[Sample]:
    """Sample completions from a trainer's policy, without changing the random state.

    Args:
        trainer: The trainer.
        num_prompts: Maximum number of prompts of its training set.
    """
    args, renderer = trainer.args, trainer.renderer
    prompts = _some_prompts(trainer.train_dataset, num_prompts, args.seed)
    samples: list[Sample] = []
    with seeded(args.seed, trainer.accelerator.device):
        for start in range(0, len(prompts), args.train_batch_size):
            batch = prompts[start : start + args.train_batch_size]
            prompt_ids = [renderer.prompt(prompt)[0] for prompt in batch]
            for prompt, group in zip(batch, trainer.generation.generate(trainer.model, prompt_ids), strict=True):
                texts = [[token for token in ids if token not in renderer.eos_token_ids] for ids in group]
                longest = [(ids * args.max_completion_length)[: args.max_completion_length] for ids in texts]
                decoded = (renderer.decode(prompt, ids) for ids in (texts, longest))
                samples.append(Sample(prompt, *map(tuple, decoded)))
    return samples


def assume_completions(args: CycleAlignConfig, dataset: Dataset, num_prompts: int = 64) -> list[Sample]:
    """Return artificial completions of `max_completion_length` tokens, for an estimate without a policy.

    Args:
        args: Arguments of the run.
        dataset: Training set of the run.
        num_prompts: Maximum number of prompts.

    Raises:
        ValueError: If the data set is a stream or has no column `prompt`.
    """
    if isinstance(dataset, IterableDataset) or "prompt" not in dataset.column_names:
        raise ValueError(f"An estimate needs a data set with a length and a column 'prompt', got {dataset}.")
    length = args.max_completion_length * BYTES_PER_TOKEN
    texts = tuple(str(index).ljust(length, ".") for index in range(args.num_generations))
    return [Sample(prompt, texts, texts) for prompt in _some_prompts(dataset, num_prompts, args.seed)]


def estimate_run(
    args: CycleAlignConfig,
    ranker: Ranker,
    samples: Sequence[Sample],
    num_prompts: int,
    num_eval_prompts: int = 0,
    *,
    demonstrations: DemonstrationPool | None = None,
    num_processes: int | None = None,
) -> RunEstimate:
    """Estimate what a run will ask of its ranker, without asking it.

    Args:
        args: Arguments of the run.
        ranker: Ranker of the run. A ranker without a method `estimate(request) -> Usage` counts as one call without
            tokens per ranking.
        samples: Completions to rehearse with, from `sample_completions` or `assume_completions`.
        num_prompts: Number of prompts in the training set.
        num_eval_prompts: Number of prompts in one evaluation. The estimate assumes that they are as long as the
            samples.
        demonstrations: Pool of demonstrations, as for `CycleAlignTrainer`.
        num_processes: Number of training processes. Defaults to the current one.

    Raises:
        ValueError: If there are no samples, or fewer prompts than one optimiser step takes.
    """
    if not samples:
        raise ValueError("An estimate needs at least 1 sample, got 0.")
    window = args.train_batch_size * args.gradient_accumulation_steps * (num_processes or args.world_size)
    sampler = InteractionSampler(num_prompts, window, args.num_interactions, seed=0, epoch=lambda: 0)
    steps_per_epoch = len(sampler) // window
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    num_evaluations = _num_evaluations(args, num_steps, steps_per_epoch) if num_eval_prompts else 0
    # At least two windows, because the first one can differ.
    size = min(window, max(1, len(samples) // 2))
    windows = [samples[start : start + size] for start in range(0, len(samples), size)]

    def total(agreement: Agreement, long: bool) -> Usage:
        pool = make_pool(args, None) if demonstrations is None else deepcopy(demonstrations)
        rehearsed = list(_rehearse(args, ranker, pool, windows, agreement, long))
        # A pool with scope "run" is empty in the first window only, a pool with scope "prompt" in every window.
        first_differs = pool.scope == "run" and len(rehearsed) > 1
        usual = [_mean(interactions) for interactions in zip(*rehearsed[first_differs:], strict=True)]
        first = rehearsed[0] if first_differs else usual
        evaluated = _mean([_usage(ranker, _open(pool, sample, long).request) for sample in samples])
        terms = [(num_evaluations * num_eval_prompts, evaluated)]
        for step in range(num_steps):
            position = step % args.num_interactions
            terms.append((window, first[position] if step < args.num_interactions else usual[position]))
        sums = (math.fsum(weight * means[index] for weight, means in terms) for index in range(4))
        prompt_tokens, completion_tokens, calls, cost = sums
        cost_or_none = None if math.isnan(cost) else cost
        return Usage(round(prompt_tokens), round(completion_tokens), attempts=round(calls), cost=cost_or_none)

    return RunEstimate(
        num_steps, num_evaluations, total("never", False), total("by chance", False), total("always", True)
    )


_PROBE_THREADS = 8


@dataclass(frozen=True, slots=True)
class Probe:
    """Real rankings of samples.

    Args:
        outcomes: Outcome of each ranking.
        seconds: Latency of each ranking.
        reasoning_tokens: Tokens that went into reasoning, over all rankings. `None` if the ranker does not count them.
    """

    outcomes: tuple[Outcome, ...]
    seconds: tuple[float, ...]
    reasoning_tokens: int | None

    @property
    def usage(self) -> Usage:
        """Usage of all rankings."""
        usages = (outcome.usage for outcome in self.outcomes if outcome.usage is not None)
        return sum(usages, Usage(attempts=0))


def probe_ranker(args: CycleAlignConfig, ranker: Ranker, samples: Sequence[Sample], num_rankings: int) -> Probe:
    """Ask a ranker for a few rankings of samples, with the static demonstrations of the run.

    Args:
        args: Arguments of the run.
        ranker: Ranker of the run. Its answers are paid for.
        samples: Completions to rank, from `sample_completions` or `assume_completions`.
        num_rankings: Maximum number of rankings.

    Raises:
        RankerError: If the ranker cannot answer any request.
    """
    pool = make_pool(args, None)
    opened = (_open(pool, sample, long=False).request for sample in samples)
    requests = [request for request in opened if request is not None][:num_rankings]

    def rank(request: RankingRequest) -> tuple[Outcome, float]:
        start = time.monotonic()
        [outcome] = ranker.rank([request])
        return outcome, time.monotonic() - start

    before = getattr(ranker, "reasoning_tokens", None)
    with ThreadPoolExecutor(_PROBE_THREADS) as threads:
        timed = list(threads.map(rank, requests))
    return Probe(
        tuple(outcome for outcome, _ in timed),
        tuple(seconds for _, seconds in timed),
        None if before is None else getattr(ranker, "reasoning_tokens", before) - before,
    )


def _some_prompts(dataset: Dataset, number: int, seed: int) -> list[Prompt]:
    chosen = random.Random(seed).sample(range(len(dataset)), min(number, len(dataset)))  # noqa: S311
    return [plain_prompt(dataset[index]["prompt"]) for index in chosen]


def _rehearse(
    args: CycleAlignConfig,
    ranker: Ranker,
    pool: DemonstrationPool,
    windows: Sequence[Sequence[Sample]],
    agreement: Agreement,
    long: bool,
) -> Iterator[list[Means]]:
    """Yield the mean usage of one prompt's ranking in each interaction, window by window."""
    rng = random.Random(args.seed)  # noqa: S311 (no secret is made here)
    for window in windows:
        agreed: set[str] = set()
        interactions = []
        for _ in range(args.num_interactions):
            rankings, results = [], []
            for sample in window:
                interaction = _open(pool, sample, long, prompt_key(sample.prompt) in agreed)
                rankings.append(_usage(ranker, interaction.request))
                outcome = None
                if interaction.request is not None:
                    number = len(interaction.request.completions)
                    order = rng.sample(range(number), number) if agreement == "by chance" else list(range(number))
                    outcome = RankingResult(tuple(reversed(order) if agreement == "never" else order))
                scores = [-float(index) for index in range(len(interaction.completions))]
                results.append(resolve(interaction, outcome, scores, args.min_agreement))
            interactions.append(_mean(rankings))
            pool.observe(result.demonstration for result in results if result.demonstration is not None)
            if args.stop_on_agreement:
                agreed.update(prompt_key(result.prompt) for result in results if result.fully_agreed)
        pool.forget(sample.prompt for sample in window)
        yield interactions


def _open(pool: DemonstrationPool, sample: Sample, long: bool, already_agreed: bool = False) -> Interaction:
    return open_interaction(
        sample.prompt,
        sample.longest if long else sample.completions,
        pool.select(sample.prompt),
        already_agreed=already_agreed,
        num_static=len(pool.static),
    )


def _usage(ranker: Ranker, request: RankingRequest | None) -> Means:
    if request is None:
        return (0.0, 0.0, 0.0, 0.0)
    usage = estimate(ranker, request) or Usage()
    cost = math.nan if usage.cost is None else usage.cost
    return (usage.prompt_tokens, usage.completion_tokens, usage.attempts, cost)


def _mean(rankings: Sequence[Means]) -> Means:
    return tuple(fmean(column) for column in zip(*rankings, strict=True))


def _num_evaluations(args: CycleAlignConfig, num_steps: int, steps_per_epoch: int) -> int:
    """Return the number of evaluations, from the Trainer's own callback."""
    state, flow = TrainerState(max_steps=num_steps), DefaultFlowCallback()
    state.compute_steps(args, num_steps)
    number = int(args.eval_on_start)
    for step in range(1, num_steps + 1):
        state.global_step, state.epoch = step, step / steps_per_epoch
        control = flow.on_step_end(args, state, TrainerControl())
        if step % steps_per_epoch == 0 or step == num_steps:
            control = flow.on_epoch_end(args, state, control)
        number += control.should_evaluate
    return number
