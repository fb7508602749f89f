"""`evaluate_ranker` with judges of known quality, and on published rankings."""

import time

import pytest

from cyclealign_trl import RankerError, RankingResult, evaluate_ranker
from cyclealign_trl.evaluation.metrics.ranking_agreement import FIGURES
from tests.evaluation.stubs import (
    RANKED_FILES,
    LengthJudge,
    TextJudge,
    brute_force_agreement,
    make_rows,
    ranks_by_length,
    read_rankings,
)


def test_agreement_equals_brute_force():
    data = make_rows()
    report = evaluate_ranker(LengthJudge(), data, reverse=False)
    expected = brute_force_agreement(
        [ranks_by_length(row["completions"]) for row in data], [row["ranks"] for row in data]
    )
    [figures] = report.figures
    assert {name: figures["agreement"][name] for name in FIGURES} == pytest.approx(expected)
    assert set(figures["subsets"]) == {"even", "odd"}
    odd = data[1::2]
    expected = brute_force_agreement(
        [ranks_by_length(row["completions"]) for row in odd], [row["ranks"] for row in odd]
    )
    assert {name: figures["subsets"]["odd"][name] for name in FIGURES} == pytest.approx(expected)
    assert (figures["rankings"], figures["failures"], figures["failure_rate"]) == (40, {}, 0)
    assert figures["reversal"] is None


@pytest.mark.parametrize("reverse", [False, True])
def test_finds_position_bias_only_in_a_biased_judge(reverse):
    data = make_rows(400)
    biased = evaluate_ranker(LengthJudge(bias=0.2), data, reverse=reverse).figures[0]["position_bias"]
    assert biased["biased"]
    assert biased["first_place_by_position"][0] > 0.35
    for unbiased in (LengthJudge(), LengthJudge(noise=20)):
        assert not evaluate_ranker(unbiased, data, reverse=reverse).figures[0]["position_bias"]["biased"]


def test_reversal_is_the_share_of_changed_pairs_and_first_places():
    data = make_rows(100)
    consistent = evaluate_ranker(LengthJudge(), data, reverse=True).figures[0]
    assert (consistent["reversal"]["pairs"], consistent["reversal"]["first_place"]) == (0, 0)
    assert consistent["position_bias"]["p_value"] == 1.0
    report = evaluate_ranker(LengthJudge(bias=0.2), data, reverse=True)
    forward, backward = report.rankings[::2], report.rankings[1::2]
    flipped = sum(
        (a.ranks[i] < a.ranks[j]) != (b.ranks[i] < b.ranks[j])
        for a, b in zip(forward, backward, strict=True)
        for i in range(4)
        for j in range(i)
    )
    assert [ranking.shown[::-1] for ranking in forward] == [ranking.shown for ranking in backward]
    reversal = report.figures[0]["reversal"]
    assert reversal["pairs"] == pytest.approx(flipped / 600)
    assert reversal["pairs_interval"][0] < flipped / 600 < reversal["pairs_interval"][1]
    changed = sum(a.ranks.index(0) != b.ranks.index(0) for a, b in zip(forward, backward, strict=True))
    assert reversal["first_place"] == pytest.approx(changed / 100)


def test_shown_orders_depend_only_on_row_and_seed():
    data = make_rows()

    def shown_completions(**options):
        judge = LengthJudge()
        evaluate_ranker(judge, data, reverse=False, **options)
        return {request.prompt: request.completions for request in judge.requests}

    shown = shown_completions()
    assert shown_completions(max_concurrency=1) == shown
    sample = shown_completions(max_samples=7)
    assert len(sample) == 7
    assert sample.items() <= shown.items()
    assert shown_completions(seed=1) != shown
    assert any(shown[row["prompt"]] != tuple(row["completions"]) for row in data)


def test_each_number_of_demonstrations_ranks_the_same_rows_without_the_demonstrations():
    data = make_rows(12)
    data += [
        {**row, "completions": [*row["completions"], "another"], "ranks": [*row["ranks"], 4]} for row in make_rows(12)
    ]
    judge = LengthJudge()
    report = evaluate_ranker(judge, data, max_demonstrations=2, reverse=False)
    by_number = {n: [r for r in judge.requests if len(r.demonstrations) == n] for n in range(3)}
    ranked = {n: sorted((r.prompt, r.completions) for r in requests) for n, requests in by_number.items()}
    assert ranked[0] == ranked[1] == ranked[2]
    assert len(report.figures) == 3
    demonstrations = report.demonstrations
    assert all(request.demonstrations == demonstrations[:n] for n in (1, 2) for request in by_number[n])
    assert not {demonstration.prompt for demonstration in demonstrations} & {r.prompt for r in judge.requests}
    assert len(ranked[0]) == 24 - 2 * 2  # each prompt occurs in two rows
    for demonstration in demonstrations:
        [row] = [
            row
            for row in data
            if row["prompt"] == demonstration.prompt and len(row["completions"]) == len(demonstration.completions)
        ]
        ranks = [
            row["ranks"][row["completions"].index(demonstration.completions[index])] for index in demonstration.order
        ]
        assert ranks == list(range(len(ranks)))


