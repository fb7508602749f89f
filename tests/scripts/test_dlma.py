"""`cyclealign dlma`: pairs from prompts, iterations, resuming, and error messages."""

import json
import shutil

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from cyclealign_trl.cli import main
from tests.scripts.test_train import policy, run_yaml, write_prompts  # noqa: F401 (fixtures)


@pytest.fixture
def arguments(tmp_path, run_yaml):  # noqa: F811
    return [
        "dlma", "--config", str(run_yaml), "--dataset_name", str(write_prompts(tmp_path)), "--max_steps", "2",
        "--warmup_steps", "0", "--positive", "a kind reply", "--negative", "a rude reply", "--max_prompt_length", "64",
    ]  # fmt: skip


def changed(first, second):
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (first, second)]
    return any(not new.equal(old) for new, old in zip(*(model.parameters() for model in models), strict=True))


def test_makes_pairs_from_prompts_and_trains_on_them(tmp_path, arguments, capfd):
    main(arguments)
    out, err = capfd.readouterr()
    assert "Pairs of train: 2 prompts, 2 kept; dropped: none" in out
    assert f"Model saved to {tmp_path / 'out'}." in out
    assert "Warning" not in err
    settings = json.loads((tmp_path / "out/pairs/train/settings.json").read_text())
    assert settings["contrastive"] == {"positive": "a kind reply", "negative": "a rude reply", "placement": "reply"}
    assert changed(tmp_path / "out", tmp_path / "policy")


@pytest.mark.parametrize("adapter", [False, True])
def test_each_iteration_starts_from_the_previous_model(tmp_path, arguments, capfd, adapter):
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"] if adapter else []
    arguments += ["--num_iterations", "2", *lora]
    main(arguments)
    first, out = tmp_path / "out/iteration-1/model", tmp_path / "out"
    assert changed(first, tmp_path / "policy")
    assert (out / "adapter_config.json").is_file() == adapter
    if not adapter:
        assert changed(first, out)
    digests = [json.loads((folder / "pairs/train/settings.json").read_text())["model"]
               for folder in (out / "iteration-1", out)]  # fmt: skip
    assert digests[0] != digests[1]

    # As if interrupted in the second iteration, before its first checkpoint. The first iteration is not run again.
    written = (first / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(out / "pairs")
    capfd.readouterr()
    main([*arguments, "--resume_from_checkpoint", "true"])
    assert "Model saved" in capfd.readouterr().out
    assert (first / "model.safetensors").stat().st_mtime_ns == written


def test_trains_on_given_pairs_without_making_new_ones(tmp_path, arguments, capfd):
    rows = [{"prompt": "Q:", "chosen": " yes", "rejected": " no", "self_reward": 3.0}] * 4
    for split in ("train", "test"):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        Dataset.from_list(rows).to_json(tmp_path / "pairs" / f"{split}.jsonl")
    main([*arguments, "--dataset_name", str(tmp_path / "pairs"), "--eval_strategy", "epoch"])
    assert "  eval  loss " in capfd.readouterr().out
    assert not (tmp_path / "out/pairs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--num_iterations", "0"], "num_iterations must be at least 1, got 0"),
        (["--contrastive", "honest", "--positive", "", "--negative", ""], "must not be empty"),
        (["--placement", "suffix"], "invalid choice"),
        (["--margin_clip", "1", "-1"], "a lower and a higher bound"),
    ],
)
def test_usage_errors_are_one_line(arguments, capsys, change, message):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *change])
    assert message in f"{stop.value.code} {capsys.readouterr().err}"


def test_one_description_alone_is_an_error(arguments):
    del arguments[arguments.index("--negative") : arguments.index("--negative") + 2]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert "--positive and --negative must be set together" in stop.value.code


def test_several_iterations_need_prompts(tmp_path, arguments):
    rows = [{"prompt": "Q:", "chosen": " yes", "rejected": " no", "self_reward": 3.0}] * 4
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--dataset_name", str(tmp_path / "pairs.jsonl"), "--num_iterations", "2"])
    assert "num_iterations=2 needs a dataset of prompts" in stop.value.code
