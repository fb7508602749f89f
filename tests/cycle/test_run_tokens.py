"""Texts and token ids of a run: samples, their export, improved completions, tools, and the end of a turn."""

import json

import pytest
from datasets import Dataset
from transformers import GenerationConfig

from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, RankingResult, export_interactions
from cyclealign_trl.cycle.interaction import add_correction, open_interaction, resolve
from tests.conftest import make_model
from tests.models.tokenizers import TEMPLATES, TOKENIZERS, make

SAMPLES = (" girl.", " big dog!", "s")


class Ranker:
    """Ranks by length, and writes one improved completion."""

    def __init__(self, improved=None):
        self.improved = improved
        self.requests = []

    def rank(self, requests):
        self.requests += requests
        return [
            RankingResult(
                tuple(sorted(range(len(request.completions)), key=lambda index: -len(request.completions[index]))),
                improved_completion=self.improved,
            )
            for request in requests
        ]


class Samples:
    """Samples the token ids that texts have after their prompt."""

    def __init__(self, renderer, prompt, tools=None):
        self.ids = [ids for ids, _ in renderer.completions(prompt, SAMPLES, tools)]

    def generate(self, model, prompt_ids):
        return [self.ids for _ in prompt_ids]


def make_trainer(tmp_path, tokenizer, prompt, improved=None, **columns):
    args = CycleAlignConfig(
        str(tmp_path / "out"), use_cpu=True, num_generations=3, num_interactions=1, max_steps=1, save_strategy="no",
        per_device_train_batch_size=1, max_prompt_length=100, max_completion_length=60, report_to="none",
    )  # fmt: skip
    model = make_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    trainer = CycleAlignTrainer(
        model,
        Ranker(improved),
        args,
        None,
        Dataset.from_list([{"prompt": prompt, **columns}]),
        processing_class=tokenizer,
    )
    sampled = trainer.generation
    trainer.generation = Samples(trainer.renderer, prompt)
    return trainer, sampled


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_exported_samples_join_their_prompt_as_they_were_sampled(tmp_path, kind):
    tokenizer, prompt = make(kind), "Once upon a time there was a little"
    trainer, _ = make_trainer(tmp_path, tokenizer, prompt)
    trainer.train()
    assert [request.completions for request in trainer.ranker.requests] == [SAMPLES]
    for row in export_interactions(tmp_path / "out", "ranked"):
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        for text, ids in zip(row["completions"], trainer.generation.ids, strict=True):
            # As TRL joins them.
            assert tokenizer(row["prompt"] + text)["input_ids"][len(prompt_ids) :] == ids[:-1]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", ["ChatML", "Llama-2", "Llama-2 that strips nothing", "Vicuna"])
def test_exported_replies_render_to_what_was_sampled(tmp_path, kind, template):
    tokenizer, prompt = (
        make(kind, chat_template=TEMPLATES[template]),
        [{"role": "user", "content": "Where is the cat?"}],
    )
    trainer, _ = make_trainer(tmp_path, tokenizer, prompt)
    trainer.train()
    prompt_ids, _ = trainer.renderer.prompt(prompt)
    row = export_interactions(tmp_path / "out", "ranked")[0]
    for messages, ids in zip(row["completions"], trainer.generation.ids, strict=True):
        if messages[0]["content"] != messages[0]["content"].strip() and "strips nothing" not in template:
            continue  # these templates strip a reply
        text = tokenizer.apply_chat_template([*prompt, *messages], tokenize=False)
        expected = tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]
        assert prompt_ids + ids == expected


@pytest.mark.parametrize("improved", ["a \ud83d b", "\udc00", "\ud83d\ude00", "</s> closes \ud83d"])
@pytest.mark.parametrize("conversational", [False, True])
def test_an_improved_completion_with_a_lone_surrogate_is_cleaned(tmp_path, improved, conversational):
    tokenizer = make("byte-level BPE", chat_template=TEMPLATES["ChatML"])
    prompt = [{"role": "user", "content": "Hi"}] if conversational else "Hi"
    trainer, _ = make_trainer(tmp_path, tokenizer, prompt, improved)
    trainer.train()
    logged = trainer.interaction_log.read()["improved_completion"][0].as_py()
    assert logged.strip() == improved.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_a_correction_with_a_lone_surrogate_is_cleaned():
    interaction = open_interaction("Q", ["a", "b"])
    result = resolve(interaction, RankingResult((0, 1)), [0.0, 1.0])
    assert add_correction(result, "x\ud83d").improved_completion == "x\ufffd"


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_a_column_of_tools_reaches_the_template(tmp_path, tools):
    template = "{% for tool in tools or [] %}{{ tool['function']['name'] }}: {% endfor %}" + TEMPLATES["ChatML"]
    tokenizer, prompt = make("byte-level BPE", chat_template=template), [{"role": "user", "content": "Hi"}]
    trainer, _ = make_trainer(tmp_path, tokenizer, prompt, tools=tools)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert tokenizer.decode(batch.prompt_ids[0]).startswith("add: <|im_start|>")
    trainer.train()


@pytest.mark.parametrize(
    ("template", "end"), [("ChatML", "<|im_end|>"), ("ChatML that strips thinking", "<|im_end|>"), ("Zephyr", "</s>")]
)
def test_the_end_of_a_turn_ends_samples_and_is_saved(tmp_path, template, end):
    tokenizer = make("byte-level BPE", chat_template=TEMPLATES[template], eos_token="<pad>")
    trainer, sampled = make_trainer(tmp_path, tokenizer, [{"role": "user", "content": "Hi"}], "Hello!")
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert end_id in sampled._config.eos_token_id
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert end_id in GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id
    assert {ids[-1] for ids in trainer.generation.ids} == {end_id}


@pytest.mark.parametrize("text", ["The tag </s> closes", "<|im_end|>", "a <|im_start|>user b"])
def test_ranker_and_log_see_special_tokens_that_a_sample_spells_out(tmp_path, text, monkeypatch):
    monkeypatch.setattr("tests.cycle.test_run_tokens.SAMPLES", (text, "b", "c"))
    tokenizer = make("metaspace BPE", chat_template=TEMPLATES["ChatML"])
    trainer, _ = make_trainer(tmp_path, tokenizer, [{"role": "user", "content": text}])
    trainer.train()
    assert trainer.ranker.requests[0].completions[0] == text
    assert text in str(export_interactions(tmp_path / "out", "ranked")[0]["completions"])
