"""Patience with another part: a time limit on every call, and a circuit breaker that leaves a part alone that fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from springtide.errors import without_data
from springtide.serving.batching import RIDE, Ride
from springtide.serving.context import current_note
from springtide.serving.metrics import Metrics, NoMetrics

log = logging.getLogger("springtide.serving")
Result = TypeVar("Result")
FAILED_LATELY = 16  # shared calls that failed which a guard remembers: as many as may end at about the same time


class Unavailable(Exception):
    """The part is not asked: it failed so often in a row, or as much as it may take is under way."""


class Breaker:
    """Closed while calls succeed; open for `pause_s` after `failures` in a row; then one call may try (half open).

    Not for use from several threads. clock: seconds that never go back.
    """

    def __init__(self, failures: int, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._pause_s, self._clock = failures, pause_s, clock
        self._failed = 0
        self._open_until: float | None = None
        self._probe: object | None = None

    @property
    def is_open(self) -> bool:
        return self._open_until is not None

    def enter(self) -> object:
        """A ticket for one call, to be handed to `leave`. Raises Unavailable when the part should not be asked."""
        ticket = object()
        if self._open_until is not None:
            if self._probe is not None or self._clock() < self._open_until:
                raise Unavailable("it failed often and is left alone for a while")
            self._probe = ticket
        return ticket

    def leave(self, ticket: object, succeeded: bool | None) -> None:
        """Tell how the call went; None: nobody waited for its end, so it says nothing of the part."""
        probing = ticket is self._probe
        if probing:
            self._probe = None
        if succeeded is None:
            return
        if succeeded:
            self._failed, self._open_until = 0, None
            return
        self._failed += 1
        # Calls that were under way when the circuit opened end late: they must not keep it open for longer.
        if probing or (self._open_until is None and self._failed >= self._limit):
            self._open_until = self._clock() + self._pause_s


class Guard:
    """One part behind a time limit and a breaker; its calls are counted under its name.

    at_once: calls under way; a further one is not made. None: as many as come.
    """

    def __init__(
        self,
        name: str,
        timeout_s: float,
        breaker: Breaker,
        metrics: Metrics | None = None,
        at_once: int | None = None,
    ) -> None:
        self.timeout_s, self.breaker = timeout_s, breaker
        self._name, self._metrics = name, metrics or NoMetrics()
        self._at_once, self._inside = at_once, 0
        self._failed_lately: deque[object] = deque(maxlen=FAILED_LATELY)

    async def run(self, call: Callable[..., Awaitable[Result]], *arguments: Any) -> Result:
        """The call's answer. Raises Unavailable, TimeoutError or what the call raises.

        A call that several share fails once, whether it ends or they are tired of waiting.
        """
        if self._at_once is not None and self._inside >= self._at_once:
            self._failed("full")
            raise Unavailable("as many calls of it are under way as it may take")
        try:
            ticket = self.breaker.enter()
        except Unavailable:
            self._failed("open circuit")
            raise
        succeeded, began, ride = None, time.perf_counter(), Ride()
        shared = RIDE.set(ride)
        self._inside += 1
        try:
            async with asyncio.timeout(self.timeout_s):  # wait_for would make a task of each call
                answer = await call(*arguments)
            succeeded = True
            return answer
        except Exception as error:  # a cancelled caller says nothing of the part and passes by
            succeeded = None if self._known(ride.shared or error) else False
            self._failed("timeout" if isinstance(error, TimeoutError) else "error")
            raise
        finally:
            RIDE.reset(shared)
            self._inside -= 1
            self.breaker.leave(ticket, succeeded)
            self._metrics.observe("springtide_stage_seconds", time.perf_counter() - began, stage=self._name)

    def _known(self, failed: object) -> bool:
        """Whether another told of this failure: by the batch that they share, or by what it raised for all of them."""
        if any(failed is one for one in self._failed_lately):
            return True
        self._failed_lately.append(failed)
        return False

    def _failed(self, reason: str) -> None:
        self._metrics.count("springtide_part_failures", part=self._name, reason=reason)


def log_failure(what: str, error: Exception) -> None:
    """A line for each call that failed, and none for calls that an open circuit spared: a crowd would flood the log."""
    if not isinstance(error, Unavailable):
        log.error("%s: %s (request %s)", what, without_data(error), current_note().request_id)
