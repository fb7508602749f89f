"""Selection, scope, eviction and state of the pool."""

import json

import pytest

from cyclealign_trl import Demonstration, DemonstrationPool
from cyclealign_trl.demonstrations import DEFAULT, from_agreement

CHAT = [{"role": "user", "content": "Hi"}]


def demonstration(prompt, number):
    return Demonstration(prompt, (f"{number} good", f"{number} bad"), (0, 1))


def test_static_first_then_dynamic_from_oldest_to_newest():
    pool = DemonstrationPool(capacity=3)
    earned = [demonstration("Q", number) for number in range(2)]
    pool.observe(earned)
    assert pool.select("Q") == (DEFAULT, *earned)


def test_the_oldest_leaves_first():
    pool = DemonstrationPool(static=(), capacity=2)
    earned = [demonstration(CHAT, number) for number in range(4)]
    pool.observe(earned)
    assert pool.select(CHAT) == tuple(earned[2:])
    assert len(pool) == 2


def test_prompt_scope_keeps_prompts_apart_and_forgets():
    pool = DemonstrationPool(static=())
    pool.observe([demonstration("Q", 0), demonstration(CHAT, 1)])
    assert pool.select("Q") == (demonstration("Q", 0),)
    assert pool.select("other") == ()
    pool.forget(["Q", "never seen"])
    assert pool.select("Q") == ()
    assert len(pool) == 1


def test_run_scope_shares_and_remembers():
    pool = DemonstrationPool(static=(), scope="run")
    pool.observe([demonstration("Q", 0), demonstration(CHAT, 1)])
    pool.forget(["Q"])
    assert pool.select("other") == (demonstration("Q", 0), demonstration(CHAT, 1))


def test_capacity_zero_holds_nothing():
    pool = DemonstrationPool(capacity=0)
    pool.observe([demonstration("Q", 0)])
    assert pool.select("Q") == (DEFAULT,)
    assert len(pool) == 0


@pytest.mark.parametrize("scope", ["prompt", "run"])
def test_state_survives_json(scope):
    pool, restored = (DemonstrationPool(capacity=2, scope=scope) for _ in range(2))
    pool.observe(demonstration(prompt, number) for number in range(3) for prompt in ("Q", CHAT))
    restored.observe([demonstration("stale", 9)])
    restored.load_state_dict(json.loads(json.dumps(pool.state_dict())))
    for prompt in ("Q", CHAT, "stale"):
        assert restored.select(prompt) == pool.select(prompt)


def test_state_of_another_scope_raises():
    state = DemonstrationPool(scope="run").state_dict()
    with pytest.raises(ValueError, match="Resume with the settings of the saved run"):
        DemonstrationPool(scope="prompt").load_state_dict(state)


def test_wrong_settings_raise():
    with pytest.raises(ValueError, match="got -1"):
        DemonstrationPool(capacity=-1)
    with pytest.raises(ValueError, match="got 'global'"):
        DemonstrationPool(scope="global")


def test_only_agreed_completions_are_shown_renumbered():
    made = from_agreement("Q", ["a", "b", "c", "d"], [3, 0, 2])
    assert made == Demonstration("Q", ("a", "c", "d"), (2, 0, 1))


def test_the_default_demonstration_shows_four_completions_of_different_merit():
    assert len(set(DEFAULT.completions)) == 4
    assert DEFAULT.order[0] == 1
