"""`cyclealign estimate`: the estimate for the arguments of a run, and error messages."""

import re

import pytest

from cyclealign_trl.cli import main
from cyclealign_trl.cycle.run_estimate import RunEstimate
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.scripts.estimate import describe
from cyclealign_trl.types import Usage
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import prompts

UNREACHABLE = "http://127.0.0.1:9/v1"


@pytest.fixture
def run_yaml(tmp_path, monkeypatch):
    """Write the YAML file of a run whose judge is unreachable."""
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
        f"report_to: none\nranker_model: judge\nranker_base_url: {UNREACHABLE}\nranker_kwargs:\n  num_passes: 3\n"
        "  prices: {input: 1.0, output: 4.0}\n"
    )
    return "run.yaml"


def table(text):
    """Return the numbers of each row of the table."""
    rows = re.findall(r"^(calls|prompt tokens|completion tokens|cost) +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE)
    return {name: [float(value.strip("$").replace(",", "")) for value in values] for name, *values in rows}


def test_estimates_a_run_without_leaving_files(tmp_path, run_yaml, capsys):
    main(["estimate", "--config", run_yaml])
    output = capsys.readouterr().out
    rows = table(output)
    assert "Optimiser steps: 10. Evaluations: 0." in output  # 9 prompts are 5 windows of 2
    assert rows["calls"] == [10 * 2 * 3] * 3
    for name in ("prompt tokens", "completion tokens"):
        assert rows[name] == sorted(rows[name])
        assert rows[name][0] > 0
    sent, received = rows["prompt tokens"][1], rows["completion tokens"][1]
    assert rows["cost"][1] == pytest.approx((sent + 4 * received) / 1e6, rel=0.05)
    assert "as long as the policy's are now" in output
    assert not (tmp_path / "out").exists()


def test_estimate_includes_evaluations_and_processes(run_yaml, capsys):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "4", "--max_eval_samples", "3"]
    main(["estimate", "--config", run_yaml, "--max_steps", "4", "--num_processes", "2", *evaluation])
    output = capsys.readouterr().out
    assert "Optimiser steps: 4. Evaluations: 1." in output
    assert table(output)["calls"] == [(4 * 4 + 3) * 3] * 3


def test_does_not_load_the_corrector(run_yaml, capsys):
    main(["estimate", "--config", run_yaml, "--sft_target", "corrector", "--corrector", "nowhere"])
    assert table(capsys.readouterr().out)["calls"] == [60] * 3


def test_without_samples_loads_no_model(run_yaml, capsys):
    main(["estimate", "--config", run_yaml, "--num_samples", "0", "--model_name_or_path", "nowhere/nothing"])
    output = capsys.readouterr().out
    assert table(output)["calls"] == [60] * 3
    assert "completions are max_completion_length tokens long" in output


def test_a_ranker_without_token_counts_is_estimated_in_calls(run_yaml, tmp_path, capsys):
    text = (tmp_path / run_yaml).read_text().partition("ranker_model")[0]
    (tmp_path / run_yaml).write_text(text + "ranker_factory: tests.scripts.test_train.make_stub\n")
    main(["estimate", "--config", run_yaml])
    assert table(capsys.readouterr().out) == {"calls": [20] * 3}


def test_cost_is_unpriced_without_prices():
    usage = Usage(1000, 10, attempts=3)
    output = describe(RunEstimate(1, 0, usage, usage, usage), sampled=True)
    assert output.count("unpriced") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset_name nowhere.jsonl", "no file nowhere.jsonl"),
        ("--per_device_train_batch_size 64", "64"),
        ("--per_device_train_batch_size 64 --num_samples 0", "64"),
        ("--model_name_or_path nowhere/nothing", "couldn't find them"),
        ("--num_samples 0 --dataset_name unprompted.jsonl", "column 'prompt'"),
    ],
)
def test_usage_errors_are_one_line_with_status_1(run_yaml, arguments, message):
    prompts(2).rename_column("prompt", "question").to_json("unprompted.jsonl")
    with pytest.raises(SystemExit) as stop:
        main(["estimate", "--config", run_yaml, *arguments.split()])
    assert stop.value.code.startswith("cyclealign estimate: error: ")
    assert message in stop.value.code
    assert "\n" not in stop.value.code


def reasoning_judge(body):
    """Reply after a fixed number of reasoning tokens, except to one prompt."""
    usage = {"prompt_tokens": 700, "completion_tokens": 420, "completion_tokens_details": {"reasoning_tokens": 400}}
    return Reply("?" if "Question 3:" in str(body) else '{"ranking": ["B", "A", "C", "D"]}', usage=usage)


@pytest.mark.parametrize(("probe", "num_calls"), [(1, 1), (3, 3), (20, 9)])
def test_a_probe_measures_real_rankings(run_yaml, tmp_path, capsys, probe, num_calls):
    text = (tmp_path / run_yaml).read_text().replace("num_passes: 3", "max_retries: 0")
    with LoopbackEndpoint(reasoning_judge) as endpoint:
        (tmp_path / run_yaml).write_text(text.replace(UNREACHABLE, endpoint.base_url))
        main(["estimate", "--config", run_yaml, "--num_generations", "4", "--probe", str(probe)])
        assert len(endpoint.requests) == num_calls
    output = capsys.readouterr().out
    assert f"Probe: {num_calls} rankings in {num_calls} calls, " in output
    assert "A call took 700 prompt tokens, 20 tokens of reply and 400 of reasoning." in output
    assert "the expected run takes 8,400 completion tokens, reasoning included." in output  # 20 calls
    assert re.search(r"Latency \d+\.\d s \(median\)", output)
    assert "The probe cost $" in output
    assert ("Failed (unparsable): 1." in output) == (num_calls == 9)


def test_without_a_probe_says_that_reasoning_is_not_counted(run_yaml, capsys):
    main(["estimate", "--config", run_yaml])
    assert "reasoning are not counted. To measure them, add --probe 8." in capsys.readouterr().out


def test_a_probe_of_an_unreachable_judge_is_an_error(run_yaml):
    with pytest.raises(SystemExit) as stop:
        main(["estimate", "--config", run_yaml, "--probe", "1"])
    assert "Nothing answers at" in stop.value.code
