"""Train an aligner once and measure it on policies that it has never seen.

A tiny aligner learns from a generated corpus of flawed answers with known corrections. It then corrects the answers of
three policies on held-out questions. Each policy is pretrained on another draw of the corpus and gives other kinds of
answers. The script prints the score (0 to 1) of the answers before and after correction, and the share of perfect
answers that the aligner leaves unchanged: with identity warm-up, and for as many steps without it.

    python benchmarks/aligner.py
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from statistics import fmean

import datasets
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from cyclealign_trl import Aligner, AlignerConfig, AlignerTrainer, ModelUpstream
from cyclealign_trl.aligner.aligner_template import DEFAULT_TEMPLATE, TEMPLATES
from cyclealign_trl.demo.corpus import Kind, dialogues, improve, questions, score, vocabulary
from cyclealign_trl.demo.policy import build_tokenizer, init_llama, pretrain
from cyclealign_trl.types import Prompt

POLICIES: dict[str, tuple[Kind, ...]] = {
    "mixed": ("helpful", "curt", "off_topic", "rude"),
    "rude, off topic": ("rude", "off_topic"),
    "curt, off topic": ("curt", "off_topic"),
}
WARMUP = {"with warm-up": 0.2, "without": 0.0}
PERFECT_SHARE = 0.3  # share of training answers that are perfect and therefore their own correction
PRETRAINING_STEPS, PRETRAINING_BATCH_SIZE = 500, 32


def messages(question: str) -> list[dict[str, str]]:
    """Return a question as a conversational prompt."""
    return [{"role": "user", "content": question}]


def correction_rows(num: int, seed: int) -> datasets.Dataset:
    """Return `num` rows of `prompt`, `answer` and `correction` about training questions."""
    rng = random.Random(seed)
    rows = []
    for dialogue in dialogues(num, seed):
        correction = improve(dialogue.question, dialogue.completion)
        answer = correction if rng.random() < PERFECT_SHARE else dialogue.completion
        rows.append({"prompt": messages(dialogue.question), "answer": answer, "correction": correction})
    return datasets.Dataset.from_list(rows)


def perfect_answers(num: int) -> tuple[list[Prompt], list[str]]:
    """Return each held-out question `num` times, and perfect answers."""
    prompts: list[Prompt] = []
    answers = []
    for question in questions("held_out"):
        prompts += [messages(question)] * num
        answers += [improve(question, str(index)) for index in range(num)]
    return prompts, answers


def tiny_aligner(seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return a model with random weights, of the size of the policies, and a tokenizer that covers the template."""
    tokenizer = build_tokenizer([TEMPLATES[DEFAULT_TEMPLATE], *vocabulary()])
    return init_llama(tokenizer, seed), tokenizer


def pretrain_upstream(kinds: Sequence[Kind], seed: int) -> ModelUpstream:
    """Pretrain a policy that gives answers of the given kinds."""
    num = PRETRAINING_STEPS * PRETRAINING_BATCH_SIZE
    corpus = [dialogue for dialogue in dialogues(4 * num, seed) if dialogue.kind in kinds][:num]
    tokenizer = build_tokenizer(vocabulary())
    model = pretrain(tokenizer, corpus, seed, PRETRAINING_BATCH_SIZE)
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    return ModelUpstream(model, tokenizer, generation_kwargs=sampling, seed=seed, device="cpu", batch_size=64)


def train_aligner(seed: int, warmup_fraction: float, num_rows: int, epochs: float) -> Aligner:
    """Train an aligner on generated corrections."""
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
    """Return the mean score of the answers to questions."""
    return fmean(score(question, answer) for question, answer in zip(asked, answers, strict=True))


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="Number of aligners per variant.")
    parser.add_argument("--rows", type=int, default=8000, help="Number of training corrections.")
    parser.add_argument("--epochs", type=float, default=3, help="Number of epochs over the corrections.")
    parser.add_argument("--samples", type=int, default=8, help="Answers of each policy per held-out question.")
    args = parser.parse_args()
    datasets.disable_progress_bars()

    asked = [question for question in questions("held_out") for _ in range(args.samples)]
    prompts: list[Prompt] = [messages(question) for question in asked]
    answers = {
        name: pretrain_upstream(kinds, 100 + number)(prompts) for number, (name, kinds) in enumerate(POLICIES.items())
    }
    perfect_prompts, perfect = perfect_answers(5)

    print(f"{'':<24}" + "".join(f"{name:>18}" for name in POLICIES) + f"{'good unchanged':>18}")
    print(f"{'before':<24}" + "".join(f"{mean_score(asked, texts):18.3f}" for texts in answers.values()), flush=True)
    for variant, fraction in WARMUP.items():
        rows = []
        for seed in range(args.seeds):
            # The warm-up adds steps, so the variant without it trains for more epochs.
            epochs = args.epochs if fraction else args.epochs + WARMUP["with warm-up"]
            aligner = train_aligner(seed, fraction, args.rows, epochs)
            after = [mean_score(asked, aligner.correct(prompts, texts)) for texts in answers.values()]
            corrected = aligner.correct(perfect_prompts, perfect)
            rows.append([*after, fmean(text == answer for text, answer in zip(corrected, perfect, strict=True))])
            print(f"{f'{variant}, seed {seed}':<24}" + "".join(f"{value:18.3f}" for value in rows[-1]), flush=True)
        print(f"{f'{variant}, mean':<24}" + "".join(f"{fmean(column):18.3f}" for column in zip(*rows, strict=True)))


if __name__ == "__main__":
    main()
