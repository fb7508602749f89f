"""`cyclealign train` and `cyclealign train-ranked`: training, launching, rankers, and error messages."""

import json
import re
import subprocess
import sys

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from cyclealign_trl import FunctionRanker, LLMRanker, RewardModelRanker
from cyclealign_trl.cli import main
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.scripts.arguments import RankerArguments
from cyclealign_trl.scripts.inputs import make_ranker
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import prompts

STUB = "--ranker_factory tests.scripts.test_train.make_stub"


@pytest.fixture
def judge():
    reply = json.dumps({"ranking": ["B", "A"], "improved_response": "better"})
    with LoopbackEndpoint(lambda body: Reply(reply)) as endpoint:
        yield endpoint


@pytest.fixture
def policy(tmp_path):
    make_model().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def run_yaml(tmp_path, policy, monkeypatch):
    """Write the YAML settings that both commands need."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {policy}\noutput_dir: {tmp_path / 'out'}\nmax_prompt_length: 32\n"
        "max_completion_length: 8\nper_device_train_batch_size: 2\nmax_steps: 9\nuse_cpu: true\n"
        "report_to: none\ndisable_tqdm: true\nlogging_steps: 1\nsave_strategy: 'no'\nlearning_rate: 1e-3\n"
    )
    return config


def jury(**kwargs):
    return {"ranker_factory": "cyclealign_trl.JuryRanker", "ranker_kwargs": kwargs}


def write_prompts(tmp_path):
    prompts(2).to_json(tmp_path / "prompts.jsonl")
    return tmp_path / "prompts.jsonl"


def write_pairs(folder):
    for split in ("train", "test"):
        rows = Dataset.from_list([{"prompt": "Q:", "chosen": " yes", "rejected": " no"}] * 4)
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def test_train_with_an_llm_and_an_adapter(tmp_path, run_yaml, judge, capfd):
    main(["train", "--config", str(run_yaml), "--dataset_name", str(write_prompts(tmp_path)), "--num_generations", "2",
          "--num_interactions", "2", "--max_steps", "2", "--ranker_model", "judge", "--ranker_base_url",
          judge.base_url, "--ranker_kwargs", '{"criteria": "the kindest"}', "--use_peft", "--lora_target_modules",
          "q_proj", "v_proj"])  # fmt: skip
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert len(list((tmp_path / "out" / "interactions").iterdir())) == 2
    assert len(judge.requests) == 4
    assert all("the kindest" in json.dumps(request) for request in judge.requests)
    out, err = capfd.readouterr()
    assert f"Model saved to {tmp_path / 'out'}." in out
    assert "Warning" not in err


def test_train_with_a_jury_from_yaml(tmp_path, run_yaml, judge):
    run_yaml.write_text(
        f"""{run_yaml.read_text()}
ranker_factory: cyclealign_trl.JuryRanker
ranker_kwargs:
  weights: [2, 2, 1]
  members:
    - ranker_model: judge
      ranker_base_url: {judge.base_url}
      ranker_kwargs: {{criteria: the kindest}}
    - ranker_model: other
      ranker_base_url: {judge.base_url}
    - ranker_factory: tests.scripts.test_train.make_stub
