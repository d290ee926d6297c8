"""What waits while something is busy goes together when it is free: requests into batches, batches into calls.

Serve's own batches are closed when their time to fill is over, though the one before still runs: under load they hold
one request each. Here a batch is made only when it can be taken, so it grows with the load and nobody waits idly.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass
class Ride:
    """Whoever asks notes here what it shares with others, so that what fails for all of them is one failure."""

    shared: object | None = None  # a batch, or the line that waits for one; None: nothing


RIDE: ContextVar[Ride | None] = ContextVar("springtide_ride", default=None)  # of who asks; None: nobody wants to know


class Batches(Generic[Item, Answer]):
    """`await batches(item)` is that item's answer from `work`, which maps a batch of items to as many answers."""

    def __init__(
        self,
        work: Callable[[list[Item]], Awaitable[Sequence[Answer]]],
        most: int,
        size: Callable[[list[Item]], int] = len,
        at_once: Callable[[], int] = lambda: 1,
        tell: Callable[[int], None] = lambda waiting: None,
    ) -> None:
        """most: the `size` of a batch, which grows with its items; an item that is larger is a batch of its own.
        at_once: batches under way; what comes while there are as many waits for the first of them to end.
        tell: how many wait, as they come and are taken."""
        self.most, self.wait_s = most, 0.0  # wait_s: for others to come, before a batch is made
        self._work, self._size, self._at_once, self._tell = work, size, at_once, tell
        self._waiting: deque[tuple[Item, asyncio.Future[Answer], Ride]] = deque()
        self._line = object()  # all that wait until the next batch ends
        self._workers: set[asyncio.Task[None]] = set()

    async def __call__(self, item: Item) -> Answer:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        ride = RIDE.get() or Ride()
        ride.shared = self._line
        self._waiting.append((item, answer, ride))
        self._tell(len(self._waiting))
        if len(self._workers) < self._at_once():
            # In a context of its own: it goes on for others after the request that starts it.
            self._workers.add(loop.create_task(self._drain(), context=contextvars.Context()))
        return await answer

    async def _drain(self) -> None:
        me = asyncio.current_task()
        assert me is not None
        try:
            if self.wait_s:
                await asyncio.sleep(self.wait_s)
            while self._waiting and len(self._workers) <= max(1, self._at_once()):
                items, answers = self._next()
                if items:
                    await self._answer(items, answers, me)
        finally:
            self._workers.discard(me)  # in the step that saw nobody waiting: whoever comes next starts another

    async def _answer(self, items: list[Item], answers: list[asyncio.Future[Answer]], me: asyncio.Task[None]) -> None:
        failure: BaseException | None = None
        found: Sequence[Answer] = ()
        try:
            found = await self._work(items)
            if len(found) != len(items):
                failure = RuntimeError(f"{len(found)} answers to {len(items)} items")
        except asyncio.CancelledError as error:
            failure = RuntimeError(f"it was cancelled: {error}")  # the work, or this worker: no caller was
            if me.cancelling():
                raise
        except Exception as error:
            failure = error
        finally:
            self._line = object()
            for place, answer in enumerate(answers):
                if answer.done():  # its caller has gone
                    continue
                if failure is None:
                    answer.set_result(found[place])
                else:
                    answer.set_exception(failure)

    def _next(self) -> tuple[list[Item], list[asyncio.Future[Answer]]]:
        """As many as fit, in the order in which they came; without those whose callers have gone."""
        items: list[Item] = []
        answers: list[asyncio.Future[Answer]] = []
        batch = object()
        while self._waiting:
            item, answer, ride = self._waiting[0]
            if not answer.done():
                if items and self._size([*items, item]) > self.most:
                    break
                items.append(item)
                answers.append(answer)
                ride.shared = batch
            self._waiting.popleft()
        self._tell(len(self._waiting))
        return items, answers


def in_thread(
    thread: ThreadPoolExecutor, work: Callable[[list[Item]], list[Answer]]
) -> Callable[[list[Item]], Awaitable[list[Answer]]]:
    """The work of Batches, in a thread."""

    async def run(items: list[Item]) -> list[Answer]:
        return await asyncio.get_running_loop().run_in_executor(thread, work, items)

    return run


class Seen:
    """How many different replicas have answered lately."""

    def __init__(self, forget_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._forget_s, self._clock = forget_s, clock
        self._last: dict[str, float] = {}

    def note(self, replica: str) -> None:
        self._last[replica] = self._clock()

    def count(self) -> int:
        """At least 1."""
        now = self._clock()
        self._last = {replica: when for replica, when in self._last.items() if now - when < self._forget_s}
        return max(1, len(self._last))
