"""The circuit breaker by a clock of the test's own, and the guard around a call."""

from __future__ import annotations

import asyncio

import pytest

from springtide.errors import SpringtideError
from springtide.serving.batching import Batches
from springtide.serving.context import CURRENT, Note
from springtide.serving.guard import Breaker, Guard, Unavailable, log_failure


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def call(breaker: Breaker, succeeded: bool | None) -> None:
    breaker.leave(breaker.enter(), succeeded)


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(3, 10.0, clock)
    for _ in range(3):
        call(breaker, False)
    assert breaker.is_open
    return breaker


def test_only_failures_in_a_row_open_the_circuit() -> None:
    breaker = Breaker(3, 10.0, Clock())
    for succeeded in (False, False, True, False, False, None, True, False, False):
        call(breaker, succeeded)
    assert not breaker.is_open
    call(breaker, False)
    with pytest.raises(Unavailable):
        breaker.enter()


def test_after_the_pause_one_call_tries() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now = 9.9
    with pytest.raises(Unavailable):
        breaker.enter()
    clock.now = 10.0
    probe = breaker.enter()
    with pytest.raises(Unavailable):
        breaker.enter()
    breaker.leave(probe, True)
    call(breaker, True)
    assert not breaker.is_open


def test_a_failed_try_pauses_again() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now = 10.0
    call(breaker, False)
    clock.now = 19.9
    with pytest.raises(Unavailable):
        breaker.enter()
    clock.now = 20.0
    call(breaker, True)
    assert not breaker.is_open


def test_a_try_that_nobody_waited_for_lets_another_try() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now = 10.0
    call(breaker, None)
    call(breaker, True)
    assert not breaker.is_open


def test_late_failures_do_not_lengthen_the_pause() -> None:
    clock = Clock()
    breaker = Breaker(3, 10.0, clock)
    tickets = [breaker.enter() for _ in range(6)]
    for ticket in tickets[:3]:
        breaker.leave(ticket, False)
    clock.now = 9.0
    for ticket in tickets[3:]:
        breaker.leave(ticket, False)
    clock.now = 10.0
    breaker.enter()


def test_the_guard_counts_time_outs_and_errors_but_not_callers_who_left() -> None:
    async def run() -> None:
        guard = Guard("part", 0.05, Breaker(2, 60.0))

        async def slow() -> None:
            await asyncio.sleep(60)

        async def broken() -> None:
            raise ConnectionError

        for _ in range(3):
            left = asyncio.create_task(guard.run(slow))
            await asyncio.sleep(0)
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
        with pytest.raises(TimeoutError):
            await guard.run(slow)
        with pytest.raises(ConnectionError):
            await guard.run(broken)
        with pytest.raises(Unavailable):
            await guard.run(broken)

    asyncio.run(run())


def test_what_fails_for_all_that_share_a_call_is_one_failure() -> None:
    async def run(errors: list[Exception]) -> bool:
        guard = Guard("scorer", 1.0, Breaker(3, 10.0, Clock()))

        async def fail(error: Exception) -> None:
            raise error

        for error in errors:
            with pytest.raises(ValueError):
                await guard.run(fail, error)
        return guard.breaker.is_open

    one = ValueError("of a call")
    assert not asyncio.run(run([one] * 9))
    assert asyncio.run(run([one, one, ValueError("of the next"), ValueError("and of another")]))


@pytest.mark.parametrize("patience_s", [0.1, 0.13, 0.3], ids=["who shares it", "some who share it", "the call"])
def test_a_slow_call_that_many_share_fails_once_whoever_gives_up_first(patience_s: float) -> None:
    async def run() -> None:
        guard = Guard("scorer", patience_s, Breaker(3, 10.0))

        async def hang(items: list[int]) -> list[int]:
            async with asyncio.timeout(0.1):
                await asyncio.sleep(60)
            return items

        batches = Batches(hang, 100)

        async def ask(after_s: float) -> int:
            await asyncio.sleep(after_s)
            return await guard.run(batches, 1)

        # The first has a call of its own, and all others, who come in the meantime, share the next one.
        found = await asyncio.gather(ask(0), *(ask(0.05 + n / 200) for n in range(9)), return_exceptions=True)
        assert all(isinstance(one, TimeoutError) for one in found)
        assert not guard.breaker.is_open

    asyncio.run(run())


def test_a_part_whose_every_call_hangs_is_left_alone_though_most_still_wait_for_a_call() -> None:
    async def run() -> None:
        guard = Guard("encoder", 0.05, Breaker(5, 10.0))

        async def hang(items: list[int]) -> list[int]:
            await asyncio.sleep(60)
            return items

        batches = Batches(hang, 100, at_once=lambda: 4)

        async def ask(after_s: float) -> int:
            await asyncio.sleep(after_s)
            return await guard.run(batches, 1)

        found = await asyncio.gather(*(ask(n / 200) for n in range(9)), return_exceptions=True)
        assert all(isinstance(one, TimeoutError) for one in found)
        assert guard.breaker.is_open

    asyncio.run(run())


def test_a_failure_in_the_log_names_the_request_and_not_what_it_asked(caplog: pytest.LogCaptureFixture) -> None:
    token = CURRENT.set(Note("r-1"))
    try:
        log_failure("not scored", ValueError("alice"))
        log_failure("not stored", SpringtideError("the disk is full"))
    finally:
        CURRENT.reset(token)
    assert caplog.messages == ["not scored: ValueError (request r-1)", "not stored: the disk is full (request r-1)"]