"""
    )
    main(["train", "--config", str(run_yaml), "--dataset_name", str(write_prompts(tmp_path)), "--num_generations", "2",
          "--num_interactions", "1", "--max_steps", "1"])  # fmt: skip
    asked = sorted((request["model"], "the kindest" in json.dumps(request)) for request in judge.requests)
    assert asked == [("judge", True), ("judge", True), ("other", False), ("other", False)]
    assert {path.name for path in (tmp_path / "out" / "spent").iterdir()} == {"judge", "other"}


def test_train_with_a_corrector(tmp_path, run_yaml, policy, capfd):
    from cyclealign_trl import Aligner

    Aligner(make_model(), make_tokenizer(), "Fix {question} {answer}:").save_pretrained(tmp_path / "aligner")
    command = ["train", "--config", str(run_yaml), "--dataset_name", str(write_prompts(tmp_path)), *STUB.split(),
               "--num_interactions", "1", "--max_steps", "2", "--corrector", str(tmp_path / "aligner")]  # fmt: skip
    options = '{"max_new_tokens": 8, "generation_kwargs": {"do_sample": false}}'
    main([*command, "--sft_target", "corrector", "--corrector_kwargs", options])
    err = capfd.readouterr().err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["sft_target"] == "corrector"
    assert "Warning" not in err
    for change, message in (
        ([], "must be set together"),
        (
            ["--sft_target", "corrector", "--corrector_kwargs", '{"beams": 3}'],
            "Aligner.from_pretrained does not accept these corrector_kwargs",
        ),
        (["--sft_target", "corrector", "--corrector", str(policy)], "has no saved aligner template"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, *change])
        assert message in stop.value.code


def test_train_ranked_on_preference_pairs_in_a_folder(tmp_path, run_yaml, policy, capfd):
    (tmp_path / "pairs").mkdir()
    main(["train-ranked", "--config", str(run_yaml), "--dataset_name", str(write_pairs(tmp_path / "pairs")),
          "--loss_type", "rrhf", "--eval_strategy", "epoch", "--max_steps", "2"])  # fmt: skip
    out, err = capfd.readouterr()
    assert "  eval  loss " in out
    assert "Warning" not in err
    trained, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", policy))
    assert any(not new.equal(old) for new, old in zip(trained.parameters(), before.parameters(), strict=True))


def test_reads_a_dataset_mixture_from_yaml(tmp_path, run_yaml, capfd):
    (tmp_path / "pairs").mkdir()
    folder = write_pairs(tmp_path / "pairs")
    run_yaml.write_text(
        run_yaml.read_text() + f"datasets:\n  - path: parquet\n    data_files: {folder / 'train.parquet'}\n"
    )
    main(["train-ranked", "--config", str(run_yaml), "--max_steps", "1"])
    assert "Model saved" in capfd.readouterr().out


def test_arguments_of_accelerate_launch_a_process(tmp_path, run_yaml):
    (tmp_path / "pairs").mkdir()
    arguments = ["train-ranked", "--config", str(run_yaml), "--num_processes", "1", "--max_steps", "1",
                 "--dataset_name", str(write_pairs(tmp_path / "pairs"))]  # fmt: skip
    command = [sys.executable, "-m", "cyclealign_trl", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "Model saved" in finished.stdout
    assert "not passed to `accelerate launch`" not in finished.stderr
    failed = subprocess.run([*command, "--dataset_train_split", "trian"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "cyclealign train-ranked: error: The dataset has no split 'trian'" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config nowhere.yaml", "nowhere.yaml"),
        (f"--dataset_name nowhere.jsonl {STUB}", "no file nowhere.jsonl"),
        ("--ranker_model judge --ranker_base_url http://127.0.0.1:9/v1", "Nothing answers at http://127.0.0.1:9/v1"),
        ("", "The ranker must be set by either --ranker_model"),
        (STUB, "No dataset to train on. Set --dataset_name"),
        ("--num_generations 1", "num_generations must be at least 2, got 1"),
        (f"--dataset_name PROMPTS {STUB} --model_name_or_path nowhere/nothing", "couldn't find them"),
        (f"--dataset_name PROMPTS {STUB} --per_device_train_batch_size 64", "64"),
    ],
)
def test_argument_errors_are_one_line_with_status_1(tmp_path, run_yaml, arguments, message):
    arguments = arguments.replace("PROMPTS", str(write_prompts(tmp_path))).split()
    if "--config" not in arguments:
        arguments = ["--config", str(run_yaml), *arguments]
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    error = stop.value.code  # a text, which `sys.exit` prints to stderr with status 1
    assert error.startswith("cyclealign train: error: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--resume_from_checkpoint true", "there is nothing to resume from"),
        ("--resume_from_checkpoint nowhere", "nowhere is not a complete checkpoint"),
        ("--dataset_name EMPTY", "has no readable rows"),
        ("--dataset_name BROKEN", "has no readable rows"),
        ("--ranker_factory tests.scripts.test_train.make_none", "returned None, which has no method rank"),
        ("--dataset_train_split dev", "no split 'dev'"),
        ("--dataset_name prompts.txt", "prompts.txt is not a supported data file"),
        ("--dataset_name data.csv", "There is no file data.csv (--dataset_name)."),
        ("--dataset_name ./nowhere", "There is no folder ./nowhere"),
        ("--dataset_name outputs/x", "There is no folder outputs/x, and it cannot be loaded from the Hub"),
        ("--model_name_or_path ./nowhere", "There is no folder ./nowhere"),
        ("--model_name_or_path outputs/x", "There is no folder outputs/x, and it cannot be loaded from the Hub"),
        ("--sft_target corrector --corrector ./nowhere", "There is no folder ./nowhere"),
        ("--sft_target corrector --corrector outputs/x", "There is no folder outputs/x"),
        (
            '--sft_target corrector --corrector x --corrector_kwargs {"temlate":3}',
            "these corrector_kwargs: unknown argument 'temlate'. Did you mean 'template'?",
        ),
        (
            '--sft_target corrector --corrector x --corrector_kwargs {"max_token":3}',
            "unknown argument 'max_token'. Did you mean 'max_new_tokens'?",
        ),
    ],
)
def test_data_ranker_and_checkpoint_errors_are_one_line(tmp_path, run_yaml, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("Hi")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n')
    arguments = arguments.replace("EMPTY", str(tmp_path / "empty.jsonl"))
    arguments = arguments.replace("BROKEN", str(tmp_path / "broken.jsonl"))
    (tmp_path / "data").mkdir()
    prompts(2).to_json(tmp_path / "data" / "train.jsonl")
    common = f"train --config {run_yaml} --dataset_name {tmp_path / 'data'} {STUB} --num_interactions 1"
    with pytest.raises(SystemExit) as stop:
        main(common.split() + arguments.split())
    assert message in stop.value.code
    assert "\n" not in stop.value.code


def test_resume_from_checkpoint_false_starts_a_new_run(tmp_path, run_yaml, capfd):
    main(["train", "--config", str(run_yaml), "--dataset_name", str(write_prompts(tmp_path)), *STUB.split(),
          "--max_steps", "1", "--resume_from_checkpoint", "false"])  # fmt: skip
    assert "Model saved" in capfd.readouterr().out


def test_fewer_processes_than_requested_is_an_error(tmp_path, run_yaml, monkeypatch):
    monkeypatch.setenv("CYCLEALIGN_NUM_PROCESSES", "2")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(run_yaml), "--dataset_name", str(write_prompts(tmp_path)), *STUB.split()])
    assert "2 processes were requested, but accelerate started 1" in stop.value.code


def test_an_interrupted_run_explains_how_to_resume(tmp_path, run_yaml, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(run_yaml), "--dataset_name", str(write_prompts(tmp_path)),
              "--ranker_factory", "tests.scripts.test_train.make_interrupted"])  # fmt: skip
    assert stop.value.code == 130
    assert "--resume_from_checkpoint true" in capfd.readouterr().out


def test_a_yaml_syntax_error_is_one_line(tmp_path):
    (tmp_path / "run.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(tmp_path / "run.yaml")])
    assert "expected" in stop.value.code
    assert "\n" not in stop.value.code


def test_an_unexpected_error_keeps_its_traceback(tmp_path, run_yaml):
    with pytest.raises(ZeroDivisionError):
        main(["train", "--config", str(run_yaml), "--dataset_name", str(write_prompts(tmp_path)),
              "--ranker_factory", "tests.scripts.test_train.make_broken"])  # fmt: skip


def test_an_error_of_the_ranker_during_training_is_one_line(tmp_path, run_yaml):
    with (
        LoopbackEndpoint(lambda body: Reply(), api_key="another") as endpoint,
        pytest.raises(SystemExit) as stop,
    ):
        main(["train", "--config", str(run_yaml), "--dataset_name", str(write_prompts(tmp_path)),
              "--ranker_model", "judge", "--ranker_base_url", endpoint.base_url])  # fmt: skip
    assert "rejects requests to the model 'judge'. Set OPENAI_API_KEY" in stop.value.code


# Rankers


def make_stub(**kwargs):
    return FunctionRanker(lambda completions, **_: [float(len(text)) for text in completions], **kwargs)


def make_none():
    return None


class Interrupted(FunctionRanker):
    def rank(self, requests):
        raise KeyboardInterrupt


def make_interrupted():
    return Interrupted(lambda completions, **_: [0.0 for _ in completions])


def make_broken():
    return FunctionRanker(lambda completions, **_: [1 / 0 for _ in completions])


def test_makes_an_llm_ranker(judge):
    arguments = RankerArguments("judge", judge.base_url, ranker_kwargs='{"max_concurrency": 3}')
    assert isinstance(make_ranker(arguments), LLMRanker)


def test_makes_a_ranker_with_a_factory():
    arguments = RankerArguments(ranker_factory="tests.scripts.test_train:make_stub", ranker_kwargs={"weights": [2.0]})
    assert isinstance(make_ranker(arguments), FunctionRanker)


def test_imports_a_factory_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_ranking_module.py").write_text("from tests.scripts.test_train import make_stub as make\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert isinstance(make_ranker(RankerArguments(ranker_factory="my_ranking_module.make")), FunctionRanker)


def test_makes_a_reward_model_ranker(tmp_path):
    from transformers import LlamaForSequenceClassification

    config = make_model().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    arguments = RankerArguments(
        ranker_factory="cyclealign_trl.RewardModelRanker", ranker_kwargs={"model": str(tmp_path), "device": "cpu"}
    )
    assert isinstance(make_ranker(arguments), RewardModelRanker)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"ranker_model": "judge", "ranker_factory": "a.b"},
            "either --ranker_model (and --ranker_base_url) or --ranker_factory, got ranker_model and ranker_factory.",
        ),
        ({"ranker_factory": "a.b", "ranker_base_url": "http://x"}, "either"),
        ({"ranker_factory": "nowhere.make"}, "'nowhere.make' cannot be imported"),
        ({"ranker_factory": "make"}, "'make' cannot be imported"),
        ({"ranker_factory": "json.nothing"}, "'json.nothing' cannot be imported"),
        ({"ranker_model": "judge", "ranker_kwargs": {"max_conc": 3}}, "max_conc"),
        (
            {"ranker_model": "judge", "ranker_kwargs": {"max_concurency": 3}},
            "these ranker_kwargs: unknown argument 'max_concurency'. Did you mean 'max_concurrency'?",
        ),
        (
            {"ranker_model": "judge", "ranker_kwargs": {"zzz": "secret"}},
            "unknown argument 'zzz'. Known arguments: criteria",
        ),
        (
            {"ranker_factory": "cyclealign_trl.RewardModelRanker", "ranker_kwargs": {"batchsize": 3}},
            "unknown argument 'batchsize'. Did you mean 'batch_size'?",
        ),
        ({"ranker_factory": "cyclealign_trl.RewardModelRanker"}, "missing a required argument: 'model'"),
        ({"ranker_factory": "tests.scripts.test_train.STUB"}, "is an instance of str. Name a class, or a function"),
        ({"ranker_model": "judge", "ranker_kwargs": {"api_key": "secret"}}, "set OPENAI_API_KEY"),
        ({"ranker_model": "judge", "ranker_kwargs": '{"api_key": "secret"'}, "ranker_kwargs must be a JSON object"),
        (
            {"ranker_model": "judge", "ranker_kwargs": {"extra": "secret"}},
            "The ranker does not accept these ranker_kwargs",
        ),
        (jury(), "missing a required argument: 'members'"),
        (jury(members="judge"), "The members of a jury must be a list of mappings with the keys ranker_model, "),
        (jury(members=["judge"]), "must be a list of mappings"),
        (
            jury(members=[{"model": "secret"}]),
            "Member 0 of the jury has the unknown key 'model'. Known keys: ranker_",
        ),
        (
            jury(members=[{"ranker_model": "judge", "ranker_kwargs": {"api_key": "secret"}}]),
            "Member 0 of the jury: ranker_kwargs must not contain an API key",
        ),
        (jury(members=[{"ranker_factory": STUB.split()[1]}]), "JuryRanker needs at least 2 members, got 1."),
    ],
)
def test_ranker_argument_errors_raise(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make_ranker(RankerArguments(**fields))
    assert "secret" not in str(error.value)
