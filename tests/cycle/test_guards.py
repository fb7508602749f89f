"""Runs that stop with a checkpoint because rankings fail or the budget is used up."""

import json
import logging
from contextlib import closing

import pytest

from cyclealign_trl import BudgetExhaustedError, LLMRanker, TooManyFailuresError
from cyclealign_trl.cycle import guards
from cyclealign_trl.cycle.guards import BudgetGuard, FailureGuard
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.cycle.stubs import DigestRanker, EmptyBudgetRanker, make_trainer, prompts, read_log

REPLY = Reply(
    '{"ranking": ["B", "C", "A"], "improved_response": "better"}',
    usage={"prompt_tokens": 400, "completion_tokens": 100},
)
SETTINGS = {"stub_generation": True, "use_dynamic_demonstrations": False}  # requests of about the same length
PRICES = {"input": 1.0, "output": 1.0}  # 0.0005 dollars per call

# Failures


def test_a_share_of_failures_above_the_limit_gives_a_reason_to_stop():
    guard = FailureGuard(max_failures=0.5)
    guard.observe(["timeout"] * 10 + ["refusal"] + [None] * 8)
    assert guard.stop_reason is None  # 19 rankings are too few to judge
    guard.observe([None])
    assert guard.stop_reason == (
        "11 of the last 20 rankings failed (timeout: 10, refusal: 1), a larger share than max_ranking_failures=0.5. "
        "Check the ranker, or raise the limit."
    )
    guard.observe([None] * 2)
    assert guard.stop_reason is None  # 11 of 22


def test_only_the_last_100_rankings_count():
    guard = FailureGuard(max_failures=0.5)
    guard.observe(["timeout"] * 100)
    guard.observe([None] * 50)
    assert guard.stop_reason is None
    guard.observe([None] * 50)
    guard.observe(["timeout"] * 51)
    assert guard.stop_reason.startswith("51 of the last 100 rankings failed (timeout: 51)")


def test_a_limit_of_1_accepts_every_failure():
    guard = FailureGuard(max_failures=1.0)
    guard.observe(["timeout"] * 100)
    assert guard.stop_reason is None


def test_a_new_run_starts_to_count_again():
    guard = FailureGuard(max_failures=0.0)
    guard.observe(["timeout"] * 20)
    assert guard.stop_reason is not None
    guard.on_train_begin(None, None, None)
    assert guard.stop_reason is None


