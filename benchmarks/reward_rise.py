"""Measure how much each objective raises a reward, compared with random rankings.

The same policy is trained for a few steps per objective. The ranker is a reward function: the number of different
cheerful words in a story. The script prints the mean reward of samples for held-out prompts before and after training.

    python benchmarks/reward_rise.py --model_name_or_path path/to/a/story/model
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
from statistics import fmean
from typing import Any

CHEERFUL = re.compile(r"\b(happy|happily|smiled|fun|love|loved|friends?|play|played|nice|laughed|best)\b")
OPENINGS = (
    "Once upon a time, there was",
    "One day,",
    "In a small village,",
    "There was once",
    "It was a sunny day and",
)
HEROES = ("a dog", "a little girl", "a cat", "Tom", "Lily", "a bird", "an old man", "a bear", "Ben", "a fish")

OBJECTIVES: dict[str, dict[str, Any]] = {
    "PRO": {"loss_type": "pro", "sft_weight": 0.0},
    "PRO + SFT": {"loss_type": "pro"},
    "RRHF + SFT": {"loss_type": "rrhf"},
    "random ranking, PRO": {"loss_type": "pro", "sft_weight": 0.0},
    "random ranking, PRO + SFT": {"loss_type": "pro"},
}


def cheerfulness(completions: list[str], **_: Any) -> list[float]:
    """Return the number of different cheerful words in each completion."""
    return [float(len(set(CHEERFUL.findall(text.lower())))) for text in completions]


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Story model to train.")
    parser.add_argument("--steps", type=int, default=40, help="Optimiser steps.")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="Learning rate.")
    parser.add_argument("--seeds", type=int, default=3, help="Number of runs per objective.")
    args = parser.parse_args()

    import torch
    from datasets import Dataset

    from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, FunctionRanker

    prompts = [f"{opening} {hero}" for opening in OPENINGS for hero in HEROES]
    random.Random(0).shuffle(prompts)
    train, held_out = prompts[:40], prompts[40:]

    def mean_reward(trainer: CycleAlignTrainer) -> float:
        ids = [trainer.renderer.prompt(prompt)[0] for prompt in held_out for _ in range(8)]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            groups = trainer.generation.generate(trainer.model, ids)
        texts = trainer.renderer.tokenizer.batch_decode(
            [row for group in groups for row in group], skip_special_tokens=True
        )
        return fmean(cheerfulness(texts))

    print(f"{'objective':<28}{'before':>8}{'after':>8}{'change':>8}   per seed")
    for name, objective in OBJECTIVES.items():
        before, after = [], []
        for seed in range(args.seeds):
            rng = random.Random(seed)
            reward = (
                (lambda completions, rng=rng, **_: [rng.random() for _ in completions])
                if name.startswith("random")
                else cheerfulness
            )
            with tempfile.TemporaryDirectory() as folder:
                trainer = CycleAlignTrainer(
                    args.model_name_or_path,
                    FunctionRanker(reward),
                    CycleAlignConfig(
                        folder,
                        seed=seed,
                        num_generations=4,
                        per_device_train_batch_size=8,
                        max_prompt_length=32,
                        max_completion_length=64,
                        top_p=1.0,  # SFT on nucleus samples would sharpen the policy for any ranking
                        learning_rate=args.learning_rate,
                        max_steps=args.steps,
                        logging_strategy="no",
                        save_strategy="no",
                        disable_tqdm=True,
                        **objective,
                    ),
                    train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in train]),
                )
                before.append(mean_reward(trainer))
                trainer.train()
                after.append(mean_reward(trainer))
        changes = [last - first for first, last in zip(before, after, strict=True)]
        per_seed = ", ".join(f"{change:+.2f}" for change in changes)
        print(f"{name:<28}{fmean(before):8.2f}{fmean(after):8.2f}{fmean(changes):+8.2f}   {per_seed}", flush=True)


if __name__ == "__main__":
    main()
