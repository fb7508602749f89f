"""The study at tiny size, with random weights: every row, resuming, the judge, and the page."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from benchmarks.estimates import intercept_with_interval
from benchmarks.study import run
from benchmarks.study.endpoint import StudyJudge, best_of, random_score
from benchmarks.study.figures import load_results
from benchmarks.study.job import Job, OutOfTimeError, Study
from benchmarks.study.methods import make
from benchmarks.study.page import DOCS, page_text, write_page
from benchmarks.study.rows import ROWS
from benchmarks.study.scales import SCALES
from benchmarks.study.splits import HELPFUL, PARTS, part_of
from cyclealign_trl import LLMRanker, RankingRequest
from cyclealign_trl.data.hh_rlhf import SUBSETS
from cyclealign_trl.demo.loopback import LoopbackEndpoint
from tests.conftest import make_model, make_tokenizer

# The libraries warn of what the study does on purpose.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return the arguments of a tiny study: model, dialogues, output folder."""
    folder = tmp_path_factory.mktemp("study")
    make_model(max_position_embeddings=2048).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    for name in ("evaluator", "judge"):
        LlamaForSequenceClassification(config).save_pretrained(folder / "output" / name)
        make_tokenizer().save_pretrained(folder / "output" / name)
        summary = {"accuracy": 0.6, "accuracy_interval": [0.5, 0.7], "pairs": 8, "held_out_pairs": 8, "seconds": 1.0}
        (folder / "output" / name / "reward_model.json").write_text(json.dumps(summary))
    for index, subset in enumerate(SUBSETS):
        lines = []
        for number in range(40):
            question = f"\n\nHuman: Q{index} {number}?\n\nAssistant:"
            lines.append(json.dumps({"chosen": f"{question} yes", "rejected": f"{question} no"}))
        (folder / f"{subset}.test.jsonl").write_text("\n".join(lines) + "\n")
    return [str(folder / "model"), str(folder), str(folder / "output"), "--scale", "tiny"]


@pytest.fixture(scope="module")
def results(inputs, tmp_path_factory):
    """Return the folder of the results of all rows."""
    folder = tmp_path_factory.mktemp("results")
    run.main([*inputs, "--results", str(folder)])
    return folder


def read(results, name):
    return json.loads((results / "tiny" / f"{name}-0.json").read_text())


def test_every_row_is_measured_on_the_same_prompts(results):
    rows = [read(results, name) for name in ROWS]
    assert len({tuple(row["prompt_ids"]) for row in rows}) == 1
    for row in rows:
        for reward_model in ("evaluator", "judge"):
            assert len(row["rewards"][reward_model]) == len(row["prompt_ids"]) == len(HELPFUL)


def test_rows_with_a_judge_ask_it_equally_often(results):
    calls = {name: read(results, name)["judge_calls"] for name, row in ROWS.items() if row.method == "cyclealign"}
    assert set(calls.values()) == {4}
    assert {read(results, name)["steps"] for name in ("sft", "dpo", "pro", "dlma")} == {2}


def test_finished_rows_are_not_run_again(inputs, results):
    before = {path: path.stat().st_mtime_ns for path in (results / "tiny").glob("*-0.json")}
    run.main([*inputs, "--results", str(results)])
    assert {path: path.stat().st_mtime_ns for path in (results / "tiny").glob("*-0.json")} == before
    assert len(before) == len(ROWS)


@pytest.mark.parametrize("name", ["pro", "cyclealign_pro"])
def test_an_interrupted_row_ends_with_the_same_weights(name, inputs, results, tmp_path):
    model, dialogues, output = inputs[:3]
    study = Study(model, dialogues, Path(output), tmp_path, SCALES["tiny"], deadline=-math.inf)
    job = Job(study, ROWS[name], 0, tmp_path / f"{name}-0")
    with pytest.raises(OutOfTimeError):
        make(job)
    assert [path.name for path in job.folder.glob("checkpoint-*")] == ["checkpoint-1"]
    study.deadline = math.inf
    make(job)
    folders = (job.folder, Path(output, "tiny", job.folder.name))
    resumed, whole = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert any(weight.any() for name, weight in whole.items() if "lora_B" in name)


def test_page_shows_every_row_with_its_control(results):
    text = page_text(load_results(results / "tiny"), has_full=False)
    for name, row in ROWS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` | {row.about} |"))
        assert row.control is None or f"| `{row.control}` |" in line
    assert "Not run yet" not in text
    assert "accuracy of the evaluator and of the judge cannot be told from chance" in text


def test_committed_page_is_what_the_stored_results_give(tmp_path):
    write_page(run.RESULTS, tmp_path)
    assert (tmp_path / "study.md").read_text() == (DOCS / "study.md").read_text()


def test_judge_ranks_by_its_score_and_offers_the_best_sample():
    prompt = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
    ]
    judge = StudyJudge(lambda _, texts: [len(text) for text in texts], {"R": prompt}, {"R": ["", "xx", "xxx", "x"]})
    with LoopbackEndpoint(judge.respond) as endpoint:
        ranker = LLMRanker("judge", endpoint.base_url, "none")
        (result,) = ranker.rank([RankingRequest(prompt, ("aa", "a", "aaa"))])
    assert result.order == (2, 0, 1)
    assert result.improved_completion == "xxx"


def test_random_judge_depends_on_the_seed_and_the_text_alone():
    texts = [f"text {number}" for number in range(20)]
    scores = random_score(0)("Q", texts)
    assert random_score(0)("Q", texts[::-1]) == scores[::-1]
    assert random_score(1)("Q", texts) != scores
    assert best_of(random_score(0), "Q", texts) != best_of(random_score(1), "Q", texts)


def test_parts_get_their_shares_of_dialogues():
    parts = [part_of(f"message {number}") for number in range(2000)]
    shares = [parts.count(part) / len(parts) for part in PARTS]
    assert shares == pytest.approx([0.35, 0.35, 0.12, 0.18], abs=0.04)


def test_difference_at_equal_length_removes_what_length_explains():
    words = np.array([0.0, 10, 20, 30, -5, 15])
    noise = np.array([0.1, -0.1, 0.05, -0.05, 0.1, -0.1])
    value, interval = intercept_with_interval(2 + 0.5 * words + noise, words)
    assert value == pytest.approx(2, abs=0.1)
    assert interval[0] < 2 < interval[1] < 2.3
