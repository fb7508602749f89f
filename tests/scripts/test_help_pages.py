"""Stored help pages, and the time that the help of a command takes."""

import importlib
import json
import subprocess
import sys

import pytest

from cyclealign_trl import cli
from cyclealign_trl.offline.losses import LOSSES
from cyclealign_trl.scripts import demo, help_pages

HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate", "peft", "openai", "pyarrow", "pandas"}


def live_parser(command):
    return importlib.import_module(f"cyclealign_trl.scripts.{command.replace('-', '_')}").make_parser()


def test_the_stored_pages_are_those_of_the_parsers():
    made = json.loads(json.dumps(help_pages.make_pages()))
    stored = json.loads(help_pages._FILE.read_text(encoding="utf-8"))
    if made["versions"] != stored["versions"]:
        pytest.skip(f"The pages were made with {stored['versions']}, and are not used with {made['versions']}.")
    assert made == stored, "run: python -m cyclealign_trl.scripts.help_pages"


@pytest.mark.parametrize("columns", ["60", "80", "200"])
@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_is_the_one_of_the_live_parser(monkeypatch, capsys, command, columns, flag):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stop:
        cli.main([command, flag])
    assert not stop.value.code
    shown = capsys.readouterr().out
    with pytest.raises(SystemExit):
        live_parser(command).parse_args(["--help"])
    assert shown == capsys.readouterr().out
    assert f"cyclealign {command}" in shown


def test_other_versions_of_the_libraries_use_the_live_parser(monkeypatch, capsys):
    monkeypatch.setattr(help_pages, "version", lambda library: "0.0.1")
    assert help_pages.stored_help("judge") is None
    with pytest.raises(SystemExit):
        cli.main(["judge", "--help"])
    assert "--ranker_model VALUE" in capsys.readouterr().out


def test_the_label_of_a_build_is_no_other_version(monkeypatch):
    stored = json.loads(help_pages._FILE.read_text(encoding="utf-8"))["versions"]
    monkeypatch.setattr(help_pages, "version", lambda library: f"{stored[library]}+cu128")
    assert help_pages.stored_help("judge") is not None


@pytest.mark.parametrize("argv", [["--bogus", "1"], ["--bogus", "1", "--help_me"]])
def test_wrong_arguments_get_the_error_of_the_parser(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(["judge", *argv])
    assert stop.value.code == 2
    assert "cyclealign judge: error: unknown argument --bogus" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([command, "--help"] for command in cli.COMMANDS)])
def test_help_imports_no_library_that_takes_seconds(argv):
    """A time would depend on the machine."""
    code = (
        "import sys\nimport cyclealign_trl\nfrom cyclealign_trl.cli import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit:\n    pass\n"
        f"print(sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stderr == "[]\n"
    assert finished.stdout


def test_the_demo_offers_every_loss():
    assert tuple(LOSSES) == demo.LOSS_TYPES
