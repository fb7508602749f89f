"""The page of settings, and one configuration at tiny size."""

import json
from dataclasses import replace
from functools import partial

import pytest

from benchmarks.settings import run
from benchmarks.settings.page import DOCS, load_results, page_text, write_page
from cyclealign_trl.demo import tasks
from tests.conftest import make_model, make_tokenizer

# The libraries warn of what the benchmark does on purpose.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def tiny_task(monkeypatch):
    """Replace the chat model by a tiny one, and take few questions and short completions."""
    task = tasks.make_task(tasks.SMOLLM2)
    task = replace(
        task,
        load_policy=lambda seed: (make_model(max_position_embeddings=2048), make_tokenizer()),
        train_questions=task.train_questions[:4],
        held_out_questions=task.held_out_questions[:4],
        settings={**task.settings, "max_completion_length": 8, "num_interactions": 2},
    )
    monkeypatch.setattr(run, "make_task", lambda name: task)


@pytest.mark.parametrize("name", ["lora_2e-4_random_judge", "full_2e-5"])
def test_a_configuration_is_run_once_and_stored(name, tiny_task, tmp_path, monkeypatch):
    command = [str(tmp_path / "output"), "--results", str(tmp_path / "results"), "--only", name]
    run.main(command)
    result = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert len(result["scores_by_step"]) == 2
    assert len(result["held_out_before"]) == len(result["held_out_after"]) == 4
    assert result["settings"] == vars(run.CONFIGURATIONS[name])
    monkeypatch.setattr(run, "run", partial(pytest.fail, "a stored configuration was run again"))
    run.main(command)


def test_committed_page_is_what_the_stored_results_give(tmp_path):
    write_page(run.RESULTS, tmp_path)
    assert (tmp_path / "settings.md").read_text() == (DOCS / "settings.md").read_text()


def test_page_names_what_has_not_run():
    results = load_results(run.RESULTS)
    (first, *others) = results
    text = page_text({first: results[first]})
    assert "Not run yet" in text
    assert all(f"`{name}`" in text for name in others)
