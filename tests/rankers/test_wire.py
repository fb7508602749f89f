"""`LLMRanker` with the forms of replies, errors and refusals that real endpoints send, over HTTP on loopback."""

import json

import pytest

from cyclealign_trl.demo.loopback import Reply
from cyclealign_trl.errors import RankerError
from cyclealign_trl.types import RankingFailure, RankingRequest
from tests.rankers.llm_stubs import COMPLETIONS, REQUEST, RIGHT, error, judge

pytestmark = pytest.mark.usefixtures("llm_environment")

FAILING = RankingRequest("failing", COMPLETIONS)


def respond_to_failing(reply):
    return lambda body: (reply(body) if callable(reply) else reply) if "failing" in str(body) else judge(body)


def completion(body, *, content=None, finish_reason="stop", message=None, choice=None, **fields):
    """Return the judge's reply in another form, as a raw body."""
    text = judge(body).content if content is None else content
    message = {"role": "assistant", "content": text, **(message or {})}
    choices = [{"index": 0, "message": message, "finish_reason": finish_reason, **(choice or {})}]
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return Reply(body=json.dumps({"choices": choices, "usage": usage, **fields}))


# Finish reasons


@pytest.mark.parametrize(
    "finish_reason",
    ["stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "COMPLETE", "complete", "FinishReason.STOP",
     "tool_calls", "function_call", "unknown", "", None, 1, ["stop"]],
)  # fmt: skip
def test_the_parser_decides_about_other_finish_reasons(serve, finish_reason):
    ranker, endpoint = serve(lambda body: completion(body, finish_reason=finish_reason))
    assert ranker.rank([REQUEST])[0].order == RIGHT
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("finish_reason", ["length", "max_tokens", "MAX_TOKENS", "LENGTH", "FinishReason.MAX_TOKENS"])
def test_a_reply_that_reached_its_limit_is_truncated(serve, finish_reason):
    ranker, _ = serve(lambda body: completion(body, finish_reason=finish_reason), max_retries=0)
    assert ranker.rank([REQUEST])[0].reason == "truncated"


@pytest.mark.parametrize(
    ("finish_reason", "reason"),
    [("error", "server_error"), ("ERROR", "server_error"), ("content_filter", "refusal"), ("SAFETY", "refusal"),
     ("PROHIBITED_CONTENT", "refusal"), ("guardrail_intervened", "refusal"), ("eos", "unparsable"),
     (None, "unparsable")],
)  # fmt: skip
def test_the_finish_reason_names_the_failure_of_an_empty_reply(serve, finish_reason, reason):
    ranker, _ = serve(lambda body: completion(body, content="", finish_reason=finish_reason), max_retries=0)
    assert ranker.rank([REQUEST])[0].reason == reason


# Content in parts

