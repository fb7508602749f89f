"""The card's text and metadata, from plain data and from trainers."""

import ast
import re

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from cyclealign_trl import FunctionRanker, LLMRanker, RankingConfig, RankingTrainer
from cyclealign_trl.cycle.publishing import PAPER as CYCLEALIGN
from cyclealign_trl.offline.losses import LOSSES
from cyclealign_trl.rankers.base import ranker_name
from cyclealign_trl.training.model_card import (
    TrainedModel,
    evaluation_metrics,
    hub_id,
    model_card,
    public_name,
)
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import make_trainer, prompts

MODEL = TrainedModel(
    "aligned",
    "org/aligned",
    base_model="org/base",
    papers=(CYCLEALIGN, LOSSES["pro"].paper),
    method=f"{CYCLEALIGN.link}: it learned.",
    settings={"learning rate": "1e-06"},
    data={"training": "8 rows"},
    sections=("## Interactions", "Eight."),
    evaluation={"ranking/accuracy": 0.75},
)


def read(folder):
    return ModelCard.load(folder / "README.md")


def code(card):
    (block,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    ast.parse(block)
    return block


def test_what_a_card_says():
    card = model_card(MODEL, datasets=["org/data"], tags=["mine"], license="mit", language="en")
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "datasets": ["org/data"],
        "language": "en",
        "library_name": "transformers",
        "license": "mit",
        "model-index": [
            {
                "name": "aligned",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "org/data", "type": "org/data"},
                        "metrics": [{"type": "ranking/accuracy", "value": 0.75, "name": "ranking/accuracy"}],
                    }
                ],
            }
        ],
        "pipeline_tag": "text-generation",
        "tags": ["cyclealign-trl", "cyclealign", "pro", "trl", "generated_from_trainer", "mine"],
    }
    for said in (
        "# aligned\n",
        "A fine-tuned version of [org/base](https://huggingface.co/org/base), trained by [CycleAlign]",
        "https://arxiv.org/abs/2310.16271",
        "| learning rate | 1e-06 |",
        "| training | 8 rows |",
        "## Interactions\n\nEight.",
        "| `ranking/accuracy` | 0.75 |",
        "- transformers: ",
        "@article{cyclealign2023,",
        "@article{pro2023,",
        "@software{vonwerra2020trl,",
    ):
        assert said in card.text
    assert 'AutoModelForCausalLM.from_pretrained("org/aligned")' in code(card)
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()


def test_an_adapter_is_loaded_by_peft():
    card = model_card(TrainedModel("a", "org/a", "org/base", is_adapter=True, conversational=True))
    assert card.data.library_name == "peft"
    assert "A PEFT adapter for [org/base]" in card.text
    assert 'AutoPeftModelForCausalLM.from_pretrained("org/a")' in code(card)
    assert "apply_chat_template" in code(card)
    assert "- peft: " in card.text


def test_what_is_not_known_is_not_said():
    card = model_card(TrainedModel("a", "org/a", evaluation={"loss": 1.0}))
    assert not {"base_model", "license", "datasets", "model-index"} & set(card.data.to_dict())
    assert "A language model, trained by" in card.text
    assert "## Evaluation" not in model_card(TrainedModel("a", "org/a")).text


def test_evaluations_belong_to_a_data_set_that_has_a_name(tmp_path):
    assert "model-index" not in model_card(MODEL, datasets=["org/one", "org/two"]).data.to_dict()
    assert "model-index" not in model_card(MODEL, datasets=[str(tmp_path)]).data.to_dict()


def test_the_last_evaluation_counts():
    history = [
        {"loss": 3.0},
        {"eval_loss": 2.0, "eval_runtime": 1.0, "eval_samples_per_second": 1.0, "eval_time/forward": 1.0},
        {"eval_loss": 1.0, "eval_harmless_ranking/accuracy": 0.5, "eval_harmless_steps_per_second": 1.0},
        {"eval_ranker/prompt_tokens": 9.0, "eval_failures/timeout": 1.0, "eval_model_preparation_time": 1.0},
    ]
    assert evaluation_metrics(history) == {"loss": 1.0, "harmless_ranking/accuracy": 0.5, "failures/timeout": 1.0}


