"""Does an aligner, trained once, improve policies that it has never seen, and leave good answers alone?

A tiny aligner learns from a generated corpus of flawed answers with known corrections. Then it corrects three policies
of different habits, pretrained on other draws of the corpus, on held-out questions. Prints the score (0 to 1) of their
answers before and after, and how many answers with full marks it leaves unchanged; with identity warm-up, and without
it at as many steps.

    python benchmarks/aligner.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import datasets
from transformers import PrinterCallback

from cyclealign_trl import Aligner, AlignerConfig, AlignerTrainer, ModelUpstream
from cyclealign_trl.demo.corpus import Dialogue, Kind, dialogues, questions, score
from cyclealign_trl.demo.corrections import correction_rows, good_answers, tiny_aligner
from cyclealign_trl.demo.policy import pretrain_policy

POLICIES: dict[str, tuple[Kind, ...]] = {
    "mixed": ("helpful", "curt", "off_topic", "rude"),
    "rude, off topic": ("rude", "off_topic"),
    "curt, off topic": ("curt", "off_topic"),
}
WARMUP = {"with warm-up": 0.2, "without": 0.0}


def pretrain(kinds: Sequence[Kind], seed: int) -> ModelUpstream:
    """A policy that answers in these kinds."""

    def corpus(num: int, seed: int) -> list[Dialogue]:
        return [dialogue for dialogue in dialogues(4 * num, seed) if dialogue.kind in kinds][:num]

    model, tokenizer = pretrain_policy(seed, num_steps=500, corpus=corpus)
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    return ModelUpstream(model, tokenizer, generation_kwargs=plain, seed=seed, device="cpu", batch_size=64)


def train_aligner(seed: int, warmup_fraction: float, num_rows: int, epochs: float) -> Aligner:
    """An aligner that has seen the generated corrections of training questions."""
    model, tokenizer = tiny_aligner(seed)
    with tempfile.TemporaryDirectory() as folder:
        args = AlignerConfig(
            folder, seed=seed, warmup_fraction=warmup_fraction, per_device_train_batch_size=16, learning_rate=3e-3,
            num_train_epochs=epochs, warmup_steps=0.1, max_length=256, activation_checkpointing=False,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = AlignerTrainer(model, args, correction_rows(num_rows, seed), processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Aligner(model, tokenizer, trainer.template, batch_size=64)


def mean_score(asked: Sequence[str], answers: Sequence[str]) -> float:
    """The mean score of answers."""
    return fmean(score(question, answer) for question, answer in zip(asked, answers, strict=True))


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="Aligners of each kind.")
    parser.add_argument("--rows", type=int, default=8000, help="Corrections to learn from.")
    parser.add_argument("--epochs", type=float, default=3, help="Passes over them.")
    parser.add_argument("--samples", type=int, default=8, help="Answers of a policy per held-out question.")
    args = parser.parse_args()
    datasets.disable_progress_bars()

    asked = [question for question in questions("held_out") for _ in range(args.samples)]
    prompts: list[Any] = [[{"role": "user", "content": question}] for question in asked]
    answers = {}
    for number, (name, kinds) in enumerate(POLICIES.items()):
        answers[name] = pretrain(kinds, 100 + number)(prompts)
    good_prompts, good = good_answers(5)

    print(f"{'':<24}" + "".join(f"{name:>18}" for name in POLICIES) + f"{'good unchanged':>18}")
    print(f"{'before':<24}" + "".join(f"{mean_score(asked, given):18.3f}" for given in answers.values()), flush=True)
    for variant, fraction in WARMUP.items():
        rows = []
        for seed in range(args.seeds):
            # As many steps with a warm-up as without.
            epochs = args.epochs if fraction else args.epochs + WARMUP["with warm-up"]
            aligner = train_aligner(seed, fraction, args.rows, epochs)
            after = [mean_score(asked, aligner.correct(prompts, given)) for given in answers.values()]
            kept = aligner.correct(good_prompts, good)
            rows.append([*after, fmean(text == answer for text, answer in zip(kept, good, strict=True))])
            print(f"{f'{variant}, seed {seed}':<24}" + "".join(f"{value:18.3f}" for value in rows[-1]), flush=True)
        print(f"{f'{variant}, mean':<24}" + "".join(f"{fmean(column):18.3f}" for column in zip(*rows, strict=True)))


if __name__ == "__main__":
    main()
