"""Train the study's two reward models: linear heads on the frozen states of a chat model, on different dialogues.

    python -m benchmarks.study.reward_models MODEL HH_RLHF_FOLDER OUTPUT_DIR

The loss is that of TRL's `RewardTrainer`, -log sigmoid(r_chosen - r_rejected), with weight decay. The states are
computed once and stored, so a head is fitted in seconds, and an interrupted command continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .splits import Part, load_part

MAX_LENGTH = 256
BATCH_SIZE = 8
WEIGHT_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5


def states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, path: Path) -> Tensor:
    """Return the state at the last token of the dialogues of each pair, chosen first: `(N, 2, hidden)`.

    Args:
        model: The sequence classifier, whose head is not used.
        tokenizer: Its tokenizer, with a chat template.
        pairs: Rows of `prompt`, `chosen` and `rejected`.
        path: File that the states are stored in as they are computed.
    """
    hidden = model.config.hidden_size
    done = np.fromfile(path, dtype=np.float32) if path.exists() else np.empty(0, dtype=np.float32)
    done = done[: len(done) // (2 * hidden * BATCH_SIZE) * (2 * hidden * BATCH_SIZE)]  # whole batches
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(done.nbytes)
        file.seek(0, 2)
        parts = [done]
        first = len(done) // (2 * hidden)
        for start in tqdm(range(first, len(pairs), BATCH_SIZE), desc=path.stem, disable=None):
            rows = pairs.select(range(start, min(start + BATCH_SIZE, len(pairs))))
            dialogues = [row["prompt"] + row[name] for row in rows for name in ("chosen", "rejected")]
            batch = _last_states(model, tokenizer, dialogues)
            parts.append(batch.reshape(-1))
            batch.tofile(file)
            file.flush()
    return torch.from_numpy(np.concatenate(parts)).view(-1, 2, hidden)


def _last_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[list[dict[str, str]]]
) -> np.ndarray[Any, Any]:
    texts = [tokenizer.apply_chat_template(dialogue, tokenize=False) for dialogue in dialogues]
    inputs = tokenizer(
        texts, add_special_tokens=False, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = model.base_model(**inputs).last_hidden_state  # (B, L, hidden)
    last = inputs["attention_mask"].sum(1) - 1
    vectors: np.ndarray[Any, Any] = hidden[torch.arange(len(texts)), last].float().numpy()
    return vectors


def fit(differences: Tensor, weight_decay: float) -> Tensor:
    """Return the head `(hidden,)` that minimises the loss of `RewardTrainer` plus weight decay.

    Args:
        differences: States of chosen minus those of rejected dialogues, `(N, hidden)`.
        weight_decay: Weight of half of the squared norm.
    """
    scale = differences.std(0).clamp(min=1e-6)
    scaled = differences / scale
    head = torch.zeros(differences.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.softplus(-scaled @ head).mean() + weight_decay / 2 * head.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head.detach() / scale


def choose_weight_decay(differences: Tensor) -> tuple[float, dict[float, float]]:
    """Return the weight decay with the best accuracy over folds, and the accuracy of each."""
    folds = torch.arange(len(differences)) % FOLDS
    accuracies = {
        weight_decay: float(
            torch.cat(
                [
                    (differences[folds == fold] @ fit(differences[folds != fold], weight_decay) > 0).float()
                    for fold in range(FOLDS)
                ]
            ).mean()
        )
        for weight_decay in WEIGHT_DECAYS
    }
    return max(accuracies, key=accuracies.__getitem__), accuracies


def sample(part: Part, hh_rlhf: str, number: int) -> Dataset:
    """Return up to `number` pairs of a part, drawn at random, by length, so that batches have little padding."""
    pairs = load_part(part, hh_rlhf)
    order = list(range(len(pairs)))
    random.Random(0).shuffle(order)
    pairs = pairs.select(order[:number])
    lengths = [sum(len(message["content"]) for message in row["prompt"] + row["chosen"]) for row in pairs]
    return pairs.select(sorted(range(len(pairs)), key=lengths.__getitem__))


def main() -> None:
    """Train both reward models, and write their folders and `reward_models.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Chat model whose states the heads read.")
    parser.add_argument("hh_rlhf", help="Folder with the test files of HH-RLHF.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--num_pairs", type=int, default=800, help="Pairs for each reward model.")
    parser.add_argument("--num_held_out", type=int, default=300, help="Pairs to measure the accuracy on.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="right", truncation_side="left")
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1).eval()
    held_out = states(
        model,
        tokenizer,
        sample("evaluation", args.hh_rlhf, args.num_held_out),
        args.output_dir / "states-evaluation.f32",
    )
    summary: dict[str, Any] = {}
    names: tuple[Part, ...] = ("evaluator", "judge")
    for name in names:
        pairs = sample(name, args.hh_rlhf, args.num_pairs)
        vectors = states(model, tokenizer, pairs, args.output_dir / f"states-{name}.f32")
        differences = vectors[:, 0] - vectors[:, 1]
        weight_decay, in_folds = choose_weight_decay(differences)
        head = fit(differences, weight_decay)
        correct = (held_out[:, 0] - held_out[:, 1]) @ head > 0
        resamples = np.random.default_rng(0).choice(correct.float().numpy(), size=(2000, len(correct))).mean(1)
        summary[name] = {
            "pairs": len(pairs),
            "weight_decay": weight_decay,
            "accuracy_in_folds": in_folds,
            "held_out_pairs": len(correct),
            "accuracy": float(correct.float().mean()),
            "accuracy_interval": [float(value) for value in np.quantile(resamples, (0.025, 0.975))],
        }
        with torch.no_grad():
            model.score.weight.copy_(head[None])
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(args.output_dir / name)
        tokenizer.save_pretrained(args.output_dir / name)
        (args.output_dir / "reward_models.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
