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
        model = make_model(max_position_embeddings=512)
        model.generation_config.eos_token_id = [1, *range(20, 60)]  # keeps replies short
        model.save_pretrained(folder / name)
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


def test_the_readme_describes_every_row_and_its_commands_can_be_parsed():
    text = (PAPER / "README.md").read_text(encoding="utf-8")
    estimated = text.split("## What a row needs")[1].split("## Rows")[0]
    assert re.findall(r"^\| (\w+) \|", estimated, re.MULTILINE) == ["row", *ROWS]
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in blocks.splitlines() if "run.py" in line]
    assert len(commands) == 4
    for _, script, *argv in commands:
        assert (PAPER.parents[1] / script).is_file()
        args, training_argv = run.make_parser().parse_known_args(argv)
        if training_argv:
            assert SCRIPTS[rows.ROWS[args.row].command].make_parser().split(training_argv) == (training_argv, [])


def test_the_reported_rows_are_those_of_the_reference(golden):
    reported = golden["evaluation"]["reported_table1"]
    ours = {name.replace("ablation_", ""): values for name, values in reported.items()}
    assert {name: list(row.reported) for name, row in rows.ROWS.items() if row.reported} == ours


# The whole chain


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_from_the_data_to_the_table(name, tmp_path, models, hh_rlhf, commands, judge, capsys):
    row = rows.ROWS[name]
    repeat(name, tmp_path, models, hh_rlhf)
    evaluated = next(command for command in commands if command[0] == "evaluate")
    kind = "chat" if row.conversational else "base"
    assert evaluated[1] == f"{name}={tmp_path / name / 'model' if row.command else models / kind}"
    assert evaluated[evaluated.index("--prompt_format") + 1] == ("chat" if row.conversational else "text")
    assert [command[0] for command in commands] == [*([row.command] if row.command else []), "evaluate"]
    if row.command == "train":
        assert len(judge.requests) == 2
        assert {request["model"] for request in judge.requests} == {row.read_config()["ranker_model"]}
        [data] = (tmp_path / "data").glob("prompts-4-train-*.jsonl")
        prompt = json.loads(data.read_text().splitlines()[0])["prompt"]
        assert isinstance(prompt, list) if row.conversational else prompt.startswith("\n\nHuman: ")
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
    line = next(
        line for line in output.splitlines() if line.startswith(f"| {row.method}, {row.backbone}, ours (see below)")
    )
    assert [cell.strip() for cell in line.split("|")[2:-1]] == expected
    note = next(line for line in output.splitlines() if line.startswith(f"- {name}: "))
    assert f"model {models / kind};" in note
    assert note.endswith(f"reward model {models / 'reward'}; 2/2/2/2 test prompts per subset.")
    assert ("--max_steps 2" in note) == (row.command is not None)


def test_an_interrupted_row_continues(tmp_path, models, hh_rlhf, commands, judge):
    def once_more():
        commands.clear()
        repeat("cyclealign_pro_llama", tmp_path, models, hh_rlhf)
        return [" ".join(command) for command in commands]

    trained = tmp_path / "cyclealign_pro_llama" / "model" / "model.safetensors"
    resumed = "--resume_from_checkpoint true"
    first, _ = once_more()
    assert resumed not in first
    weights = trained.read_bytes()
    # Finished: nothing is trained, generated or scored.
    replies = tmp_path / "cyclealign_pro_llama" / "evaluation" / "replies" / "cyclealign_pro_llama.jsonl"
    before = replies.read_bytes()
    assert [command.split()[0] for command in once_more()] == ["evaluate"]
    assert replies.read_bytes() == before
    # Killed after a checkpoint, while the model was saved
    record = tmp_path / "cyclealign_pro_llama" / rows.RECORD
    record.write_text(record.read_text().replace('"trained": true', '"trained": false'))
    trained.unlink()
    second, _ = once_more()
    assert resumed in second
    assert trained.read_bytes() == weights
    # Killed while the first checkpoint was written: the rankings of the run are still in its cache.
    record.write_text(record.read_text().replace('"trained": true', '"trained": false'))
    for marker in (tmp_path / "cyclealign_pro_llama" / "model").glob("checkpoint-*/trainer_state.json"):
        marker.unlink()
    third, _ = once_more()
    assert resumed not in third
    assert trained.read_bytes() == weights
    assert len(judge.requests) == 2


def test_a_row_that_was_started_otherwise_is_not_continued(tmp_path, models, hh_rlhf, commands, capsys):
    secret = ["--hub_token", "hf_secret", "--ranker_kwargs", '{"extra_headers": {"X-Key": "secret"}}']
    repeat("cyclealign_pro_llama", tmp_path, models, hh_rlhf, *secret)
    assert "secret" not in (tmp_path / "cyclealign_pro_llama" / rows.RECORD).read_text()
    tables.main(["--results", str(tmp_path)])
    assert "secret" not in (tmp_path / "tables.md").read_text()
    commands.clear()
    with pytest.raises(SystemExit) as stop:
        repeat("cyclealign_pro_llama", tmp_path, models, hh_rlhf, "--learning_rate", "1e-4")
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'cyclealign_pro_llama'} was started with " in error
    assert "'learning_rate': '1e-4'" in error
    assert "secret" not in error
    assert not commands


def test_an_untrained_row_takes_no_arguments_of_a_training(tmp_path, models, hh_rlhf, commands, capsys):
    with pytest.raises(SystemExit) as stop:
        repeat("zero_shot_llama", tmp_path, models, hh_rlhf, "--learning_rate", "1e-4")
    assert stop.value.code == 2
    assert "zero_shot_llama is not trained, so it takes no argument --learning_rate." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["ppo_llama"])  # only cited
    assert not commands


