"""Write the files of a run of version 0.1.0, for `test_saved_run.py`.

    python -m tests.saved_run.write FOLDER

Commit bc546d5 wrote the stored files. Do not write them again: the test shows that newer code can resume and read
them.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from datasets import Dataset

from cyclealign_trl import (
    CachedRanker,
    CycleAlignConfig,
    CycleAlignTrainer,
    Demonstration,
    LLMRanker,
    RankingFailure,
    RankingRequest,
    RankingResult,
    Usage,
    collect_corrections,
    generate_contrastive_pairs,
)
from cyclealign_trl.types import Trimmed
from tests.conftest import make_model, make_tokenizer

KILLED_AT = 3  # the optimiser step in which the run ends, one after its last checkpoint
JUDGE_URL = "http://127.0.0.1:47831/v1"  # part of the key of stored answers, which are read without a server

REQUESTS = [
    RankingRequest("Question 0:", ("one", "two", "three"), (Demonstration("Q", ("a", "b"), (1, 0)),), num_static=1),
    RankingRequest([{"role": "user", "content": "Question 1"}], ("one", "two"), metadata={"topic": 1}),
]
ANSWERS = [
    RankingResult((2, 0, 1), (1, 2, 0), "four", Usage(10, 5, 2, 0.25, 2), 0.5, Trimmed(1, 2)),
    RankingResult((1, 0)),
]
CORRECTIONS = (["Question 0:", [{"role": "user", "content": "Question 1"}]], ["an answer", "another"])


class LengthRanker:
    """Rank by length and then by text, and list the requests."""

    fingerprint = "length"

    def __init__(self):
        self.requests = []

    def rank(self, requests):
        answers = [self.answer(request) for request in requests]
        self.requests += requests
        return answers

    def answer(self, request):
        if request.prompt.startswith("Question 3"):
            return RankingFailure("timeout", "No reply within 60 s.", Usage(4, 0))
        texts = request.completions
        order = tuple(sorted(range(len(texts)), key=lambda index: (len(texts[index]), texts[index])))
        return RankingResult(order, improved_completion="better", usage=Usage(10, 5, cost=0.001))


class StoredJudge(LLMRanker):
    """`LLMRanker` with prepared answers, which have its fingerprint."""

    def stream(self, requests):
        yield from ((position, ANSWERS[REQUESTS.index(request)]) for position, request in enumerate(requests))


class Editor(BaseHTTPRequestHandler):
    """Chat endpoint that corrects every answer alike."""

    def do_POST(self):
        message = {"role": "assistant", "content": json.dumps({"correction": "a better answer"})}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


def small_model(seed=0):
    return make_model(seed, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)


def make_trainer(folder, ranker, seed=0):
    args = CycleAlignConfig(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_generations=3,
        num_interactions=2,
        demonstration_scope="run",
        max_prompt_length=64,
        max_completion_length=6,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        max_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": f"Question {index}:", "topic": index} for index in range(8)])
    return CycleAlignTrainer(small_model(seed), ranker, args, train_dataset=rows, processing_class=make_tokenizer())


def judge():
    return LLMRanker("judge", JUDGE_URL, criteria="brevity", seed=3, extra_body={"a": 1})


def pairs(folder):
    return generate_contrastive_pairs(
        small_model(),
        ["Why?", "How?", "When?"],
        tokenizer=make_tokenizer(),
        output_dir=folder,
        max_completion_length=6,
    )


def corrections(folder):
    return collect_corrections("judge", *CORRECTIONS, JUDGE_URL, cache=folder / "corrections.sqlite", criteria="wit")


def final_weights(trainer):
    return {name: value.detach().flatten().tolist() for name, value in trainer.model.state_dict().items()}


def write(folder: Path) -> None:
    # The resumed run must end like this one, which is not interrupted.
    uninterrupted = make_trainer(folder / "whole", LengthRanker())
    uninterrupted.train()
    (folder / "expected.json").write_text(
        json.dumps(
            {
                "weights": final_weights(uninterrupted),
                "demonstrations": uninterrupted.demonstrations.state_dict(),
                "rows": [
                    {name: value for name, value in row.items() if name != "usage"}
                    for row in uninterrupted.interaction_log.read().to_pylist()
                ],
            }
        )
    )
    cached = CachedRanker(StoredJudge("judge", JUDGE_URL, criteria="brevity", seed=3, extra_body={"a": 1}),
                          folder / "judge.sqlite")  # fmt: skip
    assert cached.rank(REQUESTS) == ANSWERS
    pairs(folder / "pairs")
    server = HTTPServer(("127.0.0.1", 47831), Editor)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    corrections(folder)

    # A run that is killed.
    trainer = make_trainer(folder / "run", LengthRanker())
    backward = trainer.accelerator.backward

    def end_at_step(*args, **kwargs):
        if trainer.state.global_step == KILLED_AT:
            os._exit(0)
        return backward(*args, **kwargs)

    trainer.accelerator.backward = end_at_step
    trainer.train()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
