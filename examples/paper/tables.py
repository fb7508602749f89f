"""Assemble the tables of the CycleAlign paper from the rows that `run.py` has finished, beside the paper's numbers.

    python examples/paper/tables.py

Prints the tables as Markdown, writes them to `tables.md` in the folder of the results, and plots Figure 5 into
`figure_5.png` if matplotlib is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import FIGURE_5, RECORD, REWARD_MODEL, SUBSETS, TABLES, Row

from cyclealign_trl.evaluation.markdown_table import markdown_table, printable

COLUMNS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection", "total")
NOT_RUN = ("not run yet", *["-"] * 4)


@dataclass(frozen=True, slots=True)
class Result:
    """Our numbers of a row.

    Args:
        figures: Mean reward on each subset and in total: `mean`, its `interval`, and the `count` of replies.
        notes: Differences from the paper's row.
    """

    figures: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    def cells(self) -> list[str]:
        """Return the means with their intervals."""
        return ["-" if figure["mean"] is None else _with_interval(figure) for figure in self.figures]


def read_result(results: Path, name: str, row: Row) -> Result | None:
    """Return our numbers of a row, or `None` if it is not finished.

    Raises:
        ValueError: If the evaluation is not one of the row on the four subsets.
    """
    file = results / name / "evaluation" / "report.json"
    if not file.exists():
        return None
    report = json.loads(file.read_text(encoding="utf-8"))
    if report["transform"] != "sigmoid" or name not in report["models"] or set(report["groups"]) != set(SUBSETS):
        raise ValueError(
            f"{file} has models {[*report['models']]}, groups {[*report['groups']]} and transform "
            f"{report['transform']!r}. A row needs {name!r}, {SUBSETS} and 'sigmoid': delete its folder "
            "`evaluation` and run it again with run.py."
        )
    model = report["models"][name]
    figures = (*(model["groups"][subset] for subset in SUBSETS), model["micro"])
    return Result(figures, (*_run_notes(results / name, row), *_evaluation_notes(report, model)))


def table(title: str, rows: dict[str, Row], results: dict[str, Result | None]) -> str:
    """Return a table with the paper's and our numbers of each row, and notes on ours."""
    lines: dict[str, Sequence[str]] = {}
    notes = []
    for name, row in rows.items():
        label = f"{row.method}, {row.backbone}"
        if row.reported is not None:
            lines[f"{label}, paper{' (cited)' if row.config is None else ''}"] = [
                f"{value:.2f}" for value in row.reported
            ]
        if row.config is not None:
            result = results[name]
            if result is None:
                lines[f"{label}, ours"] = NOT_RUN
            elif result.notes:
                lines[f"{label}, ours (see below)"] = result.cells()
                notes.append(f"- {name}: {printable('; '.join(result.notes))}.")
            else:
                lines[f"{label}, ours"] = result.cells()
    text = markdown_table([title, *COLUMNS], lines)
    if any(results[name] is not None for name in rows):
        text += "\n\nOurs with 95% bootstrap intervals over prompts."
    return "\n\n".join([text, "\n".join(notes)]) if notes else text


def plot_figure_5(results: dict[str, Result | None], path: Path) -> None:
    """Plot the total over the number of interactions."""
    from matplotlib.figure import Figure

    points = sorted(
        (row.read_config()["num_interactions"], result.figures[-1])
        for name, row in FIGURE_5.items()
        if (result := results[name]) is not None and result.figures[-1]["mean"] is not None
    )
    means = [figure["mean"] for _, figure in points]
    # A percentile interval does not always contain the mean, and bars must not have a negative length.
    bars = [
        [max(0.0, figure["mean"] - figure["interval"][0]) for _, figure in points],
        [max(0.0, figure["interval"][1] - figure["mean"]) for _, figure in points],
    ]
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.errorbar([number for number, _ in points], means, bars, color="#2a6f97", marker="o", capsize=2, label="ours")
    five = FIGURE_5["cyclealign_pro_alpaca"].reported
    assert five is not None
    axes.plot([5], [five[-1]], "D", color="#bc6c25", label="paper, Table 1")
    axes.set(xlabel="Interactions per prompt", ylabel="Mean reward, total", xticks=range(1, len(FIGURE_5) + 1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=144)


def main(argv: Sequence[str]) -> None:
    """Print and write the tables, and plot Figure 5."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("outputs/paper"), help="Folder of all rows.")
    folder = parser.parse_args(argv).results
    if not folder.is_dir():
        parser.error(f"there is no folder {folder}. Run a row first, or name the folder with --results.")
    tables = TABLES | {"Figure 5: number of interactions": FIGURE_5}
    try:
        results = {name: read_result(folder, name, row) for rows in tables.values() for name, row in rows.items()}
    except ValueError as error:
        parser.error(str(error))
    text = "\n\n".join(table(title, rows, results) for title, rows in tables.items())
    (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    written = ["tables.md"]
    if importlib.util.find_spec("matplotlib") is None:
        print("\nFigure 5 is not plotted, because matplotlib is not installed: pip install 'cyclealign-trl[report]'.")
    elif any(results[name] is not None for name in FIGURE_5):
        plot_figure_5(results, folder / "figure_5.png")
        written.append("figure_5.png")
    print(f"\nWritten to {folder}: {', '.join(written)}.")


def _with_interval(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure['mean']:.2f} [{low:.2f}, {high:.2f}]"


def _run_notes(folder: Path, row: Row) -> list[str]:
    """Return how a run differs from the configuration of its row."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    notes = []
    if record["model"] != row.model:
        notes.append(f"model {record['model']}")
    if record["arguments"]:
        notes.append(" ".join(f"--{name} {value}" for name, value in record["arguments"].items()))
    if record.get("train_split", "train") != "train":
        notes.append(f"trained on the {record['train_split']} split")
    if record.get("num_prompts", 1000) != 1000:
        notes.append(f"{record['num_prompts']} training prompts")
    return notes


def _evaluation_notes(report: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Return how an evaluation differs from the paper's, apart from the dropped dialogues."""
    notes = []
    if report["reward_model"] != REWARD_MODEL:
        notes.append(f"reward model {report['reward_model']}")
    if any(group["prompts"] < group["size"] for group in report["groups"].values()):
        counts = "/".join(str(report["groups"][subset]["prompts"]) for subset in SUBSETS)
        notes.append(f"{counts} test prompts per subset")
    if model["failed"] or model["unscored"]:
        notes.append(f"{model['failed'] + model['unscored']} replies without a score")
    return notes


if __name__ == "__main__":
    main(sys.argv[1:])
