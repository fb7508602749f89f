"""What a run will ask of its ranker, before it asks for anything: the cycle rehearsed on a few prompts, and scaled up.

The rehearsal is the cycle itself, with real prompts, samples of the policy and a real pool of demonstrations. Only the
two orders are made up, as nobody is asked: opposite, by chance, or the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from datasets import Dataset, IterableDataset
from transformers import DefaultFlowCallback, TrainerControl, TrainerState

from ..chat.messages import BYTES_PER_TOKEN
from ..models.generation_backend import seeded
from ..rankers.base import Ranker, estimate
from ..types import Prompt, RankingRequest, RankingResult, Usage, prompt_key
from .cyclealign_config import CycleAlignConfig, make_pool
from .cyclealign_trainer import CycleAlignTrainer
from .demonstrations import DemonstrationPool
from .interaction import Interaction, open_interaction, settle
from .interaction_sampler import InteractionSampler

Agreement = Literal["never", "by chance", "always"]

Means = tuple[float, ...]
"""Prompt tokens, completion tokens, calls and dollars of one prompt's ranking; dollars are nan where unpriced."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and K completions of it by the policy.

    Args:
        prompt: The prompt.
        completions: What one interaction samples.
        longest: The same, made as long as the policy may make them.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    longest: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """What a run takes, evaluations included and retries not. The `attempts` of each `Usage` are its calls.

    Args:
        num_steps: Optimiser steps.
        num_evaluations: Evaluations.
        low: If policy and ranker never agree, so that no dynamic demonstration is earned.
        expected: If they agree as often as chance has it. Completions are as long as those sampled.
        high: If they always agree, and every completion is `max_completion_length` tokens long.
    """

    num_steps: int
    num_evaluations: int
    low: Usage
    expected: Usage
    high: Usage


def sample_completions(trainer: CycleAlignTrainer, num_prompts: int) -> list[Sample]:
    """Samples completions from a trainer's policy as it is now, and leaves the random state as it was.

    Args:
        trainer: The trainer.
        num_prompts: Prompts of its training set, at most.
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
                decoded = (renderer.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (texts, longest))
                samples.append(Sample(prompt, *map(tuple, decoded)))
    return samples


def assume_completions(args: CycleAlignConfig, dataset: Dataset, num_prompts: int = 64) -> list[Sample]:
    """Makes up completions of `max_completion_length` tokens, for where there is no policy to sample from.

    Args:
        args: The run's arguments.
        dataset: Its training set.
        num_prompts: Prompts of it, at most.

    Raises:
        ValueError: If it is a stream, or has no prompts.
    """
    if isinstance(dataset, IterableDataset) or "prompt" not in dataset.column_names:
        raise ValueError(f"An estimate takes a data set with a length and a column 'prompt', not {dataset}.")
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
    """Estimates what a run will ask of its ranker. Nothing is asked of it now.

    Args:
        args: The run's arguments.
        ranker: Its ranker. One without a method `estimate(request) -> Usage`, such as `LLMRanker` has, is taken to
            make one call per ranking, of no tokens.
        samples: Completions to rehearse with, from `sample_completions` or `assume_completions`.
        num_prompts: Prompts in the training set.
        num_eval_prompts: Prompts of one evaluation; they are taken to be as long as those of the samples.
        demonstrations: The pool, as for `CycleAlignTrainer`.
        num_processes: Processes that train; by default as many as there are now.

    Raises:
        ValueError: If there are no samples, or fewer prompts than one optimiser step takes.
    """
    if not samples:
        raise ValueError("An estimate takes at least 1 sample; got 0.")
    window = args.train_batch_size * args.gradient_accumulation_steps * (num_processes or args.world_size)
    sampler = InteractionSampler(num_prompts, window, args.num_interactions, seed=0, epoch=lambda: 0)
    steps_per_epoch = len(sampler) // window
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    num_evaluations = _num_evaluations(args, num_steps, steps_per_epoch) if num_eval_prompts else 0
    # At least two windows, as the first one may differ.
    size = min(window, max(1, len(samples) // 2))
    windows = [samples[start : start + size] for start in range(0, len(samples), size)]

    def total(agreement: Agreement, long: bool) -> Usage:
        pool = make_pool(args, None) if demonstrations is None else deepcopy(demonstrations)
        rehearsed = list(_rehearse(args, ranker, pool, windows, agreement, long))
        # The pool of a run is empty in the first window alone; that of a prompt in each.
        special = pool.scope == "run" and len(rehearsed) > 1
        usual = [_mean(interactions) for interactions in zip(*rehearsed[special:], strict=True)]
        first = rehearsed[0] if special else usual
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


def _some_prompts(dataset: Dataset, number: int, seed: int) -> list[Prompt]:
    chosen = random.Random(seed).sample(range(len(dataset)), min(number, len(dataset)))  # noqa: S311
    return [dataset[index]["prompt"] for index in chosen]


def _rehearse(
    args: CycleAlignConfig,
    ranker: Ranker,
    pool: DemonstrationPool,
    windows: Sequence[Sequence[Sample]],
    agreement: Agreement,
    long: bool,
) -> Iterator[list[Means]]:
    """Yields, for each window, what one prompt's ranking takes in each of its interactions."""
    rng = random.Random(args.seed)  # noqa: S311 (no secret is made here)
    for window in windows:
        agreed: set[str] = set()
        interactions = []
        for _ in range(args.num_interactions):
            rankings, settlements = [], []
            for sample in window:
                interaction = _open(pool, sample, long, prompt_key(sample.prompt) in agreed)
                rankings.append(_usage(ranker, interaction.request))
                outcome = None
                if interaction.request is not None:
                    number = len(interaction.request.completions)
                    order = rng.sample(range(number), number) if agreement == "by chance" else list(range(number))
                    outcome = RankingResult(tuple(reversed(order) if agreement == "never" else order))
                scores = [-float(index) for index in range(len(interaction.completions))]
                settlements.append(settle(interaction, outcome, scores, args.min_agreement))
            interactions.append(_mean(rankings))
            pool.observe(settled.demonstration for settled in settlements if settled.demonstration is not None)
            if args.stop_on_agreement:
                agreed.update(prompt_key(settled.prompt) for settled in settlements if settled.fully_agreed)
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
    """How often the Trainer evaluates, by asking the callback that tells it when."""
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
