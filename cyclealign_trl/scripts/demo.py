"""`cyclealign demo`: the whole cycle on an embedded default, offline on two CPU cores.

A tiny policy is pretrained on a generated corpus whose replies are helpful, curt, off-topic or rude in equal shares. A
rule-based judge stands behind a true chat-completions endpoint on loopback. The policy is aligned with it through the
same `LLMRanker` and `CycleAlignTrainer` as any other.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import textwrap
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from ..trainer.cyclealign_trainer import CycleAlignTrainer

NUM_SAMPLES = 16  # replies per held-out question that the score is a mean over
BATCH_SIZE = 16

SWAP_IN = 'CycleAlignTrainer("Qwen/Qwen3-0.6B", LLMRanker("gpt-5-mini"), args, train_dataset=your_prompts).train()'


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    from ..trainer.cyclealign_config import SFTTarget
    from ..trainer.ranking_config import LossType

    parser = argparse.ArgumentParser(prog="cyclealign demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="Where everything is written.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of corpus, weights and sampling.")
    parser.add_argument("--num_train_epochs", type=int, default=2, help="Passes over the training questions.")
    parser.add_argument("--loss_type", choices=get_args(LossType), default="pro", help="Ranking loss.")
    parser.add_argument("--sft_target", choices=get_args(SFTTarget), default="improved", help="SFT target.")
    parser.add_argument("--sft_weight", type=float, default=0.05, help="SFT weight, times (K-1)^2.")
    parser.add_argument(
        "--control", action="store_true", help="Rank at random and improve nothing: what comes of the cycle alone."
    )
    return parser


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Replies to the held-out questions, several each, and the mean of their scores."""

    replies: list[tuple[str, list[str]]]
    score: float


