"""Runs of the cycle with a jury of judges behind endpoints: caps, ledgers, resume, caches and the tokenizer."""

import json
from contextlib import closing

import pytest

from cyclealign_trl import BudgetExhaustedError, FunctionRanker, JuryRanker, LLMRanker
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.cycle.stubs import assert_same_weights, digest, make_trainer, read_log, weights
from tests.rankers.llm_stubs import shown

PRICES = {"input": 1.0, "output": 4.0}
USAGE = {"prompt_tokens": 300, "completion_tokens": 50}  # 0.0005 dollars
SETTINGS = {"use_dynamic_demonstrations": False, "save_strategy": "steps", "save_steps": 3}


def by_text(key, improved=None):
    def respond(body):
        texts = shown(body)
        ranking = sorted(texts, key=lambda label: key(texts[label]))
        return Reply(json.dumps({"ranking": ranking, "improved_response": improved}), usage=USAGE)

    return respond


@pytest.fixture
def endpoints():
    with LoopbackEndpoint(by_text(str)) as first, LoopbackEndpoint(by_text(digest, "x")) as second:
        yield first, second


def run(folder, endpoints, caps=(None, None), resume=None, extra=(), min_members=1, **changes):
    """Train 8 prompts in steps of 2, twice each, which takes 16 rankings by each judge."""
    first, second = (
        LLMRanker(f"org/judge-{index}", endpoint.base_url, "key", max_tokens=128, prices=PRICES, max_cost=cap)
        for index, (endpoint, cap) in enumerate(zip(endpoints, caps, strict=True))
    )
    with closing(first), closing(second):
        jury = JuryRanker([first, second, *extra], min_members=min_members)
        trainer = make_trainer(folder, jury, **SETTINGS, **changes)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def entries(path):
    return [json.loads(line) for line in (path / "process-0.jsonl").read_text().splitlines()]


def test_a_run_goes_on_without_a_member_whose_budget_is_used_up(tmp_path, endpoints, caplog):
    trainer = run(tmp_path, endpoints, caps=(0.0042, None))
    assert trainer.state.global_step == 8
    assert [len(endpoint.requests) for endpoint in endpoints] == [8, 16]
    log = read_log(tmp_path)
    assert {row["failure"] for row in log} == {None}
    assert [row["consistency"] for row in log][8:] == [0.0] * 8
    assert log[0]["consistency"] != 0.0
    (message,) = [record.getMessage() for record in caplog.records if record.name.endswith("jury")]
    assert "org/judge-0 has not ranked a request (budget_exhausted: 'The run has spent $0.004 of max_cost" in message
    spent = {path.name: entries(path) for path in (tmp_path / "spent").iterdir()}
    assert {name: len(lines) for name, lines in spent.items()} == {"org-judge-0": 8, "org-judge-1": 16}


def test_a_run_stops_when_too_few_members_have_a_budget_and_resumes_with_a_higher_cap(tmp_path, endpoints):
    with pytest.raises(BudgetExhaustedError, match=r"org/judge-0: \$0.004 of max_cost=0.0042.*; org/judge-1: \$0.005"):
        run(tmp_path, endpoints, caps=(0.0042, None), min_members=2)
    assert [len(endpoint.requests) for endpoint in endpoints] == [8, 10]
    trainer = run(tmp_path, endpoints, caps=(1.0, None), min_members=2, resume=True)
    assert trainer.state.global_step == 8
    # The two prompts of the step at the cap are not ranked again.
    assert [len(endpoint.requests) for endpoint in endpoints] == [14, 16]
    committed = trainer.ranker.budget.committed
    assert [amount.cost for amount in committed] == pytest.approx([14 * 0.0005, 16 * 0.0005])


def test_a_killed_run_pays_for_no_vote_twice_and_ends_the_same(tmp_path, endpoints):
    def rank_of(prompts, completions, completion_ids, **_):  # needs the policy's tokenizer
        return [float(sum(ids) % 7) for ids in completion_ids]

    extra = [FunctionRanker(rank_of)]  # without a fingerprint
    whole = run(tmp_path / "whole", endpoints, extra=extra)
    before = [len(endpoint.requests) for endpoint in endpoints]
    assert before == [16, 16]

    class Killed(BaseException):
        pass

    folder = tmp_path / "killed"
    first, second = (LLMRanker(f"org/judge-{i}", e.base_url, "key", max_tokens=128) for i, e in enumerate(endpoints))
    with closing(first), closing(second):
        trainer = make_trainer(folder, JuryRanker([first, second, *extra]), **SETTINGS)
        write = trainer.interaction_log.write

        def stop(step, *args):
            if step == 4:
                raise Killed
            write(step, *args)

        trainer.interaction_log.write = stop
        with pytest.raises(Killed):
            trainer.train()
    assert [len(endpoint.requests) for endpoint in endpoints] == [26, 26]
    resumed = run(folder, endpoints, extra=extra, resume=True)
    # Steps 3 and 4 were ranked before the run was killed; their votes are stored.
    assert [len(endpoint.requests) for endpoint in endpoints] == [32, 32]
    assert_same_weights(weights(resumed), weights(whole))
    assert [amount.tokens for amount in resumed.ranker.budget.committed] == [16 * 350, 16 * 350]


def test_the_card_names_the_panel(tmp_path, endpoints):
    trainer = run(tmp_path, endpoints, max_steps=1)
    trainer.create_model_card()
    assert "jury of org/judge-0 and org/judge-1" in (tmp_path / "README.md").read_text()
