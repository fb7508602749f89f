"""The exchange between processes at the end of a step."""

import pytest

from cyclealign_trl import Budget, RankerError, Usage
from cyclealign_trl.chat.budget import Amount
from cyclealign_trl.cycle import step_exchange
from cyclealign_trl.cycle.step_exchange import exchange


@pytest.fixture
def other_process(monkeypatch):
    """Return a function that sets the error, the spending and the records that process 1 reports."""

    def report(*reported):
        monkeypatch.setattr(step_exchange, "gather_object", lambda own: [*own, reported])

    return report


def test_records_are_in_the_order_of_the_sampler(other_process):
    other_process(None, False, None, [["c", "d"], ["g", "h"]])
    assert exchange([["a", "b"], ["e", "f"]], None, None) == (list("abcdefgh"), None)


def test_one_process_gets_its_own_records():
    assert exchange([["a", "b"], ["c"]], None, None) == (list("abc"), None)
    assert exchange([], None, None) == ([], None)


def test_an_error_is_raised_as_it_is_on_its_own_process(other_process):
    other_process("RankerError: wrong key", False, None, [])
    error = ValueError("broken")
    with pytest.raises(ValueError, match=r"^broken$"):
        exchange([], error, None)


def test_an_error_of_another_process_is_named(other_process):
    other_process("ValueError: broken", True, None, [["b"]])
    with pytest.raises(RankerError, match=r"The ranker failed on process 1\. ValueError: broken"):
        exchange([["a"]], None, None)


def test_a_ranker_error_is_returned_with_the_records(other_process):
    other_process(None, False, None, [["b"]])
    error = RankerError("wrong key")
    assert exchange([["a"]], error, None) == (["a", "b"], error)
    other_process("RankerError: wrong key", False, None, [["b"]])
    records, other = exchange([["a"]], None, None)
    assert records == ["a", "b"]
    assert str(other) == "The ranker failed on process 1. RankerError: wrong key"


def test_what_is_left_of_the_budget_is_shared_out(other_process):
    budget = Budget(max_tokens=100, num_processes=2)
    budget.reserve(Usage(40))
    budget.settle(Usage(40), Usage(40))
    other_process(None, False, Amount(tokens=20), [])
    exchange([], None, budget)
    # 40 tokens are left for two processes.
    assert budget.reserve(Usage(21)) is False
    assert budget.reserve(Usage(20)) is True
