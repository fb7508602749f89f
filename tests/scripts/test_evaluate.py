"""`cyclealign evaluate`: models, adapters and endpoints on files of HH-RLHF, from a command line and from YAML."""

import gzip
import json

import pytest

from cyclealign_trl.chat import client
from cyclealign_trl.cli import main
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.evaluation.test_evaluate_models import folder  # noqa: F401
from tests.rankers.test_reward_model import warnings_in

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.01)


@pytest.fixture
def hh_rlhf(tmp_path):
    path = tmp_path / "hh"
    path.mkdir()
    for subset in SUBSETS:
        with gzip.open(path / f"{subset}.test.jsonl.gz", "wt", encoding="utf-8") as lines:
            for index in range(6):
                question = f"\n\nHuman: {subset} {index}?\n\nAssistant:"
                lines.write(json.dumps({"chosen": f"{question} Yes", "rejected": f"{question} No"}) + "\n")
    return path


def evaluate(*arguments):
    main(["evaluate", *map(str, arguments)])


def options(folder, data, out):  # noqa: F811
    return ["--reward_model", f"{folder}/rm", "--dataset_name", data, "--output_dir", out, "--max_new_tokens", "6",
            "--max_prompt_length", "60", "--device", "cpu"]  # fmt: skip


def test_evaluates_models_on_the_subsets_of_hh_rlhf(folder, hh_rlhf, tmp_path, capsys, caplog):  # noqa: F811
    out = tmp_path / "out"
    evaluate(f"base={folder}/m0", f"adapter={folder}/a0", *options(folder, hh_rlhf, out), "--max_samples", "4")
    output = capsys.readouterr().out
    lines = output.splitlines()
    header = next(line for line in lines if line.startswith("| Reward ("))
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [*(f"{name} (4)" for name in SUBSETS), "Total"]
    assert "| Minus base, with 95% intervals" in output
    assert f"Written to {out}: report.json, report.md, rewards.parquet." in output
    report = json.loads((out / "report.json").read_text())
    assert report["groups"]["helpful-online"] == {"prompts": 4, "size": 6}
    assert list(report["models"]) == ["base", "adapter"]
    assert warnings_in(caplog) == []
    evaluate(f"base={folder}/m0", f"adapter={folder}/a0", *options(folder, hh_rlhf, out), "--max_samples", "4")
    assert capsys.readouterr().out == output


def test_reads_yaml_and_an_endpoint(folder, hh_rlhf, tmp_path):  # noqa: F811
    with LoopbackEndpoint(lambda body: Reply(f"Yes, {body['max_tokens']}.")) as endpoint:
        (tmp_path / "run.yaml").write_text(
            f"models: [gpt=endpoint:any@{endpoint.base_url}]\nreward_model: {folder}/rm\ndataset_name: {hh_rlhf}\n"
            f"dataset_config: helpful-base\noutput_dir: {tmp_path}/out\ntransform: none\n"
            "endpoint_kwargs:\n  max_concurrency: 2\n  sampling: {max_tokens: 7}\n"
        )
        evaluate("--config", tmp_path / "run.yaml")
        assert len(endpoint.requests) == 6
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["transform"] == "none"
    assert report["models"]["gpt"]["groups"].keys() == {"helpful-base"}
    assert '"Yes, 7."' in (tmp_path / "out/replies/gpt.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "no model to evaluate. Name at least one, before the other arguments."),
        (["m"], 2, "no reward model. Set --reward_model."),
        (["m", "--reward_model", "r", "b"], 2, "unexpected 'b': put an --argument in front of each value."),
        (["m", "--reward_modl", "r"], 2, "unknown argument --reward_modl. Did you mean --reward_model?"),
        (["m", "--reward_model", "./r", "--dataset_name", "x.jsonl"], 1, "There is no file x.jsonl (--dataset_name)."),
        (["m", "--reward_model", "r", "--batch_size", "0"], 1, "batch_size must be at least 1, got 0."),
        (["m", "--reward_model", "r", "--prompt_format", "xml"], 1, "prompt_format must be one of"),
        (["m", "--reward_model", "r", "--endpoint_kwargs", '{"api_key": "k"}'], 1, "must not contain an API key"),
        (["m", "--reward_model", "r", "--reward_model_kwargs", "[1]"], 1, "reward_model_kwargs must be a JSON object"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, status, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        evaluate(*arguments)
    code = exit_info.value.code
    text = code if isinstance(code, str) else capsys.readouterr().err
    assert (1 if isinstance(code, str) else code) == status
    assert text.startswith("cyclealign evaluate: error: ")
    assert message in text
    assert len(text.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "extra", "message"),
    [
        ("./missing", [], "There is no folder ./missing."),
        ("endpoint:x@http://127.0.0.1:1/v1", ["--endpoint_kwargs", '{"speed": 1}'], "no argument 'speed'"),
        ("m0", ["--max_prompt_length", "300"], "but LlamaForCausalLM has 256 positions"),
        ("m0", ["--reward_model", "./rm2"], "There is no folder ./rm2"),
        ("m0", ["--reward_model", "m0"], "has num_labels=2"),
    ],
)
def test_wrong_models_end_in_one_line(folder, hh_rlhf, tmp_path, monkeypatch, model, extra, message):  # noqa: F811
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as exit_info:
        evaluate(model, *options(folder, hh_rlhf, tmp_path / "out"), *extra)
    assert message in str(exit_info.value.code)
    assert "\n" not in str(exit_info.value.code)
    assert not any((tmp_path / "out").rglob("*.jsonl"))  # nothing was generated before
