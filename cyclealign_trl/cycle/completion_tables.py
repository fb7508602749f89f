"""Tables of completions with both orders: printed, and sent to trackers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from .._compat import print_prompt_completions_sample
from ..chat.replies import printable
from ..types import Prompt
from .step_metrics import InteractionRecord

MAX_PRINTED = 8  # prompts in a printed table
TABLE = "completions"
"""Name of the table in a tracker."""


def print_completions(records: Sequence[InteractionRecord], step: int) -> None:
    """Print a table of up to `MAX_PRINTED` prompts, with each completion's place in both orders. Needs `rich`."""
    columns: dict[str, list[Any]] = {"prompt": [], "completion": [], "ranker": [], "policy": [], "agreed": []}
    for record in records[:MAX_PRINTED]:
        for row in _rows(record):
            columns["prompt"].append(_printable_prompt(record.result.prompt))
            columns["completion"].append(row["completion"])
            columns["ranker"].append(row["failure"] or str(row["ranker_rank"]))
            columns["policy"].append("" if row["policy_rank"] is None else str(row["policy_rank"]))
            columns["agreed"].append("yes" if row["agreed"] else "")
    print_prompt_completions_sample(columns.pop("prompt"), columns.pop("completion"), {}, None, step, extra=columns)


def track_completions(
    records: Sequence[InteractionRecord],
    step: int,
    report_to: Iterable[str],
    callbacks: Iterable[TrainerCallback],
) -> None:
    """Send a table of all prompts to W&B, trackio and TensorBoard, as far as `report_to` names them.

    Cells are plain text: a prompt or completion cannot add markup to the page of a tracker.

    Args:
        records: Records of a step.
        step: The step.
        report_to: Names of trackers.
        callbacks: Callbacks of the trainer, one of which has the writer of TensorBoard.
    """
    rows = [{"step": step, **row} for record in records for row in _rows(record)]
    if not rows:
        return
    columns = list(rows[0])
    cells: list[list[Any]] = [list(row.values()) for row in rows]
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            wandb.log({TABLE: wandb.Table(columns, cells), "train/global_step": step})
    if "trackio" in report_to:
        import trackio

        trackio.log({TABLE: trackio.Table(columns, cells), "train/global_step": step})
    if "tensorboard" in report_to:
        text = _markdown_table(columns, cells)
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(TABLE, text, step)
                callback.tb_writer.flush()


def _rows(record: InteractionRecord) -> list[dict[str, Any]]:
    """Return one row per completion, in the policy's order if there is one. Ranks count from 1."""
    result = record.result
    order, improved = result.white_box_order, result.improved_completion
    return [
        {
            "prompt": _as_text(result.prompt),
            "completion": printable(result.completions[index]),
            "ranker_rank": None if result.ranks is None else result.ranks[index] + 1,
            "policy_rank": place if order else None,
            "agreed": index in (result.agreement or ()),
            "improved_completion": None if improved is None else printable(improved),
            "failure": result.failure,
        }
        for place, index in enumerate(order or range(len(result.completions)), start=1)
    ]


def _as_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return printable(prompt)
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in _printable_prompt(prompt))


def _printable_prompt(prompt: Prompt) -> Any:
    if isinstance(prompt, str):
        return printable(prompt)
    return [{**message, "content": printable(message["content"])} for message in prompt]


def _markdown_table(columns: Sequence[str], cells: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table. TensorBoard renders Markdown, images from other hosts included."""
    lines = [[_literal(name) for name in columns], ["---"] * len(columns)]
    lines += [["" if cell is None else _literal(str(cell)) for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _literal(text: str) -> str:
    """Return text that Markdown and HTML show as it is: letters, digits, and character references."""
    return "".join(
        letter if letter.isalnum() or letter == " " else "<br>" if letter == "\n" else f"&#{ord(letter)};"
        for letter in text
    )
