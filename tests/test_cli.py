"""`cyclealign`: dispatch, help, and the demo in a separate process."""

import json
import subprocess
import sys

import pytest

from cyclealign_trl.cli import COMMANDS, main


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "cyclealign_trl", *arguments], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize("control", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_demo_raises_the_score_and_its_control_does_not(tmp_path, control):
    arguments = ["demo", "--output_dir", str(tmp_path), "--num_train_epochs", "1", *(["--control"] if control else [])]
    finished = run(*arguments)
    assert finished.returncode == 0, finished.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {
        "score_before", "score_after", "score_before_interval", "score_after_interval", "change_interval", "seconds",
        "interactions", "failures", "prompt_tokens", "completion_tokens", "calls", "estimated_prompt_tokens",
        "estimated_completion_tokens", "estimated_calls",
    }  # fmt: skip
    rise = summary["score_after"] - summary["score_before"]
    assert abs(rise) < 0.08 if control else rise > 0.25
    assert (summary["interactions"], summary["failures"]) == (5 * 5 * 16, 0)
    assert summary["prompt_tokens"] > 100 * summary["interactions"]
    for name in (
        "calls",
        "prompt_tokens",
        *(() if control else ("completion_tokens",)),
    ):  # the control improves nothing
        assert summary[f"estimated_{name}"] == pytest.approx(summary[name], rel=0.15), name
    assert (tmp_path / "model.safetensors").exists()
    assert len(list((tmp_path / "interactions").iterdir())) == 25
    for text in ("Held-out score", "A paid judge", "Estimated before", "LLMRanker("):
        assert text in finished.stdout
    pytest.importorskip("matplotlib")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Held-out prompts: before and after training" in page


def test_prints_help_and_version(capsys):
    for arguments, text in (
        (["--help"], "demo"),
        (["--version"], "cyclealign-trl"),
        (["demo", "--help"], "--control"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command. Choose one of the commands above."),
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
        (["tran", "--config", "run.yaml"], "unknown command 'tran'. Did you mean 'train'?"),
        (["train_ranked"], "Did you mean 'train-ranked'?"),
        (["DLMA"], "Did you mean 'dlma'?"),
        (["estimates"], "Did you mean 'estimate'?"),
        (["zzz"], "unknown command 'zzz'. Choose one of the commands above."),
        ([""], "unknown command ''. Choose one"),
    ],
)
def test_a_missing_or_unknown_command_lists_the_commands(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert all(f"\n    {command}" in error for command in COMMANDS)
    last = error.splitlines()[-1]
    assert last.startswith("cyclealign: error: ")
    assert message in last


def test_each_command_has_a_module():
    import importlib

    for command in COMMANDS:
        script = importlib.import_module(f"cyclealign_trl.scripts.{command.replace('-', '_')}")
        assert script.make_parser()
        assert script.main


def test_python_m_runs_the_command():
    assert "train-ranked" in run("--help").stdout