PARTS = {
    "one": lambda text: [{"type": "text", "text": text}],
    "several": lambda text: [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}],
    "texts": lambda text: [text[:9], text[9:]],
    "single": lambda text: {"type": "text", "text": text},
    "no type": lambda text: [{"text": text}],
    "output_text": lambda text: [{"type": "output_text", "text": text, "annotations": []}],
    "value": lambda text: [{"type": "text", "text": {"value": text, "annotations": []}}],
    "Mistral": lambda text: [
        {"type": "thinking", "thinking": [{"type": "text", "text": '{"ranking": ["A"]}'}]},
        {"type": "text", "text": text},
    ],
    "Anthropic": lambda text: [
        {"type": "thinking", "thinking": '{"ranking": ["A"]}', "signature": "x"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": text},
    ],
    "reasoning": lambda text: [{"type": "reasoning", "text": '{"ranking": ["A"]}'}, {"type": "text", "text": text}],
    "thought": lambda text: [{"text": '{"ranking": ["A"]}', "thought": True}, {"text": text}],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_joins_the_text_parts_of_a_content(serve, parts):
    ranker, _ = serve(lambda body: completion(body, content=parts(judge(body).content)))
    outcome = ranker.rank([REQUEST])[0]
    assert (outcome.order, outcome.improved_completion) == (RIGHT, "Better.")


@pytest.mark.parametrize("content", [[], [{"type": "thinking", "thinking": "hm"}], [{"type": "refusal"}]])
def test_a_content_without_text_is_empty(serve, content):
    ranker, _ = serve(lambda body: completion(body, content=content), max_retries=0)
    assert ranker.rank([REQUEST])[0].reason == "unparsable"


def test_reads_a_refusal_from_a_part(serve):
    ranker, _ = serve(lambda body: completion(body, content=[{"type": "refusal", "refusal": "No."}]), max_retries=0)
    outcome = ranker.rank([REQUEST])[0]
    assert (outcome.reason, outcome.detail) == ("refusal", "No.")


# HTTP 200 with an error

HIDDEN_ERRORS = {
    "code 502": ({"error": {"code": 502, "message": "Provider returned error"}}, "server_error"),
    "code 429": ({"error": {"code": 429, "message": "slow down"}}, "rate_limited"),
    "code 402": ({"error": {"code": 402, "message": "Insufficient credits"}}, "quota_exhausted"),
    "code in digits": ({"error": {"code": "503", "message": "busy"}}, "server_error"),
    "code as a word": ({"error": {"code": "rate_limit_exceeded", "message": "slow down"}}, "rate_limited"),
    "Anthropic": ({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "server_error"),
    "Google": ([{"error": {"code": 503, "status": "UNAVAILABLE", "message": "overloaded"}}], "server_error"),
    "Google without code": ([{"error": {"status": "RESOURCE_EXHAUSTED", "message": "quota"}}], "rate_limited"),
    "vLLM": ({"object": "error", "message": "Internal error", "type": "x", "code": 500}, "server_error"),
    "status": ({"status": 504, "title": "Gateway Timeout"}, "server_error"),
    "errors": ({"success": False, "errors": [{"code": 429, "message": "slow down"}]}, "rate_limited"),
    "choice": ({"choices": [{"error": {"code": 502, "message": "disconnected"}, "finish_reason": "error",
                             "message": {"role": "assistant", "content": '{"ranking": ["A"]}'}}]}, "server_error"),
    "empty choices": ({"choices": [], "error": {"code": 524, "message": "timed out"}}, "server_error"),
    "too long": ({"error": {"code": 400, "message": "maximum context length is 4096"}}, "too_long"),
    "flagged": ({"error": {"code": 403, "message": "Your input was flagged"}}, "refusal"),
    "text": ({"error": "no backend"}, "invalid_response"),
    "unknown code": ({"error": {"code": 1234, "message": "?"}}, "invalid_response"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), HIDDEN_ERRORS.values(), ids=HIDDEN_ERRORS)
def test_an_error_in_a_success_has_the_status_that_it_states_and_costs_nothing(serve, body, reason):
    ranker, _ = serve(
        respond_to_failing(Reply(body=json.dumps(body))),
        max_retries=3, max_concurrency=1, prices={"input": 1000.0, "output": 1000.0}, max_cost=100.0,
    )  # fmt: skip
    fine, failing = ranker.rank([REQUEST, FAILING])
    assert fine.order == RIGHT
    assert failing.reason == reason
    assert failing.usage.cost == 0
    assert ranker.budget.committed.cost == pytest.approx(fine.usage.cost)


@pytest.mark.parametrize("empty", [None, {}, "", False, {"code": None, "message": ""}])
def test_an_empty_error_is_none(serve, empty):
    ranker, _ = serve(lambda body: completion(body, error=empty))
    assert ranker.rank([REQUEST])[0].order == RIGHT


RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3600s"}
DELAYS = {
    "Google": [{"error": {"code": 429, "details": [{"@type": "x"}, RETRY_INFO]}}],
    "seconds": {"error": {"code": 429, "retry_after": 3600}},
    "metadata": {"error": {"code": 429, "metadata": {"retry_after": "1h"}}},
}


@pytest.mark.parametrize("status", [200, 429])
@pytest.mark.parametrize("body", DELAYS.values(), ids=DELAYS)
def test_respects_a_delay_in_the_body(serve, body, status):
    ranker, endpoint = serve([Reply(status=status, body=json.dumps(body))], timeout=5.0)
    assert ranker.rank([REQUEST])[0].reason == "rate_limited"  # longer than the timeout, so there is no retry
    assert len(endpoint.requests) == 1


# Rejected requests

REJECTIONS = {
    "OpenRouter": (error(403, "Input was flagged by moderation"), "refusal"),
    "flagged": (error(403, "input was flagged"), "refusal"),
    "OpenAI": (error(400, "Invalid prompt: your prompt was flagged as potentially violating our usage policy.",
                     code="invalid_prompt"), "refusal"),
    "Alibaba": (error(400, "Input data may contain inappropriate content.", code="data_inspection_failed"), "refusal"),
    "Alibaba's other spelling": (error(400, "Refused.", code="DataInspectionFailed"), "refusal"),
    "Azure": (error(400, "The response was filtered", code="content_filter",
                    innererror={"code": "ResponsibleAIPolicyViolation"}), "refusal"),
    "legal reasons": (error(451, "The content policy forbids this"), "refusal"),
    "llama.cpp": (error(400, "the request exceeds the available context size (4096), try increasing it",
                        type="exceed_context_size_error"), "too_long"),
    "TGI": (Reply(status=422, body=json.dumps({"error": "Input validation error: `inputs` tokens + `max_new_tokens` "
                  "must be <= 2048. Given: 3000 `inputs` tokens and 100 `max_new_tokens`",
                  "error_type": "validation"})), "too_long"),
    "TGI's other check": (error(422, "Input validation error: `inputs` must have less than 1024 tokens. Given: 2000"),
                          "too_long"),
    "vLLM": (error(400, "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens"),
             "too_long"),
    "Anthropic": (error(400, "prompt is too long: 210000 tokens > 200000 maximum"), "too_long"),
    "Google": (error(400, "The input token count (40000) exceeds the maximum number of tokens allowed (32768)."),
               "too_long"),
    "Alibaba's limit": (error(400, "Range of input length should be [1, 30720]"), "too_long"),
    "unknown 400": (error(400, "Bad request."), "rejected"),
    "unknown 422": (error(422, "Unprocessable."), "rejected"),
    "unknown 403": (error(403, "Forbidden."), "rejected"),
    "unknown 404": (error(404, "No route for this request."), "rejected"),
    "HTTP 406": (error(406), "rejected"),
    "no JSON": (Reply(status=400, body="<html>WAF</html>"), "rejected"),
    "no credit": (error(400, "Your credit balance is too low"), "quota_exhausted"),
}  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("reply", "reason"), REJECTIONS.values(), ids=REJECTIONS)
def test_a_rejected_request_is_its_own_failure(serve, reply, reason, first):
    ranker, _ = serve(respond_to_failing(reply), max_concurrency=1)
    outcomes = ranker.rank([FAILING, REQUEST] if first else [REQUEST, FAILING])
    failing, fine = outcomes if first else reversed(outcomes)
    assert isinstance(failing, RankingFailure)
    assert failing.reason == reason
    assert fine.order == RIGHT


@pytest.mark.parametrize(
    ("reply", "reason"), [pair for pair in REJECTIONS.values() if pair[1] in ("refusal", "too_long")]
)
def test_a_recognised_rejection_is_not_fatal_even_alone(serve, reply, reason):
    """A resumed run can begin with the prompt that ended it."""
    ranker, _ = serve(respond_to_failing(reply))
    assert ranker.rank([FAILING])[0].reason == reason


@pytest.mark.parametrize("num_good", [0, 1])
@pytest.mark.parametrize("status", [401, 403, 404])
def test_many_equal_rejections_in_a_row_are_fatal(serve, status, num_good):
    ranker, endpoint = serve(respond_to_failing(error(status, "Forbidden.")), max_concurrency=1)
    for _ in range(num_good):
        ranker.rank([REQUEST])
    with pytest.raises(RankerError, match=str(status)):
        ranker.rank([RankingRequest(f"failing {index}", COMPLETIONS) for index in range(20)])
    assert len(endpoint.requests) == num_good + (1 if status == 401 else 8)


def test_an_answer_between_rejections_starts_the_count_again(serve):
    ranker, _ = serve(respond_to_failing(error(403, "Forbidden.")), max_concurrency=1)
    requests = [REQUEST if index % 8 == 0 else RankingRequest(f"failing {index}", COMPLETIONS) for index in range(24)]
    outcomes = ranker.rank(requests)
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == [None, *["rejected"] * 7] * 3


@pytest.mark.parametrize("message", ["Your account was flagged", "The organization violates our usage policy"])
def test_an_error_about_the_account_is_no_refusal(serve, message):
    ranker, _ = serve(lambda body: error(403, message))
    with pytest.raises(RankerError, match="403"):
        ranker.rank([REQUEST])


# Replies that the endpoint itself finds invalid

INVALID_GENERATIONS = {
    "Groq": error(400, "Failed to generate JSON. Please adjust your prompt. See 'failed_generation' for more details.",
                  code="json_validate_failed", failed_generation='{"ranking": ['),
    "code": error(400, "Failed.", code="json_validate_failed"),
    "field": error(400, "Bad request.", failed_generation="B > A"),
    "schema": error(400, "Generated JSON does not match the expected schema (json_schema)."),
    "output": error(422, "The model output could not be parsed: not valid for response_format json_schema"),
    "in a success": Reply(body=json.dumps({"error": {"code": 400, "type": "json_validate_failed", "message": "no"}})),
}  # fmt: skip


@pytest.mark.parametrize("reply", INVALID_GENERATIONS.values(), ids=INVALID_GENERATIONS)
def test_an_invalid_generation_keeps_the_schema(serve, reply):
    replies = []

    def respond(body):
        if "failing" not in str(body):
            return judge(body)
        replies.append(reply)
        return reply if len(replies) <= 2 else judge(body)

    ranker, endpoint = serve(respond, max_concurrency=1)
    assert [outcome.order for outcome in ranker.rank([FAILING, REQUEST])] == [RIGHT, RIGHT]
    assert {body["response_format"]["type"] for body in endpoint.requests} == {"json_schema"}
    assert "Your previous reply was not valid" in str(endpoint.requests[1])


@pytest.mark.parametrize("reply", INVALID_GENERATIONS.values(), ids=INVALID_GENERATIONS)
def test_a_prompt_that_never_gets_a_valid_generation_is_not_fatal(serve, reply):
    ranker, endpoint = serve(respond_to_failing(reply))
    [failing] = ranker.rank([FAILING])
    assert failing.reason == "unparsable"
    assert len(endpoint.requests) == 4


def test_an_accepted_parameter_is_not_dropped_for_other_requests(serve):
    """The endpoint refuses the schema for one prompt only."""

    def respond(body):
        refused = "failing" in str(body) and body["response_format"]["type"] == "json_schema"
        return error(400, "json_schema is not supported") if refused else judge(body)

    ranker, endpoint = serve(respond, max_concurrency=1)
    assert [outcome.order for outcome in ranker.rank([REQUEST, FAILING, REQUEST])] == [RIGHT] * 3
    assert [body["response_format"]["type"] for body in endpoint.requests] == [
        "json_schema", "json_schema", "json_object", "json_schema",
    ]  # fmt: skip


# System role

NO_SYSTEM_ROLE = {
    "Gemma": error(400, "System role not supported"),
    "Google": error(400, "Developer instruction is not enabled for models/gemma-3-27b-it"),
    "Mistral": error(422, "Only user and assistant roles are supported!"),
    "vLLM": error(400, "Conversation roles must alternate user/assistant/user/assistant/..."),
    "llama.cpp": error(500, "Jinja Exception: System role not supported"),
    "in words": error(400, "This model does not accept system messages."),
    "unnamed": error(400, "Bad request."),
    "in a success": Reply(body='{"error": {"code": 400, "message": "system prompt unsupported"}}'),
}


@pytest.mark.parametrize("reply", NO_SYSTEM_ROLE.values(), ids=NO_SYSTEM_ROLE)
def test_a_refused_system_role_moves_its_text_to_the_user(serve, reply, caplog):
    respond = lambda body: reply if body["messages"][0]["role"] == "system" else judge(body)  # noqa: E731
    ranker, endpoint = serve(respond, max_concurrency=1)
    assert [outcome.order for outcome in ranker.rank([REQUEST, FAILING])] == [RIGHT, RIGHT]
    first, last = endpoint.requests[0], endpoint.requests[-1]
    assert [message["role"] for message in last["messages"]] == ["user"]
    assert first["messages"][0]["content"] in last["messages"][0]["content"]
    assert {**first, "messages": None} == {**last, "messages": None}  # nothing else was dropped
    assert len(caplog.records) == 1
    assert "system True -> False" in caplog.text


# Truncated replies and reasoning


def reasoning(needed):
    """Return a judge that needs a number of tokens for reasoning and its reply."""

    def respond(body):
        limit = body.get("max_completion_tokens") or body["max_tokens"]
        fits = limit >= needed
        used = min(limit, needed)
        usage = {"prompt_tokens": 100, "completion_tokens": used,
                 "completion_tokens_details": {"reasoning_tokens": used - 10 if fits else used}}  # fmt: skip
        return Reply(judge(body).content if fits else "", finish_reason="stop" if fits else "length", usage=usage)

    return respond


def limits(endpoint):
    return [body.get("max_completion_tokens") or body["max_tokens"] for body in endpoint.requests]


@pytest.mark.parametrize(
    ("needed", "max_tokens", "asked"),
    [(1000, 1024, [1024, 1024]), (1500, 1024, [1024, 2048, 2048]), (8000, 1024, [1024, 2048, 4096, 8192, 8192]),
     (17, 10, [10, 20, 20]), (100, 1, [1, 2, 4, 8, 1, 2, 4, 8])],
)  # fmt: skip
def test_a_truncated_reply_is_requested_again_with_twice_the_limit(serve, needed, max_tokens, asked):
    ranker, endpoint = serve(reasoning(needed), max_tokens=max_tokens, max_concurrency=1)
    outcomes = ranker.rank([REQUEST, FAILING])
    assert limits(endpoint) == asked
    assert all(isinstance(outcome, RankingFailure) == (needed == 100) for outcome in outcomes)


def test_the_limit_is_bounded(serve):
    ranker, endpoint = serve(reasoning(10**6), max_tokens=16, max_retries=9)
    [outcome] = ranker.rank([REQUEST])
    assert limits(endpoint) == [16, 32, 64, 128, 256]
    assert outcome.reason == "truncated"
    assert "256 of its tokens are reasoning" in outcome.detail


def test_the_limit_leaves_room_for_the_request_in_the_context_window(serve):
    ranker, endpoint = serve(reasoning(10**6), max_tokens=256, context_window=1500, max_retries=9)
    assert ranker.rank([REQUEST])[0].reason == "truncated"
    assert limits(endpoint)[0] == 256
    assert len(set(limits(endpoint))) == len(endpoint.requests)
    assert max(limits(endpoint)) < 1500 - 256


@pytest.mark.parametrize("status", [400, 422])
def test_a_limit_above_that_of_the_model_is_lowered_again(serve, status):
    def respond(body):
        limit = body.get("max_completion_tokens") or body["max_tokens"]
        return error(status, "max_tokens must be at most 1500") if limit > 1500 else reasoning(10**6)(body)

    ranker, _ = serve(respond)
    ranker.rank([REQUEST])
    [outcome] = ranker.rank([REQUEST])
    assert outcome.reason == "truncated"
    assert "1,024 of its tokens are reasoning" in outcome.detail


def test_a_limit_in_the_extra_body_stays(serve):
    ranker, endpoint = serve(reasoning(10**6), extra_body={"max_tokens": 77})
    assert ranker.rank([REQUEST])[0].reason == "truncated"
    assert limits(endpoint) == [77]


@pytest.mark.parametrize(
    "model",
    ["gpt-5-mini", "openai/gpt-5", "o3-mini", "o1", "openai/o4-mini", "deepseek-ai/DeepSeek-R1", "Qwen/QwQ-32B",
     "deepseek-reasoner", "magistral-small-2509", "Qwen/Qwen3-30B-A3B-Thinking-2507", "openai/gpt-oss-20b",
     "gemini-2.5-pro"],
)  # fmt: skip
def test_models_that_reason_have_more_room_from_the_start(serve, model):
    ranker, endpoint = serve(reasoning(8000), model=model)
    assert ranker.rank([REQUEST])[0].order == RIGHT
    assert limits(endpoint) == [8192]
    assert json.loads(ranker.fingerprint)["max_tokens"] == 1024


@pytest.mark.parametrize("model", ["gpt-4o-mini", "meta-llama/Llama-3.1-8B-Instruct", "claude-3-5-haiku", "foo1"])
def test_other_models_keep_the_default_limit(serve, model):
    ranker, endpoint = serve(judge, model=model)
    ranker.rank([REQUEST])
    assert limits(endpoint) == [1024]


def test_sends_the_reasoning_effort_and_drops_it_if_it_is_refused(serve, caplog):
    respond = lambda body: error(400, "Unknown: reasoning_effort") if "reasoning_effort" in body else judge(body)  # noqa: E731
    ranker, endpoint = serve(respond, reasoning_effort="low", max_concurrency=1)
    assert [outcome.order for outcome in ranker.rank([REQUEST, FAILING])] == [RIGHT, RIGHT]
    assert [body.get("reasoning_effort") for body in endpoint.requests] == ["low", None, None]
    assert "reasoning_effort True -> False" in caplog.text


def test_only_a_reasoning_effort_changes_the_fingerprint(serve):
    plain, _ = serve(judge)
    low, _ = serve(judge, reasoning_effort="low")
    assert "reasoning_effort" not in plain.fingerprint
    assert json.loads(low.fingerprint)["reasoning_effort"] == "low"
