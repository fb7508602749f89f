"""`cyclealign aligner`: training, the saved aligner, and error messages."""

import json

import pytest

from cyclealign_trl import Aligner
from cyclealign_trl.cli import main
from tests.conftest import make_model, make_tokenizer


@pytest.fixture
def run_yaml(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {tmp_path / 'base'}\noutput_dir: {tmp_path / 'out'}\nmax_length: 64\nmax_steps: 4\n"
        "aligner_template: '{question}|{answer}='\nper_device_train_batch_size: 2\nuse_cpu: true\ndtype: float32\n"
        "report_to: none\ndisable_tqdm: true\nlogging_steps: 1\nsave_strategy: 'no'\nlearning_rate: 1e-3\n"
    )
    return tmp_path / "run.yaml"


def write(path, **names):
    """Write rows under the given column names."""
    rows = ({names["question"]: f"Q{i}", "answer": "no", "correction": "yes"} for i in range(6))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("question", ["question", "prompt"])
def test_trains_on_both_column_layouts(tmp_path, run_yaml, question, capfd):
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "rows" / f"{split}.jsonl", question=question)
    main(["aligner", "--config", str(run_yaml), "--dataset_name", str(tmp_path / "rows"), "--eval_strategy", "epoch",
          "--warmup_fraction", "0.5"])  # fmt: skip
    out, err = capfd.readouterr()
    assert f"Model saved to {tmp_path / 'out'}." in out
    assert out.count("  warm-up 1.000") == 2
    assert "  eval  loss " in out
    assert "Warning" not in err
    assert Aligner.from_pretrained(tmp_path / "out", device="cpu").template.text == "{question}|{answer}="


def test_trains_an_adapter(tmp_path, run_yaml):
    pytest.importorskip("peft")
    rows = write(tmp_path / "rows.jsonl", question="question")
    main(["aligner", "--config", str(run_yaml), "--dataset_name", str(rows), "--use_peft", "--lora_target_modules",
          "q_proj", "v_proj"])  # fmt: skip
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    Aligner.from_pretrained(tmp_path / "out", device="cpu").correct(["Q1"], ["no"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "No dataset to train on. Set --dataset_name"),
        ("--dataset_name ROWS --warmup_fraction 2", "from 0 to 1, got 2.0"),
        ("--dataset_name ROWS --aligner_template none", "exactly once"),
        ("--dataset_name WRONG", "got ['answer', 'correction', 'text']"),
        ("--dataset_name ROWS --max_steps 1", "the identity warm-up alone takes 1"),
    ],
)
def test_usage_errors_are_one_line(tmp_path, run_yaml, arguments, message):
    arguments = arguments.replace("ROWS", str(write(tmp_path / "rows.jsonl", question="prompt")))
    arguments = arguments.replace("WRONG", str(write(tmp_path / "wrong.jsonl", question="text")))
    with pytest.raises(SystemExit) as stop:
        main(["aligner", "--config", str(run_yaml), *arguments.split()])
    assert stop.value.code.startswith("cyclealign aligner: error: ")
    assert message in stop.value.code
    assert "\n" not in stop.value.code
