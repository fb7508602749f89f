"""Preference pairs from corrections."""

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from cyclealign_trl import Aligner, RankingConfig, RankingTrainer, bootstrap_preferences
from tests.conftest import make_model, make_tokenizer


class Kinder(Aligner):
    """Aligner that adds "please" to answers without it."""

    def correct(self, prompts, answers):
        return [answer if "please" in answer else f"{answer} please" for answer in answers]


@pytest.fixture
def aligner():
    return Kinder(make_model(), make_tokenizer(), "labels")


def answer(prompts):
    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    return [f"{text}, please" if text == "Q1" else text for text in texts]


def message(role, text):
    return [{"role": role, "content": text}]


def test_pairs_of_texts_and_of_messages(aligner):
    dataset = bootstrap_preferences(answer, aligner, ["Q0", "Q1", "Q2"])
    assert dataset.to_list() == [
        {"prompt": "Q0", "chosen": "Q0 please", "rejected": "Q0"},
        {"prompt": "Q2", "chosen": "Q2 please", "rejected": "Q2"},
    ]
    assert dataset.info.description == "3 prompts, 2 pairs; dropped: unchanged 1"
    prompts = Dataset.from_list([{"prompt": message("user", f"Q{i}")} for i in range(2)])
    assert bootstrap_preferences(answer, aligner, prompts).to_list() == [
        {
            "prompt": message("user", "Q0"),
            "chosen": message("assistant", "Q0 please"),
            "rejected": message("assistant", "Q0"),
        }
    ]


def test_returns_an_empty_data_set_if_no_answer_changed(aligner):
    dataset = bootstrap_preferences(answer, aligner, ["Q1"])
    assert len(dataset) == 0
    assert dataset.column_names == ["prompt", "chosen", "rejected"]


def test_invalid_prompts_raise(aligner):
    with pytest.raises(ValueError, match="prompts is empty"):
        bootstrap_preferences(answer, aligner, [])
    with pytest.raises(ValueError, match="one format"):
        bootstrap_preferences(answer, aligner, ["Q0", message("user", "Q1")])


@pytest.mark.parametrize("conversational", [False, True])
def test_pairs_train_with_ranking_trainer_and_dpo_trainer(tmp_path, aligner, conversational):
    prompts = [message("user", f"Q{i}") if conversational else f"Q{i}" for i in range(4)]
    model, tokenizer = make_model(), make_tokenizer()
    pairs = bootstrap_preferences(model, aligner, prompts, tokenizer, max_tokens=4)
    assert len(pairs) == 4
    settings = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    config = RankingConfig(str(tmp_path), max_prompt_length=64, **settings)
    RankingTrainer(model, config, pairs, processing_class=tokenizer).train()
    config = DPOConfig(str(tmp_path), max_length=64, activation_checkpointing=False, **settings)
    model.save_pretrained(tmp_path / "policy")
    DPOTrainer(str(tmp_path / "policy"), args=config, train_dataset=pairs, processing_class=make_tokenizer()).train()
