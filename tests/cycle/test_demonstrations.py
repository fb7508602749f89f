"""Selection, scope, eviction and state of the pool."""

import json
import random
from collections import Counter

import pytest

from cyclealign_trl import Demonstration, DemonstrationPool
from cyclealign_trl.cycle.demonstrations import DEFAULT, from_agreement

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


def random_pool(seed=0, capacity=4, scope="run"):
    return DemonstrationPool((), capacity, scope, selection="random", seed=seed)


def test_a_random_selection_is_uniform_over_all_ever_observed():
    earned = [demonstration("Q", number) for number in range(20)]
    times_kept = Counter()
    for seed in range(2000):
        pool = random_pool(seed)
        pool.observe(earned)
        assert len(pool) == 4
        times_kept.update(pool.select("Q"))
    # 400 of 2000 expected for each, with a standard deviation of 18.
    assert all(310 < times_kept[shown] < 490 for shown in earned)


def test_a_random_selection_is_shown_in_the_order_of_observation():
    earned = [demonstration("Q", number) for number in range(50)]
    pool = random_pool()
    for number, newest in enumerate(earned, 1):
        pool.observe([newest])
        positions = [earned.index(shown) for shown in pool.select("Q")]
        assert positions == sorted(positions)
        assert len(positions) == min(number, 4)
    assert positions != [46, 47, 48, 49]


@pytest.mark.parametrize("capacity", [0, 1])
def test_a_random_selection_of_little(capacity):
    pool = random_pool(capacity=capacity)
    pool.observe(demonstration("Q", number) for number in range(9))
    assert len(pool) == capacity


def test_a_random_selection_follows_from_seed_prompt_and_count_alone():
    asked, others = ([demonstration(prompt, number) for number in range(30)] for prompt in ("Q", CHAT))
    in_one_go, piecemeal, of_another_seed = (random_pool(seed, scope="prompt") for seed in (0, 0, 1))
    in_one_go.observe(asked)
    of_another_seed.observe(asked)
    for pair in zip(others, asked, strict=True):
        random.random()
        piecemeal.observe(pair)
    assert piecemeal.select("Q") == in_one_go.select("Q")
    # Written down, for they must be the same in every process.
    assert [asked.index(shown) for shown in in_one_go.select("Q")] == [6, 17, 19, 21]
    assert [others.index(shown) for shown in piecemeal.select(CHAT)] == [6, 15, 16, 21]
    assert [asked.index(shown) for shown in of_another_seed.select("Q")] == [14, 16, 19, 21]


def test_a_random_selection_starts_anew_after_forgetting():
    pool, fresh = random_pool(scope="prompt"), random_pool(scope="prompt")
    pool.observe(demonstration("Q", number) for number in range(1000))
    pool.forget(["Q"])
    again = [demonstration("Q", number) for number in range(4)]
    for each in (pool, fresh):
        each.observe(again)
    assert pool.select("Q") == tuple(again)
    assert pool.state_dict() == fresh.state_dict()


@pytest.mark.parametrize("scope", ["prompt", "run"])
@pytest.mark.parametrize("selection", ["recent", "random"])
def test_what_is_saved_and_loaded_goes_on_as_if_never_interrupted(scope, selection):
    whole, saved, restored = (DemonstrationPool((), 2, scope, selection) for _ in range(3))
    first, then = (
        [demonstration(prompt, n) for n in numbers for prompt in ("Q", CHAT)] for numbers in (range(9), range(9, 30))
    )
    whole.observe(first)
    saved.observe(first)
    restored.observe([demonstration("stale", 9)])
    restored.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    assert restored.state_dict() == saved.state_dict()
    for each in (whole, restored):
        each.observe(then)
    for prompt in ("Q", CHAT, "stale"):
        assert restored.select(prompt) == whole.select(prompt)
    assert restored.state_dict() == whole.state_dict()


def test_an_empty_pool_is_saved_and_loaded():
    pool = DemonstrationPool(capacity=0)
    pool.observe([demonstration("Q", 0)])
    pool.load_state_dict(pool.state_dict())
    assert len(pool) == 0


def test_a_smaller_pool_loads_the_newest():
    pool, smaller, none = (DemonstrationPool((), capacity) for capacity in (4, 2, 0))
    earned = [demonstration("Q", number) for number in range(4)]
    pool.observe(earned)
    smaller.load_state_dict(pool.state_dict())
    assert smaller.select("Q") == tuple(earned[2:])
    none.load_state_dict(pool.state_dict())
    assert len(none) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scope": "run"}, "scope 'run' and selection 'recent'; this pool has version 2, scope 'prompt'"),
        (
            {"selection": "random"},
            "selection 'random'; this pool has version 2, scope 'prompt' and selection 'recent'",
        ),
    ],
)
def test_state_of_other_settings_raises(change, message):
    state = DemonstrationPool().state_dict() | change
    with pytest.raises(ValueError, match=f"{message}.*Resume with the settings of the saved run"):
        DemonstrationPool().load_state_dict(state)


def test_state_of_the_first_version_raises():
    with pytest.raises(ValueError, match="version 1, scope 'prompt' and selection None; this pool has version 2"):
        DemonstrationPool().load_state_dict({"version": 1, "scope": "prompt", "dynamic": []})


def test_wrong_settings_raise():
    with pytest.raises(ValueError, match="got -1"):
        DemonstrationPool(capacity=-1)
    with pytest.raises(ValueError, match="got 'global'"):
        DemonstrationPool(scope="global")
    with pytest.raises(ValueError, match=r"\('recent', 'random'\), got 'best'"):
        DemonstrationPool(selection="best")


def test_only_agreed_completions_are_shown_renumbered():
    made = from_agreement("Q", ["a", "b", "c", "d"], [3, 0, 2])
    assert made == Demonstration("Q", ("a", "c", "d"), (2, 0, 1))


def test_the_default_demonstration_shows_four_completions_of_different_merit():
    assert len(set(DEFAULT.completions)) == 4
    assert DEFAULT.order[0] == 1
