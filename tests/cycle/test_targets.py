"""Targets of the loss: completions to imitate, and weights by consistency."""

from dataclasses import replace

import pytest
import torch

from cyclealign_trl import RankingFailure, RankingResult
from cyclealign_trl.cycle.interaction import open_interaction, resolve
from cyclealign_trl.cycle.targets import TargetBuilder
from cyclealign_trl.models.renderer import Renderer
from cyclealign_trl.types import Trimmed
from tests.conftest import make_tokenizer
from tests.cycle.stubs import (
    DigestRanker,
    EmptyBudgetRanker,
    assert_same_weights,
    config,
    make_trainer,
    prompts,
    read_log,
    weights,
)

IDS = [[40], [41], [42]]  # token ids of the completions "a", "b" and "c"


def make_builder(folder, **changes):
    return TargetBuilder(config(folder, **changes), Renderer(make_tokenizer(), (1,), 64, 8))


def result(outcome):
    """Return the result of a prompt with the completions "a", "b" and "c", which the policy orders "b", "a", "c"."""
    return resolve(open_interaction("Q", ["a", "b", "c"]), outcome, [-2.0, -1.0, -3.0])


RANKED = RankingResult((2, 0, 1), improved_completion="new")
EXHAUSTED = RankingFailure("budget_exhausted")


# SFT targets


def test_the_improved_completion_is_the_target_unless_the_top_ranked_one_is(tmp_path):
    ids, truncated = make_builder(tmp_path).sft_target(result(RANKED), IDS)
    assert (make_tokenizer().decode(ids), truncated) == ("new</s>", False)
    assert make_builder(tmp_path, sft_target="top_ranked").sft_target(result(RANKED), IDS) == (None, False)
    assert make_builder(tmp_path).sft_target(result(replace(RANKED, improved_completion=None)), IDS) == (None, False)


def test_an_improved_completion_beyond_the_limit_is_truncated(tmp_path):
    long = result(replace(RANKED, improved_completion="0123456789"))
    ids, truncated = make_builder(tmp_path).sft_target(long, IDS)
    assert (make_tokenizer().decode(ids), truncated) == ("01234567", True)


def test_an_improved_completion_that_was_sampled_does_not_rank_above_itself(tmp_path):
    repeated = result(replace(RANKED, improved_completion="b"))
    assert make_builder(tmp_path).sft_target(repeated, IDS)[0] == make_tokenizer()("b")["input_ids"] + [1]
    assert make_builder(tmp_path, rank_improved_completion=True).sft_target(repeated, IDS) == (None, False)


def test_sft_alone_imitates_the_policys_first_completion(tmp_path):
    assert make_builder(tmp_path, at_budget_cap="sft").sft_target(result(EXHAUSTED), IDS) == (IDS[1], False)
    assert make_builder(tmp_path, at_budget_cap="stop").sft_target(result(EXHAUSTED), IDS) == (None, False)
    timeout = result(RankingFailure("timeout"))
    assert make_builder(tmp_path, at_budget_cap="sft").sft_target(timeout, IDS) == (None, False)


def test_prompts_without_a_ranking_have_absent_ranks(tmp_path):
    results = [result(RANKED), result(EXHAUSTED)]
    targets = make_builder(tmp_path, sft_target="top_ranked").build(results, [None, None], torch.zeros(2, 3))
    assert targets.ranks.tolist() == [[1, 2, 0], [-1, -1, -1]]
    assert targets.sft_ids is None  # no batch of the run can have targets
    targets = make_builder(tmp_path).build(results, [IDS[0], None], torch.zeros(2, 3))
    assert targets.sft_ids == [IDS[0], None]
    assert targets.weights is None


def test_weights_are_the_consistency_clipped_at_0(tmp_path, caplog):
    builder = make_builder(tmp_path, weight_by_consistency=True)
    results = [result(replace(RANKED, consistency=consistency)) for consistency in (0.5, -0.25, None)]
    for _ in range(2):
        targets = builder.build([*results, result(EXHAUSTED)], [None] * 4, torch.zeros(4, 3))
        assert targets.weights.tolist() == [0.5, 0.0, 1.0, 1.0]
    assert len(caplog.messages) == 1  # on the single pass


# Runs


def test_the_top_ranked_completion_replaces_a_missing_improved_one(tmp_path):
    runs = []
    for name, improve, target in (("without", False, "improved"), ("top", True, "top_ranked")):
        trainer = make_trainer(tmp_path / name, DigestRanker(improve), sft_target=target, stub_generation=True)
        trainer.train()
        runs.append(weights(trainer))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sft_target", ["improved", "top_ranked"])
