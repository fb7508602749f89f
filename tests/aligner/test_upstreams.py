"""Whose answers are corrected: models, pipelines, endpoints, functions."""

import pytest
import torch
from transformers import pipeline

from cyclealign_trl import AlignedUpstream, Aligner, EndpointUpstream, ModelUpstream, PipelineUpstream
from cyclealign_trl.aligner.upstreams import make_upstream
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.errors import PromptError, UpstreamError
from tests.conftest import make_model, make_tokenizer

CHAT = [{"role": "user", "content": "Hi"}]


class Shouter(Aligner):
    """Corrects by a rule."""

    def correct(self, prompts, answers):
        assert len(prompts) == len(answers)
        return [f"{answer}!" for answer in answers]


@pytest.fixture
def aligner():
    return Shouter(make_model(), make_tokenizer(), "labels")


def echo(prompts):
    return [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]


def reply(body):
    return Reply(f"{body['messages'][-1]['content']} {body.get('temperature')} {body.get('max_tokens')}")


# Each kind


@pytest.mark.parametrize(
    "prompts", [["Hi", "What is it?"], [CHAT, [*CHAT, {"role": "assistant", "content": "a"}, *CHAT]]]
)
def test_a_model_answers_as_it_would_alone(prompts):
    model, tokenizer = make_model(), make_tokenizer()
    greedy = {"do_sample": False, "repetition_penalty": 1.0}
    upstream = ModelUpstream(model, tokenizer, generation_kwargs=greedy, device="cpu")
    together = upstream(prompts, max_tokens=5)
    for prompt, answer in zip(prompts, together, strict=True):
        text = prompt
        if not isinstance(prompt, str):
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert answer == (expected if isinstance(prompt, str) else expected.strip())
        assert 0 < len(answer) <= 5


def test_a_model_takes_what_a_request_says(recwarn):
    upstream = ModelUpstream(make_model(), make_tokenizer(), device="cpu", max_new_tokens=20)
    prompts = ["Hi"] * 6
    assert len(set(upstream(prompts, temperature=2.0))) > 1  # sampled
    assert len(set(upstream(prompts, temperature=0))) == 1  # greedy
    assert max(map(len, upstream(prompts, max_tokens=3))) == 3
    assert max(map(len, upstream(prompts, max_completion_tokens=2, top_p=0.9))) == 2
    assert max(map(len, upstream(prompts, max_tokens=10_000))) <= 20
    assert not recwarn.list


def test_a_seed_makes_answers_depend_on_the_prompts_alone():
    seeded = ModelUpstream(make_model(), make_tokenizer(), device="cpu", max_new_tokens=8, seed=1)
    state = torch.get_rng_state()
    assert seeded(["Hi"] * 3) == seeded(["Hi"] * 3)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = ModelUpstream(make_model(), make_tokenizer(), device="cpu", max_new_tokens=8)
    assert drawn(["Hi"] * 3, temperature=2.0) != drawn(["Hi"] * 3, temperature=2.0)


def test_a_prompt_that_a_model_cannot_read_is_an_error_of_its_own():
    tokenizer = make_tokenizer()
    upstream = ModelUpstream(make_model(), tokenizer, device="cpu", max_new_tokens=200)
    with pytest.raises(PromptError, match="60 tokens, and the upstream model reads at most 56"):
        upstream(["x" * 60])
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(PromptError, match="no such role"):
        ModelUpstream(make_model(), tokenizer, device="cpu")([CHAT])
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        ModelUpstream(make_model(), tokenizer, device="cpu")([CHAT])


def test_a_pipeline(aligner):
    generator = pipeline("text-generation", model=make_model(), tokenizer=make_tokenizer(), device="cpu")
    upstream = make_upstream(generator)
    assert isinstance(upstream, PipelineUpstream)
    for prompts in (["Hi", "What?"], [CHAT, CHAT]):
        answers = upstream(prompts, max_tokens=4, temperature=0)
        assert all(0 < len(answer) <= 4 for answer in answers)
        assert AlignedUpstream(generator, aligner)(prompts, max_tokens=4, temperature=0) == [f"{a}!" for a in answers]


def test_an_endpoint_in_order_and_with_what_a_request_says():
    with LoopbackEndpoint(reply) as endpoint:
        upstream = EndpointUpstream("gpt", endpoint.base_url, sampling={"max_tokens": 9})
        assert upstream([f"Q{i}" for i in range(50)]) == [f"Q{i} None 9" for i in range(50)]
        assert upstream([CHAT], temperature=0.5, max_tokens=3) == ["Hi 0.5 3"]
        assert {request["model"] for request in endpoint.requests} == {"gpt"}


def test_an_endpoint_without_address_or_key_raises(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="No API key"):
        EndpointUpstream("gpt")


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (Reply("the key sk-secret is wrong", status=401), UpstreamError, r"HTTP 401: the key \[API key\] is wrong"),
        (Reply("This model's maximum context length is 9", status=400), PromptError, "too long"),
        (Reply("broken", status=500), UpstreamError, "HTTP 500"),
        (Reply(body="{}"), UpstreamError, "no chat completion"),
        (Reply(reset=True), UpstreamError, "APIConnectionError"),
        (Reply("late", delay=3), UpstreamError, "APITimeoutError"),
    ],
)
def test_an_endpoint_that_fails(answer, error, said):
    with LoopbackEndpoint(lambda body: answer) as endpoint:
        upstream = EndpointUpstream("gpt", endpoint.base_url, "sk-secret", max_retries=0, timeout=1)
        with pytest.raises(error, match=said) as raised:
            upstream(["Hi"])
    assert "sk-secret" not in str(raised.value)
    assert raised.value.__cause__ is None or "sk-secret" not in str(raised.value.__cause__)


def test_a_refusal_is_an_answer_too():
    with LoopbackEndpoint(lambda body: Reply("", refusal="I cannot help with that.")) as endpoint:
        assert EndpointUpstream("gpt", endpoint.base_url)(["Hi"]) == ["I cannot help with that."]


def test_functions_with_and_without_settings(aligner):
    assert AlignedUpstream(echo, aligner)(["a", CHAT]) == ["a!", "Hi!"]
    with pytest.raises(PromptError, match="does not take temperature"):
        AlignedUpstream(echo, aligner)(["a"], temperature=1.0)
    named = make_upstream(lambda prompts, temperature: [f"{temperature}"] * len(prompts))
    assert named(["a"], temperature=1.0) == ["1.0"]
    anything = make_upstream(lambda prompts, **settings: [str(settings)] * len(prompts))
    assert anything(["a"], top_p=0.5) == ["{'top_p': 0.5}"]
    with pytest.raises(UpstreamError, match="1 answers to 2 prompts"):
        make_upstream(lambda prompts: ["a"])(["a", "b"])


def test_whatever_else_raises():
    for wrong in ("gpt-5-mini", 3):
        with pytest.raises(TypeError, match="EndpointUpstream"):
            make_upstream(wrong)


# Stacked


def test_a_model_and_its_aligner(aligner):
    model, tokenizer = make_model(), make_tokenizer()
    aligned = AlignedUpstream(model, aligner, tokenizer)
    plain = ModelUpstream(model, tokenizer)
    assert aligned(["Hi"], temperature=0, max_tokens=4) == [f"{plain(['Hi'], temperature=0, max_tokens=4)[0]}!"]


def test_stacks_can_be_stacked(aligner):
    assert AlignedUpstream(AlignedUpstream(echo, aligner), aligner)(["a", "b"]) == ["a!!", "b!!"]
