"""`cyclealign demo`: run CycleAlign on a generated corpus, offline, on two CPU cores.

The demo pretrains a tiny policy on replies that are helpful, curt, off-topic or rude in equal shares. A rule-based
judge runs behind a chat-completions endpoint on the loopback interface. `LLMRanker` and `CycleAlignTrainer` are used
as with any other policy and judge.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import textwrap
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..demo.held_out import HeldOutSamples

NUM_SAMPLES = 16  # completions per held-out question
BATCH_SIZE = 16
LOSS_TYPES = ("pro", "rrhf")  # the keys of `offline.losses.LOSSES`, which imports torch

REAL_RUN = 'CycleAlignTrainer("Qwen/Qwen3-0.6B", LLMRanker("gpt-5-mini"), args, train_dataset=your_prompts).train()'


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="cyclealign demo",
        description="Align a tiny policy with a rule-based judge, offline, in under three minutes on two CPU cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/demo"),
        metavar="DIR",
        help="Folder for the model, the interaction log, report.html, summary.json and curves.png.",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="INT", help="Seed for the corpus, the weights and the sampling."
    )
    parser.add_argument(
        "--num_train_epochs", type=int, default=2, metavar="INT", help="Number of epochs over the training questions."
    )
    parser.add_argument("--loss_type", choices=LOSS_TYPES, default="pro", help="Ranking loss.")
    parser.add_argument(
        "--sft_target",
        choices=("improved", "top_ranked"),
        default="improved",
        help="Target of the SFT loss: the judge's improved completion, or the completion that it ranks first.",
    )
    parser.add_argument(
        "--sft_weight", type=float, default=0.05, metavar="FLOAT", help="Weight of the SFT loss, times (K-1)^2."
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="Control run with a judge that ranks at random and improves nothing, to see the effect of the judge.",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Run the demo and write the model, the interaction log, `report.html`, `summary.json` and `curves.png`."""
    args = make_parser().parse_args(argv)
    started = time.perf_counter()
    from datasets import Dataset
    from transformers import ProgressCallback

    from .. import CycleAlignConfig, CycleAlignTrainer, LLMRanker
    from ..cycle.run_estimate import estimate_run, sample_completions
    from ..demo.corpus import questions
    from ..demo.demo_judge import DemoJudge
    from ..demo.held_out import sample_held_out
    from ..demo.loopback import LoopbackEndpoint
    from ..demo.policy import pretrain_policy
    from ..evaluation.run_report.page import write_run_report
    from ..evaluation.run_report.run_data import HELD_OUT

    class ProgressBarOnly(ProgressCallback):
        """Show the progress bar of the Trainer without its metrics, which the demo summarizes at the end."""

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    _print_step("1/4  Pretraining a tiny policy on a generated corpus (about half a minute) ...")
    model, tokenizer = pretrain_policy(args.seed)

    judge = DemoJudge(control=args.control, seed=args.seed)
    judge_name = "random-judge" if args.control else "rule-based-judge"
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": question}]} for question in questions("train")]
    )
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
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBarOnly)
        before = sample_held_out(model, tokenizer, args.seed, NUM_SAMPLES)
        _print_step(
            f"2/4  Held-out score before: {before.score:.3f} (0 to 1, mean over {NUM_SAMPLES} samples per question)"
        )
        _print_samples(before)
        expected = estimate_run(trainer.args, ranker, sample_completions(trainer, NUM_SAMPLES), len(dataset)).expected
        _print_step(f"3/4  Aligning the policy with the judge at {endpoint.base_url} ...")
        trainer.train()
    after = sample_held_out(model, tokenizer, args.seed, NUM_SAMPLES)
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
    held_out = [
        {"prompt": question, "before": texts_before, "after": texts_after}
        for (question, texts_before), (_, texts_after) in zip(before.completions, after.completions, strict=True)
    ]
    (args.output_dir / HELD_OUT).write_text(json.dumps(held_out, indent=1) + "\n", encoding="utf-8")
    scores, agreements = _by_step(rows)
    trainer.state.log_history += [{"step": step + 1, "score": value} for step, value in scores.items()]
    trainer.save_state()
    report = write_run_report(args.output_dir)
    (args.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    _print_step(f"4/4  Held-out score after: {after.score:.3f}")
    _print_samples(after)
    written = "model, interactions/, report.html, summary.json"
    if importlib.util.find_spec("matplotlib") is None:
        written += " (to plot the curves: pip install 'cyclealign-trl[report]')"
    else:
        _plot_curves(scores, agreements, args.output_dir / "curves.png")
        written += ", curves.png"
    print(
        f"Held-out score   {before.score:.3f} -> {after.score:.3f}\n"
        f"Interactions     {summary['interactions']} rankings, {summary['failures']} failed\n"
        f"A paid judge     would have billed {summary['prompt_tokens']:,} prompt and "
        f"{summary['completion_tokens']:,} completion tokens (estimated at 4 characters per token)\n"
        f"Estimated before {expected.prompt_tokens:,} prompt and {expected.completion_tokens:,} completion tokens in "
        f"{expected.attempts} calls; the run made {summary['calls']} calls\n"
        f"Time             {summary['seconds']:.0f} s\n"
        f"Written          {args.output_dir}: {written}\n"
        f"Report           {report.absolute().as_uri()}\n\n"
        f"To align a model of your own with a judge of your own:\n  {REAL_RUN}"
    )


def _by_step(rows: Sequence[dict[str, Any]]) -> tuple[dict[int, float], dict[int, float]]:
    """Return the mean score of the policy's samples, and the mean agreement, by optimiser step."""
    from ..cycle.agreement import agreement_rate
    from ..demo.corpus import score

    scores: dict[int, list[float]] = {}
    agreements: dict[int, list[float]] = {}
    for row in rows:
        question = row["prompt"][-1]["content"]
        scores.setdefault(row["step"], []).extend(score(question, reply) for reply in row["completions"])
        if row["agreement"] is not None:
            agreements.setdefault(row["step"], []).append(agreement_rate(row["agreement"], row["ranks"]))
    return (
        {step: fmean(values) for step, values in scores.items()},
        {step: fmean(values) for step, values in agreements.items()},
    )


def _plot_curves(scores: dict[int, float], agreements: dict[int, float], path: Path) -> None:
    """Plot the policy's score and the agreement by optimiser step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, values, label in (
        (panels[0], scores, "Score of the policy's samples"),
        (panels[1], agreements, "Agreed share of each ranking"),
    ):
        panel.plot(list(values), list(values.values()), color="#2a6f97", linewidth=1.6)
        panel.set(xlabel="Optimiser step", title=label, ylim=(0, 1.02))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)


def _print_step(text: str) -> None:
    print(f"\n{text}", flush=True)


def _print_samples(samples: HeldOutSamples, number: int = 4) -> None:
    """Print one completion of each of a few evenly spaced questions."""
    for question, completions in samples.completions[:: len(samples.completions) // number][:number]:
        print(f"     {question}")
        print(textwrap.indent(textwrap.fill(completions[0] or "(empty)", 100), "       > "), flush=True)
