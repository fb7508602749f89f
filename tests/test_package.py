"""The package as a whole: what importing it costs, what it exports, what its configs say."""

import dataclasses
import inspect
import re
import subprocess
import sys

import pytest

import cyclealign_trl
from cyclealign_trl import AlignerConfig, CycleAlignConfig, DLMAConfig, RankingConfig


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_loads_no_torch():
    assert run_python("import cyclealign_trl, sys; print('torch' in sys.modules)") == "False"


def test_rankers_load_no_torch():
    code = (
        "from cyclealign_trl import LLMRanker, FunctionRanker, CachedRanker; import sys; print('torch' in sys.modules)"
    )
    assert run_python(code) == "False"


def test_every_public_name_is_there_and_documented():
    for name in cyclealign_trl.__all__:
        assert inspect.getdoc(getattr(cyclealign_trl, name)), name
    assert set(cyclealign_trl.__all__) <= set(dir(cyclealign_trl))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'GRPOTrainer'"):
        cyclealign_trl.GRPOTrainer  # noqa: B018


def own_fields(config):
    inherited = {field.name for base in config.__mro__[1:2] for field in dataclasses.fields(base)}
    return [field for field in dataclasses.fields(config) if field.name not in inherited]


@pytest.mark.parametrize("config", [RankingConfig, CycleAlignConfig, DLMAConfig, AlignerConfig])
def test_docstring_and_help_agree(config):
    entries = {
        match["name"]: match
        for match in re.finditer(
            r"^    (?P<name>\w+) \(.+, \*optional\*, defaults to `(?P<default>.+)`\):\n(?P<text>(?: {8}.+\n?)+)",
            inspect.cleandoc(config.__doc__),
            re.MULTILINE,
        )
    }
    fields = own_fields(config)
    assert list(entries) == [field.name for field in fields]
    for field in fields:
        entry = entries[field.name]
        text = " ".join(entry["text"].split())
        assert text.replace("`", "") == field.metadata["help"].replace("`", ""), field.name
        default = entry["default"].strip('"')
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert default == str(value), field.name


def test_configs_parse_from_a_command_line(tmp_path):
    from trl import TrlParser

    (config,) = TrlParser((CycleAlignConfig,)).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--num_generations", "5", "--generation_kwargs", '{"repetition_penalty": 1.2}',
         "--max_prompt_length", "99", "--use_cpu"]
    )  # fmt: skip
    assert (config.num_generations, config.max_prompt_length) == (5, 99)
    assert config.generation_kwargs == {"repetition_penalty": 1.2}
    assert config.lr_scheduler_type == "constant"
