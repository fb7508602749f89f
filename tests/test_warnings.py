"""Warnings that are logged once."""

import logging

from cyclealign_trl._warnings import OnceLogger

LOGGER = logging.getLogger("cyclealign_trl.tests")


def test_each_kind_is_logged_once_even_if_its_numbers_change(caplog):
    once = OnceLogger(LOGGER)
    for number in (1, 2):
        once.warning("truncated", "%d of %d rows were truncated.", number, 9)
        once.warning("dropped", "%d rows were dropped.", number)
    assert caplog.messages == ["1 of 9 rows were truncated.", "1 rows were dropped."]
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert {record.name for record in caplog.records} == {LOGGER.name}


def test_every_instance_logs_for_itself(caplog):
    for _ in range(2):
        OnceLogger(LOGGER).warning("dropped", "Rows were dropped.")
    assert caplog.messages == ["Rows were dropped."] * 2
