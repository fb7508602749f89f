"""Evaluate the demo's policy before and after alignment, as a check of the evaluation: the order is known.

A reward model is trained with TRL's `RewardTrainer` on pairs of replies to training questions, ordered by the demo's
rule. `evaluate_models` and `compare_models`, with the rule as judge, then measure both policies on held-out questions.

    cyclealign demo
    python -m benchmarks.demo_evaluation outputs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from cyclealign_trl import FunctionRanker, ReplySettings, compare_models, evaluate_models, read_prompts
from cyclealign_trl.demo.corpus import KINDS, dialogues, questions, score
from cyclealign_trl.demo.policy import pretrain_policy

NUM_PAIRS = 3000


def train_reward_model(policy: Path, folder: Path) -> None:
    """Train a reward model from the demo's policy on pairs of replies that the rule orders."""
    replies: dict[str, set[str]] = {}
    for dialogue in dialogues(2 * NUM_PAIRS, seed=1, kinds=KINDS):
        replies.setdefault(dialogue.question, set()).add(dialogue.completion)
    rows: list[dict[str, Any]] = []
    for question, texts in replies.items():
        ordered = sorted(texts, key=lambda text: (score(question, text), text))
        for worse, better in zip(ordered, ordered[len(ordered) // 2 :], strict=False):
            if score(question, worse) < score(question, better):
                dialogue_of = {"rejected": worse, "chosen": better}
                prompt = [{"role": "user", "content": question}]
                rows.append(
                    {"prompt": prompt}
                    | {name: [{"role": "assistant", "content": text}] for name, text in dialogue_of.items()}
                )
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = RewardConfig(
        str(folder),
        max_steps=200,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
    )
    trainer = RewardTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)


def by_rule(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """Return the demo's scores of completions."""
    return [
        score(prompt[-1]["content"], completion[-1]["content"])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="Folder of `cyclealign demo` with seed 0.")
    args = parser.parse_args()
    folder = args.demo / "evaluation"
    before = folder / "before"
    if not before.exists():
        model, tokenizer = pretrain_policy(seed=0)
        tokenizer.save_pretrained(before)
        model.save_pretrained(before)
    if not (folder / "reward_model" / "config.json").exists():
        train_reward_model(before, folder / "reward_model")
    prompts = read_prompts(
        {"prompt": [{"role": "user", "content": question}], "subset": "held out"} for question in questions("held_out")
    )
    settings = ReplySettings(max_new_tokens=48, max_prompt_length=64, device="cpu")
    models = {"before": str(before), "after": str(args.demo)}
    report = evaluate_models(
        models, str(folder / "reward_model"), prompts, output_dir=folder / "rewards", settings=settings
    )
    print(report.to_markdown())
    comparison = compare_models(
        models["after"],
        models["before"],
        FunctionRanker(by_rule),
        prompts,
        output_dir=folder / "verdicts",
        settings=settings,
    )
    print(comparison.to_markdown())


if __name__ == "__main__":
    main()
