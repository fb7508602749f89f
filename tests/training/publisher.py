"""Publish every kind of run to the Hub at `HF_ENDPOINT`, load it again, and write the results of the comparison.

    python -m tests.training.publisher FOLDER TOKEN

The results are in FOLDER/results.json.
"""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard, ModelCard, hf_hub_download
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from cyclealign_trl import (
    Aligner,
    AlignerConfig,
    AlignerTrainer,
    DemonstrationPool,
    RankingConfig,
    RankingTrainer,
    export_interactions,
)
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import DigestRanker, make_trainer, prompts, read_log


class Judge(DigestRanker):
    """Ranker with a name."""

    name = "org/judge"


def train(folder, **changes):
    trainer = make_trainer(folder, stub_generation=True, max_steps=2, hub_token=TOKEN, **changes)
    trainer.train()
    return trainer


def equal_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run_code(card):
    """Run the Python code on a card, and return its output and its variables."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        for code in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
            exec(code, variables := {})
    return output.getvalue(), variables


def full(folder):
    """Publish a model with all weights, a pool of scope "run", an evaluation and a log."""
    trainer = train(
        folder / "full",
        ranker=Judge(),
        demonstration_scope="run",
        hub_model_id="tester/full",
        eval_dataset=prompts(2),
    )
    trainer.evaluate()
    (folder / "full" / "preference").mkdir()  # as `cyclealign export` does
    export_interactions(folder / "full").to_parquet(folder / "full" / "preference" / "train.parquet")
    (folder / "full" / "runs").mkdir()
    (folder / "full" / "runs" / "events").write_text("written by a reporter")
    trainer.push_to_hub(dataset="org/questions", license="apache-2.0")
    address = trainer.push_interactions_to_hub()
    trainer.push_interactions_to_hub("tester/other-log", private=True)

    pool = DemonstrationPool(scope="run")
    pool.load_state_dict(json.loads(Path(hf_hub_download("tester/full", "demonstrations.json")).read_text()))
    tokenizer = AutoTokenizer.from_pretrained("tester/full")
    log = load_dataset("tester/full-interactions", split="train")
    card = ModelCard.load("tester/full")
    _, variables = run_code(DatasetCard.load("tester/full-interactions"))
    return {
        "weights": equal_weights(trainer.model, AutoModelForCausalLM.from_pretrained("tester/full")),
        "tokenizer": tokenizer.get_vocab() == make_tokenizer().get_vocab(),
        "chat_template": tokenizer.chat_template == make_tokenizer().chat_template,
        "demonstrations": len(pool) > 0 and pool.state_dict() == trainer.demonstrations.state_dict(),
        "log": log.to_list() == read_log(folder / "full"),
        "export": variables["pairs"].to_list() == export_interactions(folder / "full").to_list(),
        "card": card.content == (folder / "full" / "README.md").read_text(encoding="utf-8"),
        "quick_start": len(run_code(card)[0]) > 1,
        "address": address,
    }


def adapter(folder):
    """Publish a PEFT adapter for a model on the Hub, trained on conversational prompts."""
    make_model().push_to_hub("tester/base", token=TOKEN)
    make_tokenizer().push_to_hub("tester/base", token=TOKEN)
    trainer = train(
        folder / "adapter",
        model="tester/base",
        dataset=prompts(conversational=True),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        hub_model_id="tester/adapter",
    )
    trainer.push_to_hub()
    return {
        "weights": equal_weights(trainer.model, AutoPeftModelForCausalLM.from_pretrained("tester/adapter")),
        "quick_start": len(run_code(ModelCard.load("tester/adapter"))[0]) > 1,
    }


def while_training(folder):
    """Let the Trainer push checkpoints, without a call of `push_to_hub`."""
    pushed = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    for strategy in ("every_save", "checkpoint", "all_checkpoints", "end"):
        train(folder / strategy, hub_strategy=strategy, hub_model_id=f"tester/{strategy}", **pushed)
    return {}


def offline(folder):
    """Publish a model that was trained on ranked completions."""
    rows = Dataset.from_list([{"prompt": "Q", "completions": ["a", "b"], "ranks": [0, 1]}] * 4)
    config = RankingConfig(
        str(folder / "ranked"),
        loss_type="rrhf",
        max_steps=1,
        max_prompt_length=64,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        hub_token=TOKEN,
    )
    trainer = RankingTrainer(make_model(), config, rows, None, make_tokenizer())
    trainer.train()
    trainer.push_to_hub()
    return {"weights": equal_weights(trainer.model, AutoModelForCausalLM.from_pretrained("tester/ranked"))}


def aligner(folder):
    """Publish an aligner from its trainer and from `Aligner`, and load a model that has no template."""
    rows = Dataset.from_list([{"prompt": "Q", "answer": "no", "correction": "yes"}] * 8)
    config = AlignerConfig(
        str(folder / "aligner"),
        max_length=64,
        max_steps=2,
        per_device_train_batch_size=4,
        hub_model_id="tester/aligner",
        push_to_hub=True,
        hub_strategy="every_save",
        hub_always_push=True,
        save_strategy="steps",
        save_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        hub_token=TOKEN,
    )
    trainer = AlignerTrainer(make_model(), config, rows, processing_class=make_tokenizer())
    trainer.train()
    pushed_while_training = Aligner.from_pretrained("tester/aligner", device="cpu").template == trainer.template
    trainer.push_to_hub(license="apache-2.0")
    loaded = Aligner.from_pretrained("tester/aligner", device="cpu")
    loaded.push_to_hub("tester/aligner-again", token=TOKEN)
    again = Aligner.from_pretrained("tester/aligner-again", device="cpu")
    try:
        Aligner.from_pretrained("tester/base", device="cpu")
    except ValueError as error:
        without_template = str(error)
    return {
        "weights": equal_weights(trainer.model, loaded.generator.model),
        "again": equal_weights(trainer.model, again.generator.model) and again.template == trainer.template,
        "pushed_while_training": pushed_while_training,
        "quick_start": bool(run_code(ModelCard.load("tester/aligner"))[1]["aligner"]),
        "without_template": "no saved aligner template" in without_template,
    }


if __name__ == "__main__":
    FOLDER, TOKEN = Path(sys.argv[1]), sys.argv[2]
    results = {part.__name__: part(FOLDER) for part in (full, adapter, while_training, offline, aligner)}
    (FOLDER / "results.json").write_text(json.dumps(results))
