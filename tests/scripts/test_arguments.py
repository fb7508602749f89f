"""Arguments from the command line and from YAML: precedence, arguments of accelerate, errors and help."""

import os
import re

import pytest
import yaml

from cyclealign_trl import CycleAlignConfig
from cyclealign_trl.scripts import aligner, dlma, init, judge, train, train_ranked

CONFIGS = sorted(init.CONFIGS.glob("*.yaml"))

# Another legal value for each value of a field with choices.
OTHER_CHOICES = {
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
        "offline": train_ranked,
        "offline_rrhf": train_ranked,
    }
    return named.get(config.stem, train)


def parsed(script, *argv):
    """Return the fields of all parsed dataclasses."""
    fields = {}
    for part in script.make_parser().parse([*map(str, argv)]):
        fields.update(vars(part))
    return fields


def another_value(name, value):
    """Return a different value for a field: as command line tokens, and as the parser returns it."""
    if name in OTHER_CHOICES:
        return [OTHER_CHOICES[name][value]], OTHER_CHOICES[name][value]
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


def test_all_example_configs_are_tested():
    assert len(CONFIGS) == 9


@pytest.mark.parametrize(("config", "name", "value"), list(cases()))
def test_the_command_line_overrides_each_field_of_each_config(config, name, value, tmp_path):
    script = script_of(config)
    given = ["--config", config] if script is judge else ["--use_cpu", "--config", config]
    assert parsed(script, *given)[name] == value
    tokens, expected = another_value(name, value)
    assert parsed(script, *given, f"--{name}", *tokens)[name] == expected
    own_argv, accelerate_argv = script.make_parser().split([*map(str, given), f"--{name}", *tokens])
    assert own_argv == [*map(str, given), f"--{name}", *tokens]
    assert accelerate_argv == []


