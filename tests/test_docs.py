"""Run the code, commands and examples of README and docs. Only names that need a network are replaced."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

import cyclealign_trl
from cyclealign_trl import (
    AlignerConfig,
    AlignerTemplate,
    CycleAlignConfig,
    DLMAConfig,
    DLMATrainer,
    RankingConfig,
    RankingTrainer,
)
from cyclealign_trl.aligner import corrections
from cyclealign_trl.cli import COMMANDS
from cyclealign_trl.data import hh_rlhf, named_datasets
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.scripts import (
    aligner,
    compare,
    dlma,
    estimate,
    evaluate,
    export,
    init,
    report,
    serve,
    train,
    train_ranked,
)
from cyclealign_trl.scripts import judge as judge_script
from tests.aligner.test_aligner_trainer import make_trainer as make_aligner_trainer
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import make_trainer, prompts

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
ALL = [README, *PAGES]
DOCS = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)

MESSAGES = [{"role": "user", "content": "Hi"}]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def reply(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def judge():
    """Endpoint that ranks completions in reverse order of their labels, and also corrects and answers."""

    def respond(body):
        shown = body["messages"][-1]["content"]
        if "### Answer" in shown:
            return Reply(json.dumps({"correction": "better"}))
        if "### Completions" not in shown:
            return Reply("An answer.")
        names = re.findall(r"^# Completion ([A-Z])$", shown.rpartition("### Instruction")[2], re.MULTILINE)
        return Reply(json.dumps({"ranking": names[::-1], "improved_response": "better"}))

    with LoopbackEndpoint(respond) as endpoint:
        yield endpoint


@pytest.fixture
def offline(tmp_path, monkeypatch, judge):
    """Working directory with tiny stand-ins for the models and data sets of the docs. Every run takes two steps."""
    from transformers import LlamaForSequenceClassification

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_BASE_URL", judge.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    model, tokenizer = make_model(max_position_embeddings=1024), make_tokenizer()
    model.save_pretrained("Qwen/Qwen3-0.6B")
    tokenizer.save_pretrained("Qwen/Qwen3-0.6B")
    model.save_pretrained("Qwen/Qwen3-0.6B-Base")
    base_tokenizer = make_tokenizer()
    base_tokenizer.chat_template = None
    base_tokenizer.save_pretrained("Qwen/Qwen3-0.6B-Base")
    model.config.num_labels = 1
    LlamaForSequenceClassification(model.config).save_pretrained("Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    tokenizer.save_pretrained("Skywork/Skywork-Reward-V2-Qwen3-0.6B")

    # Many end-of-sequence ids keep corrections short.
    model.generation_config.eos_token_id = [1, *range(20, 40)]
    model.save_pretrained("outputs/aligner")
    tokenizer.save_pretrained("outputs/aligner")
    AlignerTemplate("{question}|{answer}=").save("outputs/aligner")

    stand_ins = {
        corrections.HUB_ID: Dataset.from_list(
            [{"question": f"Q{i}", "answer": "no", "correction": "yes"} for i in range(12)]
        ),
        "trl-lib/ultrafeedback-prompt": prompts(12, conversational=True).select_columns(["prompt"]),
        "trl-lib/ultrafeedback_binarized": Dataset.from_list(
            [{"chosen": MESSAGES + reply("yes"), "rejected": MESSAGES + reply("no")}] * 12
        ),
        hh_rlhf.HUB_ID: Dataset.from_list(
            [
                {"chosen": f"\n\nHuman: Q{i}\n\nAssistant: yes", "rejected": f"\n\nHuman: Q{i}\n\nAssistant: no"}
                for i in range(250)
            ]
        ),
    }
    load_dataset = datasets.load_dataset

    def load(path, *args, split=None, **kwargs):
        if path not in stand_ins:
            return load_dataset(path, *args, split=split, **kwargs)
        rows = stand_ins[path]
        if path == hh_rlhf.HUB_ID:  # as published, subsets share no prompts
            subset = kwargs["data_dir"]
            rows = rows.map(lambda row: {name: text.replace(": Q", f": {subset} ") for name, text in row.items()})
        return DatasetDict(train=rows, test=rows) if split is None else rows

    for module in (datasets, corrections, hh_rlhf, named_datasets):
        monkeypatch.setattr(module, "load_dataset", load)

    check_config = RankingConfig.__post_init__

    def two_steps(self):
        self.max_steps, self.use_cpu, self.disable_tqdm, self.report_to = 2, True, True, "none"
        self.max_completion_length = min(self.max_completion_length, 8)
        check_config(self)

    monkeypatch.setattr(RankingConfig, "__post_init__", two_steps)
    check_aligner_config = AlignerConfig.__post_init__

    def two_aligner_steps(self):
        self.max_steps, self.use_cpu, self.disable_tqdm, self.report_to, self.max_length = 2, True, True, "none", 256
        check_aligner_config(self)

    monkeypatch.setattr(AlignerConfig, "__post_init__", two_aligner_steps)
    return tmp_path


def run_cycle(folder):
    make_trainer(folder, dataset=prompts(2, conversational=True), max_steps=1).train()


@pytest.mark.parametrize("page", [page for page in ALL if blocks(page, "python")], ids=lambda page: page.stem)
def test_code_of_each_page_runs(page, offline):
    run_cycle("outputs/cyclealign")
    run_cycle("outputs/first")
    export.main(["outputs/first"])
    namespace = {}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)
    trainer = namespace.get("trainer")
    assert trainer is None or trainer.state.global_step == 2


def test_all_pages_with_code_are_tested():
    assert {page.stem for page in ALL if blocks(page, "python")} >= {
        "README", "quickstart", "concepts", "cyclealign_trainer", "ranking_trainer", "rankers", "demonstrations",
        "losses", "data", "dlma", "aligner", "judge", "evaluation", "recipes",
    }  # fmt: skip


def test_documented_rows_can_be_trained_on(offline):
    namespace = {}
    _, code = blocks(ROOT / "docs/ranking_trainer.md", "python")
    exec(code, namespace)
    for name in ("ranked", "rewarded", "preference", "messages"):
        row = namespace[name]
        trainer = RankingTrainer(
            make_model(),
            RankingConfig("out", max_prompt_length=64),
            Dataset.from_list([row] * 2),
            None,
            make_tokenizer(),
        )
        trainer.train()


def test_documented_losses_are_correct(capsys):
    (code,) = blocks(ROOT / "docs/losses.md", "python")
    exec(code, {})
    documented = [float(number) for number in re.findall(r"\)\)  # ([\d.]+)", code)]
    printed = [float(number) for number in re.findall(r"tensor\(\[([\d.]+)\]\)", capsys.readouterr().out)]
    assert printed == documented
    assert len(documented) == 2


@pytest.mark.parametrize(
    "page", [page for page in ALL if "cyclealign " in str(blocks(page, "bash"))], ids=lambda p: p.stem
)
def test_commands_of_each_page_can_be_parsed(page, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    commands = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [line for line in commands.splitlines() if line.startswith("cyclealign ")]
    assert lines
    for line in lines:
        _, command, *arguments = shlex.split(line, comments=True)
        assert command in COMMANDS
        if command == "init":
            init.main(arguments)
        training = {
            "train": train, "train-ranked": train_ranked, "dlma": dlma, "aligner": aligner, "estimate": estimate
        }  # fmt: skip
        if command in training:
            training[command].make_parser().split(arguments)
        elif command in ("export", "report", "serve"):
            {"export": export, "report": report, "serve": serve}[command].make_parser().parse_args(arguments)
        elif command in ("compare", "judge", "evaluate"):
            module = {"compare": compare, "judge": judge_script, "evaluate": evaluate}[command]
            _, unknown = module.make_parser().split(arguments)
            assert not unknown


def test_documented_yaml_can_be_parsed(tmp_path):
    (code,) = blocks(ROOT / "docs/cli.md", "yaml")
    (tmp_path / "run.yaml").write_text(code)
    train.make_parser().split(["--config", str(tmp_path / "run.yaml")])


# Completeness


def logged(trainer):
    trainer.train()
    of_transformers = {"grad_norm", "learning_rate", "epoch", "step"}
    return set(trainer.state.log_history[0]) - of_transformers


def explained(page):
    """Return the metrics in a page's table. A name without a folder is in the folder of the name before it."""
    table = (ROOT / "docs" / page).read_text(encoding="utf-8").split("## What is logged")[1].split("\n## ")[0]
    names = set()
    for cell in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE):
        folder = ""
        for name in re.findall(r"`([^`]+)`", cell):
            folder = f"{name.rpartition('/')[0]}/" if "/" in name else folder
            names.add(name if "/" in name or not folder else folder + name)
    return names


