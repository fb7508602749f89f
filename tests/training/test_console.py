"""One line per log on the console, and all metrics in the log history."""

import logging
import re
from types import SimpleNamespace

import pytest
from transformers import PrinterCallback, ProgressCallback

from cyclealign_trl.training.console import WIDTH, ShortPrinterCallback, ShortProgressCallback, _ShortLine
from tests.aligner.test_aligner_trainer import make_trainer as make_aligner_trainer
from tests.cycle.stubs import DigestRanker, make_trainer, prompts


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_log_is_one_short_line(tmp_path, capsys, disable_tqdm):
    ranker = DigestRanker(fail=lambda request: "timeout" if request.metadata["topic"] == 3 else None)
    trainer = make_trainer(
        tmp_path, ranker, eval_dataset=prompts(2), eval_strategy="steps", eval_steps=4, disable_tqdm=disable_tqdm
    )
    trainer.train()
    printed = lines(capsys)
    assert len(printed) == len(trainer.state.log_history) == 8 + 2 + 1
    assert all(len(line) <= WIDTH for line in printed)
    assert re.fullmatch(r"step 1/8  epoch 0\.12  loss \d+\.\d{3}  (timeout 1  )?agreement [01]\.\d{3}  .*", printed[0])
    assert sum("timeout 1" in line for line in printed) == 2
    assert "improved" not in "".join(printed)
    assert re.match(r"step 4/8  epoch 0\.50  eval  loss \d+\.\d{3}  ", printed[4])
    assert re.match(r"step 8/8  epoch 1\.00  mean loss \d+\.\d{3}  seconds ", printed[-1])
    assert {"improved/cut_ratio", "time/generate", "pool/size"} <= trainer.state.log_history[0].keys()


def test_a_line_fits_a_narrow_terminal(monkeypatch):
    logs = {"loss": 2.0, "agreement/rate": 0.25, "rewards/margins": 0.5, "learning_rate": 5e-6, "grad_norm": 1.0}
    monkeypatch.setenv("COLUMNS", "40")
    assert line(logs) == "step 5/10  loss 2.000  agreement 0.250"


def test_every_trainer_prints_short_lines(tmp_path, capsys):
    make_aligner_trainer(tmp_path, max_steps=4).train()
    assert re.match(
        r"step 1/4  epoch 0\.20  loss \d+\.\d{3}  (accuracy 0\.\d{3}  )?warm-up 1\.000  ", lines(capsys)[0]
    )


@pytest.mark.parametrize(
    ("changes", "kind"), [({}, ShortPrinterCallback), ({"disable_tqdm": False}, ShortProgressCallback)]
)
def test_callbacks_of_the_user_stay(tmp_path, changes, kind):
    class Own(PrinterCallback):
        pass

    trainer = make_trainer(tmp_path, callbacks=[Own()], **changes)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert Own in kinds
    assert kind in kinds
    trainer.remove_callback(kind.__base__ if kind is ShortProgressCallback else kind)
    assert not any(isinstance(each, kind | ProgressCallback) for each in trainer.callback_handler.callbacks)


@pytest.mark.parametrize(("level", "printed"), [("passive", True), ("info", True), ("error", False)])
def test_the_log_level_counts(tmp_path, capsys, level, printed):
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    make_trainer(tmp_path, log_level=level, max_steps=1).train()
    transformers_logging.set_verbosity(before)
    assert bool(lines(capsys)) == printed
    assert logging.getLogger("transformers").level == before


def line(logs, history=(), step=5):
    return _ShortLine()(logs, SimpleNamespace(global_step=step, max_steps=10, log_history=list(history)))


def test_important_metrics_come_first():
    logs = {
        "grad_norm": 1.0, "loss": 2.0, "failures/timeout": 3.0, "ranker/cost": 0.5, "agreement/rate": 0.25,
        "learning_rate": 5e-6, "completions/clipped_ratio": 0.0, "epoch": 0.5,
    }  # fmt: skip
    history = [{"ranker/cost": 1.0, "step": 1}, {"win_rate/cost": 0.25}, logs]
    assert line(logs, history) == (
        "step 5/10  epoch 0.50  loss 2.000  timeout 3  cost $1.7500  agreement 0.250  lr 5.0e-06  grad 1.000"
    )


def test_lines_of_the_callbacks():
    rate = {"win_rate/failed": 2.0, "win_rate/rate": 0.72, "win_rate/low": 0.661, "win_rate/high": 0.78}
    assert line(rate) == "step 5/10  win rate 0.720 [0.66, 0.78]  failed 2"
    assert line(rate | {"win_rate/rate": 0.0}).startswith("step 5/10  win rate 0.000 [")
    accuracy = {"ranking_accuracy/failed": 0.0, "ranking_accuracy/full": 0.8, "ranking_accuracy/without_d2": 0.7}
    assert line(accuracy) == "step 5/10  ranker accuracy 0.800  without D2 0.700"
    assert line({"own/metric": 3, "other": 0.5}) == "step 5/10  own/metric 3  other 0.500"


def test_a_line_never_gets_longer_and_has_no_control_characters():
    text = line({"loss": 1.0, **{f"failures/\x1b[31m{index}": 1.0 for index in range(40)}})
    assert len(text) <= WIDTH
    assert "\x1b" not in text
    assert text.startswith("step 5/10  loss 1.000  \ufffd[31m0 1")


def test_the_cost_of_a_new_run_starts_at_zero():
    write = _ShortLine()
    state = SimpleNamespace(global_step=1, max_steps=2, log_history=[{"ranker/cost": 1.0}] * 2)
    assert "cost $2.0000" in write({"loss": 1.0}, state)
    state.log_history = [{"ranker/cost": 1.0}]
    assert "cost $1.0000" in write({"loss": 1.0}, state)
