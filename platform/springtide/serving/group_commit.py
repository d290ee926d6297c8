"""One thread that does the waiting work of many threads together, so that they share one commit to disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from springtide.errors import SpringtideError

MOST_TOGETHER = 64
Work = TypeVar("Work")
Result = TypeVar("Result")


class GroupCommit(Generic[Work, Result]):
    """`do(work)` from any thread returns what `together` made of it, once the whole group is committed.

    together: takes the work that waits (at most MOST_TOGETHER pieces) and returns one result for each; an exception in
    a result's place is raised to the caller of that piece, one that is raised to the callers of all.
    """

    def __init__(self, together: Callable[[Sequence[Work]], Sequence[Result | Exception]], name: str) -> None:
        self._together, self._name = together, name
        self._waiting: queue.SimpleQueue[tuple[Work, Future[Result]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None

    def do(self, work: Work) -> Result:
        future: Future[Result] = Future()
        with self._lock:
            if self._closed:
                raise SpringtideError(f"{self._name} is closed")
            if self._thread is None:  # a store that is only read needs none
                self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
                self._thread.start()
            self._waiting.put((work, future))
        return future.result()

    def close(self) -> None:
        """Finish what waits, then refuse more."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None:
            self._waiting.put(None)
            thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            group, last = [first], False
            while len(group) < MOST_TOGETHER and not last and not self._waiting.empty():
                following = self._waiting.get()
                if following is None:
                    last = True
                else:
                    group.append(following)
            self._answer(group)
            if last:
                return

    def _answer(self, group: list[tuple[Work, Future[Result]]]) -> None:
        results: Sequence[Result | Exception]
        try:
            results = self._together([work for work, _ in group])
        except Exception as error:
            results = [error] * len(group)
        for (_, future), result in zip(group, results, strict=True):
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
