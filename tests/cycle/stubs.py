"""Deterministic ranker and generation backend, a small trainer with them, and helpers to compare runs."""

from __future__ import annotations

import hashlib

import torch
from datasets import Dataset

from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, RankingFailure, RankingResult, Usage
from cyclealign_trl.cycle.interaction_log import InteractionLog
from tests.conftest import make_model, make_tokenizer

K = 3
LENGTH = 8


def digest(*parts):
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class DigestRanker:
    """Rank by a hash of prompt and completion, so that order and batching of calls have no effect."""

    fingerprint = "digest"

    def __init__(self, improve=True, fail=lambda request: None):
        self.improve, self.fail = improve, fail
        self.requests = []

    def rank(self, requests):
        self.requests.extend(requests)
        return [self.answer(request) for request in requests]

    def answer(self, request):
        if reason := self.fail(request):
            return RankingFailure(reason, usage=Usage(3, 1))
        size = range(len(request.completions))
        order = tuple(sorted(size, key=lambda index: digest(request.prompt, request.completions[index])))
        return RankingResult(order, improved_completion="better" if self.improve else None, usage=Usage(10, 5))


class EmptyBudgetRanker(DigestRanker):
    """Ranker whose budget is used up before its first request."""

    def answer(self, request):
        return RankingFailure("budget_exhausted")


class DigestGeneration:
    """Generate completions from a hash of the prompt and the number of earlier calls, without random state."""

    def __init__(self, num_generations=K):
        self.num_generations = num_generations
        self.calls = {}

    def generate(self, model, prompt_ids):
        groups = []
        for ids in prompt_ids:
            call = self.calls[tuple(ids)] = self.calls.get(tuple(ids), -1) + 1
            seeds = [digest(ids, call, index) for index in range(self.num_generations)]
            # The last letter differs between the completions of a prompt.
            groups.append(
                [
                    [*(3 + (seed >> shift) % 90 for shift in range(seed % 5 + 1)), 40 + index, 1]
                    for index, seed in enumerate(seeds)
                ]
            )
        return groups


def prompts(number=8, conversational=False):
    if conversational:
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        return Dataset.from_list(
            [{"prompt": [*turns, {"role": "user", "content": f"Q{i}"}], "topic": i} for i in range(number)]
        )
    return Dataset.from_list([{"prompt": f"Question {i}:", "topic": i} for i in range(number)])


def config(output_dir, **changes):
    settings = {
        "per_device_train_batch_size": 2,
        "num_generations": K,
        "num_interactions": 2,
        "num_train_epochs": 1,
        "max_prompt_length": 64,
        "max_completion_length": LENGTH,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return CycleAlignConfig(str(output_dir), **(settings | changes))


def make_trainer(output_dir, ranker=None, dataset=None, model=None, stub_generation=False, **changes):
    known = ("demonstrations", "eval_dataset", "peft_config", "callbacks", "processing_class", "corrector")
    arguments = {name: changes.pop(name) for name in known if name in changes}
    arguments.setdefault("processing_class", make_tokenizer())
    trainer = CycleAlignTrainer(
        make_model() if model is None else model,
        DigestRanker() if ranker is None else ranker,
        config(output_dir, **changes),
        train_dataset=prompts() if dataset is None else dataset,
        **arguments,
    )
    if stub_generation:
        trainer.generation = DigestGeneration(trainer.args.num_generations)
    return trainer


def read_log(output_dir):
    """Return all rows of a run's interaction log, by step and process."""
    return InteractionLog(output_dir).read().to_pylist()


def weights(trainer):
    """Return a copy of the policy's weights by name."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same_weights(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)
