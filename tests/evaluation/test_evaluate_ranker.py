"""`evaluate_ranker` with judges whose quality is known, and on real data against brute force."""

import functools
import gzip
import json
import os
import random
import threading
import time
from pathlib import Path

import pytest

from cyclealign_trl import RankerError, RankingFailure, RankingResult, Usage, evaluate_ranker
from cyclealign_trl.evaluation.metrics.ranking_agreement import FIGURES
from cyclealign_trl.evaluation.report_tables import positions_table
from tests.evaluation.test_metrics import brute_force

SHARED = Path(os.environ.get("CYCLEALIGN_SHARED") or Path(__file__).parents[3] / "shared")
RANKED = SHARED / "data" / "ranked"


class Scripted:
    """Prefers long texts. In a share of its answers, drawn by what it is shown, the first one shown wins."""

    name = "scripted"

    def __init__(self, bias=0.0, noise=0.0, usage=None):
        self.bias, self.noise, self.usage = bias, noise, usage
        self.fingerprint = f"scripted-{bias}-{noise}"
        self.requests = []
        self.lock = threading.Lock()

    def rank(self, requests):
        with self.lock:
            self.requests.extend(requests)
        return [self.answer(request) for request in requests]

    def answer(self, request):
        rng = random.Random(repr((request.prompt, request.completions, len(request.demonstrations))))
        merit = [len(text) + rng.gauss(0, self.noise) for text in request.completions]
        order = sorted(range(len(merit)), key=lambda index: -merit[index])
        if rng.random() < self.bias:
            order.remove(0)
            order.insert(0, 0)
        return RankingResult(tuple(order), usage=self.usage)


def rows(number=40, size=4, seed=0, subsets=("even", "odd")):
    rng = random.Random(seed)
    made = []
    for index in range(number):
        lengths = rng.sample(range(1, 40), size)
        ranks = sorted(range(size), key=lambda i: -lengths[i] + rng.gauss(0, 8))
        ranks = [ranks.index(i) for i in range(size)]
        made.append({"prompt": f"Question {index}?", "completions": ["x" * length for length in lengths],
                     "ranks": ranks, "subset": subsets[index % 2]})  # fmt: skip
    return made


def by_length(texts):
    """The scripted judge's ranks, computed afresh."""
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    return [order.index(index) for index in range(len(texts))]


def test_the_figures_are_those_of_brute_force():
    data = rows()
    report = evaluate_ranker(Scripted(), data, reverse=False)
    expected = brute_force([by_length(row["completions"]) for row in data], [row["ranks"] for row in data])
    [figures] = report.figures
    assert {name: figures["agreement"][name] for name in FIGURES} == pytest.approx(expected)
    assert set(figures["subsets"]) == {"even", "odd"}
    odd = data[1::2]
    expected = brute_force([by_length(row["completions"]) for row in odd], [row["ranks"] for row in odd])
    assert {name: figures["subsets"]["odd"][name] for name in FIGURES} == pytest.approx(expected)
    assert (figures["rankings"], figures["failures"], figures["failure_rate"]) == (40, {}, 0)
    assert figures["reversal"] is None


@pytest.mark.parametrize("reverse", [False, True])
def test_a_planted_position_bias_is_reported_and_none_is_not(reverse):
    data = rows(400)
    biased = evaluate_ranker(Scripted(bias=0.2), data, reverse=reverse).figures[0]["position_bias"]
    assert biased["biased"]
    assert biased["first_place_by_position"][0] > 0.35
    for honest in (Scripted(), Scripted(noise=20)):
        assert not evaluate_ranker(honest, data, reverse=reverse).figures[0]["position_bias"]["biased"]


