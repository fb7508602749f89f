"""`cyclealign judge`: rankings over HTTP, the report, and error messages."""

import gzip
import json
import logging
import re

import pytest
from datasets import Dataset

from cyclealign_trl.chat import client
from cyclealign_trl.cli import main
from cyclealign_trl.data import hh_rlhf, named_datasets
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.evaluation.metrics.ranking_agreement import FIGURES
from tests.evaluation.stubs import (
    RANKED_FILES,
    LengthJudge,
    brute_force_agreement,
    make_rows,
    ranks_by_length,
    read_rankings,
    text_judge_agreement,
)

SHOWN = re.compile(r"# Completion ([A-Z]+)\n<data-\w+>\n(.*?)\n</", re.DOTALL)


def by_length(body):
    """Rank the completions of a request by length, longest first."""
    query = body["messages"][-1]["content"].rpartition("### Instruction")[2]
    ranking = sorted(SHOWN.findall(query), key=lambda one: -len(one[1]))
    return Reply(json.dumps({"ranking": [label for label, _ in ranking], "improved_response": "better"}))


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.01)


@pytest.fixture
def endpoint():
    with LoopbackEndpoint(by_length) as endpoint:
        yield endpoint


def write(path, data):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in data)
    return path


def judge(dataset, output_dir, endpoint, *arguments):
    main(["judge", "--dataset_name", str(dataset), "--output_dir", str(output_dir), "--ranker_model", "judge",
          "--ranker_base_url", endpoint.base_url, *arguments])  # fmt: skip
    return json.loads((output_dir / "report.json").read_text(encoding="utf-8"))


def test_measures_an_llm_and_does_not_repeat_stored_rankings(tmp_path, endpoint, capsys):
    data = write(tmp_path / "ranked.jsonl.gz", make_rows(20))
    options = ["--max_demonstrations", "1"]
    report = judge(data, tmp_path / "out", endpoint, *options)
    output = capsys.readouterr().out
    assert len(endpoint.requests) == 19 * 4
    assert report["rows"] == 19
    assert "| judge: 19 rows" in output
    assert "even (" in output
    assert f"Written to {tmp_path / 'out'}: report.json, report.md, rankings.jsonl" in output
    first, second = report["figures"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "rankings.jsonl").read_text().splitlines()]
    once = [line for line in lines if line["num_demonstrations"] == 0][::2]
    by_hand = brute_force_agreement(
        [ranks_by_length(one["completions"]) for one in once], [one["reference_ranks"] for one in once]
    )
    assert {name: first["agreement"][name] for name in FIGURES} == pytest.approx(by_hand)
    assert first["agreement"] == second["agreement"]
    assert first["reversal"]["pairs"] == 0.0
    assert first["position_bias"]["biased"] is False
    assert first["usage"]["prompt_tokens"] < second["usage"]["prompt_tokens"]
    assert first["latency"]["p50"] <= first["latency"]["p99"]
    again = judge(data, tmp_path / "out", endpoint, *options)
    assert len(endpoint.requests) == 19 * 4
    assert again["figures"][0]["agreement"] == first["agreement"]
    assert again["figures"][0]["usage"]["cached"] == 38


def test_reports_position_bias_unless_shuffling_is_asked_for(tmp_path):
    """`LLMRanker` shuffles by default against position bias. `cyclealign judge` turns that off to measure the bias."""

    def first_wins(body):
        labels = [label for label, _ in SHOWN.findall(body["messages"][-1]["content"])]
        return Reply(json.dumps({"ranking": labels}))

    data = write(tmp_path / "ranked.jsonl", make_rows(60))
    with LoopbackEndpoint(first_wins) as endpoint:
        report = judge(data, tmp_path / "a", endpoint)
        shuffled = judge(data, tmp_path / "b", endpoint, "--ranker_kwargs", '{"shuffle": true}', "--no_reverse")
    assert report["figures"][0]["position_bias"]["earlier_preferred"] == 1.0
    assert report["figures"][0]["position_bias"]["biased"] is True
    assert shuffled["figures"][0]["position_bias"]["biased"] is False


