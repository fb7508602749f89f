"""The code in README and docs runs as it is printed; only names that need a network are exchanged."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

import cyclealign_trl
from cyclealign_trl import CycleAlignConfig
from cyclealign_trl.demo.endpoint import LoopbackEndpoint, Reply
from tests.conftest import make_model, make_tokenizer
from tests.trainer.stubs import make_trainer, prompts

ROOT = Path(__file__).parents[1]


def snippets(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def judge():
    reply = json.dumps({"ranking": ["B", "D", "A", "C"], "improved_response": "better"})
    with LoopbackEndpoint(lambda body: Reply(reply)) as endpoint:
        yield endpoint


def test_readme(tmp_path, monkeypatch, judge):
    (code,) = snippets("README.md")
    make_model(max_position_embeddings=1024).save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    prompts(4, conversational=True).select_columns(["prompt"]).to_json(tmp_path / "prompts.jsonl")
    exchanged = {
        '"Qwen/Qwen3-0.6B"': repr(str(tmp_path / "policy")),
        'LLMRanker("gpt-5-mini")': f'LLMRanker("judge", {judge.base_url!r})',
        '"trl-lib/ultrafeedback-prompt", split="train[:1000]"': (
            f'"json", data_files={str(tmp_path / "prompts.jsonl")!r}, split="train[:1000]"'
        ),
    }
    for printed, here in exchanged.items():
        assert code.count(printed) == 1, printed
        code = code.replace(printed, here)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(code, namespace)
    assert namespace["trainer"].state.global_step == 5
    assert len(judge.requests) == 5 * 4


def test_concepts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_trainer("outputs/demo", dataset=prompts(2)).train()
    codes = snippets("docs/concepts.md")
    assert len(codes) == 4
    for code in codes:
        exec(code, {})
    assert "Question" in capsys.readouterr().out


def test_every_logged_metric_is_explained(tmp_path):
    trainer = make_trainer(tmp_path, dataset=prompts(2), max_steps=1)
    trainer.train()
    text = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    trainers_own = {"grad_norm", "learning_rate", "epoch", "step"}
    for name in set(trainer.state.log_history[0]) - trainers_own:
        assert f"`{name}`" in text or f"`{name.split('/')[-1]}`" in text, name


def test_every_setting_in_the_docs_exists():
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/concepts.md"))
    names = set(re.findall(r"`(\w+)=", text))
    known = set(CycleAlignConfig.__dataclass_fields__) | {"api_key", "ranker", "resume_from_checkpoint"}
    assert names
    assert names <= known


def test_the_file_tree_is_the_file_tree():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is where")[1]
    package = Path(cyclealign_trl.__file__).parent
    for path in [*package.glob("*.py"), *(package / "rankers").glob("*.py")]:
        if path.name not in ("__init__.py", "__main__.py"):
            assert path.name in tree, path
    for name in re.findall(r"(\w+\.py)", tree):
        assert list(package.rglob(name)), name


def test_the_example_is_short():
    lines = (ROOT / "examples/cyclealign.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80


def test_the_example_runs(tmp_path, monkeypatch, judge):
    make_model().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    (tmp_path / "data").mkdir()
    Dataset.from_list([{"prompt": f"Q{i}:"} for i in range(2)]).to_json(tmp_path / "data" / "train.jsonl")
    arguments = f"""--model_name_or_path {tmp_path / "policy"} --dataset_name {tmp_path / "data"} --ranker_model judge
        --ranker_base_url {judge.base_url} --output_dir {tmp_path / "out"} --num_generations 4 --num_interactions 2
        --max_prompt_length 32 --max_completion_length 8 --per_device_train_batch_size 2 --use_cpu --dtype float32
        --report_to none --use_peft --lora_target_modules q_proj v_proj --lora_task_type CAUSAL_LM"""
    pytest.importorskip("peft")
    namespace = {"__name__": "example"}
    exec((ROOT / "examples/cyclealign.py").read_text(encoding="utf-8"), namespace)
    monkeypatch.setattr("sys.argv", ["cyclealign.py", *arguments.split()])
    namespace["main"]()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert len(list((tmp_path / "out" / "interactions").iterdir())) == 2