def test_what_flips_when_shown_in_reverse():
    data = rows(100)
    steady = evaluate_ranker(Scripted(), data, reverse=True).figures[0]
    assert (steady["reversal"]["pairs"], steady["reversal"]["first_place"]) == (0, 0)
    assert steady["position_bias"]["p_value"] == 1.0
    report = evaluate_ranker(Scripted(bias=0.2), data, reverse=True)
    first, second = report.rankings[::2], report.rankings[1::2]
    flipped = sum(
        (a.ranks[i] < a.ranks[j]) != (b.ranks[i] < b.ranks[j])
        for a, b in zip(first, second, strict=True)
        for i in range(4)
        for j in range(i)
    )
    assert [one.shown[::-1] for one in first] == [one.shown for one in second]
    reversal = report.figures[0]["reversal"]
    assert reversal["pairs"] == pytest.approx(flipped / 600)
    assert reversal["pairs_interval"][0] < flipped / 600 < reversal["pairs_interval"][1]
    unlike = sum(a.ranks.index(0) != b.ranks.index(0) for a, b in zip(first, second, strict=True))
    assert reversal["first_place"] == pytest.approx(unlike / 100)


def test_shown_orders_are_shuffled_by_row_and_seed_alone():
    data = rows()

    def shown(**options):
        judge = Scripted()
        evaluate_ranker(judge, data, reverse=False, **options)
        return {request.prompt: request.completions for request in judge.requests}

    first = shown()
    assert shown(max_concurrency=1) == first
    some = shown(max_samples=7)
    assert len(some) == 7
    assert some.items() <= first.items()
    assert shown(seed=1) != first
    assert any(first[row["prompt"]] != tuple(row["completions"]) for row in data)


def test_every_number_of_demonstrations_ranks_the_same_rows_and_never_its_own():
    data = rows(12) + [{**row, "completions": [*row["completions"], "another"], "ranks": [*row["ranks"], 4]}
                       for row in rows(12)]  # fmt: skip
    judge = Scripted()
    report = evaluate_ranker(judge, data, max_demonstrations=2, reverse=False)
    by_number = {n: [r for r in judge.requests if len(r.demonstrations) == n] for n in range(3)}
    asked = {n: sorted((r.prompt, r.completions) for r in requests) for n, requests in by_number.items()}
    assert asked[0] == asked[1] == asked[2]
    assert len(report.figures) == 3
    demonstrations = report.demonstrations
    assert all(request.demonstrations == demonstrations[:n] for n in (1, 2) for request in by_number[n])
    assert not {one.prompt for one in demonstrations} & {request.prompt for request in judge.requests}
    assert len(asked[0]) == 24 - 2 * 2  # each prompt stands in two rows
    for one in demonstrations:
        [ranks] = {tuple(row["ranks"]) for row in data if row["prompt"] == one.prompt
                   and len(row["completions"]) == len(one.completions)}  # fmt: skip
        [texts] = {tuple(row["completions"]) for row in data if row["prompt"] == one.prompt
                   and len(row["completions"]) == len(one.completions)}  # fmt: skip
        assert [ranks[texts.index(one.completions[index])] for index in one.order] == list(range(len(ranks)))


def test_more_samples_and_more_demonstrations_ask_for_what_is_new_alone(tmp_path):
    judge = Scripted()
    common = {"cache_path": tmp_path / "a.sqlite", "reverse": False}
    few = evaluate_ranker(judge, rows(), **common, max_samples=10, max_demonstrations=1)
    assert len(judge.requests) == 20
    options = common | {"max_samples": 15, "max_demonstrations": 2}
    more = evaluate_ranker(judge, rows(), **options)
    assert len(judge.requests) == 45
    assert more.demonstrations[:1] == few.demonstrations
    assert [figures["usage"]["cached"] for figures in more.figures] == [10, 10, 0]
    again = evaluate_ranker(judge, rows(), **options)
    assert len(judge.requests) == 45
    assert again.figures[0]["agreement"] == more.figures[0]["agreement"]


def test_latency_is_that_of_the_ranker_alone(tmp_path):
    class Slow(Scripted):
        def answer(self, request):
            time.sleep(0.2 if request.prompt == "Question 3?" else 0.05)
            return super().answer(request)

    [figures] = evaluate_ranker(Slow(), rows(20), cache_path=tmp_path / "a.sqlite", max_concurrency=4).figures
    assert 0.05 <= figures["latency"]["p50"] < 0.2 <= figures["latency"]["p99"] + 0.03
    [figures] = evaluate_ranker(Slow(), rows(20), cache_path=tmp_path / "a.sqlite").figures
    assert figures["latency"] is None  # nothing was asked


