"""Measure how much offline PRO and RRHF improve the ranking accuracy of a policy on unseen prompts.

The same policy is trained on ranked data once per objective and seed. As a control, it is also trained with the ranks
of each training row shuffled. The script prints the pairwise ranking accuracy on held-out prompts before and after
training.

    python benchmarks/offline_ranking.py --model_name_or_path path/to/a/model --dataset ranked.jsonl
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from statistics import fmean
from typing import Any

OBJECTIVES: dict[str, dict[str, Any]] = {
    "PRO + SFT": {"loss_type": "pro"},
    "PRO alone": {"loss_type": "pro", "sft_weight": 0.0},
    "RRHF + SFT": {"loss_type": "rrhf"},
    "RRHF alone": {"loss_type": "rrhf", "sft_weight": 0.0},
}


def split(rows: Sequence[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split the rows by prompt, four fifths for training and one fifth for evaluation."""
    prompts = sorted({str(row["prompt"]) for row in rows})
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: len(prompts) // 5])
    return [row for row in rows if row["prompt"] not in held_out], [row for row in rows if row["prompt"] in held_out]


def shuffled(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the rows with the ranks of each row in random order."""
    rng = random.Random(seed)
    return [{**row, "ranks": rng.sample(row["ranks"], len(row["ranks"]))} for row in rows]


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Model to train.")
    parser.add_argument(
        "--dataset",
        required=True,
        help="JSON Lines file with prompt, completions and ranks.",
    )
    parser.add_argument("--epochs", type=float, default=3, help="Number of training epochs.")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="Learning rate.")
    parser.add_argument("--max_prompt_length", type=int, default=256, help="Maximum prompt tokens.")
    parser.add_argument("--max_completion_length", type=int, default=256, help="Maximum completion tokens.")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=[*OBJECTIVES], help="Objectives.")
    parser.add_argument("--seeds", type=int, default=3, help="Number of runs per objective.")
    args = parser.parse_args()

    from datasets import Dataset
    from transformers import PrinterCallback

    from cyclealign_trl import RankingConfig, RankingTrainer

    rows = [dict(row) for row in Dataset.from_json(args.dataset).select_columns(["prompt", "completions", "ranks"])]
    print(f"{len(rows)} rows, {args.epochs:g} epochs, learning rate {args.learning_rate:g}")
    print(f"{'objective':<28}{'before':>8}{'after':>8}{'change':>8}   per seed")
    for name in args.objectives:
        for control in (False, True):
            before, after = [], []
            for seed in range(args.seeds):
                train, held_out = split(rows, seed)
                with tempfile.TemporaryDirectory() as folder:
                    trainer = RankingTrainer(
                        args.model_name_or_path,
                        RankingConfig(
                            folder,
                            seed=seed,
                            per_device_train_batch_size=8,
                            max_prompt_length=args.max_prompt_length,
                            max_completion_length=args.max_completion_length,
                            learning_rate=args.learning_rate,
                            num_train_epochs=args.epochs,
                            logging_strategy="no",
                            save_strategy="no",
                            report_to="none",
                            disable_tqdm=True,
                            **OBJECTIVES[name],
                        ),
                        train_dataset=Dataset.from_list(shuffled(train, seed) if control else train),
                        eval_dataset=Dataset.from_list(held_out),
                    )
                    trainer.remove_callback(PrinterCallback)
                    before.append(trainer.evaluate()["eval_ranking/accuracy"])
                    trainer.train()
                    after.append(trainer.evaluate()["eval_ranking/accuracy"])
            changes = [last - first for first, last in zip(before, after, strict=True)]
            per_seed = ", ".join(f"{first:.3f} -> {last:.3f}" for first, last in zip(before, after, strict=True))
            label = f"{name}, shuffled" if control else name
            print(f"{label:<28}{fmean(before):8.3f}{fmean(after):8.3f}{fmean(changes):+8.3f}   {per_seed}", flush=True)


if __name__ == "__main__":
    main()
