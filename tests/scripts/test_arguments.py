"""What a command line and a YAML file come to, whose arguments are whose, and what is said of wrong ones."""

import os
from pathlib import Path

import pytest
import yaml

from cyclealign_trl import CycleAlignConfig
from cyclealign_trl.scripts import aligner, dlma, judge, train, train_ranked

CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))

# Another valid value of each field that has only some.
OTHERS = {
    "loss_type": {"pro": "rrhf", "rrhf": "pro"},
    "demonstration_scope": {"run": "prompt"},
    "sft_target": {"top_ranked": "improved"},
    "lr_scheduler_type": {"linear": "cosine", "cosine": "linear"},
    "aligner_template": {"labels": "conversation"},
    "eval_strategy": {"steps": "epoch"},
    "generation_backend": {"vllm": "transformers"},
    "vllm_mode": {"colocate": "server"},
}


def script_of(config):
    named = {
        "dlma": dlma,
        "judge": judge,
        "aligner": aligner,
        "offline_pro": train_ranked,
        "offline_rrhf": train_ranked,
    }
    return named.get(config.stem, train)


def parsed(script, *argv):
    """All fields of what the parser returns."""
    fields = {}
    for part in script.make_parser().parse([*map(str, argv)]):
        fields.update(vars(part))
    return fields


def other(name, value):
    """A value unlike the file's, as a command line gives it, and as the parser returns it."""
    if name in OTHERS:
        return [OTHERS[name][value]], OTHERS[name][value]
    if name == "warmup_fraction":
        return ["0.5"], 0.5
    if isinstance(value, bool):
        return [str(not value).lower()], not value
    if isinstance(value, int | float):
        return [str(value + 1)], value + 1
    if isinstance(value, list):
        return ["one", "two"], ["one", "two"]
    if isinstance(value, dict):
        return ['{"seed": 7}'], '{"seed": 7}'
    return [f"{value}-other"], f"{value}-other"


def cases():
    for config in CONFIGS:
        for name, value in yaml.safe_load(config.read_text(encoding="utf-8")).items():
            yield pytest.param(config, name, value, id=f"{config.stem}-{name}")


def test_there_are_configs():
    assert len(CONFIGS) == 9


@pytest.mark.parametrize(("config", "name", "value"), list(cases()))
def test_each_field_of_each_config_can_be_overridden(config, name, value, tmp_path):
    script = script_of(config)
    given = ["--config", config] if script is judge else ["--use_cpu", "--config", config]
    assert parsed(script, *given)[name] == value
    written, expected = other(name, value)
    assert parsed(script, *given, f"--{name}", *written)[name] == expected
    own, accelerate_own = script.make_parser().split([*map(str, given), f"--{name}", *written])
    assert own == [*map(str, given), f"--{name}", *written]
    assert accelerate_own == []


def test_accelerates_arguments_pass_through_from_both_places(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("num_processes: 2\nuse_deepspeed: true\nmulti_gpu: false\nlearning_rate: 1e-3\n")
    argv = f"--config {config} --seed 2 --num_machines 2 --machine_rank 1 --num_interactions 2".split()
    own, accelerate_own = train.make_parser().split(argv)
    assert own == ["--config", str(config), "--seed", "2", "--num_interactions", "2"]
    assert accelerate_own == ["--num_processes", "2", "--use_deepspeed", "--num_machines", "2", "--machine_rank", "1"]
    assert parsed(train, *own, "--use_cpu", "--output_dir", tmp_path)["learning_rate"] == 1e-3


def test_config_with_an_equals_sign(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {tmp_path}\n")
    assert parsed(train, f"--config={config}", "--use_cpu")["output_dir"] == str(tmp_path)


def test_environment_variables_from_yaml(tmp_path, monkeypatch):
    monkeypatch.delenv("FROM_THE_FILE", raising=False)
    config = tmp_path / "run.yaml"
    config.write_text("env:\n  FROM_THE_FILE: 1\n")
    train.make_parser().split(["--config", str(config)])
    assert os.environ.pop("FROM_THE_FILE") == "1"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--num_generatoins", "3"], "unknown argument --num_generatoins. Did you mean --num_generations?"),
        (["--num_procesess=2"], "unknown argument --num_procesess. Did you mean --num_processes?"),
        (
            ["--num_gen", "3"],
            "unknown argument --num_gen.",
        ),  # no abbreviations: a new field could change their meaning
        (["--zzz"], "unknown argument --zzz."),
        (["--num_generations", "many"], "invalid int value: 'many'"),
        (["three"], "unexpected 'three'"),
        (["--seed", "1", "--config"], "--config needs the path"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        train.make_parser().split(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("cyclealign train: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_misspelt_field_in_yaml(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("num_interaction: 3\n")
    with pytest.raises(SystemExit):
        train.make_parser().split(["--config", str(config)])
    assert "unknown argument --num_interaction. Did you mean --num_interactions?" in capsys.readouterr().err


@pytest.mark.parametrize("script", [train, train_ranked, aligner])
def test_help_explains_our_fields_and_names_the_others(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 220
    assert max(map(len, text.splitlines())) <= 100
    explained, others = text.split("Every other argument of transformers.TrainingArguments:")
    for name in ("--dataset_name", "--loss_type", "--learning_rate", "--output_dir", "--model_name_or_path"):
        assert explained.count(f"{name} ") == 1, name
    names = others.replace("\n", " ").replace(" ", "").split(",")
    assert "gradient_accumulation_steps" in names
    assert "loss_type" not in names
    assert "learning_rate" not in names
    if script is train:
        for name in CycleAlignConfig.__annotations__:
            if not name.startswith("_"):
                assert f"--{name} " in explained, name


def test_a_command_that_does_not_train_explains_all_of_its_own(capsys):
    with pytest.raises(SystemExit) as stop:
        judge.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "accelerate" not in text
    assert "TrainingArguments" not in text
    for part in (judge.JudgeArguments, judge.RankerArguments):
        for name in part.__dataclass_fields__:
            assert text.count(f"--{name} ") == 1, name
