"""The batcher by itself: who is batched with whom, and what happens when something goes wrong."""

import asyncio
import threading
import time

import pytest

from alore_ext.serving.batching import Batcher
from alore_ext.serving.errors import DeviceFailed, QueueFull, ShuttingDown


def run(scenario, batch, **options):
    """Run ``scenario(batcher)`` with a batcher over ``batch``; returns its result and the batches' records."""
    records = []
    options = {"max_batch": 8, "max_delay": 0.05, "max_queue": 1000} | options

    async def main():
        batcher = Batcher(batch, on_batch=records.append, **options)
        batcher.start()
        try:
            return await asyncio.wait_for(scenario(batcher), 20)
        finally:
            await asyncio.wait_for(batcher.close(), 20)

    return asyncio.run(main()), records


def double(items):
    return [2 * item for item in items]


def test_results_go_to_those_who_asked():
    async def scenario(batcher):
        return await asyncio.gather(*(batcher.submit(i) for i in range(300)))

    results, records = run(scenario, double)
    assert results == [2 * i for i in range(300)]
    assert sum(record.size for record in records) == 300 and max(record.size for record in records) == 8


def test_a_full_batch_does_not_wait_and_a_lonely_item_waits_no_longer_than_max_delay():
    async def scenario(batcher):
        started = time.monotonic()
        await asyncio.gather(*(batcher.submit(i) for i in range(8)))
        full = time.monotonic() - started
        await batcher.submit(1)
        return full, time.monotonic() - started - full

    (full, lonely), records = run(scenario, double, max_delay=0.4)
    assert [record.size for record in records] == [8, 1]
    assert full < 0.3 and 0.4 <= lonely < 1.5


def test_an_error_reaches_only_the_item_that_causes_it():
    calls = []

    def fragile(items):
        calls.append(list(items))
        if 5 in items:
            raise ValueError("not five")
        return items

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.submit(i) for i in range(8)), return_exceptions=True)

    results, records = run(scenario, fragile)
    assert [r for i, r in enumerate(results) if i != 5] == [0, 1, 2, 3, 4, 6, 7]
    assert str(results[5]) == "not five" and records[0].failed == 1
    assert len(calls) == 7  # halved: 8, 4, 4, 2, 2, 1, 1


def test_too_few_results_are_an_error_and_not_somebody_elses_answer():
    async def scenario(batcher):
        return await asyncio.gather(*(batcher.submit(i) for i in range(2)), return_exceptions=True)

    results, _ = run(scenario, lambda items: items[1:])
    assert all(isinstance(result, RuntimeError) for result in results)


def test_cancelled_items_are_taken_out_and_the_others_stay_in_place():
    seen = []

    def slow(items):
        time.sleep(0.05)
        seen.extend(items)
        return double(items)

    async def scenario(batcher):
        tasks = [asyncio.ensure_future(batcher.submit(i)) for i in range(40)]
        await asyncio.sleep(0.02)  # the first batch runs, the others wait
        for task in tasks[1::2]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results, _ = run(scenario, slow)
    assert results[::2] == [2 * i for i in range(0, 40, 2)]
    assert all(isinstance(result, asyncio.CancelledError) for result in results[1::2])
    assert set(seen) - set(range(8)) == set(range(8, 40, 2))  # cancelled while waiting: never computed


def test_admission_is_bounded_and_given_back():
    async def scenario(batcher):
        with batcher.admit(), batcher.admit():
            with pytest.raises(QueueFull, match="2 requests are waiting, of 2 at the most"):
                with batcher.admit():
                    pass
        with pytest.raises(KeyError), batcher.admit():
            raise KeyError
        with batcher.admit(), batcher.admit():
            assert batcher.admitted == 2

    run(scenario, double, max_queue=2)


def test_close_waits_for_what_was_admitted_and_admits_nobody_else():
    async def scenario(batcher):
        async def request():
            with batcher.admit():
                await asyncio.sleep(0.1)  # reads its body
                return await batcher.submit(21)

        admitted = asyncio.ensure_future(request())
        await asyncio.sleep(0.01)
        closing = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0.01)
        assert not batcher.ready
        with pytest.raises(ShuttingDown):
            with batcher.admit():
                pass
        result = await admitted
        await closing
        with pytest.raises(ShuttingDown):
            await batcher.submit(1)
        with pytest.raises(ShuttingDown):
            batcher.between_batches(print)
        return result

    assert run(scenario, double)[0] == 42


