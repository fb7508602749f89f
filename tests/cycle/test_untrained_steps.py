"""Steps in which no prompt trains leave the weights alone."""

import pytest

from cyclealign_trl import FunctionRanker, RankingFailure, RankingResult
from tests.cycle.stubs import DigestRanker, assert_same_weights, make_trainer, prompts, weights


class FirstThen:
    """Rank by hash in the first step, so that the optimiser has momentum, and answer otherwise after it."""

    def __init__(self, later):
        self.later, self.first = later, DigestRanker()
        self.trainer = None

    def rank(self, requests):
        if self.trainer.state.global_step == 0:
            return self.first.rank(requests)
        return [self.later(request) for request in requests]


def ties(request):
    size = len(request.completions)
    return RankingResult(tuple(range(size)), (0,) * size)


def inconsistent(request):
    return RankingResult(tuple(range(len(request.completions))), consistency=-0.5)


UNTRAINED = {
    "failures": (lambda request: RankingFailure("timeout"), {"max_ranking_failures": 1.0}),
    "ties": (ties, {}),
    "an improved completion without SFT": (
        lambda request: RankingResult(ties(request).order, ties(request).ranks, improved_completion="better"),
        {"sft_weight": 0.0},
    ),
    "contradictory passes": (inconsistent, {"weight_by_consistency": True}),
}


@pytest.mark.parametrize(("later", "settings"), UNTRAINED.values(), ids=UNTRAINED)
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "rmsprop"])
def test_a_step_without_a_trained_prompt_does_not_move_the_weights(tmp_path, later, settings, optim):
    ranker = FirstThen(later)
    changes = {"optim": optim, "weight_decay": 0.1, "num_interactions": 1, "max_steps": 3, **settings}
    trainer = make_trainer(tmp_path, ranker, prompts(8), stub_generation=True, **changes)
    ranker.trainer = trainer
    snapshots = [weights(trainer)]
    step = trainer._close_interaction

    def snapshot():
        snapshots.append(weights(trainer))
        step()

    trainer._close_interaction = snapshot
    trainer.train()
    initial, before_first, before_second, before_third = snapshots
    assert_same_weights(initial, before_first)
    with pytest.raises(AssertionError):
        assert_same_weights(before_first, before_second)
    assert_same_weights(before_second, before_third)
    assert_same_weights(before_third, weights(trainer))


def test_an_improved_completion_trains_where_all_others_tie(tmp_path):
    def better(request):
        return RankingResult(ties(request).order, ties(request).ranks, improved_completion="better")

    ranker = FirstThen(better)
    trainer = make_trainer(tmp_path, ranker, prompts(8), stub_generation=True, num_interactions=1, max_steps=2)
    ranker.trainer = trainer
    trainer.train()
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert last["ranking_loss"] == 0
    assert last["loss"] > 0
    assert last["ranker/all_tied"] == 2


def test_a_ranker_that_always_ties_is_counted_and_trains_nothing(tmp_path):
    constant = FunctionRanker(lambda completions, **columns: [1.0] * len(completions))
    trainer = make_trainer(tmp_path, constant, prompts(4), stub_generation=True, num_interactions=2)
    before = weights(trainer)
    trainer.train()
    assert_same_weights(before, weights(trainer))
    assert len(trainer.demonstrations) == 0
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["ranker/all_tied"] for log in logs] == [2] * 4
    assert not any(name.startswith(("agreement/", "failures/")) for log in logs for name in log)
