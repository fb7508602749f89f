"""The demo's policy: lossless tokenizer, reproducible pretraining, and files that transformers loads."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cyclealign_trl.demo.corpus import dialogues, improve, questions
from cyclealign_trl.demo.policy import build_tokenizer, pretrain_policy


@pytest.fixture(scope="module")
def pretrained():
    return pretrain_policy(seed=0, num_steps=60, batch_size=16, progress=False)


def chat(question):
    return [{"role": "user", "content": question}]


def test_decoding_restores_the_encoded_text(pretrained):
    _, tokenizer = pretrained
    for dialogue in dialogues(500, seed=7):
        for text in (dialogue.question, dialogue.completion, improve(dialogue.question, dialogue.completion)):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokens_are_words_and_punctuation_marks():
    tokenizer = build_tokenizer(["Sure! Water them."])
    ids = tokenizer("Sure! Water them. Never!")["input_ids"]
    assert [tokenizer.decode(token) for token in ids] == ["Sure", "!", " Water", " them", ".", "<|unk|>", "!"]


def test_chat_template_appends_completions_to_prompts(pretrained):
    _, tokenizer = pretrained
    prompt = tokenizer.apply_chat_template(chat("Why?"), tokenize=False, add_generation_prompt=True)
    completion = {"role": "assistant", "content": "Sure!"}
    assert prompt == "<|user|>Why?<|assistant|>"
    assert tokenizer.apply_chat_template([*chat("Why?"), completion], tokenize=False) == f"{prompt}Sure!<|end|>"
    assert tokenizer.eos_token == "<|end|>"


def test_pretraining_depends_only_on_its_seed():
    state = torch.get_rng_state()
    first, _ = pretrain_policy(seed=1, num_steps=2, batch_size=4, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second, _ = pretrain_policy(seed=1, num_steps=2, batch_size=4, progress=False)
    other, _ = pretrain_policy(seed=2, num_steps=2, batch_size=4, progress=False)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_pretrained_policy_finishes_its_completions(pretrained):
    model, tokenizer = pretrained
    inputs = tokenizer.apply_chat_template(
        [chat(question) for question in questions("held_out")],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    torch.manual_seed(0)
    completions = model.generate(**inputs, max_new_tokens=40)[:, inputs["input_ids"].shape[1] :]
    assert (completions == tokenizer.eos_token_id).any(dim=1).float().mean() > 0.9
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    assert sum(text.endswith((".", "!")) for text in texts) / len(texts) > 0.8


def test_transformers_loads_the_saved_policy(pretrained, tmp_path):
    model, tokenizer = pretrained
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    text = tokenizer.apply_chat_template(chat(questions("train")[0]), tokenize=False, add_generation_prompt=True)
    inputs = loaded_tokenizer(text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [tokenizer(text)["input_ids"]]
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    assert loaded_tokenizer.padding_side == "left"
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