def test_paths_are_nobodys_business(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "policy").mkdir(parents=True)
    for path in (str(tmp_path / "models" / "policy"), "models/policy", "./models/policy", "~/policy", "../policy"):
        assert hub_id(path) is None
        assert public_name(path) == "policy"
        assert model_card(TrainedModel("a", "org/a", path)).data.base_model is None
    for name in ("gpt-5-mini", "org/name", "accounts/all/models/name", "polite, short"):
        assert public_name(name) == name


def test_the_card_of_the_cycle(tmp_path):
    pytest.importorskip("matplotlib")
    trainer = make_trainer(
        tmp_path / "mine", eval_dataset=prompts(2), max_steps=2, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    trainer.create_model_card(dataset="org/questions", dataset_args="default", tags="mine", model_name="Mine")
    card = read(tmp_path / "mine")
    assert card.data.tags == ["cyclealign-trl", "cyclealign", "pro", "trl", "generated_from_trainer", "mine"]
    assert {result.metric_type for result in card.data.eval_results} >= {"ranking/accuracy", "agreement/rate"}
    for said in (
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
        assert said in card.text, said
    assert (tmp_path / "mine" / "agreement.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_of_a_resumed_run_covers_all_of_it(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **settings).train()
    trainer = make_trainer(tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.create_model_card()
    text = read(tmp_path).text
    assert "| interactions | 8 |" in text
    assert "| optimiser steps | 4 |" in text
    assert "answers from the cache | 4 (when first asked for: 40 prompt, 20 completion; unpriced)" in text


def test_a_ranker_is_called_by_its_name_and_nothing_else(tmp_path):
    ranker = LLMRanker("gpt-5-mini", "http://judge.internal/v1", "sk-secret")
    trainer = make_trainer(tmp_path, ranker=ranker)  # behind a cache
    trainer.create_model_card()
    text = read(tmp_path).content
    assert "| ranker | `gpt-5-mini` |" in text
    assert "judge.internal" not in text
    assert "sk-secret" not in text
    ranker.close()


def test_names_of_rankers():
    def polite(completions, **kwargs):
        return [0.0] * len(completions)

    assert ranker_name(FunctionRanker([polite, polite])) == "polite, polite"


@pytest.mark.parametrize("loss_type", ["pro", "rrhf"])
def test_the_card_of_ranked_training(tmp_path, loss_type):
    rows = Dataset.from_list([{"prompt": "Q", "completions": ["a", "b"], "ranks": [0, 1]}] * 4)
    settings = {"max_steps": 1, "max_prompt_length": 64, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    config = RankingConfig(str(tmp_path / loss_type), loss_type=loss_type, **settings)
    trainer = RankingTrainer(make_model(), config, rows, {"held-out": rows}, make_tokenizer())
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(tasks="text-classification")
    card = read(tmp_path / loss_type)
    paper = LOSSES[loss_type].paper
    assert card.data.tags == ["cyclealign-trl", loss_type, "trl", "generated_from_trainer"]
    assert card.data.pipeline_tag == "text-classification"
    assert f"trained by {paper.link}" in card.text
    assert paper.bibtex in card.text
    assert CYCLEALIGN.title not in card.text
    assert "| evaluation | held-out: 4 rows of `completions`, `prompt`, `ranks` |" in card.text
    assert "| `held-out_ranking/accuracy` | " in card.text


def test_arguments_are_saved_without_tokens(tmp_path):
    import torch

    config = RankingConfig(str(tmp_path), hub_token="hf_secret", model_init_kwargs={"dtype": "auto"})
    torch.save(config, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (loaded.hub_token, loaded.model_init_kwargs) == (None, {"dtype": "auto"})
    assert config.hub_token == "hf_secret"
