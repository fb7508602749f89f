"""Markdown tables of a judge report, aligned to be readable on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .markdown_table import markdown_table
from .metrics.ranking_agreement import FIGURES

Figures = Mapping[str, Any]
"""An entry of `JudgeReport.figures`."""

_LABELS = dict(zip(FIGURES, ("Pairwise accuracy", "Exact match", "Top-1", "Kendall's tau-b"), strict=True))


def figures_table(title: str, figures: Sequence[Figures]) -> str:
    """Return a table of all figures, with a column for each number of demonstrations."""
    rows = {label: [_with_interval(entry["agreement"], name) for entry in figures] for name, label in _LABELS.items()}
    rows["Earlier shown preferred"] = [
        _with_interval(entry["position_bias"], "earlier_preferred") for entry in figures
    ]
    rows["Position bias"] = [_bias_test(entry["position_bias"]) for entry in figures]
    if any(entry["reversal"] for entry in figures):
        for name, label in (("pairs", "Pairs flipped"), ("first_place", "First place flipped")):
            rows[f"{label} in reverse"] = [_with_interval(entry["reversal"], name) for entry in figures]
    rows["Failures"] = [_failures(entry) for entry in figures]
    rows["Latency p50 / p90 / p99 (s)"] = [_latency(entry["latency"]) for entry in figures]
    rows["Tokens in + out per ranking"] = [_tokens(entry) for entry in figures]
    rows["US dollars per 1,000 rankings"] = [_cost(entry) for entry in figures]
    return markdown_table([title, *_column_titles(figures)], rows)


def subsets_table(sizes: Mapping[str, int], figures: Sequence[Figures]) -> str:
    """Return a table of the agreement by subset.

    Args:
        sizes: Number of rows by subset.
        figures: `JudgeReport.figures`.
    """
    rows = {
        f"{subset} ({sizes[subset]})": [
            " / ".join(_number(entry["subsets"][subset][name]) for name in FIGURES) for entry in figures
        ]
        for subset in sorted(sizes)
    }
    return markdown_table(["Subset (rows): accuracy / exact / top-1 / tau", *_column_titles(figures)], rows)


def positions_table(figures: Sequence[Figures]) -> str:
    """Return a table of position bias by shown position.

    Each cell shows the share of the other completions that the completion at the position beats (0.5 without bias),
    how often it is ranked first, and in parentheses how often it is ranked first without bias.
    """
    names = ("placement_by_position", "first_place_by_position", "expected_by_position")
    columns = [
        [
            f"{placement:.3f} / {first_place:.3f} ({expected:.3f})"
            for placement, first_place, expected in zip(*(entry["position_bias"][name] for name in names), strict=True)
        ]
        for entry in figures
    ]
    rows = {
        str(position + 1): [column[position] if position < len(column) else "-" for column in columns]
        for position in range(max(map(len, columns)))
    }
    return markdown_table(["Shown position: beats / is first (without bias)", *_column_titles(figures)], rows)


def _column_titles(figures: Sequence[Figures]) -> list[str]:
    counts = [entry["num_demonstrations"] for entry in figures]
    return [f"{count} demonstration{'s' * (count != 1)}" for count in counts]


def _bias_test(position_bias: Figures) -> str:
    if position_bias["biased"] is None:
        return "-"
    return f"{'' if position_bias['biased'] else 'not '}found (p = {position_bias['p_value']:.3f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _with_interval(figures: Figures, name: str) -> str:
    value, interval = figures.get(name), figures.get(f"{name}_interval")
    return "-" if value is None or interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _failures(figures: Figures) -> str:
    reasons = ", ".join(f"{reason} {count / figures['rankings']:.1%}" for reason, count in figures["failures"].items())
    return f"{figures['failure_rate']:.1%}" + (f" ({reasons})" if reasons else "")


def _latency(latency: Mapping[str, float] | None) -> str:
    return "-" if latency is None else " / ".join(f"{seconds:.2f}" for seconds in latency.values())


def _tokens(figures: Figures) -> str:
    usage, count = figures["usage"], figures["rankings"]
    return f"{usage['prompt_tokens'] / count:,.0f} + {usage['completion_tokens'] / count:,.0f}"


def _cost(figures: Figures) -> str:
    cost = figures["usage"]["cost"]
    return "unpriced" if cost is None else f"{1000 * cost / figures['rankings']:,.2f}"