def test_measures_a_jury_and_stores_the_rankings_of_each_member(tmp_path, endpoint):
    def shortest(body):
        labels = sorted(SHOWN.findall(body["messages"][-1]["content"]), key=lambda one: len(one[1]))
        return Reply(json.dumps({"ranking": [label for label, _ in labels]}))

    def measure(*models):
        members = [{"ranker_model": model, "ranker_base_url": address} for model, address in models]
        main(["judge", "--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--no_reverse",
              "--ranker_factory", "cyclealign_trl.JuryRanker", "--ranker_kwargs", json.dumps({"members": members})]
        )  # fmt: skip
        return json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))

    data = write(tmp_path / "ranked.jsonl", make_rows(5))
    with LoopbackEndpoint(shortest) as other:
        pair = [("one", endpoint.base_url), ("two", other.base_url)]
        report = measure(*pair)
        assert report["ranker"] == "jury of one and two"
        assert report["figures"][0]["agreement"]["pairwise_accuracy"] == 0.5  # opposite votes tie everything
        shown = [[text for _, text in SHOWN.findall(body["messages"][-1]["content"])] for body in endpoint.requests]
        assert sorted(shown) == sorted(
            [text for _, text in SHOWN.findall(body["messages"][-1]["content"])] for body in other.requests
        )
        measure(*pair, ("three", endpoint.base_url))
        assert (len(endpoint.requests), len(other.requests)) == (10, 5)


def test_reports_the_cost_at_given_prices(tmp_path, endpoint, capsys):
    data = write(tmp_path / "ranked.jsonl", make_rows(5))
    prices = json.dumps({"prices": {"input": 2.0, "output": 8.0}})  # dollars per million tokens
    usage = judge(data, tmp_path / "out", endpoint, "--no_reverse", "--ranker_kwargs", prices)["figures"][0]["usage"]
    dollars = (2 * usage["prompt_tokens"] + 8 * usage["completion_tokens"]) / 1e6
    assert usage["cost"] == pytest.approx(dollars)
    assert f"{200 * dollars:.2f}" in capsys.readouterr().out  # per 1,000 rankings


def test_several_passes_count_as_one_ranking(tmp_path, endpoint):
    report = judge(
        write(tmp_path / "a.jsonl", make_rows(5)), tmp_path / "out", endpoint, "--ranker_kwargs", '{"num_passes": 2}'
    )
    assert len(endpoint.requests) == 20
    assert report["figures"][0]["rankings"] == 10
    assert report["figures"][0]["usage"]["attempts"] == 20


def test_counts_invalid_replies_and_refusals(tmp_path):
    def unreliable(body):
        query = body["messages"][-1]["content"]
        number = int(re.search(r"Question (\d+)\?", query)[1])
        if number % 4 == 0:
            return Reply(refusal="I cannot.")
        return Reply("B is nice.") if number % 4 == 1 else by_length(body)

    data = write(tmp_path / "ranked.jsonl", make_rows(20))
    with LoopbackEndpoint(unreliable) as endpoint:
        report = judge(data, tmp_path / "out", endpoint, "--no_reverse", "--ranker_kwargs", '{"max_retries": 1}')
    [figures] = report["figures"]
    assert figures["failures"] == {"refusal": 5, "unparsable": 5}
    assert figures["failure_rate"] == 0.5
    assert figures["usage"]["attempts"] == 10 * 2 + 10
    lines = [json.loads(line) for line in (tmp_path / "out" / "rankings.jsonl").read_text().splitlines()]
    assert sum(line["failure"] == "refusal" and "I cannot." in line["detail"] for line in lines) == 5