def test_arguments_of_accelerate_are_split_off_from_command_line_and_yaml(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("num_processes: 2\nuse_deepspeed: true\nmulti_gpu: false\nlearning_rate: 1e-3\n")
    argv = f"--config {config} --seed 2 --num_machines 2 --machine_rank 1 --num_interactions 2".split()
    own_argv, accelerate_argv = train.make_parser().split(argv)
    assert own_argv == ["--config", str(config), "--seed", "2", "--num_interactions", "2"]
    assert accelerate_argv == ["--num_processes", "2", "--use_deepspeed", "--num_machines", "2", "--machine_rank", "1"]
    assert parsed(train, *own_argv, "--use_cpu", "--output_dir", tmp_path)["learning_rate"] == 1e-3


RANKER = ("ranker_model", "ranker_base_url", "ranker_factory", "ranker_kwargs")


@pytest.mark.parametrize(
    ("in_yaml", "argv", "expected"),
    [
        ("ranker_model: a\nranker_base_url: http://a\nranker_kwargs: {criteria: x}", "--ranker_factory m.f",
         (None, None, "m.f", None)),
        ("ranker_model: a\nranker_kwargs: {criteria: x}", "--ranker_factory=m.f --ranker_kwargs {}",
         (None, None, "m.f", "{}")),
        ("ranker_base_url: http://a", "--ranker-factory m.f", (None, None, "m.f", None)),
        ("ranker_factory: m.f\nranker_kwargs: {weights: [1]}", "--ranker_model a", ("a", None, None, None)),
        ("ranker_factory: m.f", "--ranker_model a --ranker_base_url http://a", ("a", "http://a", None, None)),
        # The same kind of ranker: field by field.
        ("ranker_model: a\nranker_kwargs: {criteria: x}", "--ranker_model b", ("b", None, None, {"criteria": "x"})),
        ("ranker_kwargs: {weights: [1]}", "--ranker_factory m.f", (None, None, "m.f", {"weights": [1]})),
        # Both kinds on the command line, or in the file: `make_ranker` raises.
        ("seed: 1", "--ranker_model a --ranker_factory m.f", ("a", None, "m.f", None)),
        ("ranker_model: a\nranker_factory: m.f", "--seed 1", ("a", None, "m.f", None)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("script", [train, judge])
def test_a_ranker_on_the_command_line_replaces_one_of_the_other_kind_in_yaml(
    script, in_yaml, argv, expected, tmp_path
):
    config = tmp_path / "run.yaml"
    config.write_text(in_yaml)
    fields = parsed(script, "--config", config, *([] if script is judge else ["--use_cpu"]), *argv.split())
    assert tuple(fields[name] for name in RANKER) == expected


def test_config_can_be_given_with_an_equals_sign(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {tmp_path}\n")
    assert parsed(train, f"--config={config}", "--use_cpu")["output_dir"] == str(tmp_path)


def test_yaml_sets_environment_variables(tmp_path, monkeypatch):
    monkeypatch.delenv("FROM_THE_FILE", raising=False)
    config = tmp_path / "run.yaml"
    config.write_text("env:\n  FROM_THE_FILE: 1\n")
    train.make_parser().split(["--config", str(config)])
    assert os.environ.pop("FROM_THE_FILE") == "1"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_generatoins", "3"], "unknown argument --num_generatoins. Did you mean --num_generations?"),
        (["--num_procesess=2"], "unknown argument --num_procesess. Did you mean --num_processes?"),
        # Abbreviations are not accepted, because a new field could change their meaning.
        (["--num_gen", "3"], "unknown argument --num_gen."),
        (["--zzz"], "unknown argument --zzz."),
        (["--num_generations", "many"], "invalid int value: 'many'"),
        (["three"], "unexpected 'three'"),
        (["--seed", "1", "--config"], "--config needs the path"),
    ],
)
def test_argument_errors_are_one_line_with_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.make_parser().split(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("cyclealign train: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_misspelt_field_in_yaml_is_an_error_with_a_suggestion(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("num_interaction: 3\n")
    with pytest.raises(SystemExit):
        train.make_parser().split(["--config", str(config)])
    assert "unknown argument --num_interaction. Did you mean --num_interactions?" in capsys.readouterr().err


@pytest.mark.parametrize("script", [train, train_ranked, aligner])
def test_help_explains_own_fields_and_names_inherited_ones(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 230
    assert max(map(len, text.splitlines())) <= 100
    explained, others = text.split("Other arguments of transformers.TrainingArguments:")
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


def test_help_of_a_command_without_training_explains_all_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        judge.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "accelerate" not in text
    assert "TrainingArguments" not in text
    for part in (judge.JudgeArguments, judge.RankerArguments):
        for name in part.__dataclass_fields__:
            assert text.count(f"--{name} ") == 1, name


@pytest.mark.parametrize(
    ("script", "hidden"),
    [
        (train, ["remove_unused_columns", "dataloader_pin_memory", "gradient_checkpointing"]),
        (train_ranked, ["remove_unused_columns", "dataloader_pin_memory", "gradient_checkpointing"]),
        (dlma, ["remove_unused_columns", "dataloader_pin_memory", "gradient_checkpointing", "loss_type"]),
        (
            aligner,
            ["packing", "packing_strategy", "eval_packing", "completion_only_loss", "assistant_only_loss",
             "train_sampling_strategy", "dataset_text_field", "gradient_checkpointing", "pad_token"],
        ),
    ],
)  # fmt: skip
def test_help_hides_settings_without_a_choice_and_deprecated_ones(script, hidden):
    parser = script.make_parser()
    explained, _, others = parser.format_help().partition("Other arguments of transformers.TrainingArguments:")
    listed = {*re.findall(r"^  --(\w+)", explained, re.MULTILINE), *re.findall(r"\w+", others)}
    assert {"learning_rate", "gradient_accumulation_steps"} <= listed
    assert not listed & set(hidden)
    assert {f"--{name}" for name in hidden} <= parser._option_string_actions.keys()


@pytest.mark.parametrize(
    ("script", "setting", "message"),
    [
        (train, "--remove_unused_columns true", "remove_unused_columns must be False"),
        (dlma, "--loss_type pro", "loss_type must be one of 'dlma'"),
        (aligner, "--packing", "packing and eval_packing must be False"),
        (aligner, "--completion_only_loss false", "completion_only_loss"),
        (aligner, "--train_sampling_strategy sequential", "train_sampling_strategy must be 'random'"),
    ],
)
def test_hidden_settings_are_still_checked(script, setting, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parsed(script, "--use_cpu", "--output_dir", tmp_path, *setting.split())