def test_all_cyclealign_metrics_are_documented(tmp_path):
    assert logged(make_trainer(tmp_path, dataset=prompts(2), max_steps=1)) <= explained("cyclealign_trainer.md")


def test_all_ranking_metrics_are_documented(tmp_path):
    rows = Dataset.from_list([{"prompt": "Q", "completions": ["a", "b"], "ranks": [0, 1]}])
    settings = {"max_prompt_length": 64, "max_steps": 1, "logging_steps": 1, "use_cpu": True, "report_to": "none"}
    config = RankingConfig(str(tmp_path), **settings, disable_tqdm=True)
    trainer = RankingTrainer(make_model(), config, rows, None, make_tokenizer())
    assert logged(trainer) == explained("ranking_trainer.md")


def test_all_dlma_metrics_are_documented(tmp_path):
    rows = Dataset.from_list([{"prompt": "Q", "chosen": "a", "rejected": "b", "self_reward": 1.0}])
    settings = {"max_prompt_length": 64, "max_completion_length": 64, "max_steps": 1, "logging_steps": 1}
    config = DLMAConfig(str(tmp_path), **settings, sft_weight=1.0, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = DLMATrainer(make_model(), args=config, train_dataset=rows, processing_class=make_tokenizer())
    assert logged(trainer) == explained("dlma.md")


def test_all_aligner_metrics_are_documented(tmp_path):
    assert logged(make_aligner_trainer(tmp_path, max_steps=4)) == explained("aligner.md")


def test_documented_corrections_can_be_trained_on(offline):
    namespace = {}
    exec(blocks(ROOT / "docs/aligner.md", "python")[2], namespace)
    for name in ("row", "messages"):
        make_aligner_trainer("out", rows=[namespace[name]] * 4, warmup_fraction=0).train()


def test_all_failures_are_documented():
    table = (ROOT / "docs/concepts.md").read_text(encoding="utf-8").split("## When a ranking fails")[1]
    sources = "\n".join(path.read_text() for path in (ROOT / "cyclealign_trl").rglob("*.py"))
    reasons = set(re.findall(r"(?:RankingFailure|CallError|InvalidReply|InvalidRanking)\(\s*\"(\w+)\"", sources))
    assert len(reasons) > 5
    for reason in reasons:
        assert f"`{reason}`" in table, reason


def test_all_public_names_are_documented():
    shown = set(re.findall(r"^::: cyclealign_trl\.(\S+)$", DOCS, re.MULTILINE))
    for name, module in cyclealign_trl._MODULES.items():
        assert {f"{module}.{name}", module} & shown, name


def test_documented_settings_exist():
    text = "\n".join(page.read_text(encoding="utf-8") for page in ALL)
    names = set(re.findall(r"`([a-z]\w*)=", text))
    configs = (CycleAlignConfig, DLMAConfig, AlignerConfig)
    known = {name for config in configs for name in config.__dataclass_fields__} | {
        "api_key", "ranker", "resume_from_checkpoint", "peft_config", "chat_template", "selection", "keep_paragraphs",
        "conversational", "dataset_type", "corrector",
    }  # fmt: skip
    assert names
    assert names <= known


def test_file_tree_is_complete():
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Files")[1]
    package = Path(cyclealign_trl.__file__).parent
    modules = {path.name for path in package.rglob("*.py") if not path.name.startswith("__")}
    assert set(re.findall(r"\w+\.py", tree)) == modules
    folders = {path.parent.name for path in package.rglob("*.py")} - {package.name}
    assert set(re.findall(r"(\w+)/ ", tree)) == folders


def test_readme_lists_all_folders():
    package = Path(cyclealign_trl.__file__).parent
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"── (\w+)/", README.read_text(encoding="utf-8"))) == folders


