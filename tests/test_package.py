"""The package as a whole: import cost, exported names, and the help texts of the configs."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cyclealign_trl
from cyclealign_trl import AlignerConfig, CycleAlignConfig, DLMAConfig, RankingConfig


@pytest.mark.parametrize(
    "statement",
    [
        "import cyclealign_trl",
        "from cyclealign_trl import LLMRanker, FunctionRanker, CachedRanker, Budget, Prices",
    ],
)
def test_importing_does_not_load_torch(statement):
    code = f"{statement}; import sys; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


def test_type_checkers_and_lazy_imports_see_the_same_names():
    tree = ast.parse(Path(cyclealign_trl.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {alias.asname: statement.module for statement in block.body for alias in statement.names}
    assert imported == cyclealign_trl._MODULES


def test_every_public_name_exists_and_has_a_docstring():
    for name in cyclealign_trl.__all__:
        assert inspect.getdoc(getattr(cyclealign_trl, name)), name
    assert set(cyclealign_trl.__all__) <= set(dir(cyclealign_trl))


def test_an_unknown_name_raises_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'GRPOTrainer'"):
        cyclealign_trl.GRPOTrainer  # noqa: B018


def test_the_wheel_contains_every_file_of_the_package():
    package = Path(cyclealign_trl.__file__).parent
    settings = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["cyclealign_trl"]
    declared = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files == declared


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
