"""`cyclealign init`: the files that it writes, and that the commands take them."""

import re
import shlex

import pytest
import yaml

from cyclealign_trl.cli import main
from cyclealign_trl.scripts import aligner, dlma, estimate, init, judge, train, train_ranked

SCRIPTS = {script.make_parser().prog.split()[1]: script for script in (
    aligner, dlma, estimate, judge, train, train_ranked
)}  # fmt: skip
NAMES = sorted(path.stem for path in init.CONFIGS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["init", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_writes_the_settings_of_cyclealign_by_default(tmp_path, capsys):
    main(["init"])
    assert [path.name for path in tmp_path.iterdir()] == ["cyclealign.yaml"]
    assert (tmp_path / "cyclealign.yaml").read_bytes() == (init.CONFIGS / "cyclealign.yaml").read_bytes()
    assert capsys.readouterr().out == (
        "Written to cyclealign.yaml. Edit it, then run:\n"
        "  cyclealign estimate --config cyclealign.yaml\n  cyclealign train --config cyclealign.yaml\n"
    )


def test_an_existing_file_is_replaced_with_force_only(tmp_path, capsys):
    (tmp_path / "dlma.yaml").write_text("mine")
    assert error_of(capsys, "dlma") == (
        "cyclealign init: error: dlma.yaml exists. Add --force to replace it, or --output FILE to write another file."
    )
    assert (tmp_path / "dlma.yaml").read_text() == "mine"
    main(["init", "dlma", "--force"])
    assert "contrastive: harmless" in (tmp_path / "dlma.yaml").read_text()


def test_commands_name_the_file_that_is_written(tmp_path, capsys):
    main(["init", "offline", "--output", "new folder/run.yaml"])
    command = "cyclealign train-ranked --config 'new folder/run.yaml'"
    assert f"\n  {command}\n" in capsys.readouterr().out
    assert f"\n#   {command}\n" in (tmp_path / "new folder" / "run.yaml").read_text()


def test_wrong_use_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "file/run.yaml cannot be written" in error_of(capsys, "--output", "file/run.yaml")
    assert f"{tmp_path} cannot be written" in error_of(capsys, "--force", "--output", str(tmp_path))
    assert "invalid choice: 'ppo'" in error_of(capsys, "ppo")


def commands_in(text):
    return re.findall(r"^#   cyclealign (\S+ .+)$", text, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_each_file_take_it(name, capsys):
    main(["init", name])
    commands = [shlex.split(line) for line in commands_in((init.CONFIGS / f"{name}.yaml").read_text())]
    assert commands
    for command, *arguments in commands:
        own, others = SCRIPTS[command].make_parser().split(arguments)
        assert (own, others) == (arguments, [])


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_are_commented_out_are_valid(name, tmp_path):
    text = (init.CONFIGS / f"{name}.yaml").read_text()
    path = tmp_path / "all.yaml"
    path.write_text(re.sub(r"^#(\w+:|  (?=\w+: ))", lambda match: match[1], text, flags=re.MULTILINE))
    keys = yaml.safe_load(path.read_text())
    assert len(keys) - len(yaml.safe_load(text)) == len(re.findall(r"^#\w+:", text, re.MULTILINE))
    script = SCRIPTS[shlex.split(commands_in(text)[-1])[0]]
    given = [] if script is judge else ["--use_cpu"]
    fields = {}
    for part in script.make_parser().parse([*given, "--config", str(path)]):
        fields.update(vars(part))
    fields["report_to"] = "".join(fields.get("report_to", ()))  # the parser returns a list
    assert {key: fields[key] for key in keys} == keys


def test_the_help_lists_every_file(capsys):
    with pytest.raises(SystemExit):
        main(["init", "--help"])
    out = capsys.readouterr().out
    assert {"cyclealign", "offline", "dlma", "aligner"} <= set(NAMES)
    for name in NAMES:
        assert re.search(rf"^  {name} +[A-Z].+\.$", out, re.MULTILINE), name