def test_a_run_over_its_budget_imitates_the_policys_first_completions(tmp_path, sft_target):
    trainer = make_trainer(
        tmp_path, EmptyBudgetRanker(), stub_generation=True, at_budget_cap="sft", sft_target=sft_target
    )
    seen = []
    targets = trainer._targets

    def record(inputs, sums, lengths):
        found = targets(inputs, sums, lengths)
        best = (sums / lengths).argmax(dim=1).tolist()
        seen.append((found, [ids[index] for ids, index in zip(inputs.completion_ids, best, strict=True)]))
        return found

    trainer._targets = record
    trainer.train()
    assert len(seen) == 8
    for found, best in seen:
        assert found.sft_ids == best
        assert (found.ranks == -1).all()
    assert {row["improved_completion"] for row in read_log(tmp_path)} == {None}


def test_a_corrector_corrects_the_targets_of_a_run_over_its_budget(tmp_path):
    class Corrector:
        def correct(self, prompts, answers):
            return [f"better than {answer.strip()}"[:6] for answer in answers]

    def train(name, **changes):
        trainer = make_trainer(
            tmp_path / name, EmptyBudgetRanker(), stub_generation=True, at_budget_cap="sft", **changes
        )
        trainer.train()
        return trainer

    corrected = train("a", corrector=Corrector(), sft_target="corrector", dataset=prompts(4))
    assert {row["improved_completion"].strip() for row in read_log(tmp_path / "a")} == {"better"}
    plain = train("b", dataset=prompts(4))
    assert not all(
        torch.equal(one, other)
        for one, other in zip(corrected.model.state_dict().values(), plain.model.state_dict().values(), strict=True)
    )


class Consistent(DigestRanker):
    """Add a consistency and omitted parts of the request to every ranking."""

    fingerprint = None

    def __init__(self, consistency):
        super().__init__()
        self.consistency = consistency

    def answer(self, request):
        trimmed = Trimmed(demonstrations=1, completions=2)
        return replace(super().answer(request), consistency=self.consistency(request), trimmed=trimmed)


def train(folder, ranker=None, **changes):
    trainer = make_trainer(folder, ranker, prompts(2), stub_generation=True, max_steps=1, **changes)
    before = weights(trainer)
    trainer.train()
    return trainer, before


@pytest.mark.parametrize("consistency", [0.0, -0.5])
def test_a_ranking_whose_passes_disagree_does_not_train(tmp_path, consistency):
    trainer, before = train(tmp_path, Consistent(lambda _: consistency), weight_by_consistency=True)
    assert_same_weights(weights(trainer), before)
    trainer, before = train(tmp_path / "unweighted", Consistent(lambda _: consistency))
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_the_loss_of_a_prompt_is_multiplied_by_its_consistency(tmp_path):
    def loss(name, **changes):
        trainer, _ = train(tmp_path / name, **changes)
        return trainer.state.log_history[0]["loss"]

    def only(number):  # the consistency of the other prompt is 0
        return Consistent(lambda request: 1.0 * request.prompt.startswith(f"Question {number}"))

    whole = loss("plain")
    assert loss("all", ranker=Consistent(lambda _: 1.0), weight_by_consistency=True) == whole
    half = loss("half", ranker=Consistent(lambda _: 0.5), weight_by_consistency=True)
    assert half == pytest.approx(whole / 2)
    parts = [loss(str(number), ranker=only(number), weight_by_consistency=True) for number in range(2)]
    assert sum(parts) == pytest.approx(whole)
    assert min(parts) > 0


def test_consistency_and_omitted_parts_are_logged(tmp_path):
    ranker = Consistent(lambda request: 0.5 if request.prompt.startswith("Question 0") else None)
    trainer, _ = train(tmp_path, ranker)
    log = trainer.state.log_history[0]
    assert log["ranker/consistency"] == 0.5
    assert (log["ranker/dropped_demonstrations"], log["ranker/cut_completions"]) == (2, 4)
    assert {row["consistency"] for row in read_log(tmp_path)} == {0.5, None}


def test_weights_without_effect_are_logged_once(tmp_path, caplog):
    trainer, _ = train(tmp_path, weight_by_consistency=True, num_interactions=1)
    [record] = [record for record in caplog.records if "weight_by_consistency" in record.message]
    assert "num_passes=3" in record.message
    plain, _ = train(tmp_path / "plain", num_interactions=1)
    assert_same_weights(weights(trainer), weights(plain))
