"""The pool of demonstrations: selection, scope, capacity and state."""

import json
import random
from collections import Counter

import pytest

from cyclealign_trl import Demonstration, DemonstrationPool
from cyclealign_trl.cycle.demonstrations import DEFAULT, from_agreement

CHAT = [{"role": "user", "content": "Hi"}]


def demonstration(prompt, number):
    return Demonstration(prompt, (f"{number} good", f"{number} bad"), (0, 1))


def test_static_demonstrations_come_first_then_dynamic_ones_by_age():
    pool = DemonstrationPool(capacity=3)
    observed = [demonstration("Q", number) for number in range(2)]
    pool.observe(observed)
    assert pool.select("Q") == (DEFAULT, *observed)


def test_the_oldest_demonstration_is_dropped_first():
    pool = DemonstrationPool(static=(), capacity=2)
    observed = [demonstration(CHAT, number) for number in range(4)]
    pool.observe(observed)
    assert pool.select(CHAT) == tuple(observed[2:])
    assert len(pool) == 2


def test_prompt_scope_separates_prompts_and_forgets_them():
    pool = DemonstrationPool(static=())
    pool.observe([demonstration("Q", 0), demonstration(CHAT, 1)])
    assert pool.select("Q") == (demonstration("Q", 0),)
    assert pool.select("other") == ()
    pool.forget(["Q", "never seen"])
    assert pool.select("Q") == ()
    assert len(pool) == 1


def test_run_scope_shares_demonstrations_and_forgets_none():
    pool = DemonstrationPool(static=(), scope="run")
    pool.observe([demonstration("Q", 0), demonstration(CHAT, 1)])
    pool.forget(["Q"])
    assert pool.select("other") == (demonstration("Q", 0), demonstration(CHAT, 1))


def test_a_capacity_of_0_keeps_no_dynamic_demonstration():
    pool = DemonstrationPool(capacity=0)
    pool.observe([demonstration("Q", 0)])
    assert pool.select("Q") == (DEFAULT,)
    assert len(pool) == 0


def random_pool(seed=0, capacity=4, scope="run"):
    return DemonstrationPool((), capacity, scope, selection="random", seed=seed)


def test_random_selection_is_uniform_over_all_observed():
    observed = [demonstration("Q", number) for number in range(20)]
    times_kept = Counter()
    for seed in range(2000):
        pool = random_pool(seed)
        pool.observe(observed)
        assert len(pool) == 4
        times_kept.update(pool.select("Q"))
    # 400 of 2000 are expected for each, with a standard deviation of 18.
    assert all(310 < times_kept[shown] < 490 for shown in observed)


def test_random_selection_keeps_the_order_of_observation():
    observed = [demonstration("Q", number) for number in range(50)]
    pool = random_pool()
    for number, newest in enumerate(observed, 1):
        pool.observe([newest])
        positions = [observed.index(shown) for shown in pool.select("Q")]
        assert positions == sorted(positions)
        assert len(positions) == min(number, 4)
    assert positions != [46, 47, 48, 49]


@pytest.mark.parametrize("capacity", [0, 1])
def test_random_selection_with_a_capacity_of_0_or_1(capacity):
    pool = random_pool(capacity=capacity)
    pool.observe(demonstration("Q", number) for number in range(9))
    assert len(pool) == capacity


def test_random_selection_depends_only_on_seed_prompt_and_count():
    own, others = ([demonstration(prompt, number) for number in range(30)] for prompt in ("Q", CHAT))
    at_once, one_by_one, with_another_seed = (random_pool(seed, scope="prompt") for seed in (0, 0, 1))
    at_once.observe(own)
    with_another_seed.observe(own)
    for pair in zip(others, own, strict=True):
        random.random()
        one_by_one.observe(pair)
    assert one_by_one.select("Q") == at_once.select("Q")
    # Fixed values, because every process must draw the same.
    assert [own.index(shown) for shown in at_once.select("Q")] == [6, 17, 19, 21]
    assert [others.index(shown) for shown in one_by_one.select(CHAT)] == [6, 15, 16, 21]
    assert [own.index(shown) for shown in with_another_seed.select("Q")] == [14, 16, 19, 21]


def test_random_selection_starts_over_after_forgetting():
    pool, new = random_pool(scope="prompt"), random_pool(scope="prompt")
    pool.observe(demonstration("Q", number) for number in range(1000))
    pool.forget(["Q"])
    again = [demonstration("Q", number) for number in range(4)]
    for each in (pool, new):
        each.observe(again)
    assert pool.select("Q") == tuple(again)
    assert pool.state_dict() == new.state_dict()


@pytest.mark.parametrize("scope", ["prompt", "run"])
@pytest.mark.parametrize("selection", ["recent", "random"])
def test_a_restored_pool_continues_like_the_original(scope, selection):
    original, saved, restored = (DemonstrationPool((), 2, scope, selection) for _ in range(3))
    earlier, later = (
        [demonstration(prompt, n) for n in numbers for prompt in ("Q", CHAT)] for numbers in (range(9), range(9, 30))
    )
    original.observe(earlier)
    saved.observe(earlier)
    restored.observe([demonstration("stale", 9)])
    restored.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    assert restored.state_dict() == saved.state_dict()
    for each in (original, restored):
        each.observe(later)
    for prompt in ("Q", CHAT, "stale"):
        assert restored.select(prompt) == original.select(prompt)
    assert restored.state_dict() == original.state_dict()


def test_an_empty_pool_can_be_saved_and_loaded():
    pool = DemonstrationPool(capacity=0)
    pool.observe([demonstration("Q", 0)])
    pool.load_state_dict(pool.state_dict())
    assert len(pool) == 0


def test_a_smaller_pool_loads_the_newest_demonstrations():
    pool, smaller, empty = (DemonstrationPool((), capacity) for capacity in (4, 2, 0))
    observed = [demonstration("Q", number) for number in range(4)]
    pool.observe(observed)
    smaller.load_state_dict(pool.state_dict())
    assert smaller.select("Q") == tuple(observed[2:])
    empty.load_state_dict(pool.state_dict())
    assert len(empty) == 0


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
def test_a_state_with_other_settings_raises(change, message):
    state = DemonstrationPool().state_dict() | change
    with pytest.raises(ValueError, match=f"{message}.*Resume with the settings of the saved run"):
        DemonstrationPool().load_state_dict(state)


def test_a_state_of_version_1_raises():
    with pytest.raises(ValueError, match="version 1, scope 'prompt' and selection None; this pool has version 2"):
        DemonstrationPool().load_state_dict({"version": 1, "scope": "prompt", "dynamic": []})


def test_invalid_settings_raise():
    with pytest.raises(ValueError, match="capacity must be 0 or more dynamic demonstrations, got -1"):
        DemonstrationPool(capacity=-1)
    with pytest.raises(ValueError, match=r"scope must be one of .*, got 'global'"):
        DemonstrationPool(scope="global")
    with pytest.raises(ValueError, match=r"\('recent', 'random'\), got 'best'"):
        DemonstrationPool(selection="best")


def test_a_demonstration_renumbers_the_agreed_completions():
    demonstration = from_agreement("Q", ["a", "b", "c", "d"], [3, 0, 2])
    assert demonstration == Demonstration("Q", ("a", "c", "d"), (2, 0, 1))


def test_the_default_demonstration_ranks_four_completions():
    assert len(set(DEFAULT.completions)) == 4
    assert DEFAULT.order[0] == 1
