"""`RewardModelRanker` with a tiny classifier: scores, batches, chat templates, truncation, loading, threads."""

import json
import logging
import math
import threading

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForSequenceClassification,
    LlamaForSequenceClassification,
)

from cyclealign_trl.errors import RankerError
from cyclealign_trl.models.gpt_neox_reward_model import OPEN_ASSISTANT_CHAT_TEMPLATE
from cyclealign_trl.rankers.reward_model import RewardModelRanker
from cyclealign_trl.types import RankingFailure, RankingRequest, RankingResult
from tests.conftest import make_model, make_tokenizer

USER = {"role": "user", "content": "Hi"}
REQUEST = RankingRequest("Why? ", ("Because.", "No idea", "Because I say so, and nobody asked.", "!"))
CHAT = RankingRequest([USER], ("Hello, how are you?", "Yo"))


def make_reward_model(**changes):
    return LlamaForSequenceClassification(make_model(**({"num_labels": 1} | changes)).config).eval()


def make_plain_tokenizer(**changes):
    """Build a tokenizer without a chat template, for plain-text prompts."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def with_special_tokens(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("</s> $A <unk>", None, [("</s>", 1), ("<unk>", 2)])
    return tokenizer


def score_alone(model, text):
    """Score a text in a batch of its own."""
    ids = make_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits.item()


def record_scores(model):
    """Return a dictionary that collects each text that the model reads, and its score."""
    tokenizer, seen = make_tokenizer(), {}

    def record(_, args, inputs, output):
        for ids, mask, logits in zip(inputs["input_ids"], inputs["attention_mask"], output.logits, strict=True):
            assert mask.sort(descending=True).values.equal(mask)
            seen[tokenizer.decode(ids[mask.bool()])] = logits.float().item()

    model.register_forward_hook(record, with_kwargs=True)
    return seen


def by_score(request, scores):
    """Return the indices of the completions of a plain-text prompt, best first."""
    return tuple(
        sorted(range(len(request.completions)), key=lambda i: -scores[request.prompt + request.completions[i]])
    )


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_ranks_higher_scores_first(caplog):
    model = make_reward_model()
    expected = by_score(
        REQUEST, {REQUEST.prompt + text: score_alone(model, REQUEST.prompt + text) for text in REQUEST.completions}
    )
    [result] = RewardModelRanker(model, make_plain_tokenizer()).rank([REQUEST])
    assert result.order == expected
    assert [result.ranks[index] for index in result.order] == [0, 1, 2, 3]
    assert warnings_in(caplog) == []


def test_equal_scores_share_a_rank_and_are_ordered_by_index():
    model = make_reward_model()
    model.score.weight.data.zero_()
    assert RewardModelRanker(model, make_plain_tokenizer()).rank([REQUEST]) == [
        RankingResult((0, 1, 2, 3), ranks=(0, 0, 0, 0))
    ]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_finite_fails_only_its_request(score):
    model = make_reward_model()
    mark = make_tokenizer().convert_tokens_to_ids("!")

    def spoil(_, args, inputs, output):
        output.logits[(inputs["input_ids"] == mark).any(dim=1)] = score

    model.register_forward_hook(spoil, with_kwargs=True)
    other = RankingRequest("Who? ", ("You", "I"))
    failure, result = RewardModelRanker(model, make_plain_tokenizer()).rank([REQUEST, other])
    assert failure == RankingFailure("no_score", f"completion 3 has the score {score}")
    assert isinstance(result, RankingResult)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("padding", ["model", "tokenizer", "model with another id"])
def test_scores_do_not_depend_on_the_batch(batch_size, padding, caplog):
    model = make_reward_model(pad_token_id=0 if padding == "model" else None)
    reference = make_reward_model()
    if padding == "model with another id":  # the model's own padding token takes precedence
        model.config.pad_token_id = reference.config.pad_token_id = 2
    seen = record_scores(model)
    other = RankingRequest("Who? ", ("You", "A friend of a friend of mine", "I", "We"))
    ranker = RewardModelRanker(model, make_plain_tokenizer(), batch_size=batch_size)
    forward = ranker.rank([REQUEST, other])
    first = dict(seen)
    backward = ranker.rank([other, REQUEST])
    assert set(seen) == {request.prompt + text for request in (REQUEST, other) for text in request.completions}
    for text, score in seen.items():
        assert score == pytest.approx(score_alone(reference, text), abs=1e-4)
        assert score == pytest.approx(first[text], abs=1e-4)
    assert forward == backward[::-1]
    assert [outcome.order for outcome in forward] == [by_score(request, seen) for request in (REQUEST, other)]
    assert model.config.pad_token_id == reference.config.pad_token_id
    assert warnings_in(caplog) == []


def test_batches_texts_of_similar_length():
    model, shapes = make_reward_model(), []
    model.register_forward_pre_hook(lambda _, args, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    request = RankingRequest("Q", tuple("a" * length for length in (1, 50, 2, 49, 3, 48, 4)))
    RewardModelRanker(model, make_plain_tokenizer(), batch_size=3).rank([request])
    assert shapes == [(3, 51), (3, 5), (1, 2)]
    assert RewardModelRanker(model, make_plain_tokenizer()).rank([]) == []
    assert len(shapes) == 3


def test_scores_one_text_at_a_time_without_a_padding_token(caplog):
    model, tokenizer = make_reward_model(pad_token_id=None), make_plain_tokenizer(pad_token=None)
    seen = record_scores(model)
    ranker = RewardModelRanker(model, tokenizer)
    assert ranker.rank([REQUEST])[0].order == by_score(REQUEST, seen)
    for text, score in seen.items():
        assert score == pytest.approx(score_alone(make_reward_model(), text), abs=1e-5)
    [message] = warnings_in(caplog)
    assert "one at a time instead of 16" in message
    assert "tokenizer.pad_token" in message
    caplog.clear()
    RewardModelRanker(model, tokenizer, batch_size=1)
    assert warnings_in(caplog) == []


def test_formats_conversations_with_the_chat_template(caplog):
    model = make_reward_model()
    seen = record_scores(model)
    RewardModelRanker(model, with_special_tokens(make_tokenizer())).rank([CHAT])
    assert set(seen) == {f"<user>Hi</s>\n<assistant>{text}</s>\n" for text in CHAT.completions}
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("as_text", [False, True])
def test_the_chat_template_gets_the_tools_of_the_row(as_text):
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    model, tokenizer = make_reward_model(), make_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
        "{% for message in messages %}{{ message.content }} {% endfor %}"
    )
    seen = record_scores(model)
    metadata = {"tools": json.dumps(tools) if as_text else tools}
    RewardModelRanker(model, tokenizer).rank([RankingRequest([USER], ("Yo",), metadata=metadata)])
    assert list(seen) == ["clock Hi Yo "]


def test_a_completion_continues_a_prefilled_assistant_message():
    model = make_reward_model()
    seen = record_scores(model)
    prompt = [USER, {"role": "assistant", "content": "Well, "}]
    RewardModelRanker(model, make_tokenizer()).rank([RankingRequest(prompt, ("yes", "no"))])
    assert set(seen) == {f"<user>Hi</s>\n<assistant>Well, {text}</s>\n" for text in ("yes", "no")}
    assert prompt[-1]["content"] == "Well, "


def test_adds_special_tokens_to_plain_text():
    model = make_reward_model()
    seen = record_scores(model)
    RewardModelRanker(model, with_special_tokens(make_plain_tokenizer())).rank([REQUEST])
    assert set(seen) == {f"</s>Why? {text}<unk>" for text in REQUEST.completions}


def test_warns_once_about_plain_text_for_a_chat_model(caplog):
    ranker = RewardModelRanker(make_reward_model(), make_tokenizer())
    for _ in range(2):
        assert isinstance(ranker.rank([REQUEST])[0], RankingResult)
    [message] = warnings_in(caplog)
    assert "Use conversational prompts" in message


def test_a_conversation_raises_without_a_chat_template():
    with pytest.raises(RankerError, match="Pass the one that the model was trained with as `chat_template`"):
        RewardModelRanker(make_reward_model(), make_plain_tokenizer()).rank([CHAT])


def test_messages_that_the_template_rejects_fail_only_their_request():
    ranker = RewardModelRanker(make_reward_model(), make_tokenizer(), chat_template=OPEN_ASSISTANT_CHAT_TEMPLATE)
    refused = RankingRequest([{"role": "system", "content": "Be nice."}, USER], ("Yes", "No"))
    before, failure, after = ranker.rank([CHAT, refused, CHAT])
    assert before == after
    assert isinstance(before, RankingResult)
    assert failure.reason == "invalid_prompt"
    assert "user and assistant turns, no system" in failure.detail


def test_the_open_assistant_template_matches_the_reference(golden):
    model = make_reward_model()
    seen = record_scores(model)
    roles = {"Human": "user", "Assistant": "assistant"}
    ranker = RewardModelRanker(model, make_plain_tokenizer(), chat_template=OPEN_ASSISTANT_CHAT_TEMPLATE)
    kept = [case["expected"] for case in golden["hh_rlhf"]["filter"] if case["expected"]["status"] == "kept"]
    for case in kept:
        *prompt, reply = [{"role": roles[speaker], "content": text} for speaker, text in case["chosen_turns"]]
        ranker.rank([RankingRequest(prompt, (reply["content"],))])
    assert list(seen) == [case["reward_model_text_good"] for case in kept]
    assert seen


def test_truncates_long_texts_on_the_left_and_warns_once(caplog):
    model = make_reward_model()
    seen = record_scores(model)
    ranker = RewardModelRanker(model, with_special_tokens(make_plain_tokenizer()), max_length=12)
    for _ in range(2):
        ranker.rank([RankingRequest("0123456789", ("a", "bb"))])
    assert set(seen) == {"</s>123456789a<unk>", "</s>23456789bb<unk>"}
    [message] = warnings_in(caplog)
    assert "13 tokens" in message
    assert "limited to 12" in message
    assert "lose their beginning" in message


def test_truncates_long_conversations_on_the_left(caplog):
    model = make_reward_model()
    seen = record_scores(model)
    RewardModelRanker(model, make_tokenizer(), max_length=20).rank([CHAT])
    assert set(seen) == {">Hi</s>\n<assistant>Yo</s>\n", "ello, how are you?</s>\n"}
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize(
    ("positions", "tokenizer_limit", "max_length", "expected"),
    [(64, 10**30, None, 64), (64, 40, None, 40), (64, 99, None, 64), (64, 40, 50, 50), (64, 40, 64, 64)],
)
def test_max_length_defaults_to_the_limits_of_model_and_tokenizer(
    positions, tokenizer_limit, max_length, expected, caplog
):
    model = make_reward_model(max_position_embeddings=positions)
    seen = record_scores(model)
    ranker = RewardModelRanker(model, make_plain_tokenizer(model_max_length=tokenizer_limit), max_length=max_length)
    ranker.rank([RankingRequest("a", ("b" * (expected - 1),))])
    assert warnings_in(caplog) == []
    ranker.rank([RankingRequest("a", ("c" * expected,))])
    assert len(warnings_in(caplog)) == 1
    assert set(seen) == {"a" + "b" * (expected - 1), "c" * expected}


def test_a_model_without_a_limit_is_not_truncated(caplog):
    config = BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
    model = BloomForSequenceClassification(config)
    seen = record_scores(model)
    RewardModelRanker(model, make_plain_tokenizer()).rank([RankingRequest("a", ("b" * 4000,))])
    assert set(seen) == {"a" + "b" * 4000}
    assert warnings_in(caplog) == []


def test_prepares_a_loaded_model_and_does_not_modify_the_tokenizer():
    model, tokenizer = make_reward_model(attention_dropout=0.9).train(), make_tokenizer()
    outputs = []
    model.register_forward_hook(lambda _, args, output: outputs.append(output))
    ranker = RewardModelRanker(model, tokenizer, chat_template=OPEN_ASSISTANT_CHAT_TEMPLATE, device="cpu")
    assert ranker.rank([CHAT]) == ranker.rank([CHAT])
    assert outputs[0].logits.equal(outputs[1].logits)
    assert outputs[0].logits.is_inference()
    assert outputs[0].past_key_values is None
    assert tokenizer.truncation_side == "right"
    assert tokenizer.chat_template == make_tokenizer().chat_template


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads_a_model_by_name(tmp_path, dtype):
    model = make_reward_model()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    ranker = RewardModelRanker(str(tmp_path), model_init_kwargs={"dtype": dtype})
    [parameter] = {parameter.dtype for parameter in ranker.scorer.model.parameters()}
    assert parameter == getattr(torch, dtype)
    seen = record_scores(ranker.scorer.model)
    ranker.rank([CHAT])
    assert len(seen) == 2
    for text, score in seen.items():
        assert score == pytest.approx(score_alone(model, text), abs=1e-5 if dtype == "float32" else 0.1)
    assert repr(ranker) == f"RewardModelRanker(model={str(tmp_path)!r}, device='{ranker.scorer.model.device}')"


def test_loads_the_tokenizer_with_the_revision_of_the_model(tmp_path, monkeypatch):
    make_reward_model().save_pretrained(tmp_path)
    loaded = []

    def load(name, **kwargs):
        loaded.append((name, kwargs))
        return make_tokenizer()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    RewardModelRanker(str(tmp_path), model_init_kwargs={"revision": "abc", "dtype": "bfloat16"})
    assert loaded == [(str(tmp_path), {"trust_remote_code": False, "revision": "abc"})]


def test_loads_the_tokenizer_of_a_loaded_model_by_its_name(tmp_path):
    make_reward_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(RewardModelRanker(model).rank([CHAT])[0], RankingResult)
    with pytest.raises(ValueError, match="Pass `tokenizer`"):
        RewardModelRanker(make_reward_model())


def test_calls_from_several_threads_run_one_at_a_time():
    model, inside = make_reward_model(), []

    def enter(*_):
        inside.append(1)
        assert len(inside) == 1

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(lambda *_: inside.pop() and None)
    ranker = RewardModelRanker(model, make_plain_tokenizer(), batch_size=2, max_length=30)
    requests = [
        RankingRequest(f"{number}? ", tuple(chr(97 + (number * i) % 26) * (5 * i + number) for i in range(1, 6)))
        for number in range(16)
    ]
    expected = [ranker.rank([request])[0] for request in requests]
    outcomes = {}

    def work(number):
        outcomes[number] = [ranker.rank([requests[number]])[0] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {number: [expected[number]] * 3 for number in range(16)}


def test_does_not_move_a_model_with_a_device_map(monkeypatch):
    model = make_reward_model()
    model.hf_device_map = {"": "cpu"}
    monkeypatch.setattr(model, "to", lambda *_: pytest.fail("moved"))
    RewardModelRanker(model, make_tokenizer())
    with pytest.raises(ValueError, match=r"device='cpu' was given, but a `device_map` has placed"):
        RewardModelRanker(model, make_tokenizer(), device="cpu")


def test_invalid_arguments_raise(tmp_path):
    model, tokenizer = make_reward_model(), make_tokenizer()
    with pytest.raises(ValueError, match="num_labels=2"):
        RewardModelRanker(make_reward_model(num_labels=2), tokenizer)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        RewardModelRanker(model, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="`max_length` must be at least 1, got 0"):
        RewardModelRanker(model, tokenizer, max_length=0)
    with pytest.raises(ValueError, match="257 tokens, but LlamaForSequenceClassification has 256 positions"):
        RewardModelRanker(model, tokenizer, max_length=257)
    with pytest.raises(ValueError, match=r"\['dtype'\].*loaded"):
        RewardModelRanker(model, tokenizer, model_init_kwargs={"dtype": "bfloat16"})


def test_weights_sharded_by_zero_3_raise():
    model = make_reward_model()
    model.score.weight.ds_id = 0  # how DeepSpeed marks a partitioned parameter
    with pytest.raises(ValueError, match="before the training arguments"):
        RewardModelRanker(model, make_tokenizer())


def test_has_a_name_but_no_fingerprint():
    ranker = RewardModelRanker(make_reward_model(), make_tokenizer(), device="cpu")
    assert not hasattr(ranker, "fingerprint")
    assert repr(ranker) == "RewardModelRanker(model='LlamaForSequenceClassification', device='cpu')"


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_a_padding_token_of_minus_one_counts_as_none(architecture):
    model = make_reward_model(pad_token_id=0)
    if architecture == "bloom":
        config = BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
        model = BloomForSequenceClassification(config)
    request = RankingRequest("Q:", ("a", "bcd", ""))
    expected = RewardModelRanker(model, make_plain_tokenizer()).rank([request])
    model.config.pad_token_id = -1
    assert RewardModelRanker(model, make_plain_tokenizer()).rank([request]) == expected
    model.config.pad_token_id = -1
    assert RewardModelRanker(model, make_plain_tokenizer(pad_token=None), batch_size=1).rank([request]) == expected


def test_tokens_without_an_embedding_raise():
    tokenizer = make_plain_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"without an embedding, for example '<new>' with id 99"):
        RewardModelRanker(make_reward_model(), tokenizer)
    model = make_reward_model()
    model.config.pad_token_id = 500
    with pytest.raises(ValueError, match=r"The padding token .* has id 500, but the model has .* ids below 99"):
        RewardModelRanker(model, make_plain_tokenizer())


@pytest.mark.parametrize("prompt", ["Q:", [{"role": "user", "content": "Q"}]])
def test_special_tokens_that_a_completion_spells_out_are_scored_as_text(prompt):
    ranker = RewardModelRanker(make_reward_model(), make_tokenizer())
    texts = ranker._encode(RankingRequest(prompt, ("a</s>b", "<pad>")))
    assert all(len(ids) > len(text) for ids, text in zip(texts, ("a</s>b", "<pad>"), strict=True))
    assert not {1, 0} & set(texts[0][-8:-3] if isinstance(prompt, list) else texts[0])