def test_a_worker_that_dies_leaves_nobody_waiting(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    def die(items):
        raise SystemExit

    async def scenario(batcher):
        everyone = asyncio.gather(*(batcher.submit(i) for i in range(20)), return_exceptions=True)
        return batcher.ready, await asyncio.wait_for(everyone, 5), batcher.ready

    (before, results, after), _ = run(scenario, die)
    assert before and not after and all(isinstance(result, ShuttingDown) for result in results)


def test_a_change_that_ends_the_worker_is_answered(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    def leave():
        raise SystemExit

    async def scenario(batcher):
        with pytest.raises(ShuttingDown):
            await asyncio.wait_for(asyncio.wrap_future(batcher.between_batches(leave)), 5)
        return batcher.live

    assert run(scenario, double)[0] is False


def test_a_change_that_is_given_up_is_not_made():
    gate, made = threading.Event(), []

    async def scenario(batcher):
        batcher.between_batches(gate.wait)
        given_up = batcher.between_batches(lambda: made.append(1))
        assert given_up.cancel()
        gate.set()
        return await batcher.submit(21)

    assert run(scenario, double)[0] == 42 and not made


def test_counting_batches_does_not_end_them(caplog):
    def broken(record):
        raise ZeroDivisionError

    async def main():
        batcher = Batcher(double, max_batch=1, max_delay=0, max_queue=9, on_batch=broken)
        batcher.start()
        results = [await asyncio.wait_for(batcher.submit(i), 5) for i in range(3)]
        await batcher.close()
        return results

    assert asyncio.run(main()) == [0, 2, 4] and "on_batch failed" in caplog.text


def test_a_fatal_error_is_the_last():
    calls = []

    def lost(items):
        calls.append(len(items))
        raise OSError("the device is lost")

    async def scenario(batcher):
        results = await asyncio.gather(*(batcher.submit(i) for i in range(8)), return_exceptions=True)
        assert not batcher.ready and not batcher.live
        with pytest.raises(DeviceFailed, match="started anew"), batcher.admit():
            pass
        with pytest.raises(DeviceFailed):  # was admitted before
            await batcher.submit(1)
        return results

    results, _ = run(scenario, lost, fatal=lambda error: isinstance(error, OSError))
    assert [str(result) for result in results] == ["the device is lost"] * 8
    assert calls == [8]  # not halved, and not tried again


def test_batches_that_all_fail_are_no_readiness_until_one_succeeds(monkeypatch):
    works = []

    def fragile(items):
        if not works:
            raise ValueError("no")
        return items

    async def scenario(batcher):
        ready = []
        for _ in range(6):
            with batcher.admit(), pytest.raises(ValueError):
                await batcher.submit(1)
            ready.append(batcher.ready)
        assert batcher.live
        with monkeypatch.context() as later:
            later.setattr("alore_ext.serving.batching._RETRY_S", 0)
            assert batcher.ready  # or nobody would be sent to find out
        works.append(1)
        await batcher.submit(1)
        return [*ready, batcher.ready]

    assert run(scenario, fragile, max_delay=0)[0] == [True] * 4 + [False] * 2 + [True]


def test_changes_never_overlap_with_a_batch():
    running, overlaps = threading.Event(), []

    def batch(items):
        running.set()
        time.sleep(0.005)
        running.clear()
        return items

    async def scenario(batcher):
        work = [asyncio.ensure_future(batcher.submit(i)) for i in range(100)]
        for _ in range(20):
            change = batcher.between_batches(lambda: overlaps.append(running.is_set()))
            await asyncio.wrap_future(change)
        with pytest.raises(ZeroDivisionError):
            await asyncio.wrap_future(batcher.between_batches(lambda: 1 / 0))
        return await asyncio.gather(*work)

    assert run(scenario, batch)[0] == list(range(100))
    assert overlaps == [False] * 20
