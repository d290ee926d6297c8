"""Two processes for one: the one that Ray knows, and its child, which does the work. Either may be killed.

Nobody but its parent can start at once what was killed, so the parent does nothing else; and the parent is all that Ray
starts again, after its health check, so the child serves on until then.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from springtide.errors import SpringtideError

PASSED_ON = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTTOU, signal.SIGTTIN)
ENDING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
QUICK_S, QUICK_DEATHS = 2.0, 5  # so many deaths, each so soon after a start: then it is Ray's turn


class Deaths:
    """Of what is started again and again: whether there is any use in it."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=QUICK_DEATHS)

    def too_many(self) -> bool:
        """To be asked after each death."""
        self._latest.append(time.monotonic())
        return len(self._latest) == QUICK_DEATHS and self._latest[-1] - self._latest[0] < QUICK_DEATHS * QUICK_S


def face(work: Callable[[bool], int], ended: Callable[[], None]) -> int:
    """Run `work` in a child, and again in another one when that is killed, and pass signals on to it.

    work is told whether it is the first to do it, begins with the signals PASSED_ON blocked, and its status is ours.
    It has the memory and descriptors of here, and what it has started must die with it (see when_parent_dies): another
    one begins when all that is gone. ended: called as soon as a signal asks us to end, and not when the work does.
    """
    _libc().prctl(PR_SET_CHILD_SUBREAPER, 1)
    child, ending, first = 0, False, True
    deaths = Deaths()

    def heard(number: int, _: object) -> None:
        nonlocal ending
        if number in ENDING:
            ending = True
            ended()
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(child, number)

    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    for number in PASSED_ON:
        signal.signal(number, heard)
    while True:
        child = os.fork()
        if not child:
            _end_with(work, first)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        first = False
        if status >= 0 or ending:
            return plain(status)
        _reap()
        if deaths.too_many():
            print(f"springtide-haproxy: killed {QUICK_DEATHS} times in a row", file=sys.stderr)
            return 1


def plain(status: int) -> int:
    """The exit status of a process as a shell has it, where Python gives a signal as a negative number."""
    return status if status >= 0 else 128 - status


def when_parent_dies(number: int) -> None:
    """Have this signal sent to us then."""
    _libc().prctl(PR_SET_PDEATHSIG, number)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _reap() -> None:
    """Wait for what a killed child has left: until its threads are gone, its ports are taken."""
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _end_with(work: Callable[[bool], int], first: bool) -> NoReturn:
    status = 1
    try:
        status = work(first)
    except (OSError, SpringtideError) as error:
        print(f"springtide-haproxy: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
