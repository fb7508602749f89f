"""Batches, order and failures of `Batcher`."""

import asyncio
import threading

import pytest

from cyclealign_trl.aligner.serving.batcher import Batcher


def run(batcher, asks):
    async def main():
        batcher.start()
        try:
            return await asyncio.gather(*(batcher.ask(key, item) for key, item in asks), return_exceptions=True)
        finally:
            await batcher.close()

    return asyncio.run(main())


def test_waiting_items_with_equal_keys_share_a_call():
    calls = []

    def answer(key, items):
        calls.append((key, list(items)))
        return [f"{key}{item}" for item in items]

    asks = [("ab"[index % 2], index) for index in range(10)]
    assert run(Batcher(answer, batch_size=4), asks) == [f"{key}{item}" for key, item in asks]
    assert all(len(items) <= 4 for _, items in calls)
    assert calls[:2] == [("a", [0, 2]), ("b", [1, 3])]


def test_a_bad_item_does_not_fail_the_others():
    def answer(key, items):
        if "bad" in items:
            raise ValueError("bad item")
        return [item.upper() for item in items]

    good, bad, other = run(Batcher(answer, batch_size=8), [(None, item) for item in ("good", "bad", "other")])
    assert (good, other) == ("GOOD", "OTHER")
    assert isinstance(bad, ValueError)


def test_runs_max_concurrency_calls_at_once():
    meeting = threading.Barrier(3, timeout=10)

    def answer(key, items):
        meeting.wait()  # returns once three calls are in flight
        return items

    assert run(Batcher(answer, batch_size=1, max_concurrency=3), [(None, index) for index in range(6)]) == [*range(6)]


def test_a_cancelled_item_is_not_answered():
    seen = []
    started, go_on = threading.Event(), threading.Event()

    def answer(key, items):
        seen.extend(items)
        started.set()
        go_on.wait(10)
        return items

    async def main():
        batcher = Batcher(answer, batch_size=1)
        batcher.start()
        first, second, third = (asyncio.create_task(batcher.ask(None, index)) for index in range(3))
        await asyncio.to_thread(started.wait, 10)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        go_on.set()
        assert [await first, await third] == [0, 2]
        await batcher.close()

    asyncio.run(main())
    assert seen == [0, 2]