def test_too_many_failures_stop_a_run_with_a_checkpoint(tmp_path):
    broken = DigestRanker(fail=lambda request: "server_error")
    settings = {"num_train_epochs": 4, "num_interactions": 3, "stub_generation": True}
    trainer = make_trainer(tmp_path, broken, **settings)
    with pytest.raises(TooManyFailuresError, match=r"8 of the last 8 .*server_error: 8.*checkpoint-4") as error:
        trainer.train()
    assert "resume_from_checkpoint" in str(error.value)
    resumed = make_trainer(tmp_path, DigestRanker(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 4 * 4 * 3


def test_a_run_with_failures_below_the_limit_goes_on(tmp_path):
    failing = set(prompts()["prompt"][:4])
    ranker = DigestRanker(fail=lambda request: "timeout" if request.prompt in failing else None)
    trainer = make_trainer(tmp_path, ranker, num_interactions=5, stub_generation=True)
    trainer.train()
    assert trainer.state.global_step == 4 * 5


# Budget


def test_the_budget_guard_gives_a_reason_to_stop_only_at_the_cap():
    guard = BudgetGuard("stop")
    guard.observe([None, "timeout"], "$1")
    assert guard.stop_reason is None
    guard.observe([None, "budget_exhausted"], "$2 of max_cost=2")
    assert guard.stop_reason == (
        "The ranker's budget is used up: $2 of max_cost=2. Raise the cap to go on, or set at_budget_cap='sft'."
    )
    guard.on_train_begin(None, None, None)
    assert guard.stop_reason is None


def test_the_budget_guard_does_not_stop_a_run_that_goes_on_with_sft():
    guard = BudgetGuard("sft")
    guard.observe(["budget_exhausted"], "$2 of max_cost=2")
    assert guard.stop_reason is None


@pytest.fixture
def endpoint():
    with LoopbackEndpoint(lambda body: REPLY) as endpoint:
        yield endpoint


def run(folder, endpoint, resume=None, **options):
    """Train 8 prompts in steps of 2, twice each, which takes 16 rankings. Return the trainer."""
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 3}
    changes = {name: options.pop(name) for name in ("at_budget_cap", "cache_rankings") if name in options}
    with closing(LLMRanker("judge", endpoint.base_url, max_tokens=128, prices=PRICES, **options)) as ranker:
        trainer = make_trainer(folder, ranker, **settings, **changes)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def spent(folder):
    """Return the entries of the ledger."""
    return [json.loads(line) for path in (folder / "spent").iterdir() for line in path.read_text().splitlines()]


def test_a_run_stops_at_its_cap_and_resumes_with_a_higher_one(tmp_path, endpoint):
    with pytest.raises(BudgetExhaustedError, match=r"of max_cost=0.0042 .*checkpoint-5.*") as caught:
        run(tmp_path, endpoint, max_cost=0.0042)
    assert "at_budget_cap='sft'" in str(caught.value)
    assert len(endpoint.requests) == 8
    assert [row["failure"] for row in read_log(tmp_path)] == [None] * 8 + ["budget_exhausted"] * 2
    assert sum(entry["cost"] for entry in spent(tmp_path)) == pytest.approx(8 * 0.0005)

    trainer = run(tmp_path, endpoint, resume=True, max_cost=1.0)
    assert trainer.state.global_step == 8
    # The two prompts without a ranking are not ranked again.
    assert len(endpoint.requests) == 14
    assert trainer.ranker.budget.committed.cost == pytest.approx(14 * 0.0005)
    assert len(spent(tmp_path)) == 14


def test_spending_after_the_last_checkpoint_counts(tmp_path, endpoint):
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
    # Steps 3 and 4 were paid for and are ranked again, as far as the budget allows.
    with pytest.raises(BudgetExhaustedError, match="6,000 of max_run_tokens=6,500 tokens"):
        run(tmp_path, endpoint, resume=True, max_run_tokens=6500, cache_rankings=False)
    assert len(endpoint.requests) == 12


def test_a_new_run_in_the_same_folder_starts_with_its_whole_budget(tmp_path, endpoint):
    for _ in range(2):
        run(tmp_path, endpoint, max_cost=0.0088, cache_rankings=False)
    assert len(endpoint.requests) == 32
    assert len(spent(tmp_path)) == 16
    assert len((tmp_path / "spent-1" / "process-0.jsonl").read_text().splitlines()) == 16


def test_a_run_can_go_on_with_sft_and_logs_it_once(tmp_path, endpoint, caplog):
    with caplog.at_level(logging.WARNING, logger=guards.__name__):
        trainer = run(tmp_path, endpoint, max_cost=0.0042, at_budget_cap="sft")
    assert trainer.state.global_step == 8
    assert len(endpoint.requests) == 8
    [message] = [record.getMessage() for record in caplog.records if record.name == guards.__name__]
    assert "$0.004 of max_cost=0.0042 and 4,000 tokens" in message
    ranked, sft_only = ([log for log in trainer.state.log_history if "loss" in log][part] for part in (0, -1))
    assert ranked["ranking_loss"] > 0
    assert (sft_only["ranking_loss"], sft_only["failures/budget_exhausted"]) == (0.0, 2)
    assert sft_only["loss"] == pytest.approx(trainer.args.sft_weight * 4 * sft_only["sft_loss"], rel=1e-4)
    assert (ranked["ranker/requests"], ranked["ranker/cost"]) == (2, pytest.approx(0.001))
    assert "ranker/cost" not in sft_only


def test_an_exhausted_budget_does_not_count_as_a_failure(tmp_path):
    trainer = make_trainer(
        tmp_path,
        EmptyBudgetRanker(),
        stub_generation=True,
        at_budget_cap="sft",
        dataset=prompts(24),
        max_ranking_failures=0.0,
    )
    trainer.train()
    assert trainer.state.global_step == 24
