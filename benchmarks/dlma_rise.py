"""Does DLMA make a policy better without any judge, and do its own opinions deserve the credit?

Pretrains the demo's tiny policy on a corpus that teaches it to follow "(kind)" and "(rude)". Prints, per seed: how
often its self-reward orders a held-out kind reply above a rude one; the score of its replies to plain held-out
questions before training, and the change by DLMA, by DPO on the same pairs, by DLMA with self-rewards and pairs
shuffled, and by both with 40% of the pairs the wrong way round, which is what the margin is for.

    python benchmarks/dlma_rise.py --seeds 3
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_PAIRS = 200  # held-out kind and rude replies
REPEATS = 4  # pairs generated for each of the 80 training questions
MAX_PROMPT, MAX_COMPLETION = 64, 48
VARIANTS = ("DLMA", "DPO", "shuffled", "DLMA, 40% wrong", "DPO, 40% wrong")


def user(question: str) -> list[dict[str, str]]:
    """A prompt."""
    return [{"role": "user", "content": question}]


def ordering_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> float:
    """Share of held-out (kind, rude) reply pairs with a positive self-reward."""
    from datasets import Dataset

    from cyclealign_trl import add_self_rewards
    from cyclealign_trl.demo.corpus import dialogues
    from cyclealign_trl.demo.styles import STYLES

    # The same seed draws the same questions.
    kind, rude = (dialogues(NUM_PAIRS, seed, [wanted], "held_out") for wanted in ("helpful", "rude"))
    rows = [
        {
            "prompt": user(good.question),
            "chosen": [{"role": "assistant", "content": good.reply}],
            "rejected": [{"role": "assistant", "content": bad.reply}],
        }
        for good, bad in zip(kind, rude, strict=True)
        if good.question == bad.question
    ]
    scored = add_self_rewards(Dataset.from_list(rows), model, STYLES, tokenizer)
    return fmean(reward > 0 for reward in scored["self_reward"])


def shuffled(pairs: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The same pairs with each other's self-rewards, and half of them turned around."""
    noise = random.Random(seed)
    rewards = [pair["self_reward"] for pair in pairs]
    noise.shuffle(rewards)
    turned = set(noise.sample(range(len(pairs)), len(pairs) // 2))
    rows = []
    for index, (pair, reward) in enumerate(zip(pairs, rewards, strict=True)):
        sides = ("rejected", "chosen") if index in turned else ("chosen", "rejected")
        rows.append(
            {"prompt": pair["prompt"], "chosen": pair[sides[0]], "rejected": pair[sides[1]], "self_reward": reward}
        )
    return rows


def mislabelled(pairs: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The same pairs, 40% of them the wrong way round, as a policy writes them that follows its prompts badly."""
    wrong = set(random.Random(seed).sample(range(len(pairs)), 2 * len(pairs) // 5))
    return [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"], "self_reward": -pair["self_reward"]}
        if index in wrong
        else dict(pair)
        for index, pair in enumerate(pairs)
    ]


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, seed: int, **changes: Any
) -> float:
    """Held-out score of plain prompts after training a copy of the model."""
    from transformers import PrinterCallback

    from cyclealign_trl import DLMAConfig, DLMATrainer
    from cyclealign_trl.demo.held_out import held_out

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
    return held_out(trainer.model, tokenizer, seed).score


def measure(seed: int, num_steps: int = 800, variants: Sequence[str] = VARIANTS) -> dict[str, float]:
    """All figures of one seed, with a policy that was pretrained for so many steps."""
    from datasets import Dataset

    from cyclealign_trl import generate_contrastive_pairs
    from cyclealign_trl.demo.corpus import questions
    from cyclealign_trl.demo.held_out import held_out
    from cyclealign_trl.demo.policy import pretrain_policy
    from cyclealign_trl.demo.styles import STYLES, styled_dialogues, styled_sentences

    model, tokenizer = pretrain_policy(seed, num_steps, corpus=styled_dialogues, vocabulary=styled_sentences)
    prompts = [user(question) for question in questions("train") for _ in range(REPEATS)]
    pairs = generate_contrastive_pairs(
        model, prompts, STYLES, tokenizer, batch_size=64, max_prompt_length=MAX_PROMPT,
        max_completion_length=MAX_COMPLETION, seed=seed,
    )  # fmt: skip
    before = held_out(model, tokenizer, seed).score
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
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="Policies.")
    args = parser.parse_args()

    print("seed  ordering    before" + "".join(f"{name:>17}" for name in VARIANTS))
    for seed in range(args.seeds):
        figures = measure(seed)
        changes = "".join(f"{figures[variant]:+17.3f}" for variant in VARIANTS)
        print(f"{seed:<6}{figures['ordering']:10.3f}{figures['before']:10.3f}{changes}", flush=True)


if __name__ == "__main__":
    main()
