"""The figures of a judge's report as tables in Markdown, which read as well on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .metrics.ranking_agreement import FIGURES

Figures = Mapping[str, Any]
"""An entry of `JudgeReport.figures`."""

_TITLES = dict(zip(FIGURES, ("Pairwise accuracy", "Exact match", "Top-1", "Kendall's tau-b"), strict=True))


def figures_table(title: str, figures: Sequence[Figures]) -> str:
    """All figures, a column for each number of demonstrations."""
    rows = {name: [_with_interval(one["agreement"], key) for one in figures] for key, name in _TITLES.items()}
    rows["Earlier shown preferred"] = [_with_interval(one["position_bias"], "earlier_preferred") for one in figures]
    rows["Position bias"] = [_verdict(one["position_bias"]) for one in figures]
    if any(one["reversal"] for one in figures):
        for key, name in (("pairs", "Pairs flipped"), ("first_place", "First place flipped")):
            rows[f"{name} in reverse"] = [_with_interval(one["reversal"], key) for one in figures]
    rows["Failures"] = [_failures(one) for one in figures]
    rows["Latency p50 / p90 / p99 (s)"] = [_latency(one["latency"]) for one in figures]
    rows["Tokens in + out per ranking"] = [_tokens(one) for one in figures]
    rows["US dollars per 1,000 rankings"] = [_cost(one) for one in figures]
    return _table([title, *_heads(figures)], rows)


def subsets_table(sizes: Mapping[str, int], figures: Sequence[Figures]) -> str:
    """Agreement by subset, of which `sizes` has the numbers of rows."""
    rows = {
        f"{name} ({sizes[name]})": [
            " / ".join(_number(one["subsets"][name][key]) for key in FIGURES) for one in figures
        ]
        for name in sorted(sizes)
    }
    return _table(["Subset (rows): accuracy / exact / top-1 / tau", *_heads(figures)], rows)


def positions_table(figures: Sequence[Figures]) -> str:
    """What the ranker likes by shown position: of the completions there, the share of the others that each beats (0.5
    without bias), and how often it comes first (and how often without bias).
    """
    names = ("placement_by_position", "first_place_by_position", "expected_by_position")
    columns = [
        [
            f"{placed:.3f} / {first:.3f} ({expected:.3f})"
            for placed, first, expected in zip(*(one["position_bias"][name] for name in names), strict=True)
        ]
        for one in figures
    ]
    rows = {
        str(position + 1): [column[position] if position < len(column) else "-" for column in columns]
        for position in range(max(map(len, columns)))
    }
    return _table(["Shown position: beats / is first (without bias)", *_heads(figures)], rows)


def _heads(figures: Sequence[Figures]) -> list[str]:
    numbers = (one["num_demonstrations"] for one in figures)
    return [f"{number} demonstration{'s' * (number != 1)}" for number in numbers]


def _table(head: Sequence[str], rows: dict[str, list[str]]) -> str:
    """Markdown that can be read as it is: columns of one width."""
    lines = [list(head), *([title, *cells] for title, cells in rows.items())]
    lines = [[_cell(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _cell(text: str) -> str:
    """Names come from data: what would break the table, or drive a terminal, is shown as a question mark."""
    return "".join(letter if letter.isprintable() and letter != "|" else "?" for letter in text)


def _verdict(position_bias: Figures) -> str:
    if position_bias["biased"] is None:
        return "-"
    return f"{'' if position_bias['biased'] else 'not '}found (p = {position_bias['p_value']:.3f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _with_interval(figures: Figures, name: str) -> str:
    value, interval = figures.get(name), figures.get(f"{name}_interval")
    return "-" if value is None or interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _failures(figures: Figures) -> str:
    kinds = ", ".join(f"{kind} {count / figures['rankings']:.1%}" for kind, count in figures["failures"].items())
    return f"{figures['failure_rate']:.1%}" + (f" ({kinds})" if kinds else "")


def _latency(latency: Mapping[str, float] | None) -> str:
    return "-" if latency is None else " / ".join(f"{seconds:.2f}" for seconds in latency.values())


def _tokens(figures: Figures) -> str:
    usage, count = figures["usage"], figures["rankings"]
    return f"{usage['prompt_tokens'] / count:,.0f} + {usage['completion_tokens'] / count:,.0f}"


def _cost(figures: Figures) -> str:
    cost = figures["usage"]["cost"]
    return "unpriced" if cost is None else f"{1000 * cost / figures['rankings']:,.2f}"
