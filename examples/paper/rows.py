"""Rows of the tables in the CycleAlign paper (arXiv 2310.16271), and what it reports for each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parent / "configs"
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
"""Columns of the tables. A total follows, over all test prompts."""
REWARD_MODEL = "OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1"
"""Reward model of the paper's evaluation."""
RECORD = "row.json"
"""File in the folder of a row: the model and the arguments that it was started with."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table.

    Args:
        method: Method, as the tables name it.
        backbone: Model that is trained.
        config: Name of the configuration in `configs/`. `None` for a row that is only cited.
        command: Command of `cyclealign` that trains it. `None` evaluates the model as it is.
        reported: Mean reward on each subset, and the total, as the paper reports them. `None` if it has no such row.
        overrides: Arguments that differ from the configuration.
        conversational: Whether prompts are messages. The paper's models read dialogues as plain text.
    """

    method: str
    backbone: str
    config: str | None
    command: str | None = None
    reported: tuple[float, ...] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    conversational: bool = False

    @property
    def model(self) -> str:
        """Name of the model that is trained, from the configuration."""
        return str(self.read_config()["model_name_or_path"])

    def read_config(self) -> dict[str, Any]:
        """Return the arguments of the training."""
        config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{self.config}.yaml").read_text(encoding="utf-8"))
        return config | self.overrides


TABLE_1: dict[str, Row] = {
    "zero_shot_llama": Row("zero-shot", "LLaMA-7B", "zero_shot_llama", reported=(53.59, 33.25, 40.48, 36.23, 40.67)),
    "zero_shot_alpaca": Row(
        "zero-shot", "Alpaca-7B", "zero_shot_alpaca", reported=(52.77, 53.85, 55.30, 55.43, 54.26)
    ),
    # Needs code from the model's repository, which we do not run.
    "zero_shot_chatglm": Row("zero-shot", "ChatGLM-6B", None, reported=(67.26, 62.14, 60.44, 63.86, 63.85)),
    # The version that the paper asked is not known.
    "zero_shot_chatgpt": Row("zero-shot", "ChatGPT", None, reported=(72.19, 68.28, 69.85, 71.02, 70.43)),
    # PRO's paper reports this row, without code or settings.
    "ppo_llama": Row("PPO", "LLaMA-7B", None, reported=(61.97, 55.29, 59.78, 58.26, 58.65)),
    "rrhf_llama": Row("RRHF", "LLaMA-7B", "rrhf_llama", "train-ranked", reported=(64.63, 61.38, 63.26, 63.28, 63.12)),
    "cyclealign_rrhf_llama": Row(
        "CycleAlign_RRHF",
        "LLaMA-7B",
        "cyclealign_rrhf_llama",
        "train",
        reported=(71.66, 67.05, 65.89, 67.95, 68.43),
    ),
    "pro_llama": Row("PRO", "LLaMA-7B", "pro_llama", "train-ranked", reported=(72.86, 64.05, 65.56, 66.44, 67.40)),
    "cyclealign_pro_llama": Row(
        "CycleAlign_PRO", "LLaMA-7B", "cyclealign_pro_llama", "train", reported=(70.62, 66.49, 67.67, 68.50, 68.41)
    ),
    "pro_alpaca": Row("PRO", "Alpaca-7B", "pro_alpaca", "train-ranked", reported=(73.13, 64.56, 65.60, 66.51, 67.64)),
    "cyclealign_pro_alpaca": Row(
        "CycleAlign_PRO", "Alpaca-7B", "cyclealign_pro_alpaca", "train", reported=(71.32, 67.89, 66.53, 68.92, 68.97)
    ),
}

TABLE_4: dict[str, Row] = {
    "cyclealign_pro_alpaca": TABLE_1["cyclealign_pro_alpaca"],
    "without_d2": Row(
        "CycleAlign_PRO w/o D2", "Alpaca-7B", "without_d2", "train", reported=(71.77, 65.37, 64.99, 66.34, 67.36)
    ),
    "without_icl": Row(
        "CycleAlign_PRO w/o ICL", "Alpaca-7B", "without_icl", "train", reported=(71.96, 64.37, 64.03, 65.93, 66.88)
    ),
}

# The paper shows this as a curve that rises up to 5 interactions and falls after them; its values are not printed.
# With 5 interactions, it is the row of Table 1.
FIGURE_5: dict[str, Row] = {
    name: TABLE_1.get(name)
    or Row(
        f"CycleAlign_PRO, T = {number}",
        "Alpaca-7B",
        "cyclealign_pro_alpaca",
        "train",
        overrides={"num_interactions": number},
    )
    for number in range(1, 8)
    for name in ["cyclealign_pro_alpaca" if number == 5 else f"interactions_{number}"]
}

MODERN: dict[str, Row] = {
    "zero_shot_qwen3": Row("zero-shot", "Qwen3-4B", "zero_shot_qwen3", conversational=True),
    "cyclealign_pro_qwen3": Row("CycleAlign_PRO", "Qwen3-4B", "cyclealign_pro_qwen3", "train", conversational=True),
}

TABLES = {"Table 1: mean reward": TABLE_1, "Table 4: ablation": TABLE_4, "A modern pair": MODERN}
ROWS: dict[str, Row] = {**TABLE_1, **TABLE_4, **FIGURE_5, **MODERN}