@pytest.mark.parametrize("lora", [[], ["--use_peft", "true"], ["--use_peft=true"]])
@pytest.mark.parametrize("name", ["interactions_2", "rrhf_llama"])
def test_a_gpu_trains_under_zero_2_or_with_an_adapter(name, lora, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "run_command", lambda *command: commands.append(command))
    run.train(rows.ROWS[name], tmp_path / "data.jsonl", tmp_path / "model", "org/model", lora)
    [[command, *argv]] = commands
    assert ("--num_interactions 2" in " ".join(argv)) == (name == "interactions_2")
    own_argv, accelerate_argv = SCRIPTS[command].make_parser().split(argv)
    assert own_argv[own_argv.index("--dtype") + 1] == "bfloat16"
    assert own_argv[own_argv.index("--model_name_or_path") + 1] == "org/model"
    if lora:
        assert accelerate_argv == []
        assert "--deepspeed" not in own_argv
    else:
        assert accelerate_argv == ["--num_processes", "1", "--use_deepspeed"]
        assert json.loads(Path(own_argv[own_argv.index("--deepspeed") + 1]).read_text())["zero_optimization"]


# Tables


def write_row(results, name, *, model=None, **changes):
    """Write the files of a finished row, with means 50, 51, 52, 53 and a total of 54.5."""
    figures = [{"mean": 50.0 + i, "interval": [49.0 + i, 51.5 + i], "count": 9} for i in range(4)]
    total = {"mean": 54.5, "interval": [54.0, 55.25], "count": 36}
    row = rows.ROWS[name]
    folder = results / name
    report = {
        "reward_model": rows.REWARD_MODEL,
        "transform": "sigmoid",
        "groups": {subset: {"prompts": 9, "size": 9} for subset in rows.SUBSETS},
        "models": {
            name: {
                "groups": dict(zip(rows.SUBSETS, figures, strict=True)), "micro": total, "failed": 0, "unscored": 0
            }
        },
    }  # fmt: skip
    run.write_record(folder, {"model": model or row.model, "arguments": {}, "trained": True})
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "report.json").write_text(json.dumps(report | changes))


def test_tables_show_the_papers_numbers_ours_and_what_was_not_run(tmp_path, capsys):
    write_row(tmp_path, "pro_alpaca")
    tables.main(["--results", str(tmp_path)])
    output = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    assert cells[0] == ["Table 1: mean reward", *tables.COLUMNS]
    lines = {first: others for first, *others in cells}
    assert lines["PRO, Alpaca-7B, paper"] == ["73.13", "64.56", "65.60", "66.51", "67.64"]
    assert lines["PRO, Alpaca-7B, ours"] == [
        "50.00 [49.00, 51.50]", "51.00 [50.00, 52.50]", "52.00 [51.00, 53.50]", "53.00 [52.00, 54.50]",
        "54.50 [54.00, 55.25]",
    ]  # fmt: skip
    assert lines["PPO, LLaMA-7B, paper (cited)"] == ["61.97", "55.29", "59.78", "58.26", "58.65"]
    assert "PPO, LLaMA-7B, ours" not in output
    assert lines["PRO, LLaMA-7B, ours"] == ["not run yet", "-", "-", "-", "-"]
    assert sum("ours" in line for line in lines) == len(ROWS)
    assert output.count("95% bootstrap intervals") == 1
    assert "- pro_alpaca" not in output  # nothing differs from the row
    assert output.splitlines()[-1] == f"Written to {tmp_path}: tables.md."
    assert (tmp_path / "tables.md").read_text().strip() in output


def test_figure_5_is_plotted_from_the_rows_that_are_there(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("interactions_1", "cyclealign_pro_alpaca", "interactions_7"):
        write_row(tmp_path, name)
    tables.main(["--results", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == f"Written to {tmp_path}: tables.md, figure_5.png."
    assert (tmp_path / "figure_5.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "figure_5.png").unlink()
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    tables.main(["--results", str(tmp_path)])
    assert "Figure 5 is not plotted, because matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "figure_5.png").exists()


def test_notes_say_what_differs_and_control_no_terminal(tmp_path, capsys):
    write_row(tmp_path, "pro_llama", model="a\x1b[31m|b", reward_model="other/reward")
    tables.main(["--results", str(tmp_path)])
    output = capsys.readouterr().out
    assert "- pro_llama: model a?[31m|b; reward model other/reward." in output
    assert "\x1b" not in (tmp_path / "tables.md").read_text()


def test_other_evaluations_and_folders_are_errors(tmp_path, capsys):
    write_row(tmp_path, "pro_llama", transform="none")
    for folder, message in ((tmp_path / "no", "there is no folder"), (tmp_path, "transform 'none'. A row needs")):
        with pytest.raises(SystemExit) as stop:
            tables.main(["--results", str(folder)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_the_script_runs_the_commands_in_processes_of_their_own(tmp_path, models, hh_rlhf, monkeypatch, capfd):
    monkeypatch.chdir(PAPER.parents[1])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repeat("zero_shot_llama", tmp_path, models, hh_rlhf)
    tables.main(["--results", str(tmp_path)])
    output = capfd.readouterr().out
    assert f"Written to {tmp_path / 'zero_shot_llama' / 'evaluation'}: " in output
    assert re.search(r"^\| zero-shot, LLaMA-7B, ours \(see below\) +\| \d\d\.\d\d \[", output, re.MULTILINE)
    with pytest.raises(SystemExit) as stop:
        run.run_command("trian")
    assert stop.value.code == 2
