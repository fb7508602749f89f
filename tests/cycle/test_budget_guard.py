"""A run whose ranker may spend no more: it stops with a checkpoint, or goes on with SFT alone."""

import json
import logging
from contextlib import closing

import pytest
import torch

from cyclealign_trl import BudgetExhaustedError, LLMRanker, RankingFailure
from cyclealign_trl.cycle import guards
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.cycle.stubs import DigestRanker, make_trainer, prompts, read_log

REPLY = Reply(
    '{"ranking": ["B", "C", "A"], "improved_response": "better"}',
    usage={"prompt_tokens": 400, "completion_tokens": 100},
)
SETTINGS = {"stub_generation": True, "use_dynamic_demonstrations": False}  # requests of about the same length
PRICES = {"input": 1.0, "output": 1.0}  # 0.0005 dollars per call


@pytest.fixture
def endpoint():
    with LoopbackEndpoint(lambda body: REPLY) as endpoint:
        yield endpoint


def run(folder, endpoint, resume=None, **options):
    """Trains 8 prompts in steps of 2, twice each, which takes 16 rankings; returns the trainer."""
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 3}
    changes = {name: options.pop(name) for name in ("at_budget_cap", "cache_rankings") if name in options}
    with closing(LLMRanker("judge", endpoint.base_url, max_tokens=128, prices=PRICES, **options)) as ranker:
        trainer = make_trainer(folder, ranker, **settings, **changes)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def spent(folder):
    return [json.loads(line) for path in (folder / "spent").iterdir() for line in path.read_text().splitlines()]


def test_a_run_stops_with_a_checkpoint_and_goes_on_under_a_higher_cap(tmp_path, endpoint):
    with pytest.raises(BudgetExhaustedError, match=r"of max_cost=0.0042 .*checkpoint-5.*") as caught:
        run(tmp_path, endpoint, max_cost=0.0042)
    assert "at_budget_cap='sft'" in str(caught.value)
    assert len(endpoint.requests) == 8
    assert [row["failure"] for row in read_log(tmp_path)] == [None] * 8 + ["budget_exhausted"] * 2
    assert sum(entry["cost"] for entry in spent(tmp_path)) == pytest.approx(8 * 0.0005)

    trainer = run(tmp_path, endpoint, resume=True, max_cost=1.0)
    assert trainer.state.global_step == 8
    # The two that were not paid for trained nothing, and are not asked for again.
    assert len(endpoint.requests) == 14
    assert trainer.ranker.budget.committed.cost == pytest.approx(14 * 0.0005)
    assert len(spent(tmp_path)) == 14


def test_what_was_spent_after_the_last_checkpoint_counts(tmp_path, endpoint):
    with closing(LLMRanker("judge", endpoint.base_url, max_tokens=128)) as ranker:
        trainer = make_trainer(tmp_path, ranker, **SETTINGS, save_strategy="steps", save_steps=3, cache_rankings=False)
        log = trainer.interaction_log.write

        def write(step, *args):
            if step == 4:
                raise InterruptedError
            log(step, *args)

        trainer.interaction_log.write = write
        with pytest.raises(InterruptedError):
            trainer.train()
    assert len(endpoint.requests) == 10
    # Steps 3 and 4 were paid for, and are asked for again as far as the money goes.
    with pytest.raises(BudgetExhaustedError, match="6,000 of max_run_tokens=6,500 tokens"):
        run(tmp_path, endpoint, resume=True, max_run_tokens=6500, cache_rankings=False)
    assert len(endpoint.requests) == 12


def test_a_fresh_run_in_the_same_folder_has_its_budget_to_itself(tmp_path, endpoint):
    for _ in range(2):
        run(tmp_path, endpoint, max_cost=0.0088, cache_rankings=False)
    assert len(endpoint.requests) == 32
    assert len(spent(tmp_path)) == 16
    assert len((tmp_path / "spent-1" / "process-0.jsonl").read_text().splitlines()) == 16


def test_with_sft_alone_it_goes_on_and_says_so_once(tmp_path, endpoint, caplog):
    with caplog.at_level(logging.WARNING, logger=guards.__name__):
        trainer = run(tmp_path, endpoint, max_cost=0.0042, at_budget_cap="sft")
    assert trainer.state.global_step == 8
    assert len(endpoint.requests) == 8
    [said] = [record.getMessage() for record in caplog.records if record.name == guards.__name__]
    assert "$0.004 of max_cost=0.0042 and 4,000 tokens" in said
    ranked, alone = ([log for log in trainer.state.log_history if "loss" in log][part] for part in (0, -1))
    assert ranked["ranking_loss"] > 0
    assert (alone["ranking_loss"], alone["failures/budget_exhausted"]) == (0.0, 2)
    assert alone["loss"] == pytest.approx(trainer.args.sft_weight * 4 * alone["sft_loss"], rel=1e-4)
    assert (ranked["ranker/requests"], ranked["ranker/cost"]) == (2, pytest.approx(0.001))
    assert "ranker/cost" not in alone


class Poor(DigestRanker):
    """Has no money for any request."""

    def answer(self, request):
        return RankingFailure("budget_exhausted")


@pytest.mark.parametrize("sft_target", ["improved", "top_ranked"])
def test_sft_alone_imitates_what_the_policy_ranks_first(tmp_path, sft_target):
    trainer = make_trainer(tmp_path, Poor(), stub_generation=True, at_budget_cap="sft", sft_target=sft_target)
    seen = []
    targets = trainer._targets

    def look(inputs, sums, lengths):
        found = targets(inputs, sums, lengths)
        best = (sums / lengths).argmax(dim=1).tolist()
        seen.append((found, [ids[index] for ids, index in zip(inputs.completion_ids, best, strict=True)]))
        return found

    trainer._targets = look
    trainer.train()
    assert len(seen) == 8
    for found, best in seen:
        assert found.sft_ids == best
        assert (found.ranks == -1).all()
    assert {row["improved_completion"] for row in read_log(tmp_path)} == {None}


def test_a_corrector_corrects_what_sft_alone_imitates(tmp_path):
    class Corrector:
        def correct(self, prompts, answers):
            return [f"better than {answer.strip()}"[:6] for answer in answers]

    def train(name, **changes):
        trainer = make_trainer(tmp_path / name, Poor(), stub_generation=True, at_budget_cap="sft", **changes)
        trainer.train()
        return trainer

    corrected = train("a", corrector=Corrector(), sft_target="corrector", dataset=prompts(4))
    assert {row["improved_completion"].strip() for row in read_log(tmp_path / "a")} == {"better"}
    plain = train("b", dataset=prompts(4))
    assert not all(
        torch.equal(one, other)
        for one, other in zip(corrected.model.state_dict().values(), plain.model.state_dict().values(), strict=True)
    )


def test_it_is_no_failure_of_the_ranker(tmp_path):
    trainer = make_trainer(
        tmp_path, Poor(), stub_generation=True, at_budget_cap="sft", dataset=prompts(24), max_ranking_failures=0.0
    )
    trainer.train()
    assert trainer.state.global_step == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at_budget_cap": "sft", "sft_weight": 0.0}, "trains nothing with sft_weight=0"),
        ({"at_budget_cap": "pause"}, "at_budget_cap"),
        ({"ranking_timeout": 0.0}, "ranking_timeout must be above 0"),
    ],
)
def test_settings_that_make_no_sense_raise(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, Poor(), **changes)
