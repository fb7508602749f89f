"""`LLMRanker` with `transformers serve`, an independent server, and tiny models with fixed replies."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from cyclealign_trl import Demonstration, LLMRanker, RankerError, RankingFailure, RankingRequest
from cyclealign_trl.cli import main
from tests.conftest import make_model, make_tokenizer
from tests.evaluation.stubs import make_rows

REPLIES = {
    "json": '{"ranking": ["B", "A"], "improved_response": "Because."}',
    "thinking": 'A seems better.</think>```json\n{"ranking": ["B", "A"]}\n```',
    "chain": "B > A",
    "chatty": "Both are fine answers, I think!",
    "three": '{"ranking": ["B", "A", "C"]}',
}
REQUEST = RankingRequest(
    [{"role": "user", "content": "Why?"}], ("No.", "Yes."), (Demonstration("How?", ("So.", "Thus."), (0, 1)),)
)


def save_fixed_reply_model(folder, reply):
    """Save a model that always generates `reply`, or an endless sequence of "x" if `reply` is `None`.

    The weights are constructed: each token has a unit vector as its embedding, the layers add nothing to it, and the
    head maps each vector to the next token.
    """
    tokenizer = make_tokenizer()
    token = "x" if reply is None else reply
    tokenizer.add_tokens([token])
    start_id, token_id, end_id = map(tokenizer.convert_tokens_to_ids, (">", token, tokenizer.eos_token))
    model = make_model(vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=1, max_position_embeddings=8192)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), 128))
        for weight in (model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight):
            weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[token_id, start_id] = 1.0  # ">" is the template's last character before a reply
        model.lm_head.weight[token_id if reply is None else end_id, token_id] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of the server and folder of its models."""
    models = tmp_path_factory.mktemp("models")
    for name, reply in {**REPLIES, "endless": None}.items():
        save_fixed_reply_model(models / name, reply)
    make_model(max_position_embeddings=8192).save_pretrained(models / "random")
    make_tokenizer().save_pretrained(models / "random")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = models / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=output, stderr=output)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", models
    finally:
        process.kill()
        process.wait(30)


def wait_for(address, process, log):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"The server did not start:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


@pytest.fixture
def rank(server):
    """Rank with one of the models."""
    address, models = server

    def rank_with(name, request=REQUEST, **options):
        ranker = LLMRanker(str(models / name), address, shuffle=False, **{"max_retries": 0, **options})
        try:
            ranker.check_connection()
            return ranker.rank([request])[0]
        finally:
            ranker.close()

    return rank_with


@pytest.mark.parametrize(("name", "improved"), [("json", "Because."), ("thinking", None), ("chain", None)])
def test_reads_rankings_from_json_and_text(rank, name, improved):
    """The server ignores the JSON schema, so replies can have any form."""
    outcome = rank(name)
    assert outcome.order == (1, 0)
    assert outcome.improved_completion == improved
    assert outcome.usage.attempts == 1
    assert outcome.usage.prompt_tokens > 1000  # one per character
    assert outcome.usage.completion_tokens in (1, 2)


@pytest.mark.parametrize(
    ("name", "reason"), [("chatty", "unparsable"), ("three", "invalid_ranking"), ("endless", "truncated")]
)
def test_a_reply_without_a_valid_ranking_fails_after_the_retries(rank, name, reason):
    outcome = rank(name, max_retries=1, max_tokens=8)
    assert isinstance(outcome, RankingFailure)
    assert outcome.reason == reason
    assert outcome.usage.attempts == 2
    assert outcome.usage.completion_tokens > 0


def test_replies_of_random_weights_are_rejected(rank):
    outcome = rank("random", max_tokens=64, temperature=1.0)
    assert isinstance(outcome, RankingFailure)
    assert outcome.reason in ("truncated", "unparsable")


def test_an_unknown_field_raises_and_drops_no_parameter(rank, caplog):
    with pytest.raises(RankerError, match=r"HTTP 422: .*Unexpected fields .*no_such_field"):
        rank("json", extra_body={"no_such_field": 1})
    assert "refuses a parameter" not in caplog.text


def test_a_model_that_the_server_cannot_load_fails(rank):
    assert rank("nowhere").reason == "server_error"


def test_the_judge_report_shows_the_bias_of_a_fixed_reply(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    address, models = server
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(24, size=2)))
    main(["judge", "--dataset_name", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "out"),
          "--ranker_model", str(models / "json"), "--ranker_base_url", address])  # fmt: skip
    [figures] = json.loads((tmp_path / "out" / "report.json").read_text())["figures"]
    assert figures["rankings"] == 48
    assert figures["failures"] == {}
    assert figures["position_bias"]["earlier_preferred"] == 0.0
    assert figures["position_bias"]["biased"] is True
    assert figures["reversal"]["pairs"] == 1.0