def test_readme_starts_with_the_demo_and_the_tests():
    commands = [line.split("#")[0].strip() for line in blocks(README, "bash")[0].splitlines()]
    assert commands == ["make demo", "make test"]


@pytest.mark.parametrize("page", [*ROOT.glob("*.md")], ids=lambda page: page.stem)
def test_local_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for target in {first or second for first, second in targets}:
        assert "://" in target or (ROOT / target).is_file(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_lines_fit_on_the_page(page):
    fence = None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fence = line if fence is None else None
        elif fence not in (None, "```math"):
            assert len(line) <= 88, line


def test_citation_names_the_version():
    assert f"\nversion: {cyclealign_trl.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    losses = (tmp_path / "site" / "losses" / "index.html").read_text(encoding="utf-8")
    assert losses.count("<math ") == 3
    trainer = (tmp_path / "site" / "cyclealign_trainer" / "index.html").read_text(encoding="utf-8")
    assert "<code>int</code>, default <code>3</code>" in trainer
    assert "*optional*" not in trainer
    assert "[<code>" not in trainer
    assert "https://fonts" not in losses


# Examples


def run_example(name, monkeypatch, arguments):
    code = (ROOT / "examples" / name).read_text(encoding="utf-8")
    namespace = {"__name__": "example"}
    exec(compile(code, name, "exec"), namespace)
    monkeypatch.setattr("sys.argv", [name, *shlex.split(arguments)])
    namespace["main"]()


SMALL = """--model_name_or_path Qwen/Qwen3-0.6B --output_dir out --max_prompt_length 64 --per_device_train_batch_size 2
    --dtype float32"""
HH = "--dataset_name Anthropic/hh-rlhf --dataset_config harmless-base"


def test_cyclealign_example(offline, monkeypatch, judge):
    pytest.importorskip("peft")
    run_example(
        "cyclealign.py",
        monkeypatch,
        f"""{SMALL} --dataset_name trl-lib/ultrafeedback-prompt --ranker_model judge --use_peft
            --lora_target_modules q_proj v_proj --num_interactions 2""",
    )
    assert (offline / "out" / "adapter_model.safetensors").is_file()
    assert len(list((offline / "out" / "interactions").iterdir())) == 2


def test_jury_example(offline, monkeypatch, judge):
    run_example(
        "jury.py",
        monkeypatch,
        f"{SMALL} --dataset_name trl-lib/ultrafeedback-prompt --judges one another --num_interactions 2",
    )
    assert (offline / "out" / "model.safetensors").is_file()
    assert {request["model"] for request in judge.requests} == {"one", "another"}


def test_jury_command(offline, monkeypatch, judge):
    monkeypatch.syspath_prepend(ROOT)
    docstring = ast.get_docstring(ast.parse((ROOT / "examples" / "jury.py").read_text(encoding="utf-8")))
    arguments = shlex.split(docstring[docstring.index("cyclealign train") :])[2:]
    train.main([*arguments, "--max_prompt_length", "64", "--per_device_train_batch_size", "2"])
    assert {request["model"] for request in judge.requests} == {"gpt-5-mini", "gpt-5-nano"}


def test_offline_pro_example(offline, monkeypatch, capsys):
    run_example("offline_pro.py", monkeypatch, f"{SMALL} {HH} --eval_strategy epoch --max_eval_pairs 4")
    output = capsys.readouterr().out
    assert re.search(r"Held-out ranking accuracy: \d\.\d{3} -> \d\.\d{3}", output)


def test_reward_model_example(offline, monkeypatch):
    run_example(
        "reward_model_ranker.py",
        monkeypatch,
        f"{SMALL} {HH} --reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B --num_prompts 8 --num_interactions 2",
    )
    assert len(list((offline / "out" / "interactions").iterdir())) == 2


def test_dlma_example(offline, monkeypatch, capsys):
    run_example("dlma.py", monkeypatch, f"{SMALL} --dataset_name trl-lib/ultrafeedback-prompt --max_prompt_length 256")
    assert (offline / "out" / "model.safetensors").is_file()
    assert "12 prompts, 12 kept" in capsys.readouterr().out


def brevity(prompts, completions, **_):
    """Score completions by their length, as a TRL reward function."""
    return [-float(len(completion[0]["content"])) for completion in completions]


def test_bootstrapping_example(offline, monkeypatch, capsys):
    run_example(
        "aligner_bootstrap.py",
        monkeypatch,
        f"""{SMALL} --dataset_name trl-lib/ultrafeedback-prompt --aligner outputs/aligner --num_prompts 8
            --max_new_tokens 16 --use_cpu --scorer tests.test_docs.brevity""",
    )
    output = capsys.readouterr().out
    assert re.findall(r"^Round (\d): 8 prompts, [1-8] pairs; ", output, re.MULTILINE) == ["1", "2", "3"]
    assert re.findall(r"^Score after (\d) rounds: -\d+\.\d{3}$", output, re.MULTILINE) == ["0", "1", "2", "3"]
    assert sorted(path.name for path in (offline / "out").glob("round-*")) == ["round-1", "round-2", "round-3"]
    weights = [(offline / "out" / f"round-{number}" / "model.safetensors").read_bytes() for number in (1, 2, 3)]
    assert len(set(weights)) == 3


PROMPTS = {"prompt": MESSAGES}
PAIRS = {"chosen": MESSAGES + reply("yes"), "rejected": MESSAGES + reply("no")}
NEEDED = {
    "aligner_bootstrap.py": ("--aligner outputs/aligner --num_prompts 4 --num_rounds 1 --max_new_tokens 8", PROMPTS),
    "jury.py": ("--judges one another --num_interactions 1", PROMPTS),
    "cyclealign.py": ("--ranker_model judge --num_interactions 1", PROMPTS),
    "dlma.py": ("--max_prompt_length 256", PROMPTS),
    "offline_pro.py": ("", PAIRS),
    "reward_model_ranker.py": ("--reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B --num_interactions 1", PROMPTS),
}


@pytest.fixture(params=NEEDED)
def example(request, monkeypatch):
    """Run an example with its other arguments. Its data are files, unlike those of the tests above."""
    needed, row = NEEDED[request.param]
    for number in range(2):
        questions = [[{"role": "user", "content": f"Question {number}{i}"}] for i in range(4)]
        rows = [{name: question + messages[1:] for name, messages in row.items()} for question in questions]
        Dataset.from_list(rows).to_json(f"rows{number}.jsonl")
    return lambda arguments: run_example(request.param, monkeypatch, f"{SMALL} {needed} --use_cpu {arguments}")


def test_examples_take_a_mixture_of_files(offline, example):
    Path("mixture.yaml").write_text(
        "datasets:\n" + "".join(f"  - path: json\n    data_files: rows{number}.jsonl\n" for number in range(2))
    )
    example("--config mixture.yaml")
    assert next((offline / "out").rglob("model.safetensors")).is_file()


def test_examples_refuse_a_stream(offline, example):
    with pytest.raises(ValueError, match="--dataset_streaming is set, but the trainers need datasets with a length"):
        example("--dataset_name rows0.jsonl --dataset_streaming")


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="the model would be loaded")
def test_examples_load_the_policy_in_4_bits(offline, example):
    with pytest.raises(ImportError, match="bitsandbytes"):
        example("--dataset_name rows0.jsonl --use_peft --load_in_4bit")


def test_all_examples_are_tested_and_short():
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    tested = set(re.findall(r'"(\w+\.py)",\s*monkeypatch', Path(__file__).read_text(encoding="utf-8")))
    assert names == tested == set(NEEDED)
    for name in names:
        assert len((ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()) < 100, name
