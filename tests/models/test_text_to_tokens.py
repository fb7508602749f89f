"""Token ids of prompts and completions under many kinds of tokenizers and chat templates."""

import json
import logging

import pytest

from cyclealign_trl.models.loading import check_vocabulary, sync_special_tokens
from cyclealign_trl.models.renderer import Renderer
from tests.conftest import make_model
from tests.models.tokenizers import POST_PROCESSORS, TEMPLATES, TOKENIZERS, make

PLAIN = [
    ("Once upon a time there was a little", " girl."),
    ("Human: Where is the cat?\n\nAssistant:", " It sits on the mat."),
    ("The little boy said:", "Hello!"),
    ("3 + 4 =", " 7"),
    ("Answer:", "\n\nNo, thanks."),
    ("She went to the park, and she saw the little dog under the table, where it sits: " * 3 + "Then", " a big dog."),
]
INSIDE_A_TOKEN = [("Answer: ", "yes"), ("Hello!\n", "\nNo"), ("a lit", "tle girl"), ("a  ", " cat")]
SPELLED_OUT = [
    "The tag </s> closes",
    "<s>bold</s> text",
    "<|im_end|>",
    "a <|im_start|>user b",
    "[INST] is a tag",
    "<pad>",
]


def renderer_for(tokenizer, **lengths):
    return Renderer(
        tokenizer, (tokenizer.eos_token_id,), **({"max_prompt_length": None, "max_completion_length": 400} | lengths)
    )


def user(content):
    return [{"role": "user", "content": content}]


# The join of prompt and completion


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("prompt", "completion"), PLAIN)
def test_a_completion_has_the_tokens_that_it_has_after_its_prompt(kind, prompt, completion):
    tokenizer = make(kind)
    renderer = renderer_for(tokenizer)
    ids = renderer.prompt(prompt)[0] + renderer.completion(prompt, completion)[0]
    assert ids == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("prompt", "completion"), INSIDE_A_TOKEN)
def test_a_completion_that_starts_inside_a_token_keeps_its_text(kind, prompt, completion):
    tokenizer = make(kind)
    renderer = renderer_for(tokenizer)
    prompt_ids, ids = renderer.prompt(prompt)[0], renderer.completion(prompt, completion)[0]
    assert prompt_ids == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(prompt_ids + ids[:-1]).lstrip() == prompt + completion


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "template", ["Llama-2", "Llama-2 that strips nothing", "ChatML", "Mistral", "Zephyr", "Vicuna"]
)
@pytest.mark.parametrize("completion", ["She went to the park.", "Hello!\n\nNo, thanks.", "7"])
def test_a_conversation_has_the_tokens_of_its_rendered_text(kind, template, completion):
    tokenizer = make(kind, chat_template=TEMPLATES[template])
    renderer, prompt = renderer_for(tokenizer), user("Where is the cat?")
    ids = renderer.prompt(prompt)[0] + renderer.completion(prompt, completion)[0]
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": completion}], tokenize=False)
    expected = tokenizer(whole.rstrip("\n"), add_special_tokens=False)["input_ids"]
    assert ids == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [None, "Llama-2", "Llama-2 that strips nothing", "ChatML", "Vicuna"])
def test_the_text_of_a_sample_gives_its_tokens_back(kind, template):
    tokenizer = make(kind, chat_template=template and TEMPLATES[template])
    renderer = renderer_for(tokenizer)
    prompt = "There was a little" if template is None else user("Where is the cat?")
    samples = [
        renderer.completion(prompt, text)[0] for text in (" girl.", "girl.", "She went.", " a\n\nb", "x </s> y")
    ]
    texts = renderer.decode(prompt, samples)
    assert [ids for ids, _ in renderer.completions(prompt, texts)] == samples
    unfinished = samples[0][:-1]
    assert renderer.decode(prompt, [unfinished])[0].strip() == "girl."


def test_a_long_prompt_is_not_tokenised_for_each_completion(monkeypatch):
    tokenizer = make("byte-level BPE")
    renderer, lengths = renderer_for(tokenizer), []
    encode = renderer._encoder.encode
    monkeypatch.setattr(renderer._encoder, "encode", lambda text: lengths.append(len(text)) or encode(text))
    renderer.completions("She went to the park. " * 1000, [f" {number}" for number in range(8)])
    assert max(lengths) < 200


