"""Launch configurations of the examples: valid, documented, and tested with two processes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModelForCausalLM, AutoTokenizer

from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import read_log

ROOT = Path(__file__).parents[1]
ACCELERATE = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "examples" / "deepspeed").glob("*.json"))
LORA = "--use_peft --lora_target_modules q_proj v_proj"
PROCESSES = {
    "zero2.yaml": "--config_file examples/accelerate_configs/zero2.yaml",
    "zero2.json": "--config_file examples/accelerate_configs/multi_gpu.yaml",
    "zero3.yaml": "--config_file examples/accelerate_configs/zero3.yaml",
}


# Configuration files


def by_name(paths):
    return {"argvalues": paths, "ids": [path.name for path in paths]}


def test_all_configurations_are_tested():
    assert [path.stem for path in ACCELERATE] == ["fsdp2", "multi_gpu", "single", "zero1", "zero2", "zero3"]
    assert [path.stem for path in DEEPSPEED] == ["zero2", "zero2_offload", "zero3"]


@pytest.mark.parametrize("path", **by_name(ACCELERATE))
def test_accelerate_knows_each_key(path):
    config = load_config_from_file(str(path))  # rejects unknown keys, except within sections
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.deepspeed_config, *config.fsdp_config} <= known
    assert config.num_processes == (1 if path.stem == "single" else 8)
    assert f"accelerate launch --config_file {path.relative_to(ROOT)} " in path.read_text()


@pytest.mark.parametrize("path", **by_name(DEEPSPEED))
def test_deepspeed_knows_each_key(path):
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    config = json.loads(path.read_text())
    assert set(config) == {
        "bf16", "fp16", "zero_optimization", "gradient_clipping", "gradient_accumulation_steps", "train_batch_size",
        "train_micro_batch_size_per_gpu",
    }  # fmt: skip
    zero_config(**{name: value for name, value in config["zero_optimization"].items() if value != "auto"})
    set_by_trainer = [config["bf16"]["enabled"], config["fp16"]["enabled"], *list(config.values())[3:]]
    assert set(set_by_trainer) == {"auto"}


@pytest.mark.parametrize("path", **by_name([*ACCELERATE, *DEEPSPEED]))
def test_each_configuration_is_documented(path):
    assert f"`{path.name}`" in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


# Launched processes


def respond(body):
    """Rank the labels of the request in reverse order."""
    schema = body["response_format"]["json_schema"]["schema"]
    names = schema["properties"]["ranking"]["items"]["enum"]
    return Reply(json.dumps({"ranking": names[::-1], "improved_response": "better"}))


def write_policy_and_prompts(folder):
    make_model(max_position_embeddings=1024).save_pretrained(folder / "policy")
    make_tokenizer().save_pretrained(folder / "policy")
    (folder / "prompts").mkdir()
    rows = ({"prompt": [{"role": "user", "content": f"Question {i}"}]} for i in range(16))
    (folder / "prompts" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Folder with a policy, prompts and preference pairs."""
    write_policy_and_prompts(tmp_path)
    (tmp_path / "pairs").mkdir()
    rows = ({"prompt": f"Q{i}", "chosen": " yes", "rejected": " no way"} for i in range(16))
    (tmp_path / "pairs" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(folder, command, arguments):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OPENAI_API_KEY": "a-key",
    }
    common = f"""--model_name_or_path {folder}/policy --output_dir {folder}/out --max_prompt_length 64
        --max_completion_length 8 --per_device_train_batch_size 1 --logging_steps 1 --save_steps 2 --dtype float32
        --disable_tqdm true {arguments}"""
    finished = subprocess.run(
        [sys.executable, *shlex.split(command), *shlex.split(common)],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=280,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def run_cycle(folder, launcher, arguments, num_processes=2, device="--use_cpu"):
    """Run the example, and assert that all processes took part in each step."""
    with LoopbackEndpoint(respond) as endpoint:
        out = run(
            folder,
            f"-m accelerate.commands.launch {launcher} --num_processes {num_processes} --main_process_port 0 "
            f"{'--mixed_precision no' if device else ''} examples/cyclealign.py",
            f"--dataset_name {folder}/prompts --ranker_model judge --ranker_base_url {endpoint.base_url} "
            f"--num_interactions 2 {device} {arguments}",
        )
    assert "Model saved to" in out
    rows = read_log(folder / "out")
    names = {path.name for path in (folder / "out" / "interactions").iterdir()}
    assert names == {f"step-{step:06}-{i}.parquet" for step in {r["step"] for r in rows} for i in range(num_processes)}
    assert not any(row["failure"] for row in rows)
    return rows


def assert_loads(folder, adapter):
    """Assert that transformers loads the saved model, that it differs from the initial one, and that it generates."""
    before, model = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    if adapter:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, folder / "out").merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert any(not new.equal(old) for new, old in zip(model.parameters(), before.parameters(), strict=True))
    inputs = AutoTokenizer.from_pretrained(folder / "out")("Question 1", return_tensors="pt")
    assert model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[1] > 10


