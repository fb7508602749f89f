"""Reports of dropped rows."""

from collections import Counter

from cyclealign_trl.data.drop_reports import dropped_rows


def test_reasons_are_counted_in_alphabetical_order():
    assert dropped_rows(["repeated", "empty", "repeated"]) == "dropped: empty 1, repeated 2"


def test_counts_can_be_given():
    assert dropped_rows(Counter({"too_long": 3, "empty": 1})) == "dropped: empty 1, too_long 3"


def test_nothing_dropped():
    assert dropped_rows([]) == "dropped: none"