REWARD_BENCH_2 = [
    {"id": str(i), "prompt": f"Question {i}?", "chosen": ["the longest of them"], "rejected": ["so", "no", "oh"][:3],
     "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["m"] * 4,
     "subset": ("Factuality", "Math")[i % 2], "additional_metadata": {"category": None, "index": 1.0}}
    for i in range(6)
]  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        REWARD_BENCH_2,
        [{"prompt": f"{i}?", "chosen": "the longer", "rejected": "no"} for i in range(6)],
        [
            {"chosen": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "the longer"}],
             "rejected": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "no"}]}
            for i in range(6)
        ],
        [
            {"chosen": f"\n\nHuman: {i}?\n\nAssistant: the longer",
             "rejected": f"\n\nHuman: {i}?\n\nAssistant: no"}
            for i in range(6)
        ],
        [{"prompt": f"{i}?", "responses": [{"model": "m", "text": "no"}, {"model": "n", "text": "the longer"}],
          "scores": [0.5, 1.0], "ranking": [1, 0], "has_ties": False} for i in range(6)],
    ],
    ids=["reward-bench-2", "preference", "implicit prompt", "hh-rlhf", "responses"],
)  # fmt: skip
def test_reads_each_dataset_layout(tmp_path, endpoint, data):
    report = judge(write(tmp_path / "data.jsonl", data), tmp_path / "out", endpoint)
    assert report["rows"] == 6
    assert report["figures"][0]["agreement"]["top_1"] == 1.0
    assert report["figures"][0]["agreement"]["exact_match"] == 1.0
    assert set(report["figures"][0]["subsets"]) == ({"Factuality", "Math"} if data is REWARD_BENCH_2 else set())


def test_reads_parquet_and_compressed_files(tmp_path, endpoint):
    Dataset.from_list(REWARD_BENCH_2).to_parquet(tmp_path / "data.parquet")
    write(tmp_path / "data.json.gz", REWARD_BENCH_2)
    for ending in ("parquet", "json.gz"):
        assert judge(tmp_path / f"data.{ending}", tmp_path / ending, endpoint)["rows"] == 6


def test_reads_the_splits_of_a_folder(tmp_path, endpoint):
    (tmp_path / "data").mkdir()
    for split, number in (("train", 3), ("test", 5)):
        write(tmp_path / "data" / f"{split}.jsonl", make_rows(number))
    assert judge(tmp_path / "data", tmp_path / "out", endpoint)["rows"] == 5
    assert judge(tmp_path / "data", tmp_path / "out", endpoint, "--dataset_split", "train")["rows"] == 3


def test_reads_datasets_on_the_hub(tmp_path, endpoint, monkeypatch):
    """The subsets of HH-RLHF are folders on the Hub. RewardBench 2 has a single split."""
    calls = []

    def load(path, **kwargs):
        calls.append((path, kwargs))
        dialogues = [{"chosen": f"\n\nHuman: {i}?\n\nAssistant: the longer",
                      "rejected": f"\n\nHuman: {i}?\n\nAssistant: no"} for i in range(4)]  # fmt: skip
        return Dataset.from_list(dialogues) if "split" in kwargs else {"test": Dataset.from_list(REWARD_BENCH_2)}

    for module in (hh_rlhf, named_datasets):
        monkeypatch.setattr(module, "load_dataset", load)
    report = judge("Anthropic/hh-rlhf", tmp_path / "a", endpoint, "--dataset_config", "harmless-base")
    assert calls == [("Anthropic/hh-rlhf", {"data_dir": "harmless-base", "split": "test"})]
    assert set(report["figures"][0]["subsets"]) == {"harmless-base"}
    assert judge("allenai/reward-bench-2", tmp_path / "b", endpoint)["rows"] == 6
    assert calls[1] == ("allenai/reward-bench-2", {"name": None})


@pytest.mark.parametrize("name", RANKED_FILES)
def test_figures_on_published_rankings_match_brute_force(tmp_path, name, optional_data):
    path = optional_data / "data" / "ranked" / name
    main(["judge", "--dataset_name", str(path), "--output_dir", str(tmp_path / "out"), "--ranker_factory",
          "tests.evaluation.stubs.TextJudge"])  # fmt: skip
    _, scores = read_rankings(path)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    [figures] = report["figures"]
    assert {key: figures["agreement"][key] for key in FIGURES} == pytest.approx(text_judge_agreement(scores))
    assert report["rows"] == len(scores)
    assert (figures["rankings"], figures["failures"]) == (2 * len(scores), {})
    assert figures["reversal"]["pairs"] == 0
    assert figures["position_bias"]["biased"] is False