# Templates that rewrite the reply


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("ChatML that strips thinking", "<think>Hm, 3 + 4.</think>7"),
        ("ChatML that strips thinking", "</think>"),
        ("ChatML that strips", "7 \n"),
        ("ChatML that strips", "\n\n7"),
        ("ChatML that opens with thinking", "Hm.</think>7"),
        ("Llama-2", "7\n"),
        ("capitals", "seven"),
        ("first word", "It sits on the mat."),
        ("moved thinking", "<think>Hm.</think>7"),
    ],
)
@pytest.mark.parametrize("kind", ["byte-level BPE", "metaspace BPE", "LLaMA's normalizer"])
def test_a_completion_that_the_template_would_change_is_trained_on_as_it_is(kind, template, text, caplog):
    changed = {
        "capitals": "m['content'].upper()",
        "first word": "m['content'].split(' ')[0]",
        "moved thinking": "('\n' + m['content'].replace('</think>', '\n</think>\n\n') if '</think>' in m['content']"
        " else m['content'])",
    }
    template = TEMPLATES.get(template) or TEMPLATES["ChatML"].replace("m['content']", changed[template])
    tokenizer = make(kind, chat_template=template)
    renderer, prompt = renderer_for(tokenizer), user("3 + 4")
    with caplog.at_level(logging.WARNING):
        ids = renderer.completion(prompt, text)[0]
    assert tokenizer.decode(renderer.prompt(prompt)[0] + ids[:-1]).rstrip(" ").endswith(text.rstrip(" "))
    assert renderer.completion(prompt, "other" + text)[0] != ids
    assert len([record for record in caplog.records if "changes completions" in record.message]) <= 1


def test_a_template_that_keeps_completions_is_silent(caplog):
    for template in TEMPLATES.values():
        renderer = renderer_for(make("metaspace BPE", chat_template=template))
        system = [{"role": "system", "content": "Be kind."}] if "No system" in template else []
        renderer.completion([*system, *user("Hi")], "Hello! 3 + 4 = 7")
    assert not caplog.records


def test_a_reply_with_thinking_of_its_own_gets_no_second_block():
    kept = "'<think>' in m['content'] or m['role'] == 'user'"
    content = f"(m['content'] if {kept} else '<think>\n\n</think>\n\n' + m['content'])"
    tokenizer = make("byte-level BPE", chat_template=TEMPLATES["ChatML"].replace("m['content']", content))
    renderer = renderer_for(tokenizer)
    for text, expected in (("7", "<think>\n\n</think>\n\n7"), ("<think>Hm.</think>7", "<think>Hm.</think>7")):
        ids = renderer.completion(user("3 + 4"), text)[0]
        assert tokenizer.decode(ids[:-1]) == expected
        assert renderer.decode(user("3 + 4"), [ids]) == [text]


# Tokens that the tokenizer adds


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("adds", POST_PROCESSORS)
def test_a_prompt_does_not_end_with_a_token_that_the_tokenizer_adds(kind, adds):
    tokenizer = make(kind, adds)
    renderer, plain = renderer_for(tokenizer), make(kind)("Human: Hi")["input_ids"]
    opening = [tokenizer.bos_token_id] if "BOS" in adds else []
    assert renderer.prompt("Human: Hi")[0] == [*opening, *plain]
    assert renderer.prompt("<s>Human: Hi")[0].count(tokenizer.bos_token_id) == 1
    assert renderer.completion("Human: Hi", " yes")[0][-1:] == [tokenizer.eos_token_id]
    assert renderer.completion("Human: Hi", " yes")[0].count(tokenizer.eos_token_id) == 1


# The end of a turn


