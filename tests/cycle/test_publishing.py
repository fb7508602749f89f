"""The cycle's part of the model card, its demonstrations, and its log as a data set."""

import pytest
from huggingface_hub import ModelCard

from cyclealign_trl import DemonstrationPool, FunctionRanker, LLMRanker
from cyclealign_trl.cycle import publishing
from cyclealign_trl.cycle.interaction_log import InteractionLog, schema
from cyclealign_trl.cycle.interaction_totals import SUMMARY_COLUMNS, summarize
from cyclealign_trl.cycle.publishing import DATA_FILE, interaction_sections, interactions_card, save_demonstrations
from cyclealign_trl.rankers.base import ranker_name
from tests.cycle.stubs import DigestRanker, make_trainer, prompts


def read(folder):
    return ModelCard.load(folder / "README.md")


# Model card


def test_the_card_describes_run_and_agreement(tmp_path):
    pytest.importorskip("matplotlib")
    trainer = make_trainer(
        tmp_path / "mine", eval_dataset=prompts(2), max_steps=2, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    trainer.create_model_card(dataset="org/questions", dataset_args="default", tags="mine", model_name="Mine")
    card = read(tmp_path / "mine")
    assert card.data.tags == ["cyclealign-trl", "cyclealign", "pro", "trl", "generated_from_trainer", "mine"]
    assert {result.metric_type for result in card.data.eval_results} >= {"ranking/accuracy", "agreement/rate"}
    for text in (
        "# Mine\n",
        "| ranker | `DigestRanker` |",
        "| completions per prompt, K | 3 |",
        "| interactions per prompt | 2 |",
        "| SFT loss | 0.05 (K - 1)², on the ranker's improved completion |",
        "| source | [org/questions](https://huggingface.co/datasets/org/questions) (default) |",
        "| training | 8 rows of `prompt`, `topic` |",
        "| interactions | 4 |",
        "| tokens billed | 40 prompt, 20 completion |",
        "| cost | unpriced |",
        "](agreement.png)",
        "@article{cyclealign2023,",
    ):
        assert text in card.text, text
    assert (tmp_path / "mine" / "agreement.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_of_a_resumed_run_covers_the_whole_run(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **settings).train()
    trainer = make_trainer(tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.create_model_card()
    text = read(tmp_path).text
    assert "| interactions | 8 |" in text
    assert "| optimiser steps | 4 |" in text
    assert "answers from the cache | 4 (when first asked for: 40 prompt, 20 completion; unpriced)" in text


def test_the_card_shows_the_rankers_model_and_neither_its_address_nor_its_key(tmp_path):
    ranker = LLMRanker("gpt-5-mini", "http://judge.internal/v1", "sk-secret")
    trainer = make_trainer(tmp_path, ranker=ranker)  # the trainer adds a cache
    trainer.create_model_card()
    text = read(tmp_path).content
    assert "| ranker | `gpt-5-mini` |" in text
    assert "judge.internal" not in text
    assert "sk-secret" not in text
    ranker.close()


def test_a_function_ranker_is_named_after_its_functions():
    def polite(completions, **kwargs):
        return [0.0] * len(completions)

    assert ranker_name(FunctionRanker([polite, polite])) == "polite, polite"


def test_the_curve_is_a_table_without_matplotlib(tmp_path, monkeypatch):
    make_trainer(tmp_path, max_steps=2).train()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    summary = summarize(InteractionLog(tmp_path, 0).read(SUMMARY_COLUMNS).to_pylist(), 2)
    text = "\n".join(interaction_sections(summary, tmp_path))
    assert "| up to step | agreement |" in text
    assert f"| 1 | {summary.curve(10)[-1][1]:.3f} |" in text
    assert not (tmp_path / "agreement.png").exists()


def test_failed_rankings_are_counted_by_reason(tmp_path):
    ranker = DigestRanker(fail=lambda request: "timeout" if request.prompt == "Question 1:" else None)
    make_trainer(tmp_path, ranker=ranker, num_interactions=1, max_ranking_failures=1.0).train()
    summary = summarize(InteractionLog(tmp_path, 0).read(SUMMARY_COLUMNS).to_pylist(), 2)
    assert "| rankings that failed | 1 (timeout: 1) |" in "\n".join(interaction_sections(summary, tmp_path))


# Files next to the model


def test_only_demonstrations_of_the_whole_run_are_saved(tmp_path):
    save_demonstrations(DemonstrationPool(scope="run"), tmp_path)
    assert (tmp_path / "demonstrations.json").exists()
    save_demonstrations(DemonstrationPool(scope="prompt"), tmp_path)
    assert not (tmp_path / "demonstrations.json").exists()


# Log as a data set


def test_the_card_of_a_log_describes_its_columns_and_its_run():
    card = interactions_card("org/log", 1234, {"ranker": "`judge`"})
    assert card.data.to_dict()["configs"][0]["data_files"] == [{"split": "train", "path": DATA_FILE}]
    assert "license" not in card.data.to_dict()
    assert "The 1,234 interactions" in card.text
    assert "| ranker | `judge` |" in card.text
    for column in schema(conversational=True).names:
        assert f"| `{column}` | " in card.text


def test_a_failure_of_the_main_process_raises_on_all_processes(tmp_path, monkeypatch):
    broadcasts = []

    def broadcast(values):
        broadcasts.append(values)
        return [None]

    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(publishing, "broadcast_object_list", broadcast)
    with pytest.raises(FileNotFoundError):
        trainer.push_interactions_to_hub()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    with pytest.raises(RuntimeError, match="The main process could not publish the log"):
        trainer.push_interactions_to_hub()
    assert broadcasts == [[None], [None]]


def test_publishing_without_a_log_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No interaction log in .*interactions"):
        make_trainer(tmp_path).push_interactions_to_hub()
