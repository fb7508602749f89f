"""Upstreams: models, pipelines, endpoints, functions."""

import json
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import pipeline

from cyclealign_trl import AlignedUpstream, Aligner, EndpointUpstream, ModelUpstream, PipelineUpstream
from cyclealign_trl.aligner.upstreams import make_upstream
from cyclealign_trl.chat import client
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.errors import PromptError, UpstreamError
from tests.conftest import make_model, make_tokenizer

CHAT = [{"role": "user", "content": "Hi"}]


class Shouter(Aligner):
    """Aligner that adds an exclamation mark."""

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


# Kinds of upstreams


@pytest.mark.parametrize(
    "prompts", [["Hi", "What is it?"], [CHAT, [*CHAT, {"role": "assistant", "content": "a"}, *CHAT]]]
)
def test_a_model_answers_a_batch_as_it_answers_each_prompt(prompts):
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


def test_a_model_uses_the_sampling_parameters_of_a_request(recwarn):
    upstream = ModelUpstream(make_model(), make_tokenizer(), device="cpu", max_new_tokens=20)
    prompts = ["Hi"] * 6
    assert len(set(upstream(prompts, temperature=2.0))) > 1  # sampled
    assert len(set(upstream(prompts, temperature=0))) == 1  # greedy
    assert max(map(len, upstream(prompts, max_tokens=3))) == 3
    assert max(map(len, upstream(prompts, max_completion_tokens=2, top_p=0.9))) == 2
    assert max(map(len, upstream(prompts, max_tokens=10_000))) <= 20
    assert not recwarn.list


def test_a_seed_makes_answers_reproducible():
    seeded = ModelUpstream(make_model(), make_tokenizer(), device="cpu", max_new_tokens=8, seed=1)
    state = torch.get_rng_state()
    assert seeded(["Hi"] * 3) == seeded(["Hi"] * 3)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = ModelUpstream(make_model(), make_tokenizer(), device="cpu", max_new_tokens=8)
    assert drawn(["Hi"] * 3, temperature=2.0) != drawn(["Hi"] * 3, temperature=2.0)


def test_a_prompt_that_a_model_cannot_answer_is_a_prompt_error():
    tokenizer = make_tokenizer()
    upstream = ModelUpstream(make_model(), tokenizer, device="cpu", max_new_tokens=200)
    with pytest.raises(PromptError, match="60 tokens, but the upstream model accepts 56 at most"):
        upstream(["x" * 60])
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(PromptError, match="no such role"):
        ModelUpstream(make_model(), tokenizer, device="cpu")([CHAT])
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        ModelUpstream(make_model(), tokenizer, device="cpu")([CHAT])


def test_a_pipeline_answers_texts_and_messages(aligner):
    generator = pipeline("text-generation", model=make_model(), tokenizer=make_tokenizer(), device="cpu")
    upstream = make_upstream(generator)
    assert isinstance(upstream, PipelineUpstream)
    for prompts in (["Hi", "What?"], [CHAT, CHAT]):
        answers = upstream(prompts, max_tokens=4, temperature=0)
        assert all(0 < len(answer) <= 4 for answer in answers)
        assert AlignedUpstream(generator, aligner)(prompts, max_tokens=4, temperature=0) == [f"{a}!" for a in answers]


def test_an_endpoint_answers_in_order_with_the_given_sampling():
    with LoopbackEndpoint(reply) as endpoint:
        upstream = EndpointUpstream("gpt", endpoint.base_url, sampling={"max_tokens": 9})
        assert upstream([f"Q{i}" for i in range(50)]) == [f"Q{i} None 9" for i in range(50)]
        assert upstream([CHAT], temperature=0.5, max_tokens=3) == ["Hi 0.5 3"]
        assert {request["model"] for request in endpoint.requests} == {"gpt"}


def test_an_endpoint_receives_only_what_the_user_has_set():
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    with LoopbackEndpoint(reply) as endpoint:
        EndpointUpstream("gpt", endpoint.base_url)([chat])
        sampling = {"seed": 3, "extra_body": {"top_k": 5}}
        EndpointUpstream("gpt", endpoint.base_url, sampling=sampling)(["Hi"], top_p=0.5, max_completion_tokens=7)
        assert endpoint.requests == [
            {"model": "gpt", "messages": chat},
            {"model": "gpt", "messages": CHAT, "seed": 3, "top_k": 5, "top_p": 0.5, "max_completion_tokens": 7},
        ]


def test_an_endpoint_without_address_or_key_raises(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="No API key"):
        EndpointUpstream("gpt")


CONTENT_FILTER = json.dumps({"error": {"message": "Filtered.", "code": "content_filter"}})


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (Reply("the key sk-secret is wrong", status=401), UpstreamError, r"HTTP 401: the key \[API key\] is wrong"),
        (Reply("Unsupported value: 'top_p'.", status=400), UpstreamError, "HTTP 400: Unsupported value: 'top_p'"),
        (Reply("This model's maximum context length is 9", status=400), PromptError, "too long"),
        (Reply(body=CONTENT_FILTER, status=400), PromptError, "rejected the content of the prompt"),
        (Reply("broken", status=500), UpstreamError, r"\(server_error\): HTTP 500: broken"),
        (Reply("slow down", status=429), UpstreamError, r"\(rate_limited\): HTTP 429: slow down"),
        (Reply(body="{}"), UpstreamError, r"\(invalid_response\): The response has no chat completion: \{\}"),
        (Reply(reset=True), UpstreamError, r"\(connection\): Client\w+Error: .*Connection reset"),
        (Reply("late", delay=3), UpstreamError, r"\(timeout\): No reply within 1 s"),
    ],
)
def test_errors_of_an_endpoint(answer, error, message):
    with LoopbackEndpoint(lambda body: answer) as endpoint:
        upstream = EndpointUpstream("gpt", endpoint.base_url, "sk-secret", max_retries=0, timeout=1)
        with pytest.raises(error, match=message) as raised:
            upstream(["Hi"])
        assert len(endpoint.requests) == 1
    assert "sk-secret" not in "".join(traceback.format_exception(raised.value))


