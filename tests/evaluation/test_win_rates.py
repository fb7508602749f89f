"""Win rates: counts, omega, coverage of intervals, and control of planted preferences for length."""

import numpy as np
import pytest

from cyclealign_trl.evaluation.win_rates import win_rates


def verdicts(wins, ties, losses):
    return ["win"] * wins + ["tie"] * ties + ["lose"] * losses


@pytest.mark.parametrize("counts", [(27, 13, 28), (9, 0, 0), (0, 0, 9)])
def test_counts_and_rates(counts):
    figures = win_rates(verdicts(*counts))
    total = sum(counts)
    assert [figures[name] for name in ("win", "tie", "lose")] == list(counts)
    assert figures["win_rate"] == pytest.approx(100 * (counts[0] + counts[1] / 2) / total)
    assert figures["net_win_rate"] == pytest.approx(100 * (counts[0] - counts[2]) / total)
    low, high = figures["win_rate_interval"]
    assert low <= figures["win_rate"] <= high
    assert figures["length_controlled_win_rate"] is None


def test_omega_of_the_aligner_paper():
    """Its tables give wins, equal and lost counts beside omega: 277/289/130 -> +21.1 and 115/431/151 -> -5.2."""
    assert win_rates(verdicts(277, 289, 130))["net_win_rate"] == pytest.approx(21.1, abs=0.05)
    assert win_rates(verdicts(115, 431, 151))["net_win_rate"] == pytest.approx(-5.2, abs=0.05)


def simulate(rng, num_prompts, quality, length_preference, lengths=(0.0, 100.0)):
    """Return verdicts of a judge that prefers longer replies, with logit `quality` at equal lengths."""
    differences = rng.normal(*lengths, size=num_prompts)
    logits = quality + length_preference * np.tanh(differences / differences.std())
    wins = rng.random(num_prompts) < 1 / (1 + np.exp(-logits))
    return ["win" if win else "lose" for win in wins], differences


@pytest.mark.parametrize("quality", [-0.5, 0.0, 0.8])
def test_length_control_removes_a_planted_preference(quality):
    """A model that writes 80 characters more wins by its length alone. The controlled rate is that of its quality."""
    rng = np.random.default_rng(1)
    truth = 100 / (1 + np.exp(-quality))
    covered = plain_covered = 0
    for trial in range(60):
        drawn, differences = simulate(rng, 400, quality, 1.5, lengths=(80.0, 100.0))
        figures = win_rates(drawn, differences, n_resamples=200, seed=trial)
        low, high = figures["length_controlled_win_rate_interval"]
        covered += low <= truth <= high
        low, high = figures["win_rate_interval"]
        plain_covered += low <= truth <= high
    assert covered >= 52  # of 60; 57 are expected, and fewer than 52 have a probability of 1 %
    assert plain_covered <= 10


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(300):
        drawn = rng.choice(["win", "tie", "lose"], p=[0.5, 0.2, 0.3], size=200)
        low, high = win_rates(list(drawn), n_resamples=300, seed=trial)["win_rate_interval"]
        covered += low <= 60 <= high
    assert covered >= 273  # 285 expected


def test_verdicts_on_one_prompt_are_resampled_together():
    drawn = list(np.random.default_rng(0).choice(["win", "lose"], size=100))
    single = win_rates(drawn)["win_rate_interval"]
    repeated = win_rates(
        [one for one in drawn for _ in range(4)], prompt_ids=[i for i in range(100) for _ in range(4)]
    )
    assert repeated["win_rate_interval"] == pytest.approx(single, abs=1e-9)
    alone = win_rates([one for one in drawn for _ in range(4)])["win_rate_interval"]
    assert alone[1] - alone[0] < 0.7 * (single[1] - single[0])


def test_edges():
    empty = win_rates([])
    assert empty["win_rate"] is None
    assert empty["length_controlled_win_rate"] is None
    assert win_rates(["win"] * 5, [0.0] * 5)["length_controlled_win_rate"] > 90
    assert win_rates(["win"] * 5, [7.0] * 5)["length_controlled_win_rate"] is None  # says nothing about equal lengths
    # Where all of the longer replies win, the fit stays finite.
    separated = win_rates(["win"] * 20 + ["lose"] * 20, [10.0] * 20 + [-10.0] * 20)
    assert separated["length_controlled_win_rate"] == pytest.approx(50, abs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["won"],), "'win', 'tie', 'lose'; got 'won'"),
        ((["win"], [1.0, 2.0]), "`length_differences` needs one entry per verdict, got 2 for 1"),
        ((["win"], None, ["a", "b"]), "`prompt_ids` needs one entry per verdict, got 2 for 1"),
    ],
)
def test_wrong_use(arguments, message):
    with pytest.raises(ValueError, match=message):
        win_rates(*arguments)
