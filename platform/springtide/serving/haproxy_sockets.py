"""Sockets that outlive one HAProxy: the front that callers connect to, and the admin socket that Ray asks.

Each `springtide-haproxy` hands the front on to the one that comes after it, over the admin socket. So a connection that
arrives while HAProxy is being replaced waits in the kernel, and is not refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from springtide.errors import SpringtideError

HAND_OVER = b"springtide: hand over the front\n"  # no command of HAProxy's
PATIENCE_S = 2.0
BACKLOG = 4096
_PID = re.compile(rb"^Pid: \d+", re.MULTILINE)


@dataclass
class Front:
    """Listening sockets by the address that HAProxy's configuration gives them, and who has them too."""

    sockets: dict[str, socket.socket] = field(default_factory=dict)
    owner: int | None = None  # the process that Ray knows; None: nobody
    keeper: int | None = None  # the one that keeps them, its child, or the same when that has lost its parent
    owners_haproxy: Path | None = None  # its admin socket

    def descriptors(self) -> dict[str, int]:
        return {address: one.fileno() for address, one in self.sockets.items()}

    def close(self) -> None:
        while self.sockets:
            self.sockets.popitem()[1].close()


def take_front(admin: Path, addresses: Iterable[str], reuse_port: bool) -> Front:
    """The front of the one that serves now, and what it lacks newly bound. Raises SpringtideError if that fails.

    reuse_port: whether others may listen there too, as Ray allows them where several nodes share a machine.
    """
    front = _handed_over(admin)
    if front.owner is None:
        front = _handed_over(_left(admin))
    wanted = list(addresses)
    for address in sorted(front.sockets.keys() - wanted):
        front.sockets.pop(address).close()
    for address in wanted:
        if address not in front.sockets:
            front.sockets[address] = _listen(address, reuse_port)
    return front


def _handed_over(admin: Path) -> Front:
    with socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(PATIENCE_S)
        try:
            asked.connect(str(admin))
            asked.sendall(HAND_OVER)
            told, descriptors, _, _ = socket.recv_fds(asked, 65536, 64)
        except OSError:
            return Front()
    if not told.startswith(b"{"):  # HAProxy itself, which knows nothing of this
        return Front()
    owner = json.loads(told)
    sockets = {a: socket.socket(fileno=d) for a, d in zip(owner["front"], descriptors, strict=True)}
    return Front(sockets, owner["pid"], owner["keeper"], Path(owner["haproxy"]))


def _listen(address: str, reuse_port: bool) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    one = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse_port))
        one.bind(("" if host == "*" else host, int(port)))
        one.listen(BACKLOG)
    except OSError as error:
        one.close()
        raise SpringtideError(f"cannot listen on {address}: {error.strerror}") from None
    return one


# ---------------------------------------------------------------- the admin socket
@dataclass
class Admin:
    """Where Ray asks."""

    path: Path
    listening: socket.socket
    file: int  # inode of our socket's name

    def leave(self) -> None:
        """From now on only whoever comes after us finds us, and Ray finds nobody."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self.file:  # or somebody has come after us already
                self.path.rename(_left(self.path))

    def close(self) -> None:
        self.listening.close()
        left = _left(self.path)
        with contextlib.suppress(FileNotFoundError):
            if left.stat().st_ino == self.file:
                left.unlink()


def is_answered(path: Path) -> bool:
    """Whether anybody listens there."""
    with socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(PATIENCE_S)
        return asked.connect_ex(str(path)) == 0


def open_admin(path: Path) -> Admin:
    """Listen there, in the place of whoever listened there before."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    beside.unlink(missing_ok=True)
    one = socket.socket(socket.AF_UNIX)
    one.bind(str(beside))
    beside.chmod(0o600)
    one.listen(64)
    file = beside.stat().st_ino
    beside.replace(path)
    return Admin(path, one, file)


def _left(admin: Path) -> Path:
    return admin.with_name(f"{admin.name}.left")


def answer(connection: socket.socket, haproxy: Path, front: Front, pid: int) -> None:
    """One command of Ray, answered by HAProxy under this process id, or one of our successor, who gets the front."""
    with connection, contextlib.suppress(OSError):  # whoever asked hears nothing, and asks again
        connection.settimeout(PATIENCE_S)
        command = b""
        while not command.endswith(b"\n") and (part := connection.recv(65536)):
            command += part
        if command == HAND_OVER:
            told = {"front": list(front.sockets), "pid": pid, "keeper": os.getpid(), "haproxy": str(haproxy)}
            socket.send_fds(connection, [json.dumps(told).encode()], list(front.descriptors().values()))
            return
        connection.sendall(_PID.sub(b"Pid: %d" % pid, ask(haproxy, command)))


def ask(haproxy: Path, command: bytes) -> bytes:
    """HAProxy's answer to an admin command. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(PATIENCE_S)
        asked.connect(str(haproxy))
        asked.sendall(command)
        parts = []
        while part := asked.recv(65536):
            parts.append(part)
        return b"".join(parts)


def pid_of(haproxy: Path) -> int | None:
    """The process that answers there; None if none does."""
    try:
        found = _PID.search(ask(haproxy, b"show info\n"))
    except OSError:
        return None
    return int(found[0].split()[1]) if found else None
