"""One short line per log on the console. Trackers and the log history get all metrics."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..chat.replies import printable

WIDTH = 120  # columns of a line where the terminal has as many, or where there is no terminal
_METRICS = {
    "loss": "loss",
    "train_loss": "mean loss",
    "train_runtime": "seconds",
    "agreement/rate": "agreement",
    "ranking/accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "mean_token_accuracy": "accuracy",
    "win_rate/rate": "win rate",
    "win_rate/failed": "failed",
    "ranking_accuracy/full": "ranker accuracy",
    "ranking_accuracy/without_d2": "without D2",
    "ranking_accuracy/without_icl": "without ICL",
    "ranking_accuracy/failed": "failed",
    "reward": "reward",
    "rewards/margins": "margin",
    "ranking/margin": "margin",
    "completions/mean_length": "length",
    "identity_warmup": "warm-up",
    "learning_rate": "lr",
    "grad_norm": "grad",
}
"""Metrics on a line and their names there, the most important first."""
_OF_TRAINER = ("epoch", "total_flos")


class _ShortLine:
    """Writes the line of a log, with the cost of the whole run so far."""

    def __init__(self) -> None:
        self._cost, self._num_logs = 0.0, 0

    def __call__(self, logs: Mapping[str, Any], state: TrainerState) -> str:
        """Return a line that fits the terminal. Metrics that are 0 are left out, and so are those without room."""
        line = f"step {state.global_step}/{state.max_steps}"
        if logs.get("epoch") is not None:
            line += f"  epoch {logs['epoch']:.2f}"
        width = min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
        for part in self._parts(logs, state):
            if len(line) + 2 + len(part) > width:
                break
            line += f"  {part}"
        return printable(line).replace("\n", " ")

    def _parts(self, logs: Mapping[str, Any], state: TrainerState) -> Iterator[str]:
        losses = [name for name in logs if name.startswith("eval_") and name.endswith("_loss")]
        prefix = min(losses, key=len).removesuffix("loss") if losses else ""  # `eval_`, or with the data set's name
        own = {name.removeprefix(prefix): value for name, value in logs.items() if name not in _OF_TRAINER}
        if prefix:
            yield prefix.rstrip("_").replace("_", " ")
        shown = [name for name in _METRICS if _is_used(name, own.get(name))]
        for name in shown[:1]:
            yield _part(name, own)
        for name, value in own.items():
            if name.startswith("failures/") and value:
                yield f"{name.removeprefix('failures/')} {value:,.0f}"
        if cost := self._spent(state):
            yield f"cost ${cost:,.4f}"
        for name in shown[1:]:
            yield _part(name, own)
        if not shown:  # metrics of another callback
            for name, value in own.items():
                if _is_used(name, value):
                    yield f"{name} {_rounded(value)}"

    def _spent(self, state: TrainerState) -> float:
        """Return the dollars in the whole log."""
        if self._num_logs > len(state.log_history):  # of another run
            self._cost, self._num_logs = 0.0, 0
        for log in state.log_history[self._num_logs :]:
            self._cost += sum(value for name, value in log.items() if name.endswith("/cost"))
        self._num_logs = len(state.log_history)
        return self._cost


class ShortProgressCallback(ProgressCallback):
    """Progress bar of the Trainer, with one line per log."""

    def __init__(self) -> None:
        super().__init__()
        self._line = _ShortLine()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line above the bar."""
        if state.is_world_process_zero and self.training_bar is not None and logs and _is_wanted(args):
            self.training_bar.write(self._line(logs, state))


class ShortPrinterCallback(PrinterCallback):
    """One line per log, without a progress bar."""

    def __init__(self) -> None:
        self._line = _ShortLine()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line."""
        if state.is_world_process_zero and logs and _is_wanted(args):
            print(self._line(logs, state), flush=True)


def shorten_console(trainer: Trainer) -> None:
    """Replace the callbacks of the Trainer that print all metrics, but none of the user's own."""
    short: dict[type[TrainerCallback], type[TrainerCallback]] = {
        ProgressCallback: ShortProgressCallback,
        PrinterCallback: ShortPrinterCallback,
    }
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [short[type(each)]() if type(each) in short else each for each in callbacks]


def _is_wanted(args: TrainingArguments) -> bool:
    return bool(args.get_process_log_level() <= logging.WARNING)


def _is_used(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and (value != 0 or name in ("loss", "win_rate/rate"))


def _part(name: str, logs: Mapping[str, Any]) -> str:
    text = f"{_METRICS[name]} {_rounded(logs[name], name)}"
    low, high = (logs.get(f"{name.rpartition('/')[0]}/{bound}") for bound in ("low", "high"))
    if name.endswith("/rate") and low is not None and high is not None:
        text += f" [{low:.2f}, {high:.2f}]"
    return text


def _rounded(value: float, name: str = "") -> str:
    if name == "learning_rate":
        return f"{value:.1e}"
    return (
        f"{value:,.0f}" if isinstance(value, int) or name.endswith("/failed") or abs(value) >= 1000 else f"{value:.3f}"
    )