def test_a_cache_takes_a_ranker_with_a_fingerprint(tmp_path):
    judge = Scripted()
    judge.fingerprint = None
    with pytest.raises(ValueError, match="has no `fingerprint`"):
        evaluate_ranker(judge, rows(), cache_path=tmp_path / "a.sqlite")


def test_ties_of_the_reference_show_once_in_a_demonstration():
    data = [{"prompt": str(i), "chosen": ["good"], "rejected": ["bad", "worse", "awful"]} for i in range(3)]
    [demonstration] = evaluate_ranker(Scripted(), data, max_demonstrations=1).demonstrations
    assert len(demonstration.completions) == 2
    assert demonstration.completions[demonstration.order[0]] == "good"


def test_failures_are_counted_by_kind_and_no_figure_is_made_of_them():
    class Moody(Scripted):
        def answer(self, request):
            kind = int(request.prompt.split()[1][:-1]) % 4
            if kind < 2:
                return RankingFailure(("refusal", "unparsable")[kind], "no", Usage(50, 5, cost=0.25))
            return super().answer(request)

    data = rows(40)
    report = evaluate_ranker(Moody(usage=Usage(100, 10, cost=0.5, attempts=2)), data, reverse=True)
    [figures] = report.figures
    assert figures["failures"] == {"refusal": 20, "unparsable": 20}
    assert (figures["rankings"], figures["failure_rate"]) == (80, 0.5)
    assert figures["agreement"]["num_prompts"] == 20
    assert figures["usage"] == {
        "prompt_tokens": 6000, "completion_tokens": 600, "attempts": 120, "cost": 30.0, "cached": 0
    }  # fmt: skip
    assert "50.0% (refusal 25.0%, unparsable 25.0%)" in report.to_markdown()
    assert "375.00" in report.to_markdown()  # dollars per 1,000 rankings


@pytest.mark.parametrize("usage", [None, Usage(100, 10)])
def test_an_unknown_price_is_not_a_price_of_0(usage):
    report = evaluate_ranker(Scripted(usage=usage), rows(4))
    assert report.figures[0]["usage"]["cost"] is None
    assert "unpriced" in report.to_markdown()


def test_a_judge_that_only_fails_has_no_figures(tmp_path):
    class Mute(Scripted):
        def answer(self, request):
            return RankingFailure("timeout")

    report = evaluate_ranker(Mute(), rows(4), reverse=True)
    assert report.figures[0]["agreement"]["top_1"] is None
    assert report.figures[0]["position_bias"]["biased"] is None
    assert "| -" in report.to_markdown()
    report.save(tmp_path)
    assert len((tmp_path / "rankings.jsonl").read_text().splitlines()) == 8


def test_ties_of_the_ranker_and_every_one_of_its_ranks_reach_the_figures():
    class Tied(Scripted):
        def answer(self, request):
            size = len(request.completions)
            return RankingResult(tuple(range(size)), ranks=(0,) * size)

    [figures] = evaluate_ranker(Tied(), rows(20)).figures
    assert figures["agreement"]["pairwise_accuracy"] == 0.5
    assert figures["agreement"]["kendall_tau"] is None
    assert figures["position_bias"]["p_value"] == 1.0


