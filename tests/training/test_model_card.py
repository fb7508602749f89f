"""Text and metadata of model cards."""

import ast
import re

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from cyclealign_trl import RankingConfig, RankingTrainer
from cyclealign_trl.cycle.publishing import PAPER as CYCLEALIGN
from cyclealign_trl.offline.losses import LOSSES
from cyclealign_trl.training.model_card import (
    TrainedModel,
    evaluation_metrics,
    hub_id,
    model_card,
    public_name,
)
from tests.conftest import make_model, make_tokenizer

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


def test_metadata_and_text_of_a_card():
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
    for text in (
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
        assert text in card.text
    assert 'AutoModelForCausalLM.from_pretrained("org/aligned")' in code(card)
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()


def test_the_card_of_an_adapter_loads_it_with_peft():
    card = model_card(TrainedModel("a", "org/a", "org/base", is_adapter=True, conversational=True))
    assert card.data.library_name == "peft"
    assert "A PEFT adapter for [org/base]" in card.text
    assert 'AutoPeftModelForCausalLM.from_pretrained("org/a")' in code(card)
    assert "apply_chat_template" in code(card)
    assert "- peft: " in card.text


def test_unknown_fields_are_left_out():
    card = model_card(TrainedModel("a", "org/a", evaluation={"loss": 1.0}))
    assert not {"base_model", "license", "datasets", "model-index"} & set(card.data.to_dict())
    assert "A language model, trained by" in card.text
    assert "## Evaluation" not in model_card(TrainedModel("a", "org/a")).text


def test_metrics_are_in_the_metadata_only_for_a_single_data_set_on_the_hub(tmp_path):
    assert "model-index" not in model_card(MODEL, datasets=["org/one", "org/two"]).data.to_dict()
    assert "model-index" not in model_card(MODEL, datasets=[str(tmp_path)]).data.to_dict()


def test_the_last_value_of_each_quality_metric_is_kept():
    history = [
        {"loss": 3.0},
        {"eval_loss": 2.0, "eval_runtime": 1.0, "eval_samples_per_second": 1.0, "eval_time/forward": 1.0},
        {"eval_loss": 1.0, "eval_harmless_ranking/accuracy": 0.5, "eval_harmless_steps_per_second": 1.0},
        {"eval_ranker/prompt_tokens": 9.0, "eval_failures/timeout": 1.0, "eval_model_preparation_time": 1.0},
    ]
    assert evaluation_metrics(history) == {"loss": 1.0, "harmless_ranking/accuracy": 0.5, "failures/timeout": 1.0}


def test_paths_are_reduced_to_their_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "policy").mkdir(parents=True)
    for path in (str(tmp_path / "models" / "policy"), "models/policy", "./models/policy", "~/policy", "../policy"):
        assert hub_id(path) is None
        assert public_name(path) == "policy"
        assert model_card(TrainedModel("a", "org/a", path)).data.base_model is None
    for name in ("gpt-5-mini", "org/name", "accounts/all/models/name", "polite, short"):
        assert public_name(name) == name


@pytest.mark.parametrize("loss_type", ["pro", "rrhf"])
def test_the_card_of_a_ranking_trainer(tmp_path, loss_type):
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