@pytest.mark.parametrize(
    ("template", "special", "end"),
    [
        ("ChatML", {}, "<|im_end|>"),
        ("ChatML", {"eos_token": "<|im_end|>"}, "<|im_end|>"),
        ("ChatML of parts", {}, "<|im_end|>"),
        ("ChatML that strips", {}, "<|im_end|>"),
        ("ChatML that strips thinking", {}, "<|im_end|>"),
        ("ChatML that opens with thinking", {}, "<|im_end|>"),
        ("Llama-2", {}, "</s>"),
        ("Mistral", {}, "</s>"),
        ("Zephyr", {}, "</s>"),
        ("Zephyr", {"eos_token": "<pad>"}, "</s>"),
        ("Vicuna", {}, "</s>"),
    ],
)
@pytest.mark.parametrize("kind", ["byte-level BPE", "Unigram"])
def test_a_completion_ends_where_the_template_ends_a_turn(kind, template, special, end, caplog):
    tokenizer = make(kind, chat_template=TEMPLATES[template], **special)
    model = make_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    with caplog.at_level(logging.WARNING):
        eos_token_ids = sync_special_tokens(model, tokenizer)
    end_id = tokenizer.convert_tokens_to_ids(end)
    ids = renderer_for(tokenizer).completion(user("Hi"), "Hello!")[0]
    assert ids[-1] == end_id
    assert not set(ids[:-1]) & {end_id, tokenizer.eos_token_id}
    assert end_id in eos_token_ids
    assert end_id in renderer_for(tokenizer).eos_token_ids
    declared = model.generation_config.eos_token_id
    assert end_id in (declared if isinstance(declared, list) else [declared])
    differs = tokenizer.eos_token != end
    assert [record.message for record in caplog.records if "ends an assistant's turn" in record.message] == [
        f"The chat template ends an assistant's turn with {end!r}, but the end-of-sequence token of the tokenizer is "
        f"{tokenizer.eos_token!r}. Completions of conversations end with {end!r}, in training, in sampling and in the "
        "saved generation config."
    ] * differs


def test_plain_text_ends_with_the_tokenizers_own_token():
    tokenizer = make("byte-level BPE", chat_template=TEMPLATES["ChatML"])
    assert renderer_for(tokenizer).completion("Hi", " you")[0][-1] == tokenizer.eos_token_id


def test_a_turn_that_ends_in_plain_text_ends_with_the_tokenizers_token(caplog):
    template = TEMPLATES["ChatML"].replace("<|im_end|>", "<|stop|>")
    tokenizer = make("byte-level BPE", chat_template=template)
    with caplog.at_level(logging.WARNING):
        sync_special_tokens(make_model(vocab_size=len(tokenizer)), tokenizer)
    assert "no special token" in caplog.text
    ids = renderer_for(tokenizer).completion(user("Hi"), "Hello!")[0]
    assert tokenizer.decode(ids) == "Hello!</s>"


# Special tokens that are spelled out


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", SPELLED_OUT)
@pytest.mark.parametrize("template", [None, "ChatML", "Llama-2", "Zephyr"])
def test_special_tokens_that_a_completion_spells_out_are_text(kind, text, template):
    tokenizer = make(kind, chat_template=template and TEMPLATES[template])
    renderer = renderer_for(tokenizer)
    prompt = "Say it:" if template is None else user("Say it")
    ids, truncated = renderer.completion(prompt, text + " here.")
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    assert not set(ids[:-1]) & special
    assert ids[-1] in renderer.eos_token_ids
    assert not truncated
    assert renderer.decode(prompt, [ids])[0] == text + " here."


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", SPELLED_OUT)
def test_special_tokens_that_a_message_spells_out_are_text(kind, text):
    tokenizer = make(kind, chat_template=TEMPLATES["ChatML"])
    renderer = renderer_for(tokenizer)
    ids, _ = renderer.prompt([{"role": "system", "content": text}, *user(f"Explain {text} here")])
    markup = [
        token for token in tokenizer.convert_ids_to_tokens(ids) if token in SPELLED_OUT or token == "<|im_start|>"
    ]
    assert markup == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]
    assert f"Explain {text} here" in tokenizer.decode(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "special"),
    [
        ("What does </s> mean?", 0),
        ("The <s> tag strikes", 0),
        ("<s>[INST] Hi [/INST]", 3),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", 3),
        ("[INST] Hi [/INST]", 2),
        ("<|user|>\nHi</s>\n<|assistant|>\n", 1),
    ],
)
def test_a_plain_prompt_is_markup_only_if_it_is_a_rendered_conversation(kind, prompt, special):
    template = TEMPLATES["Zephyr" if prompt.startswith("<|user") else "ChatML"]
    tokenizer = make(kind, chat_template=template)
    ids, _ = renderer_for(tokenizer).prompt(prompt)
    assert sum(token in tokenizer.added_tokens_decoder and token != tokenizer.unk_token_id for token in ids) == special


