"""Write docs/settings.md and its figure from the stored results.

python -m benchmarks.settings.page
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import numpy as np

from benchmarks.charts import BLUE, GREY, ORANGE, new_figure, save, style
from benchmarks.estimates import mean_with_interval, to_text
from cyclealign_trl.evaluation.intervals import Estimate

from .run import CONFIGURATIONS, RESULTS

DOCS = Path(__file__).parents[2] / "docs"
PACKAGES = ("python", "torch", "transformers", "trl", "peft")
WINDOW = 3  # optimiser steps on the same prompts

Results = Mapping[str, Mapping[str, Any]]

_PAGE = """\
# Settings that work

Which settings move a small chat model within 24 steps: CycleAlign with PRO on SmolLM2-135M-Instruct, with the
questions and the judge of `cyclealign demo --model smollm2`. The judge scores an answer from 0 to 1 by a rule: short,
finished, on the topic. The score is dense: two samples seldom have the same. This page and its figure are written by
`python -m benchmarks.settings.page` from the results in `benchmarks/settings/results`.

![Score of the policy's samples by optimiser step, for LoRA and for all weights.](images/settings.svg)

## Results

{table}

{legend}

## What the results show

{findings}

`cyclealign init cyclealign_lora` writes a configuration with the learning rate of the first row, and `cyclealign demo
--model smollm2` runs the row itself. Its answers satisfy the rule after about 20 steps; longer runs were not measured.

## What the policies write

{replies}

## How it was measured

- 32 questions to train on, 24 held out. 4 questions per step, 4 samples of at most 64 tokens per question, and the
  judge's improved completion as a fifth. 3 interactions per question, so 96 judge calls.
- Temperature 0.7, nucleus 0.95, SFT weight 0.05 (times (K-1)², that is 0.8), AdamW, constant learning rate, and LoRA
  of rank 8 on all linear layers, except where the row's name says otherwise.
- The random judge ranks at random and improves nothing, so the SFT loss is on the completion that it ranks first.
- The score is the mean over the held-out questions, with 2 samples each, before and after training.
- One seed. {machine}

```bash
python -m benchmarks.settings.run OUTPUT_DIR
python -m benchmarks.settings.page
```
"""


def load_results(folder: Path) -> Results:
    """Read the results, in the order of `CONFIGURATIONS`."""
    paths = {name: folder / f"{name}.json" for name in CONFIGURATIONS}
    return {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.exists()}


def write_page(results: Path, docs: Path) -> None:
    """Write the page and its figure.

    Args:
        results: Folder of the results.
        docs: Folder of the page.
    """
    finished = load_results(results)
    _draw(finished, docs / "images" / "settings.svg")
    (docs / "settings.md").write_text(page_text(finished), encoding="utf-8")


def page_text(results: Results) -> str:
    """Return the page."""
    missing = [name for name in CONFIGURATIONS if name not in results]
    legend = (
        "Scores of held-out questions with 95 % intervals by bootstrap over the questions. Changes are paired by "
        "question. The intervals do not cover the draw of the training seed."
    )
    if missing:
        legend += f" Not run yet: {', '.join(f'`{name}`' for name in missing)}."
    versions = "; ".join(
        sorted({", ".join(f"{name} {run['versions'][name]}" for name in PACKAGES) for run in results.values()})
    )
    machine = (
        f"CPU, 1 thread per run, other work at the same time: {min(run['seconds'] for run in results.values())} to "
        f"{max(run['seconds'] for run in results.values())} s per run. Versions: {versions}."
    )
    return _PAGE.format(
        table=_table(results),
        legend=fill(legend, 119),
        findings="\n".join(f"- {line}" for line in _findings(results)),
        replies=_replies(results),
        machine=fill(machine, 106, initial_indent="", subsequent_indent="  "),
    )


def _table(results: Results) -> str:
    lines = [
        "| row | score before | score after | change | change minus that of its control | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in results.items():
        cells = [
            f"`{name}`",
            f"{fmean(run['held_out_before']):.3f}",
            f"{fmean(run['held_out_after']):.3f}",
            to_text(mean_with_interval(_change(run)), "+.3f"),
            to_text(_minus_control(results, name), "+.3f"),
            str(run["seconds"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _findings(results: Results) -> list[str]:
    """Return a sentence per row, written from the intervals."""
    lines = []
    for name, run in results.items():
        value, interval = mean_with_interval(_change(run))
        assert interval is not None
        moves = "raises" if interval[0] > 0 else "lowers" if interval[1] < 0 else "does not move"
        line = f"`{name}` {moves} the score ({value:+.3f})"
        beyond, beyond_interval = _minus_control(results, name)
        if beyond is not None and beyond_interval is not None:
            more = "more than" if beyond_interval[0] > 0 else "less than" if beyond_interval[1] < 0 else "no more than"
            line += f", {more} its control `{_control(name)}` ({beyond:+.3f})"
        lines.append(line + ".")
    if {"lora_2e-4", "lora_2e-4_no_sft"} <= results.keys():
        difference = _change(results["lora_2e-4_no_sft"]) - _change(results["lora_2e-4"])
        value, interval = mean_with_interval(difference)
        if value is not None and interval is not None and interval[1] < 0:
            lines.append(
                f"Without the SFT loss, the change is {-value:.3f} smaller: in so few steps, the policy learns from "
                "the judge's improved completions first."
            )
    return lines


def _replies(results: Results) -> str:
    """Return a reply of each policy to the first held-out question."""
    question = next(iter(results.values()))["samples_after"][0][0]
    lines = [f"The first sample of each, after training, for the held-out question *{question}*", ""]
    lines += ["| row | reply |", "| --- | --- |"]
    for name, run in results.items():
        reply = " ".join(run["samples_after"][0][1].split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {reply or '(empty)'} |")
    return "\n".join(lines)


def _control(name: str) -> str | None:
    """Return the row with the random judge for the same weights."""
    if CONFIGURATIONS[name].random_judge:
        return None
    return "lora_2e-4_random_judge" if CONFIGURATIONS[name].lora else "full_2e-5_random_judge"


def _change(run: Mapping[str, Any]) -> np.ndarray:
    """Return the change of the score `(B,)` of each held-out question."""
    change: np.ndarray = np.array(run["held_out_after"]) - np.array(run["held_out_before"])
    return change


def _minus_control(results: Results, name: str) -> Estimate:
    control = _control(name)
    if control is None or control not in results:
        return None, None
    return mean_with_interval(_change(results[name]) - _change(results[control]))


def _draw(results: Results, path: Path) -> None:
    """Draw the score of the policy's samples, a point per window of steps on the same prompts, as an SVG."""
    figure = new_figure(9, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, lora, title in zip(panels, (True, False), ("LoRA", "All weights"), strict=True):
        names = [name for name in results if CONFIGURATIONS[name].lora == lora]
        for index, name in enumerate(names):
            scores = np.array(results[name]["scores_by_step"])
            windows = scores[: len(scores) // WINDOW * WINDOW].reshape(-1, WINDOW).mean(1)
            steps = WINDOW * (np.arange(len(windows)) + 1)
            random = CONFIGURATIONS[name].random_judge
            colour = GREY if random else (BLUE, ORANGE, "#3a9d6a", "#a45ac0", "#c0466a", "#8a7a2a")[index % 6]
            axes.plot(steps, windows, color=colour, linestyle="--" if random else "-", linewidth=1.8, label=name)
        style(axes, f"{title}: score of the policy's samples")
        axes.set_xlabel("optimiser step", color=GREY)
        axes.set_ylim(0, 1)
        if names:
            axes.legend(frameon=False, labelcolor=GREY, fontsize=7, loc="lower left")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Write docs/settings.md and its figure from the stored results.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the results. Default: %(default)s.")
    parser.add_argument("--docs", type=Path, default=DOCS, help="Folder of the page. Default: %(default)s.")
    args = parser.parse_args(argv)
    write_page(args.results, args.docs)


if __name__ == "__main__":
    main()
