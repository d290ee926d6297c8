"""Batches of what waits while a thread is busy: who shares one, who gets which answer, and what failures cost."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.serving.batching import Batches, Seen, in_thread


class Busy:
    """Doubles numbers, a batch at a time, and only when it is let go; odd ones above 100 it cannot."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def __call__(self, items: list[int]) -> list[int]:
        self.begun.release()
        self.go.acquire()
        self.batches.append(items)
        if any(item > 100 and item % 2 for item in items):
            raise ValueError("odd")
        return [2 * item for item in items]


async def asked(busy: Busy, first: int, others: list[int], most: int = 4, **options: object) -> list[object]:
    """Answers where `others` come while `first` is being worked on."""
    batches: Batches[int, int] = Batches(in_thread(ThreadPoolExecutor(1), busy), most, **options)  # type: ignore[arg-type]
    calls = [asyncio.create_task(batches(first))]
    await asyncio.to_thread(busy.begun.acquire)
    calls += [asyncio.create_task(batches(other)) for other in others]
    await asyncio.sleep(0)
    busy.go.release(100)
    return list(await asyncio.gather(*calls, return_exceptions=True))


def test_one_alone_waits_for_nobody_and_those_that_wait_share_the_next() -> None:
    busy = Busy()
    assert asyncio.run(asked(busy, 1, [2, 3, 4, 5, 6])) == [2, 4, 6, 8, 10, 12]
    assert busy.batches == [[1], [2, 3, 4, 5], [6]]


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 12))
def test_each_gets_its_own_answer_in_batches_that_fit(items: list[int], most: int) -> None:
    busy = Busy()
    found = asyncio.run(asked(busy, 5, items, most, size=sum))
    assert found == [10, *(2 * item for item in items)]
    assert sum(busy.batches, []) == [5, *items]  # in the order in which they came
    assert all(sum(batch) <= most or len(batch) == 1 for batch in busy.batches)
    fuller = zip(busy.batches[1:], busy.batches[2:], strict=False)
    assert all(sum(batch) + after[0] > most for batch, after in fuller)  # no batch is smaller than it must be


def test_a_failure_is_that_of_its_batch_alone() -> None:
    first, *others = asyncio.run(asked(Busy(), 1, [2, 103, 4, 5, 6]))
    assert first == 2 and others[-1] == 12
    assert all(isinstance(one, ValueError) for one in others[:4])


def test_who_has_gone_is_not_worked_for() -> None:
    async def run() -> tuple[Busy, int]:
        busy = Busy()
        batches: Batches[int, int] = Batches(in_thread(ThreadPoolExecutor(1), busy), 4)
        held = [asyncio.create_task(batches(1))]
        await asyncio.to_thread(busy.begun.acquire)
        gone, stays = asyncio.create_task(batches(2)), asyncio.create_task(batches(3))
        await asyncio.sleep(0)
        gone.cancel()
        held[0].cancel()  # in the middle of its work, which goes on
        busy.go.release(10)
        with pytest.raises(asyncio.CancelledError):
            await gone
        return busy, await stays

    busy, answer = asyncio.run(run())
    assert answer == 6 and busy.batches == [[1], [3]]


def test_it_may_wait_for_more() -> None:
    async def run() -> list[list[int]]:
        busy = Busy()
        busy.go.release(10)
        batches: Batches[int, int] = Batches(in_thread(ThreadPoolExecutor(1), busy), 4)
        batches.wait_s = 0.2
        first = asyncio.create_task(batches(1))
        await asyncio.sleep(0.02)
        assert await asyncio.gather(first, batches(2)) == [2, 4]
        return busy.batches

    assert asyncio.run(run()) == [[1, 2]]