def test_an_error_of_the_ranker_ends_the_judging():
    class Broken(Scripted):
        def answer(self, request):
            time.sleep(0.02)
            raise RankerError("no key")

    judge = Broken()
    with pytest.raises(RankerError, match="no key"):
        evaluate_ranker(judge, rows(400), max_concurrency=2)
    assert len(judge.requests) < 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_demonstrations": -1}, "max_demonstrations must be at least 0, got -1"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1, got 0"),
        ({"confidence_level": 1.0}, "confidence_level must lie between 0 and 1, got 1.0"),
        ({"max_demonstrations": 4}, "Of 4 rows with a reference order, 4 are held out as demonstrations"),
    ],
)
def test_wrong_use_raises(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_ranker(Scripted(), rows(4), **options)


def test_the_table_of_positions():
    class FirstWins(Scripted):
        def answer(self, request):
            return RankingResult(tuple(range(len(request.completions))))

    report = evaluate_ranker(FirstWins(), rows(6, size=3))
    lines = positions_table(report.figures).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == [
        "1.000 / 1.000 (0.333)",
        "0.500 / 0.000 (0.333)",
        "0.000 / 0.000 (0.333)",
    ]


def test_the_files_of_a_report(tmp_path):
    pytest.importorskip("matplotlib")
    report = evaluate_ranker(Scripted(), rows(10, subsets=("ev|en\n\x1b[31m", "odd")), max_demonstrations=1)
    assert report.save(tmp_path) == ["report.json", "report.md", "rankings.jsonl", "report.png"]
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert (saved["ranker"], saved["rows"], len(saved["figures"])) == ("scripted", 9, 2)
    text = (tmp_path / "report.md").read_text()
    assert "\x1b" not in text
    for table in text.strip().split("\n\n"):
        assert len({line.count("|") for line in table.splitlines()}) == 1
        assert "1 demonstration " in table
    lines = [json.loads(line) for line in (tmp_path / "rankings.jsonl").read_text().splitlines()]
    assert len(lines) == 36
    assert lines[0]["ranks"] == by_length(lines[0]["completions"])
    assert lines[0]["failure"] is None
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


# Real data, without the package's own reading of it

REAL = (
    "oasst_en100_human_ranked.jsonl",
    "pandalm_human_pairwise.jsonl",
    "vicuna80_gpt4_roundrobin.jsonl.gz",
    "vicuna80_gpt4_scores_manymodels.jsonl.gz",
)
on_real_rankings = pytest.mark.skipif(not RANKED.exists(), reason=f"{RANKED} is not here (see CYCLEALIGN_SHARED)")


def read_real(name):
    """The rows of a file, and per row that orders anything its different texts with their scores."""
    path = RANKED / name
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        data = [json.loads(line) for line in lines]
    scores = []
    for row in data:
        best = {}
        for answer, score in zip(row["responses"], row["scores"], strict=True):
            text = str(answer["text"])  # one of them is a bare `true`
            best[text] = max(score, best.get(text, score))
        if len(set(best.values())) > 1:
            scores.append(best)
    return data, scores


@functools.cache
def merit(text):
    return sum(map(ord, text)) % 1009


def ranks_by_merit(texts):
    return [sum(merit(other) > merit(text) for other in texts) for text in texts]


class ByMerit:
    """A judge whose ranks, ties included, depend on the texts alone."""

    def rank(self, requests):
        ranks = [ranks_by_merit(request.completions) for request in requests]
        return [RankingResult(tuple(sorted(range(len(r)), key=r.__getitem__)), tuple(r)) for r in ranks]


def expected_of_merit(scores):
    """What the judge by merit comes to, by brute force."""
    references = [[-score for score in best.values()] for best in scores]
    return brute_force([ranks_by_merit(best) for best in scores], references)


@on_real_rankings
@pytest.mark.parametrize("name", REAL)
def test_a_planted_bias_is_reported_on_real_rankings_and_none_is_not(name):
    data, _ = read_real(name)
    [biased] = evaluate_ranker(Scripted(bias=0.2), data).figures
    [honest] = evaluate_ranker(ByMerit(), data).figures
    assert biased["position_bias"]["biased"]
    assert biased["position_bias"]["earlier_preferred_interval"][0] > 0.5
    assert (honest["position_bias"]["biased"], honest["position_bias"]["p_value"]) == (False, 1.0)
    [at_half_the_price] = evaluate_ranker(Scripted(bias=0.2), data, reverse=False).figures
    assert at_half_the_price["position_bias"]["biased"]
