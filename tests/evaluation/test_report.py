"""Figures, tables and files of a judge report."""

import json

import pytest

from cyclealign_trl import RankingFailure, RankingResult, Usage, evaluate_ranker
from cyclealign_trl.evaluation.report_tables import positions_table
from tests.evaluation.stubs import LengthJudge, make_rows, ranks_by_length


def test_failures_are_counted_by_reason_and_excluded_from_the_agreement():
    class FailingJudge(LengthJudge):
        def rank_one(self, request):
            kind = int(request.prompt.split()[1][:-1]) % 4
            if kind < 2:
                return RankingFailure(("refusal", "unparsable")[kind], "no", Usage(50, 5, cost=0.25))
            return super().rank_one(request)

    judge = FailingJudge(usage=Usage(100, 10, cost=0.5, attempts=2))
    report = evaluate_ranker(judge, make_rows(40), reverse=True)
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
def test_unknown_price_is_not_reported_as_zero(usage):
    report = evaluate_ranker(LengthJudge(usage=usage), make_rows(4))
    assert report.figures[0]["usage"]["cost"] is None
    assert "unpriced" in report.to_markdown()


def test_figures_are_none_if_every_ranking_fails(tmp_path):
    class TimeoutJudge(LengthJudge):
        def rank_one(self, request):
            return RankingFailure("timeout")

    report = evaluate_ranker(TimeoutJudge(), make_rows(4), reverse=True)
    assert report.figures[0]["agreement"]["top_1"] is None
    assert report.figures[0]["position_bias"]["biased"] is None
    assert "| -" in report.to_markdown()
    report.save(tmp_path)
    assert len((tmp_path / "rankings.jsonl").read_text().splitlines()) == 8


def test_position_bias_ignores_rows_ranked_in_one_order_only():
    class HalfFailingJudge(LengthJudge):
        """Fail whenever the longest completion is shown first."""

        def rank_one(self, request):
            if len(request.completions[0]) == max(map(len, request.completions)):
                return RankingFailure("timeout")
            return super().rank_one(request)

    [figures] = evaluate_ranker(HalfFailingJudge(), make_rows(200), reverse=True).figures
    assert figures["failures"]["timeout"] > 50
    assert figures["position_bias"]["p_value"] == 1.0


def test_positions_table():
    class FirstWins(LengthJudge):
        def rank_one(self, request):
            return RankingResult(tuple(range(len(request.completions))))

    report = evaluate_ranker(FirstWins(), make_rows(6, size=3))
    lines = positions_table(report.figures).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == [
        "1.000 / 1.000 (0.333)",
        "0.500 / 0.000 (0.333)",
        "0.000 / 0.000 (0.333)",
    ]


def test_save_writes_json_tables_rankings_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    data = make_rows(10, subsets=("ev|en\n\x1b[31m", "odd"))
    report = evaluate_ranker(LengthJudge(), data, max_demonstrations=1)
    assert report.save(tmp_path) == ["report.json", "report.md", "rankings.jsonl", "report.png"]
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert (saved["ranker"], saved["rows"], len(saved["figures"])) == ("length-judge", 9, 2)
    text = (tmp_path / "report.md").read_text()
    assert "\x1b" not in text
    for table in text.strip().split("\n\n"):
        assert len({line.count("|") for line in table.splitlines()}) == 1
        assert "1 demonstration " in table
    lines = [json.loads(line) for line in (tmp_path / "rankings.jsonl").read_text().splitlines()]
    assert len(lines) == 36
    assert lines[0]["ranks"] == ranks_by_length(lines[0]["completions"])
    assert lines[0]["failure"] is None
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("num_demonstrations", "bars"), [(0, 4), (2, 0)])
def test_the_plot_has_bars_for_a_single_number_of_demonstrations(tmp_path, monkeypatch, num_demonstrations, bars):
    figure = pytest.importorskip("matplotlib.figure")
    from cyclealign_trl import FunctionRanker, evaluate_ranker
    from cyclealign_trl.evaluation.report_plot import plot_report

    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    rows = [{"prompt": f"q{i}", "completions": ["a", "bb", "ccc"], "ranks": [2, 1, 0]} for i in range(8)]
    ranker = FunctionRanker(lambda completions, **kwargs: [len(text) for text in completions])
    report = evaluate_ranker(ranker, rows, max_demonstrations=num_demonstrations)
    plot_report(report.figures, tmp_path / "plot.png")
    agreement = drawn[0].axes[0]
    assert len(agreement.patches) == bars
    low, high = agreement.get_xlim()
    assert high - low > 1
