"""Servers of a benchmark: in a network of their own where possible, and ended without touching anybody else's.

Ray listens on every interface of the machine, whatever address it is given. As root on Linux the servers therefore run
in a network namespace that has nothing but `lo`. Everything started carries a tag in its environment, daemons and their
children included, and what is ended is what carries the tag.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from harness import REPO, environment, tail

TAG = "SPRINGTIDE_BENCHMARK"
Command = Sequence[str | Path]


@dataclass(frozen=True)
class Place:
    """Where servers and load run: a prefix for their commands and the tag of their environment."""

    prefix: list[str] = field(default_factory=list)
    tag: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def isolated(self) -> bool:
        return bool(self.prefix)

    def environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        return environment(**{TAG: self.tag}, **extra)

    def start(self, command: Command, log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a server, its output in `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                [*self.prefix, *map(str, command)], cwd=REPO, env=dict(env), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def run(self, command: Command, log: Path, env: Mapping[str, str], timeout: float = 300) -> None:
        """Run a command to its end. Raises SystemExit with the end of the log if it fails."""
        process = self.start(command, log, env)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{command[0]} took longer than {timeout:.0f} s:\n{tail(log)}") from None
        if status:
            raise SystemExit(f"{' '.join(map(str, command))} failed ({status}):\n{tail(log)}")

    def ask(self, command: Command, env: Mapping[str, str], timeout: float = 300) -> str:
        """Standard output of a command. Raises SystemExit if it fails."""
        done = subprocess.run([*self.prefix, *map(str, command)], cwd=REPO, env=dict(env), check=False, text=True,
                              capture_output=True, timeout=timeout)  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed: {done.stderr[-2000:]}")
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """Everything alive that was started here."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(TAG) == self.tag:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def cpu_seconds(self) -> float:
        """CPU time so far of everything alive that was started here."""
        total = 0.0
        for process in self.processes():
            try:
                times = process.cpu_times()
                total += times.user + times.system
            except psutil.Error:
                continue
        return total

    def stop(self) -> None:
        """End everything that was started here."""
        for send in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
            running = self.processes()
            for process in running:
                try:
                    send(process)
                except psutil.Error:
                    continue
            psutil.wait_procs(running, timeout=5)


@contextmanager
def isolated_place() -> Iterator[Place]:
    """A network namespace with only `lo`, if this is root and `ip` works; else the machine's own loopback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the servers would outlive this process
    name = f"springtide-{secrets.token_hex(4)}"
    if os.geteuid() == 0 and shutil.which("ip") and _quiet("ip", "netns", "add", name):
        place = Place(["ip", "netns", "exec", name])
        try:
            if not _quiet("ip", "-n", name, "link", "set", "lo", "up"):
                raise SystemExit("cannot bring up lo in the network namespace")
            yield place
        finally:
            place.stop()
            _quiet("ip", "netns", "delete", name)
        return
    place = Place()
    try:
        yield place
    finally:
        place.stop()


def _quiet(*command: str) -> bool:
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def wait_until_answered(place: Place, url: str, seconds: float, log: Path) -> None:
    """Wait for status 200. Raises SystemExit with the end of the server's log."""
    code = f"import urllib.request; urllib.request.urlopen({url!r}, timeout=2).read()"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if place.isolated:
            command = [*place.prefix, "python3", "-c", code]
            if subprocess.run(command, check=False, capture_output=True).returncode == 0:
                return
        else:
            try:
                urllib.request.urlopen(url, timeout=2).read()
                return
            except (OSError, urllib.error.URLError):
                pass
        time.sleep(0.5)
    raise SystemExit(f"{url} did not answer within {seconds:.0f} s:\n{tail(log)}")
