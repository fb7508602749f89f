"""Measure how much DLMA improves a policy without a judge, compared with DPO and with shuffled data.

The demo's tiny policy is pretrained on a corpus that teaches it to follow "(kind)" and "(rude)" in a question. For
each seed, the script prints how often the policy's self-reward orders a held-out kind completion above a rude one, and
the score of its completions of plain held-out questions before training. The other columns show the change of the
score: by DLMA, by DPO on the same pairs, by DLMA with self-rewards and pairs shuffled, and by DLMA and DPO with 40% of
the pairs swapped. The margin of DLMA should reduce the effect of swapped pairs.

    python benchmarks/dlma_rise.py --seeds 3
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from cyclealign_trl import (
    ContrastivePrompts,
    DLMAConfig,
    DLMATrainer,
    add_self_rewards,
    generate_contrastive_pairs,
)
from cyclealign_trl.demo.corpus import Dialogue, Kind, dialogues, questions, vocabulary
from cyclealign_trl.demo.held_out import sample_held_out
from cyclealign_trl.demo.policy import build_tokenizer, pretrain
from cyclealign_trl.demo.tasks import make_task

STYLES = ContrastivePrompts("kind", "rude")
KINDS: dict[str, Kind] = {STYLES.positive: "helpful", STYLES.negative: "rude"}
VARIANTS = ("DLMA", "DPO", "shuffled", "DLMA, 40% wrong", "DPO, 40% wrong")
NUM_HELD_OUT_PAIRS = 200
PAIRS_PER_QUESTION = 4
PRETRAINING_BATCH_SIZE = 32
MAX_PROMPT, MAX_COMPLETION = 64, 48


def styled_dialogues(num: int, seed: int) -> list[Dialogue]:
    """Return `num` dialogues: half of them plain, and a quarter for each style with matching completions."""
    corpus = dialogues(num, seed)
    for index, (style, kind) in enumerate(KINDS.items()):
        styled = dialogues(num // 4, seed + index + 1, [kind])
        corpus[index::4] = [replace(dialogue, question=f"{dialogue.question} ({style})") for dialogue in styled]
    return corpus


def pretrain_styled_policy(seed: int, num_steps: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Pretrain a policy that follows the styles."""
    tokenizer = build_tokenizer([*vocabulary(), *(f"Why? ({style}) Why? ({style})" for style in KINDS)])
    corpus = styled_dialogues(num_steps * PRETRAINING_BATCH_SIZE, seed)
    return pretrain(tokenizer, corpus, seed, PRETRAINING_BATCH_SIZE), tokenizer


def messages(question: str) -> list[dict[str, str]]:
    """Return a question as a conversational prompt."""
    return [{"role": "user", "content": question}]


def ordering_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> float:
    """Return the share of held-out pairs of a kind and a rude completion with a positive self-reward."""
    # The same seed draws the same questions.
    kind, rude = (dialogues(NUM_HELD_OUT_PAIRS, seed, [wanted], "held_out") for wanted in KINDS.values())
    pairs = [
        {
            "prompt": messages(good.question),
            "chosen": [{"role": "assistant", "content": good.completion}],
            "rejected": [{"role": "assistant", "content": bad.completion}],
        }
        for good, bad in zip(kind, rude, strict=True)
        if good.question == bad.question
    ]
    scored = add_self_rewards(Dataset.from_list(pairs), model, STYLES, tokenizer)
    return fmean(reward > 0 for reward in scored["self_reward"])


def shuffled(pairs: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the pairs with shuffled self-rewards, and with chosen and rejected swapped in half of them."""
    rng = random.Random(seed)
    rewards = [pair["self_reward"] for pair in pairs]
    rng.shuffle(rewards)
    swapped = set(rng.sample(range(len(pairs)), len(pairs) // 2))
    rows = []
    for index, (pair, reward) in enumerate(zip(pairs, rewards, strict=True)):
        chosen, rejected = ("rejected", "chosen") if index in swapped else ("chosen", "rejected")
        rows.append(
            {"prompt": pair["prompt"], "chosen": pair[chosen], "rejected": pair[rejected], "self_reward": reward}
        )
    return rows


def mislabelled(pairs: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the pairs with 40% of them swapped, as from a policy that often does not follow its prompts."""
    swapped = set(random.Random(seed).sample(range(len(pairs)), 2 * len(pairs) // 5))
    return [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"], "self_reward": -pair["self_reward"]}
        if index in swapped
        else dict(pair)
        for index, pair in enumerate(pairs)
    ]


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, seed: int, **changes: Any
) -> float:
    """Train a copy of the model and return its score on plain held-out questions."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 32,
            "max_prompt_length": MAX_PROMPT,
            "max_completion_length": MAX_COMPLETION + 1,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        trainer = DLMATrainer(
            copy.deepcopy(model),
            args=DLMAConfig(folder, seed=seed, **{**settings, **changes}),
            train_dataset=pairs,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return sample_held_out(trainer.model, tokenizer, make_task(), seed).score


def measure(seed: int, num_steps: int = 800, variants: Sequence[str] = VARIANTS) -> dict[str, float]:
    """Return the ordering accuracy, the score before training, and the change of the score for each variant.

    Args:
        seed: Seed of the policy, its pairs and its training.
        num_steps: Number of pretraining steps.
        variants: Variants to train.
    """
    model, tokenizer = pretrain_styled_policy(seed, num_steps)
    prompts = [messages(question) for question in questions("train") for _ in range(PAIRS_PER_QUESTION)]
    pairs = generate_contrastive_pairs(
        model, prompts, STYLES, tokenizer, batch_size=64, max_prompt_length=MAX_PROMPT,
        max_completion_length=MAX_COMPLETION, seed=seed,
    )  # fmt: skip
    before = sample_held_out(model, tokenizer, make_task(), seed).score
    figures = {"ordering": ordering_accuracy(model, tokenizer, seed), "before": before}
    for variant in variants:
        rows = pairs.to_list()
        if variant == "shuffled":
            rows = shuffled(rows, seed)
        elif variant.endswith("wrong"):
            rows = mislabelled(rows, seed)
        changes = {"margin_weight": 0.0} if variant.startswith("DPO") else {}
        figures[variant] = train(model, tokenizer, Dataset.from_list(rows), seed, **changes) - before
    return figures


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="Number of policies.")
    parser.add_argument("--pretraining_steps", type=int, default=800, help="Pretraining steps of each policy.")
    args = parser.parse_args()

    print("seed  ordering    before" + "".join(f"{name:>17}" for name in VARIANTS))
    for seed in range(args.seeds):
        figures = measure(seed, args.pretraining_steps)
        changes = "".join(f"{figures[variant]:+17.3f}" for variant in VARIANTS)
        print(f"{seed:<6}{figures['ordering']:10.3f}{figures['before']:10.3f}{changes}", flush=True)


if __name__ == "__main__":
    main()
