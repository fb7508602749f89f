"""`examples/paper/`: every row from the data to the tables with tiny models, its configuration, and resumption."""

import dataclasses
import gzip
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from cyclealign_trl import cli
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.scripts import train, train_ranked
from tests.conftest import make_model, make_tokenizer
from tests.rankers.test_reward_model import make_plain_tokenizer, make_reward_model

PAPER = Path(__file__).parents[2] / "examples" / "paper"
sys.path.append(str(PAPER))

import rows  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402

CONFIGS = sorted(path.stem for path in (PAPER / "configs").glob("*.yaml"))
ROWS = {name: row for name, row in rows.ROWS.items() if row.config is not None}
SCRIPTS = {"train": train, "train-ranked": train_ranked}
TINY = shlex.split("""--max_steps 2 --max_prompt_length 64 --max_completion_length 8 --gradient_accumulation_steps 1
    --use_cpu true --report_to none --disable_tqdm true --save_steps 1 --logging_steps 1""")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with a base model, a chat model and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    for name, tokenizer in (("base", make_plain_tokenizer()), ("chat", make_tokenizer())):
        make_model(max_position_embeddings=512).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    make_reward_model(max_position_embeddings=1024).save_pretrained(folder / "reward")
    make_tokenizer().save_pretrained(folder / "reward")
    return folder


@pytest.fixture(scope="module")
def hh_rlhf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hh")
    for subset in rows.SUBSETS:
        for split, number in (("train", 4), ("test", 3)):
            with gzip.open(folder / f"{subset}.{split}.jsonl.gz", "wt", encoding="utf-8") as lines:
                for index in range(number):
                    question = f"\n\nHuman: {subset} {split} {index}?\n\nAssistant:"
                    lines.write(json.dumps({"chosen": f"{question} Yes", "rejected": f"{question} No"}) + "\n")
    return folder


@pytest.fixture
def judge(monkeypatch):
    """Endpoint that ranks completions in reverse order of their labels."""

    def respond(body):
        query = body["messages"][-1]["content"].rpartition("### Instruction")[2]
        labels = re.findall(r"^# Completion ([A-Z])$", query, re.MULTILINE)
        return Reply(json.dumps({"ranking": labels[::-1], "improved_response": "Better."}))

    with LoopbackEndpoint(respond) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "a-key")
        yield endpoint


@pytest.fixture
def commands(tmp_path, monkeypatch, judge):
    """Run commands in this process, and return them as they were given."""
    given = []

    def run_command(*command):
        given.append(command)
        cli.main(command)

    monkeypatch.setattr(run, "run_command", run_command)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return given


def repeat(name, results, models, hh_rlhf, *arguments):
    """Run a row with a tiny model."""
    row = rows.ROWS[name]
    model = models / ("chat" if row.conversational else "base")
    own = ["--results", results, "--hh_rlhf", hh_rlhf, "--model_name_or_path", model, "--num_prompts", "4",
           "--reward_model", models / "reward", "--max_samples", "2"]  # fmt: skip
    run.main([name, *map(str, own), *(TINY if row.command else []), *arguments])


def parse(script, *argv):
    """Return the fields of all dataclasses that the command parses."""
    own_argv, accelerate_argv = script.make_parser().split([*map(str, argv)])
    assert accelerate_argv == []
    parts = script.make_parser().parse(own_argv)
    return {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}


def test_every_configuration_belongs_to_a_row():
    assert {row.config for row in ROWS.values()} == set(CONFIGS)
    assert len(CONFIGS) == 12


@pytest.mark.parametrize("name", CONFIGS)
def test_every_value_is_marked_as_the_papers_or_ours(name):
    lines = (PAPER / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if line and not line.startswith("#")]
    assert len(values) == len(yaml.safe_load("\n".join(lines)))
    for line in values:
        assert re.search(r" # (paper|ours|PRO|RRHF)\b", line), line


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.command])
def test_the_command_reads_every_value_of_the_configuration_unchanged(name, tmp_path):
    row = ROWS[name]
    overrides = [text for field, value in row.overrides.items() for text in (f"--{field}", value)]
    config = PAPER / "configs" / f"{row.config}.yaml"
    given = ["--config", config, "--output_dir", tmp_path, "--use_cpu", "true", *overrides]
    parsed = parse(SCRIPTS[row.command], *given)
    for field, value in row.read_config().items():
        assert parsed[field] == value, field
    tiny = parse(SCRIPTS[row.command], *given, *TINY)
    sizes = {token[2:] for token in TINY if token.startswith("--")}
    assert {field for field, value in parsed.items() if tiny[field] != value} <= sizes


def test_the_reported_rows_are_those_of_the_reference(golden):
    reported = golden["evaluation"]["reported_table1"]
    ours = {name.replace("ablation_", ""): values for name, values in reported.items()}
    assert {name: list(row.reported) for name, row in rows.ROWS.items() if row.reported} == ours


# The whole chain


@pytest.mark.parametrize("name", [*CONFIGS, "interactions_2"])
def test_a_row_from_the_data_to_the_table(name, tmp_path, models, hh_rlhf, commands, judge, capsys):
    row = rows.ROWS[name]
    repeat(name, tmp_path, models, hh_rlhf)
    evaluated = next(command for command in commands if command[0] == "evaluate")
    kind = "chat" if row.conversational else "base"
    assert evaluated[1] == f"{name}={tmp_path / name / 'model' if row.command else models / kind}"
    assert [command[0] for command in commands] == [*([row.command] if row.command else []), "evaluate"]
    if row.command == "train":
        assert len(judge.requests) == 2
        assert {request["model"] for request in judge.requests} == {row.read_config()["ranker_model"]}
        shown = json.dumps(judge.requests[0])
        assert ("Human:" in shown) != row.conversational
        settings = json.loads((tmp_path / name / "model" / "run.json").read_text())["settings"]
        assert settings["num_interactions"] == row.read_config()["num_interactions"]
    else:
        assert not judge.requests
    if row.command:
        assert (tmp_path / name / "model" / "model.safetensors").read_bytes() != (
            models / kind / "model.safetensors"
        ).read_bytes()
    capsys.readouterr()

    tables.main(["--results", str(tmp_path)])
    output = capsys.readouterr().out
    report = json.loads((tmp_path / name / "evaluation" / "report.json").read_text())["models"][name]
    figures = [*(report["groups"][subset] for subset in rows.SUBSETS), report["micro"]]
    expected = [
        f"{figure['mean']:.2f} [{figure['interval'][0]:.2f}, {figure['interval'][1]:.2f}]" for figure in figures
    ]
    line = next(line for line in output.splitlines() if line.startswith(f"| {row.method}, {row.backbone}, ours"))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == expected
    note = next(line for line in output.splitlines() if line.startswith(f"- {name}: "))
    assert f"model {models / kind};" in note
    assert note.endswith(f"reward model {models / 'reward'}; 2/2/2/2 test prompts per subset.")
    assert ("--max_steps 2" in note) == (row.command is not None)
    assert (tmp_path / "figure_5.png").exists() == (name in rows.FIGURE_5)
