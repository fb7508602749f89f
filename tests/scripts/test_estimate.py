"""The command that says what a run will ask of its ranker, with the arguments of the run itself."""

import re

import pytest

from cyclealign_trl.cli import main
from cyclealign_trl.cycle.run_estimate import RunEstimate
from cyclealign_trl.scripts.estimate import describe
from cyclealign_trl.types import Usage
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import prompts

NOBODY = "http://127.0.0.1:9/v1"


@pytest.fixture
def run_yaml(tmp_path, monkeypatch):
    """A run in a file, with a judge that does not answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_model().save_pretrained("policy")
    make_tokenizer().save_pretrained("policy")
    (tmp_path / "data").mkdir()
    prompts(9).to_json("data/train.jsonl")
    prompts(5).to_json("data/test.jsonl")
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: policy\ndataset_name: data\noutput_dir: out\nmax_prompt_length: 32\n"
        "max_completion_length: 8\nper_device_train_batch_size: 2\nnum_interactions: 2\nuse_cpu: true\n"
        f"report_to: none\nranker_model: judge\nranker_base_url: {NOBODY}\nranker_kwargs:\n  num_passes: 3\n"
        "  prices: {input: 1.0, output: 4.0}\n"
    )
    return "run.yaml"


def table(text):
    """Numbers by row and column."""
    rows = re.findall(r"^(calls|prompt tokens|completion tokens|cost) +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE)
    return {name: [float(value.strip("$").replace(",", "")) for value in values] for name, *values in rows}


def test_a_run_is_estimated_and_nothing_is_left_behind(tmp_path, run_yaml, capsys):
    main(["estimate", "--config", run_yaml])
    said = capsys.readouterr().out
    rows = table(said)
    assert "Optimiser steps: 10. Evaluations: 0." in said  # 9 prompts are 5 windows of 2
    assert rows["calls"] == [10 * 2 * 3] * 3
    for name in ("prompt tokens", "completion tokens"):
        assert rows[name] == sorted(rows[name])
        assert rows[name][0] > 0
    sent, received = rows["prompt tokens"][1], rows["completion tokens"][1]
    assert rows["cost"][1] == pytest.approx((sent + 4 * received) / 1e6, rel=0.05)
    assert "as long as the policy's are now" in said
    assert not (tmp_path / "out").exists()


def test_the_command_line_and_evaluations_count(run_yaml, capsys):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "4", "--max_eval_samples", "3"]
    main(["estimate", "--config", run_yaml, "--max_steps", "4", "--num_processes", "2", *evaluation])
    said = capsys.readouterr().out
    assert "Optimiser steps: 4. Evaluations: 1." in said
    assert table(said)["calls"] == [(4 * 4 + 3) * 3] * 3


def test_a_corrector_is_not_loaded(run_yaml, capsys):
    main(["estimate", "--config", run_yaml, "--sft_target", "corrector", "--corrector", "nowhere"])
    assert table(capsys.readouterr().out)["calls"] == [60] * 3


def test_without_samples_no_model_is_loaded(run_yaml, capsys):
    main(["estimate", "--config", run_yaml, "--num_samples", "0", "--model_name_or_path", "nowhere/nothing"])
    said = capsys.readouterr().out
    assert table(said)["calls"] == [60] * 3
    assert "completions are max_completion_length tokens long" in said


def test_a_ranker_that_says_nothing_of_tokens_is_counted_in_calls(run_yaml, tmp_path, capsys):
    text = (tmp_path / run_yaml).read_text().partition("ranker_model")[0]
    (tmp_path / run_yaml).write_text(text + "ranker_factory: tests.scripts.test_train.make_stub\n")
    main(["estimate", "--config", run_yaml])
    assert table(capsys.readouterr().out) == {"calls": [20] * 3}


def test_no_price_is_no_price():
    usage = Usage(1000, 10, attempts=3)
    said = describe(RunEstimate(1, 0, usage, usage, usage), sampled=True)
    assert said.count("unpriced") == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--dataset_name nowhere.jsonl", "no file nowhere.jsonl"),
        ("--per_device_train_batch_size 64", "64"),
        ("--per_device_train_batch_size 64 --num_samples 0", "64"),
        ("--model_name_or_path nowhere/nothing", "couldn't find them"),
        ("--num_samples 0 --dataset_name unprompted.jsonl", "column 'prompt'"),
    ],
)
def test_wrong_use_is_one_line_and_status_1(run_yaml, arguments, said):
    prompts(2).rename_column("prompt", "question").to_json("unprompted.jsonl")
    with pytest.raises(SystemExit) as stop:
        main(["estimate", "--config", run_yaml, *arguments.split()])
    assert stop.value.code.startswith("cyclealign estimate: error: ")
    assert said in stop.value.code
    assert "\n" not in stop.value.code
