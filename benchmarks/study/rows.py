"""The rows of the study: what is trained, on what, and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["none", "best_of_4", "sft", "ranking", "dpo", "dpo_on_export", "cyclealign", "dlma", "aligner"]
Judge = Literal["reward model", "random"]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        method: How the policy is made: a key of `methods.METHODS`.
        about: What the row is, for the page.
        control: Row that a gain is compared with, in addition to `zero_shot`.
        judge: Who ranks during training.
        settings: Settings of the method that differ from its defaults in this study.
        needs: Row that has to be finished before, with the same seed if it depends on one.
        seeded: Whether the row depends on the seed.
    """

    method: Method
    about: str
    control: str | None = None
    judge: Judge | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None
    seeded: bool = True


_CYCLE = {"loss_type": "pro", "num_interactions": 3}

ROWS: dict[str, Row] = {
    "zero_shot": Row("none", "the initial policy", seeded=False),
    "cyclealign_pro": Row(
        "cyclealign", "CycleAlign with PRO, 3 interactions", "random_judge", "reward model", _CYCLE
    ),
    "random_judge": Row(
        "cyclealign", "the same with random rankings and a random improved completion", None, "random", _CYCLE
    ),
    "cyclealign_rrhf": Row(
        "cyclealign", "CycleAlign with RRHF, 3 interactions", "random_judge", "reward model",
        {**_CYCLE, "loss_type": "rrhf"},
    ),
    "pro": Row("ranking", "PRO on HH-RLHF's pairs", "sft", settings={"loss_type": "pro"}),
    "dpo": Row("dpo", "DPO (TRL) on HH-RLHF's pairs", "sft"),
    "sft": Row("sft", "SFT (TRL) on HH-RLHF's chosen completions"),
    "rrhf": Row("ranking", "RRHF on HH-RLHF's pairs", "sft", settings={"loss_type": "rrhf"}),
    "best_of_4": Row(
        "best_of_4", "the judge's choice of 4 samples of the initial policy", "random_of_4", "reward model"
    ),
    "random_of_4": Row("best_of_4", "the random judge's choice of the same 4 samples", judge="random"),
    "dpo_on_export": Row(
        "dpo_on_export", "DPO (TRL) on what `cyclealign export` writes for `cyclealign_pro`", "dpo_on_random_export",
        "reward model", needs="cyclealign_pro",
    ),
    "dpo_on_random_export": Row(
        "dpo_on_export", "DPO (TRL) on what `cyclealign export` writes for `random_judge`", None, "random",
        needs="random_judge",
    ),
    "cyclealign_pro_1": Row(
        "cyclealign", "CycleAlign with PRO, 1 interaction per prompt, as many calls", "cyclealign_pro",
        "reward model", {**_CYCLE, "num_interactions": 1},
    ),
    "cyclealign_pro_5": Row(
        "cyclealign", "CycleAlign with PRO, 5 interactions per prompt, as many calls", "cyclealign_pro",
        "reward model", {**_CYCLE, "num_interactions": 5},
    ),
    "dlma": Row("dlma", "DLMA, which asks nobody"),
    "aligner": Row("aligner", "Aligner on HH-RLHF's pairs, correcting `zero_shot`", needs="zero_shot"),
}  # fmt: skip
"""Rows by name, the most important first."""