def main(argv: Sequence[str]) -> None:
    """Runs the demo and writes the model, the interaction log, `summary.json` and `curves.png`."""
    args = make_parser().parse_args(argv)
    started = time.perf_counter()
    from datasets import Dataset
    from transformers import ProgressCallback

    from .. import CycleAlignConfig, CycleAlignTrainer, LLMRanker
    from ..demo.corpus import questions
    from ..demo.endpoint import LoopbackEndpoint
    from ..demo.judge import DemoJudge
    from ..demo.policy import pretrain_policy
    from ..trainer.estimate import estimate_run, sample_completions

    class ProgressBarOnly(ProgressCallback):
        """The Trainer's progress bar, without the metrics: the demo says what they come to."""

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    _say("1/4  Pretraining a tiny policy on a generated corpus (about half a minute) ...")
    model, tokenizer = pretrain_policy(args.seed)

    judge = DemoJudge(control=args.control, seed=args.seed)
    judge_name = "random-judge" if args.control else "rule-based-judge"
    dataset = Dataset.from_list([{"prompt": [_user(question)]} for question in questions("train")])
    with LoopbackEndpoint(judge.respond) as endpoint, closing(LLMRanker(judge_name, endpoint.base_url)) as ranker:
        trainer = CycleAlignTrainer(
            model,
            ranker,
            CycleAlignConfig(
                str(args.output_dir),
                seed=args.seed,
                num_generations=4,
                num_train_epochs=args.num_train_epochs,
                per_device_train_batch_size=BATCH_SIZE,
                max_prompt_length=64,
                max_completion_length=48,
                top_p=1.0,
                learning_rate=4e-4,
                loss_type=args.loss_type,
                sft_target=args.sft_target,
                sft_weight=args.sft_weight,
                logging_strategy="no",
                save_strategy="no",
                use_cpu=True,
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBarOnly)
        before = _held_out(trainer, args.seed)
        _say(f"2/4  Held-out score before: {before.score:.3f} (0 to 1, mean over {NUM_SAMPLES} samples a question)")
        _show(before)
        expected = estimate_run(trainer.args, ranker, sample_completions(trainer, NUM_SAMPLES), len(dataset)).expected
        _say(f"3/4  Aligning it with the judge at {endpoint.base_url} ...")
        trainer.train()
    after = _held_out(trainer, args.seed)
    trainer.save_model()

    rows = trainer.interaction_log.read().to_pylist()
    usages = [row["usage"] for row in rows if row["usage"] is not None]
    summary = {
        "score_before": before.score,
        "score_after": after.score,
        "seconds": time.perf_counter() - started,
        "interactions": len(rows),
        "failures": sum(row["black_box_order"] is None and row["usage"] is not None for row in rows),
        "prompt_tokens": sum(usage["prompt_tokens"] for usage in usages),
        "completion_tokens": sum(usage["completion_tokens"] for usage in usages),
        "calls": sum(usage["attempts"] for usage in usages),
        "estimated_prompt_tokens": expected.prompt_tokens,
        "estimated_completion_tokens": expected.completion_tokens,
        "estimated_calls": expected.attempts,
    }
    (args.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    _say(f"4/4  Held-out score after: {after.score:.3f}")
    _show(after)
    curves = _plot(rows, args.output_dir / "curves.png")
    print(
        f"Held-out score   {before.score:.3f} -> {after.score:.3f}\n"
        f"Interactions     {summary['interactions']} rankings, {summary['failures']} failed\n"
        f"A paid judge     would have billed {summary['prompt_tokens']:,} prompt and "
        f"{summary['completion_tokens']:,} completion tokens (about 4 characters a token)\n"
        f"Estimated before {expected.prompt_tokens:,} prompt and {expected.completion_tokens:,} completion tokens in "
        f"{expected.attempts} calls; it took {summary['calls']}\n"
        f"Time             {summary['seconds']:.0f} s\n"
        f"Written          {args.output_dir}: model, interactions/, summary.json{curves}\n\n"
        f"With a model and a judge of your own, this is the line:\n  {SWAP_IN}"
    )


def _held_out(trainer: CycleAlignTrainer, seed: int) -> HeldOut:
    """Samples replies to all held-out questions from the policy as it is now."""
    import torch

    from ..demo.corpus import questions, score

    replies = []
    held_out = questions("held_out")
    repeated = [question for question in held_out for _ in range(NUM_SAMPLES // trainer.args.num_generations)]
    prompt_ids = [trainer.encoder.prompt([_user(question)])[0] for question in repeated]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        groups = trainer.generation.generate(trainer.model, prompt_ids)
    for question, ids in zip(repeated, groups, strict=True):
        replies.append((question, trainer.encoder.tokenizer.batch_decode(ids, skip_special_tokens=True)))
    return HeldOut(replies, fmean(score(question, reply) for question, texts in replies for reply in texts))


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> str:
    """Draws reward and agreement by optimiser step; returns what to say of it."""
    if importlib.util.find_spec("matplotlib") is None:
        return " (for the curves: pip install 'cyclealign-trl[report]')"
    from matplotlib.figure import Figure

    from ..demo.corpus import score

    rewards: dict[int, list[float]] = {}
    agreements: dict[int, list[float]] = {}
    for row in rows:
        question = row["prompt"][-1]["content"]
        rewards.setdefault(row["step"], []).extend(score(question, reply) for reply in row["completions"])
        if row["agreement"] is not None:
            agreements.setdefault(row["step"], []).append(len(row["agreement"]) / len(row["black_box_order"]))

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, values, label in (
        (panels[0], rewards, "Score of the policy's samples"),
        (panels[1], agreements, "Share of each ranking agreed on"),
    ):
        panel.plot(list(values), [fmean(step) for step in values.values()], color="#2a6f97", linewidth=1.6)
        panel.set(xlabel="Optimiser step", title=label, ylim=(0, 1.02))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)
    return ", curves.png"


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _show(held_out: HeldOut, number: int = 4) -> None:
    for question, replies in held_out.replies[:: len(held_out.replies) // number][:number]:
        print(f"     {question}")
        print(textwrap.indent(textwrap.fill(replies[0] or "(nothing)", 100), "       > "), flush=True)