def test_example_with_zero2_and_an_adapter(folder):
    pytest.importorskip("peft")
    pytest.importorskip("deepspeed")
    rows = run_cycle(folder, PROCESSES["zero2.yaml"], f"--max_steps 4 {LORA}")
    assert len(rows) == 4 * 2
    assert_loads(folder, adapter=True)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["", LORA], ids=["full", "lora"])
@pytest.mark.parametrize("config", PROCESSES)
def test_resuming_repeats_no_step(folder, config, adapter):
    pytest.importorskip("deepspeed")
    arguments = f"{adapter} --deepspeed examples/deepspeed/{config}" if config.endswith("json") else adapter
    run_cycle(folder, PROCESSES[config], f"--max_steps 6 {arguments}")
    first = read_log(folder / "out")
    rows = run_cycle(folder, PROCESSES[config], f"--max_steps 10 --resume_from_checkpoint true {arguments}")
    assert len(rows) == 10 * 2
    assert [row for row in rows if row["step"] < 6] == first
    state = json.loads((folder / "out" / "checkpoint-10" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"]] == list(range(1, 11))
    assert_loads(folder, adapter)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "--use_deepspeed --zero_stage 2",
        "--config_file examples/accelerate_configs/zero2.yaml",
        "--config_file examples/accelerate_configs/multi_gpu.yaml",
        "--config_file examples/accelerate_configs/multi_gpu.yaml --deepspeed examples/deepspeed/zero2.json",
    ],
    ids=["flags", "zero2.yaml", "multi_gpu.yaml", "zero2.json"],
)
def test_the_command_line_launches_processes(folder, launcher):
    processes = f"{launcher} --num_processes 2 --mixed_precision no --main_process_port 0 --use_cpu --max_steps 4"
    run(folder, "-m cyclealign_trl train-ranked", f"--dataset_name {folder}/pairs {processes}")
    assert (folder / "out" / "checkpoint-4" / "rng_state_1.pth").is_file()
    assert_loads(folder, adapter=False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("adapter", ["", LORA], ids=["full", "lora"])
@pytest.mark.parametrize("path", **by_name([path for path in ACCELERATE if path.stem != "single"]))
def test_on_gpus(folder, path, adapter):
    run_cycle(
        folder, f"--config_file {path}", f"--max_steps 4 {adapter}", num_processes=torch.cuda.device_count(), device=""
    )
    assert_loads(folder, adapter)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("path", **by_name(DEEPSPEED))
def test_on_gpus_with_a_deepspeed_file(folder, path):
    launcher = "--config_file examples/accelerate_configs/multi_gpu.yaml"
    run_cycle(
        folder, launcher, f"--max_steps 4 --deepspeed {path}", num_processes=torch.cuda.device_count(), device=""
    )
    assert_loads(folder, adapter=False)
