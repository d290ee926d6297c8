"""Whether the parts behind an Ingress answer, for GET /readyz: looked at once a second, however many ask."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from springtide.serving.guard import log_failure
from springtide.serving.options import Limits
from springtide.serving.store import HistoryStore

TOLD_S = 1.0  # that what was found is told again
Checks = dict[str, str]  # part -> "ok", or what is wrong with it


class Health:
    """Store and scorer answering, and for a model with texts an encoder that has answered once. One that fails later
    degrades answers with a query alone, and one that scales to zero is not kept awake.

    Anybody may ask, so it stays apart from the threads and breakers of those who want a recommendation.
    """

    def __init__(
        self,
        store: HistoryStore,
        encode: Callable[[list[str]], Awaitable[Any]],
        call: Callable[[str], Awaitable[Any]],
        limits: Limits,
    ) -> None:
        self.found_until = 0.0
        self._store, self._encode, self._call = store, encode, call
        self._limits = limits
        self._threads = ThreadPoolExecutor(1, "store-ready")
        self._encoder_answered = False
        self._found: Checks | None = None
        self._looking: asyncio.Task[Checks] | None = None

    async def checks(self) -> Checks:
        if self._found is None or time.monotonic() >= self.found_until:
            if self._looking is None:
                # In a context of its own: Ray cancels what a request has asked of others when its caller leaves.
                self._looking = asyncio.create_task(self._look(), context=contextvars.Context())
            self._found = await asyncio.shield(self._looking)
        return self._found

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _look(self) -> Checks:
        """What each part says of itself; raises nothing but its own cancellation."""
        try:
            return await self._ask_all()
        finally:
            self.found_until, self._looking = time.monotonic() + TOLD_S, None

    async def _ask_all(self) -> Checks:
        checks = {"store": "ok", "scorer": "ok"}
        try:
            asked = asyncio.get_running_loop().run_in_executor(self._threads, self._store.history, "", 1)
            await asyncio.wait_for(asked, self._limits.store_timeout_s)
        except Exception as error:
            log_failure("not ready, the store fails", error)
            checks["store"] = "the event log cannot be read at the moment"
        try:
            described = await _answer_of(self._call("describe"), self._limits.scorer_timeout_s)
            if described["text"] and not self._encoder_answered:
                checks["encoder"] = await self._try_encoder()
        except Exception as error:
            log_failure("not ready, the scorer fails", error)
            checks["scorer"] = "the model does not answer at the moment"
        return checks

    async def _try_encoder(self) -> str:
        try:
            await _answer_of(self._encode(["ready"]), self._limits.encoder_timeout_s)
        except Exception as error:
            log_failure("not ready, the encoder fails", error)
            return "the text encoder does not answer"
        self._encoder_answered = True
        return "ok"


async def _answer_of(asked: Awaitable[Any], timeout_s: float) -> Any:
    """What is awaited, within a time limit. Raises RuntimeError where that was cancelled, and not whoever awaits it."""
    try:
        return await asyncio.wait_for(asked, timeout_s)
    except asyncio.CancelledError:
        me = asyncio.current_task()
        if me is not None and me.cancelling():
            raise
        raise RuntimeError("the call was cancelled") from None