def make_judge(bias=0.0):
    return LengthJudge(bias)


def test_measures_a_factory_ranker_from_a_yaml_file(tmp_path, capsys):
    data = write(tmp_path / "ranked.jsonl", make_rows(60))
    config = tmp_path / "judge.yaml"
    config.write_text(
        f"dataset_name: {data}\noutput_dir: {tmp_path / 'out'}\n"
        "ranker_factory: tests.scripts.test_judge.make_judge\nranker_kwargs:\n  bias: 0.2\n"
    )
    main(["judge", "--config", str(config), "--max_samples", "50"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["ranker"], report["rows"]) == ("length-judge", 50)
    assert report["figures"][0]["position_bias"]["biased"] is True
    assert "| found (p = 0.0" in capsys.readouterr().out


RANKED_PROMPTS = []


class Interrupted(LengthJudge):
    """Ranker that is interrupted during its eighth ranking."""

    def rank_one(self, request):
        RANKED_PROMPTS.append(request.prompt)
        if len(RANKED_PROMPTS) == 8:
            raise KeyboardInterrupt
        return super().rank_one(request)


def make_interrupted():
    return Interrupted()


def test_an_interrupted_run_continues_with_the_remaining_rows(tmp_path, capsys):
    data = write(tmp_path / "ranked.jsonl", make_rows(20))
    command = ["judge", "--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--ranker_factory",
               "tests.scripts.test_judge.make_interrupted", "--max_concurrency", "1", "--no_reverse"]  # fmt: skip
    RANKED_PROMPTS.clear()
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 130
    assert "Run the same command again to rank the remaining rows" in capsys.readouterr().out
    assert 8 <= len(RANKED_PROMPTS) < 20
    main(command)
    assert len(RANKED_PROMPTS) == 20 + 1  # the interrupted one is repeated
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "No dataset to rank. Set --dataset_name."),
        ("--dataset_name nowhere.jsonl", "There is no file nowhere.jsonl (--dataset_name)."),
        ("--dataset_name DATA", "The ranker must be set by either --ranker_model"),
        ("--dataset_name DATA FACTORY --max_samples 0", "max_samples must be at least 1, got 0."),
        ("--dataset_name DATA FACTORY --max_demonstrations 9", "No rows are left to rank"),
        ("--dataset_name TEXT FACTORY", "Row 0 has no readable reference order"),
        ("--dataset_name DATA --ranker_model judge --ranker_base_url http://127.0.0.1:9/v1", "Nothing answers at"),
        ('--dataset_name DATA --ranker_model judge --ranker_kwargs {"api_key":"x"}', "set OPENAI_API_KEY"),
    ],
)
def test_usage_errors_are_one_line_with_status_1(tmp_path, arguments, message):
    arguments = arguments.replace("DATA", str(write(tmp_path / "ranked.jsonl", make_rows(4))))
    arguments = arguments.replace("TEXT", str(write(tmp_path / "text.jsonl", [{"text": "a"}])))
    arguments = arguments.replace("FACTORY", "--ranker_factory tests.scripts.test_judge.make_judge")
    with pytest.raises(SystemExit) as stop:
        main(["judge", *arguments.split(), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code.startswith("cyclealign judge: error: ")
    assert message in stop.value.code
    assert "\n" not in stop.value.code


def test_arguments_of_accelerate_are_unknown(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["judge", "--num_processes", "2"])
    assert stop.value.code == 2
    assert "unknown argument --num_processes" in capsys.readouterr().err


def test_a_rejected_api_key_is_a_one_line_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0123456789")
    caplog.set_level(logging.DEBUG)
    data = write(tmp_path / "ranked.jsonl", make_rows(4))
    with LoopbackEndpoint(by_length, api_key="another") as endpoint, pytest.raises(SystemExit) as stop:
        judge(data, tmp_path / "out", endpoint)
    assert "rejects requests to the model 'judge'. Set OPENAI_API_KEY" in stop.value.code
    assert "very-secret" not in caplog.text + stop.value.code