def test_some_batches_at_once_and_what_comes_meanwhile_shares_the_next() -> None:
    async def run() -> tuple[list[list[int]], list[int]]:
        begun: list[list[int]] = []
        ends = asyncio.Semaphore(0)

        async def work(items: list[int]) -> list[int]:
            begun.append(items)
            await ends.acquire()
            return [2 * item for item in items]

        batches: Batches[int, int] = Batches(work, 3, at_once=lambda: 2)
        calls = []
        for item in range(7):
            calls.append(asyncio.create_task(batches(item)))
            await asyncio.sleep(0.01)
        assert begun == [[0], [1]]
        ends.release()
        await asyncio.sleep(0.01)
        assert begun == [[0], [1], [2, 3, 4]]
        for _ in range(3):
            ends.release()
        return begun, await asyncio.gather(*calls)

    begun, answers = asyncio.run(run())
    assert begun == [[0], [1], [2, 3, 4], [5, 6]]
    assert answers == [2 * item for item in range(7)]


def test_replicas_count_while_they_answer() -> None:
    now = 0.0
    seen = Seen(forget_s=10, clock=lambda: now)
    assert seen.count() == 1
    for replica in "aba":
        seen.note(replica)
    assert seen.count() == 2
    now = 8.0
    seen.note("b")
    now = 11.0
    assert seen.count() == 1


class Ends:
    """Work that lasts until its future is set; the number of the batch is every item's answer."""

    def __init__(self) -> None:
        self.futures: list[asyncio.Future[None]] = []

    async def __call__(self, items: list[int]) -> list[int]:
        self.futures.append(asyncio.get_running_loop().create_future())
        number = len(self.futures)
        await self.futures[-1]
        return [number] * len(items)


async def ticks(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_who_comes_in_the_moment_in_which_a_worker_leaves_is_not_forgotten() -> None:
    async def run(ticks_between: int) -> int:
        ends = Ends()
        batches: Batches[int, int] = Batches(ends, 4)
        first = asyncio.create_task(batches(1))
        await ticks()
        ends.futures[0].set_result(None)
        await ticks(ticks_between)
        second = asyncio.create_task(batches(2))
        await ticks()
        ends.futures[1].set_result(None)
        async with asyncio.timeout(5):
            await first
            return await second

    for between in range(6):
        assert asyncio.run(run(between)) == 2


def test_some_workers_stay_when_fewer_are_allowed() -> None:
    async def run() -> list[int]:
        ends, allowed = Ends(), [8]
        batches: Batches[int, int] = Batches(ends, 1, at_once=lambda: allowed[0])
        calls = []
        for item in range(12):
            calls.append(asyncio.create_task(batches(item)))
            await ticks()
        assert len(ends.futures) == 8
        allowed[0] = 3
        for future in ends.futures[:8]:
            future.set_result(None)
        await ticks(20)
        assert len(ends.futures) == 11
        while len(ends.futures) < 12 or not all(future.done() for future in ends.futures):
            for future in ends.futures:
                if not future.done():
                    future.set_result(None)
            await ticks()
        async with asyncio.timeout(5):
            return await asyncio.gather(*calls)

    assert asyncio.run(run()) == list(range(1, 13))


def test_work_that_is_cancelled_leaves_nobody_waiting() -> None:
    """Ray raises that where a call was cancelled at the other end."""

    async def run() -> list[object]:
        async def work(items: list[int]) -> list[int]:
            await asyncio.sleep(0)
            if items[0] == 1:
                raise asyncio.CancelledError("by the replica")
            return items

        batches: Batches[int, int] = Batches(work, 1)
        async with asyncio.timeout(5):
            return list(await asyncio.gather(batches(1), batches(2), return_exceptions=True))

    first, second = asyncio.run(run())
    assert isinstance(first, RuntimeError) and "by the replica" in str(first)
    assert second == 2


def test_answers_of_another_number_are_nobodys() -> None:
    async def run() -> int:
        async def work(_: list[int]) -> list[int]:
            return []

        async with asyncio.timeout(5):
            return await Batches(work, 4)(1)

    with pytest.raises(RuntimeError, match="0 answers to 1 items"):
        asyncio.run(run())