def test_an_endpoint_is_called_again_after_temporary_errors(monkeypatch):
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.01)
    replies = iter([Reply(status=500), Reply(status=429), Reply(reset=True), Reply(body="{}"), Reply("Hello.")])
    with LoopbackEndpoint(lambda body: next(replies)) as endpoint:
        assert EndpointUpstream("gpt", endpoint.base_url, max_retries=4)(["Hi"]) == ["Hello."]
        assert endpoint.requests == [{"model": "gpt", "messages": CHAT}] * 5


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (Reply("", refusal="I cannot help with that."), "I cannot help with that."),
        (Reply("It depends on", finish_reason="length"), "It depends on"),
        (Reply("Well", finish_reason="content_filter"), "Well"),
        (Reply("Well", finish_reason=None), "Well"),
        (Reply(""), ""),
        (Reply("Your key is sk-secret-0123456789."), "Your key is [API key]."),
    ],
    ids=["refusal", "token limit", "filtered", "no finish reason", "empty", "echoed key"],
)
def test_every_chat_completion_of_an_endpoint_is_an_answer(answer, text):
    with LoopbackEndpoint(lambda body: answer) as endpoint:
        assert EndpointUpstream("gpt", endpoint.base_url, "sk-secret-0123456789")(["Hi"]) == [text]
        assert len(endpoint.requests) == 1


def test_threads_share_the_concurrency_of_an_endpoint():
    lock, in_flight, most = threading.Lock(), 0, 0

    def respond(body):
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        time.sleep(0.02)
        with lock:
            in_flight -= 1
        return reply(body)

    with LoopbackEndpoint(respond) as endpoint, ThreadPoolExecutor(12) as threads:
        upstream = EndpointUpstream("gpt", endpoint.base_url, max_concurrency=4)
        answers = list(threads.map(lambda i: upstream([f"Q{i}", f"R{i}"]), range(12)))
    assert answers == [[f"Q{i} None None", f"R{i} None None"] for i in range(12)]
    assert most == 4


def test_functions_with_and_without_sampling_parameters(aligner):
    assert AlignedUpstream(echo, aligner)(["a", CHAT]) == ["a!", "Hi!"]
    with pytest.raises(PromptError, match="does not support temperature"):
        AlignedUpstream(echo, aligner)(["a"], temperature=1.0)
    named = make_upstream(lambda prompts, temperature: [f"{temperature}"] * len(prompts))
    assert named(["a"], temperature=1.0) == ["1.0"]
    anything = make_upstream(lambda prompts, **settings: [str(settings)] * len(prompts))
    assert anything(["a"], top_p=0.5) == ["{'top_p': 0.5}"]
    with pytest.raises(UpstreamError, match="1 answers to 2 prompts"):
        make_upstream(lambda prompts: ["a"])(["a", "b"])


def test_make_upstream_rejects_other_types():
    for wrong in ("gpt-5-mini", 3):
        with pytest.raises(TypeError, match="EndpointUpstream"):
            make_upstream(wrong)


# Stacks


def test_an_aligner_on_a_model(aligner):
    model, tokenizer = make_model(), make_tokenizer()
    aligned = AlignedUpstream(model, aligner, tokenizer)
    plain = ModelUpstream(model, tokenizer)
    assert aligned(["Hi"], temperature=0, max_tokens=4) == [f"{plain(['Hi'], temperature=0, max_tokens=4)[0]}!"]


def test_two_aligners_on_one_upstream(aligner):
    assert AlignedUpstream(AlignedUpstream(echo, aligner), aligner)(["a", "b"]) == ["a!!", "b!!"]


# Limits of an endpoint


def test_an_endpoint_has_a_budget():
    usage = {"prompt_tokens": 100, "completion_tokens": 50}
    with LoopbackEndpoint(lambda body: Reply("Hi", usage=usage)) as endpoint:
        upstream = EndpointUpstream(
            "gpt", endpoint.base_url, prices={"input": 1.0, "output": 4.0}, max_cost=0.001, sampling={"max_tokens": 50}
        )
        for _ in range(3):
            upstream(["Hi"])
        with pytest.raises(UpstreamError, match=r"budget_exhausted.*of max_cost=0\.001"):
            upstream(["Hi"])
        assert len(endpoint.requests) == 3
        assert [body["max_tokens"] for body in endpoint.requests] == [50] * 3
    assert upstream.budget.committed.cost == pytest.approx(0.0009)


@pytest.mark.parametrize("name", ["temperature", "seed", "retries"])
def test_unknown_arguments_of_an_endpoint_raise(name):
    with pytest.raises(TypeError, match=f"no argument '{name}'"):
        EndpointUpstream("gpt", "http://127.0.0.1:1", **{name: 1})


@pytest.mark.parametrize("name", ["stop", "top_k", "frequency_penalty", "n"])
def test_a_model_refuses_parameters_that_it_would_ignore(name):
    with pytest.raises(PromptError, match=f"does not support {name}"):
        ModelUpstream(make_model(), make_tokenizer())(["Hi"], **{name: 1})