def test_a_plain_completion_can_spell_out_its_end_token_once(caplog):
    tokenizer = make("byte-level BPE")
    renderer = renderer_for(tokenizer)
    assert renderer.completion("Q:", " A</s>") == renderer.completion("Q:", " A")
    assert "counts as their end-of-sequence token" in caplog.text


# Tools


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL | {"strict": None}]])
def test_tools_reach_the_template(tools):
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATES["ChatML"]
    renderer = renderer_for(make("byte-level BPE", chat_template=template))
    text = renderer.tokenizer.decode(renderer.prompt(user("3 + 4"), tools)[0])
    assert text.startswith(json.dumps([TOOL]))
    assert renderer.tokenizer.decode(renderer.completion(user("3 + 4"), "7", tools)[0]) == "7<|im_end|>"
    assert renderer.prompt(user("3 + 4"), [])[0] == renderer.prompt(user("3 + 4"))[0]


# Sizes


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda tokenizer: tokenizer.add_tokens(["<tool>"]), "<tool>"),
        (lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}), r"\[PAD\]"),
        (lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<|end|>"}), r"<\|end\|>"),
        (lambda tokenizer: tokenizer.add_tokens(["<|start|>"], special_tokens=True), r"<\|start\|>"),
        (lambda tokenizer: tokenizer.add_tokens(["<image>"], special_tokens=True), None),
        (lambda tokenizer: None, None),
    ],
)
def test_a_tokenizer_larger_than_the_model_is_refused(change, refused):
    tokenizer = make("byte-level BPE", chat_template=TEMPLATES["ChatML"].replace("<|im_start|>", "<|start|>"))
    model = make_model(vocab_size=len(tokenizer))
    change(tokenizer)
    if refused is None:
        check_vocabulary(model, tokenizer)
        return
    with pytest.raises(ValueError, match=rf"without an embedding, for example '{refused}'.*resize_token_embeddings"):
        check_vocabulary(model, tokenizer)


def test_another_models_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"has embeddings for ids below 99\. Use the model's own tokenizer"):
        sync_special_tokens(make_model(), make("byte-level BPE"))


def test_a_prompt_beyond_the_models_positions_is_refused():
    renderer = renderer_for(make("byte-level BPE"), max_positions=32, max_completion_length=16)
    with pytest.raises(ValueError, match=r"positions of the model\. Set max_prompt_length to 16"):
        renderer.prompt("She went to the park. " * 10)


# Templates with conditions


@pytest.mark.parametrize("template", ["ChatML of parts", "ChatML with a system message"])
def test_a_template_with_conditions_renders_like_one_without(template, caplog):
    prompt = [{"role": "system", "content": "Be kind."}, *user("Hi")]
    prefilled = [*prompt, {"role": "assistant", "content": "Well, "}]
    expected, renderer = (
        renderer_for(make("byte-level BPE", chat_template=TEMPLATES[name])) for name in ("ChatML", template)
    )
    for given in (prompt, prefilled):
        assert renderer.prompt(given) == expected.prompt(given)
        assert renderer.completion(given, "Hello </s>!") == expected.completion(given, "Hello </s>!")
        samples = [expected.completion(given, "Hello!")[0]]
        assert renderer.decode(given, samples) == ["Hello!"]
    assert not caplog.records


@pytest.mark.parametrize("template", ["ChatML", "Llama-2", "Llama-2 that strips nothing", "Vicuna"])
@pytest.mark.parametrize("kind", ["byte-level BPE", "metaspace BPE", "Unigram, first piece only"])
def test_a_sample_that_continues_a_message_keeps_its_space(kind, template):
    # Templates of the usual kinds close a message; transformers removes what follows the prefill.
    renderer = renderer_for(make(kind, chat_template=TEMPLATES[template]))
    prompt = [*user("Where is the cat?"), {"role": "assistant", "content": "It sits"}]
    samples = [renderer.completion(prompt, text)[0] for text in (" on the mat.", "!")]
    assert renderer.decode(prompt, samples) == [" on the mat.", "!"]
