"""`cyclealign judge` from its arguments to the report, over real HTTP."""

import gzip
import json
import logging
import re

import pytest
from datasets import Dataset

from cyclealign_trl.chat import client
from cyclealign_trl.cli import main
from cyclealign_trl.data import hh_rlhf
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.evaluation.metrics.ranking_agreement import FIGURES
from cyclealign_trl.scripts import inputs
from tests.evaluation.test_evaluate_ranker import (
    RANKED,
    REAL,
    Scripted,
    expected_of_merit,
    on_real_rankings,
    read_real,
    rows,
)
from tests.evaluation.test_evaluate_ranker import by_length as ranks_by_length
from tests.evaluation.test_metrics import brute_force

SHOWN = re.compile(r"# Completion ([A-Z]+)\n<data-\w+>\n(.*?)\n</", re.DOTALL)


def by_length(body):
    """A chat endpoint that prefers long texts."""
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


def test_a_ranking_llm_is_judged_and_paid_for_once(tmp_path, endpoint, capsys):
    data = write(tmp_path / "ranked.jsonl.gz", rows(20))
    options = ["--max_demonstrations", "1"]
    report = judge(data, tmp_path / "out", endpoint, *options)
    said = capsys.readouterr().out
    assert len(endpoint.requests) == 19 * 4
    assert report["rows"] == 19
    assert "| judge: 19 rows" in said
    assert "even (" in said
    assert f"Written to {tmp_path / 'out'}: report.json, report.md, rankings.jsonl" in said
    first, second = report["figures"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "rankings.jsonl").read_text().splitlines()]
    once = [line for line in lines if line["num_demonstrations"] == 0][::2]
    by_hand = brute_force(
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


def test_position_bias_of_an_endpoint_is_seen_unless_its_ranker_shuffles(tmp_path):
    """The ranker of `cyclealign train` shuffles against this bias; here it must not, unless that is what is asked."""

    def first_wins(body):
        labels = [label for label, _ in SHOWN.findall(body["messages"][-1]["content"])]
        return Reply(json.dumps({"ranking": labels}))

    data = write(tmp_path / "ranked.jsonl", rows(60))
    with LoopbackEndpoint(first_wins) as endpoint:
        report = judge(data, tmp_path / "a", endpoint)
        shuffled = judge(data, tmp_path / "b", endpoint, "--ranker_kwargs", '{"shuffle": true}', "--no_reverse")
    assert report["figures"][0]["position_bias"]["earlier_preferred"] == 1.0
    assert report["figures"][0]["position_bias"]["biased"] is True
    assert shuffled["figures"][0]["position_bias"]["biased"] is False


def test_what_it_costs_by_the_prices_that_are_given(tmp_path, endpoint, capsys):
    data = write(tmp_path / "ranked.jsonl", rows(5))
    prices = json.dumps({"prices": {"input": 2.0, "output": 8.0}})  # dollars per million tokens
    usage = judge(data, tmp_path / "out", endpoint, "--no_reverse", "--ranker_kwargs", prices)["figures"][0]["usage"]
    dollars = (2 * usage["prompt_tokens"] + 8 * usage["completion_tokens"]) / 1e6
    assert usage["cost"] == pytest.approx(dollars)
    assert f"{200 * dollars:.2f}" in capsys.readouterr().out  # of 1,000 rankings


def test_several_passes_are_judged_as_one_ranker(tmp_path, endpoint):
    report = judge(
        write(tmp_path / "a.jsonl", rows(5)), tmp_path / "out", endpoint, "--ranker_kwargs", '{"num_passes": 2}'
    )
    assert len(endpoint.requests) == 20
    assert report["figures"][0]["rankings"] == 10
    assert report["figures"][0]["usage"]["attempts"] == 20


def test_invalid_replies_and_refusals_are_counted(tmp_path):
    def moody(body):
        query = body["messages"][-1]["content"]
        number = int(re.search(r"Question (\d+)\?", query)[1])
        if number % 4 == 0:
            return Reply(refusal="I cannot.")
        return Reply("B is nice.") if number % 4 == 1 else by_length(body)

    data = write(tmp_path / "ranked.jsonl", rows(20))
    with LoopbackEndpoint(moody) as endpoint:
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
def test_each_layout(tmp_path, endpoint, data):
    report = judge(write(tmp_path / "data.jsonl", data), tmp_path / "out", endpoint)
    assert report["rows"] == 6
    assert report["figures"][0]["agreement"]["top_1"] == 1.0
    assert report["figures"][0]["agreement"]["exact_match"] == 1.0
    assert set(report["figures"][0]["subsets"]) == ({"Factuality", "Math"} if data is REWARD_BENCH_2 else set())


def test_other_kinds_of_files(tmp_path, endpoint):
    Dataset.from_list(REWARD_BENCH_2).to_parquet(tmp_path / "data.parquet")
    write(tmp_path / "data.json.gz", REWARD_BENCH_2)
    for ending in ("parquet", "json.gz"):
        assert judge(tmp_path / f"data.{ending}", tmp_path / ending, endpoint)["rows"] == 6


def test_a_folder_with_splits(tmp_path, endpoint):
    (tmp_path / "data").mkdir()
    for split, number in (("train", 3), ("test", 5)):
        write(tmp_path / "data" / f"{split}.jsonl", rows(number))
    assert judge(tmp_path / "data", tmp_path / "out", endpoint)["rows"] == 5
    assert judge(tmp_path / "data", tmp_path / "out", endpoint, "--dataset_split", "train")["rows"] == 3


def test_names_on_the_hub(tmp_path, endpoint, monkeypatch):
    """HH-RLHF's subsets are folders there; RewardBench 2 is one split."""
    asked = []

    def load(path, **kwargs):
        asked.append((path, kwargs))
        dialogues = [{"chosen": f"\n\nHuman: {i}?\n\nAssistant: the longer",
                      "rejected": f"\n\nHuman: {i}?\n\nAssistant: no"} for i in range(4)]  # fmt: skip
        return Dataset.from_list(dialogues) if "split" in kwargs else {"test": Dataset.from_list(REWARD_BENCH_2)}

    for module in (hh_rlhf, inputs):
        monkeypatch.setattr(module, "load_dataset", load)
    report = judge("Anthropic/hh-rlhf", tmp_path / "a", endpoint, "--dataset_config", "harmless-base")
    assert asked == [("Anthropic/hh-rlhf", {"data_dir": "harmless-base", "split": "test"})]
    assert set(report["figures"][0]["subsets"]) == {"harmless-base"}
    assert judge("allenai/reward-bench-2", tmp_path / "b", endpoint)["rows"] == 6
    assert asked[1] == ("allenai/reward-bench-2", {"name": None})


@on_real_rankings
@pytest.mark.parametrize("name", REAL)
def test_on_real_rankings_the_figures_are_those_of_brute_force(tmp_path, name):
    main(["judge", "--dataset_name", str(RANKED / name), "--output_dir", str(tmp_path / "out"), "--ranker_factory",
          "tests.evaluation.test_evaluate_ranker.ByMerit"])  # fmt: skip
    _, scores = read_real(name)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    [figures] = report["figures"]
    assert {key: figures["agreement"][key] for key in FIGURES} == pytest.approx(expected_of_merit(scores))
    assert report["rows"] == len(scores)
    assert (figures["rankings"], figures["failures"]) == (2 * len(scores), {})
    assert figures["reversal"]["pairs"] == 0
    assert figures["position_bias"]["biased"] is False


def make_scripted(bias=0.0):
    return Scripted(bias)


def test_any_ranker_and_a_yaml_file(tmp_path, capsys):
    data = write(tmp_path / "ranked.jsonl", rows(60))
    config = tmp_path / "judge.yaml"
    config.write_text(
        f"dataset_name: {data}\noutput_dir: {tmp_path / 'out'}\n"
        "ranker_factory: tests.scripts.test_judge.make_scripted\nranker_kwargs:\n  bias: 0.2\n"
    )
    main(["judge", "--config", str(config), "--max_samples", "50"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["ranker"], report["rows"]) == ("scripted", 50)
    assert report["figures"][0]["position_bias"]["biased"] is True
    assert "| found (p = 0.0" in capsys.readouterr().out


ASKED = []


class Interrupted(Scripted):
    """A judge during whose eighth answer somebody presses Control-C."""

    def answer(self, request):
        ASKED.append(request.prompt)
        if len(ASKED) == 8:
            raise KeyboardInterrupt
        return super().answer(request)


def make_interrupted():
    return Interrupted()


def test_an_interrupted_run_pays_for_nothing_twice(tmp_path, capsys):
    data = write(tmp_path / "ranked.jsonl", rows(20))
    command = ["judge", "--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--ranker_factory",
               "tests.scripts.test_judge.make_interrupted", "--max_concurrency", "1", "--no_reverse"]  # fmt: skip
    ASKED.clear()
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 130
    assert "goes on with what is missing" in capsys.readouterr().out
    asked = len(ASKED)
    assert 8 <= asked < 20
    main(command)
    assert len(ASKED) == 20 + 1  # the one that was interrupted is asked again
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows"] == 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "Say what to rank, with --dataset_name."),
        ("--dataset_name nowhere.jsonl", "There is no file nowhere.jsonl (--dataset_name)."),
        ("--dataset_name DATA", "Say who ranks"),
        ("--dataset_name DATA FACTORY --max_samples 0", "max_samples must be at least 1, got 0."),
        ("--dataset_name DATA FACTORY --max_demonstrations 9", "none is left to rank"),
        ("--dataset_name TEXT FACTORY", "Row 0 holds no reference order that can be read"),
        ("--dataset_name DATA --ranker_model judge --ranker_base_url http://127.0.0.1:9/v1", "Nothing answers at"),
        ('--dataset_name DATA --ranker_model judge --ranker_kwargs {"api_key":"x"}', "set OPENAI_API_KEY"),
    ],
)
def test_wrong_use_is_one_line_and_status_1(tmp_path, arguments, said):
    arguments = arguments.replace("DATA", str(write(tmp_path / "ranked.jsonl", rows(4))))
    arguments = arguments.replace("TEXT", str(write(tmp_path / "text.jsonl", [{"text": "a"}])))
    arguments = arguments.replace("FACTORY", "--ranker_factory tests.scripts.test_judge.make_scripted")
    with pytest.raises(SystemExit) as stop:
        main(["judge", *arguments.split(), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code.startswith("cyclealign judge: error: ")
    assert said in stop.value.code
    assert "\n" not in stop.value.code


def test_arguments_of_accelerate_are_none_of_its_own(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["judge", "--num_processes", "2"])
    assert stop.value.code == 2
    assert "unknown argument --num_processes" in capsys.readouterr().err


def test_a_refused_key_is_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0123456789")
    caplog.set_level(logging.DEBUG)
    data = write(tmp_path / "ranked.jsonl", rows(4))
    with LoopbackEndpoint(by_length, api_key="another") as endpoint, pytest.raises(SystemExit) as stop:
        judge(data, tmp_path / "out", endpoint)
    assert "rejects requests to the model 'judge'. Set OPENAI_API_KEY" in stop.value.code
    assert "very-secret" not in caplog.text + stop.value.code