def test_more_samples_and_demonstrations_only_request_what_is_not_cached(tmp_path):
    judge = LengthJudge()
    common = {"cache_path": tmp_path / "a.sqlite", "reverse": False}
    small = evaluate_ranker(judge, make_rows(), **common, max_samples=10, max_demonstrations=1)
    assert len(judge.requests) == 20
    options = common | {"max_samples": 15, "max_demonstrations": 2}
    large = evaluate_ranker(judge, make_rows(), **options)
    assert len(judge.requests) == 45
    assert large.demonstrations[:1] == small.demonstrations
    assert [figures["usage"]["cached"] for figures in large.figures] == [10, 10, 0]
    repeated = evaluate_ranker(judge, make_rows(), **options)
    assert len(judge.requests) == 45
    assert repeated.figures[0]["agreement"] == large.figures[0]["agreement"]


def test_latency_excludes_the_cache(tmp_path):
    class SlowJudge(LengthJudge):
        def rank_one(self, request):
            time.sleep(0.2 if request.prompt == "Question 3?" else 0.05)
            return super().rank_one(request)

    options = {"cache_path": tmp_path / "a.sqlite"}
    [figures] = evaluate_ranker(SlowJudge(), make_rows(20), **options, max_concurrency=4).figures
    assert 0.05 <= figures["latency"]["p50"] < 0.2 <= figures["latency"]["p99"] + 0.03
    [figures] = evaluate_ranker(SlowJudge(), make_rows(20), **options).figures
    assert figures["latency"] is None  # all answers are cached


def test_cache_without_a_fingerprint_raises(tmp_path):
    judge = LengthJudge()
    judge.fingerprint = None
    with pytest.raises(ValueError, match="has no `fingerprint`"):
        evaluate_ranker(judge, make_rows(), cache_path=tmp_path / "a.sqlite")


def test_demonstration_contains_one_of_several_tied_completions():
    data = [{"prompt": str(i), "chosen": ["good"], "rejected": ["bad", "worse", "awful"]} for i in range(3)]
    [demonstration] = evaluate_ranker(LengthJudge(), data, max_demonstrations=1).demonstrations
    assert len(demonstration.completions) == 2
    assert demonstration.completions[demonstration.order[0]] == "good"


def test_ties_of_the_ranker_reach_the_figures():
    class TieJudge(LengthJudge):
        def rank_one(self, request):
            size = len(request.completions)
            return RankingResult(tuple(range(size)), ranks=(0,) * size)

    [figures] = evaluate_ranker(TieJudge(), make_rows(20)).figures
    assert figures["agreement"]["pairwise_accuracy"] == 0.5
    assert figures["agreement"]["kendall_tau"] is None
    assert figures["position_bias"]["p_value"] == 1.0


def test_ranker_error_stops_the_evaluation():
    class BrokenJudge(LengthJudge):
        def rank_one(self, request):
            time.sleep(0.02)
            raise RankerError("no key")

    judge = BrokenJudge()
    with pytest.raises(RankerError, match="no key"):
        evaluate_ranker(judge, make_rows(400), max_concurrency=2)
    assert len(judge.requests) < 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_demonstrations": -1}, "max_demonstrations must be at least 0, got -1"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1, got 0"),
        ({"confidence_level": 1.0}, "confidence_level must be between 0 and 1, got 1.0"),
        ({"max_demonstrations": 4}, "of 4 rows with a reference order, 4 are held out as demonstrations"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_ranker(LengthJudge(), make_rows(4), **options)


@pytest.mark.parametrize("name", RANKED_FILES)
def test_finds_position_bias_on_published_rankings_only_in_a_biased_judge(name, optional_data):
    data, _ = read_rankings(optional_data / "data" / "ranked" / name)
    [biased] = evaluate_ranker(LengthJudge(bias=0.2), data).figures
    [unbiased] = evaluate_ranker(TextJudge(), data).figures
    assert biased["position_bias"]["biased"]
    assert biased["position_bias"]["earlier_preferred_interval"][0] > 0.5
    assert (unbiased["position_bias"]["biased"], unbiased["position_bias"]["p_value"]) == (False, 1.0)
    [without_reversal] = evaluate_ranker(LengthJudge(bias=0.2), data, reverse=False).figures
    assert without_reversal["position_bias"]["biased"]
