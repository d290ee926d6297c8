"""A real Ray cluster of one node on this machine, with token authentication and ports of its own, and its exact end.

`ray stop` would kill every Ray on the machine; this stops the processes that it started and no others.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from springtide.cluster import SMALL_MACHINE
from springtide.errors import SpringtideError

TAG = "SPRINGTIDE_CLUSTER"  # in the environment of all that a cluster starts: the folder it lies in
START_SECONDS = 120
STOP_SECONDS = 20


@dataclass(frozen=True)
class LocalCluster:
    """Where the cluster is and what a client needs in its environment."""

    address: str  # of the GCS, for RAY_ADDRESS
    dashboard: str  # http://127.0.0.1:port, for `ray job submit --address`
    environment: dict[str, str]  # the whole environment of a client process, token included
    python: str
    temp_dir: Path

    def ray(self, *arguments: str) -> list[str]:
        """The command line of Ray's own CLI in this cluster's Python."""
        return [self.python, "-m", "ray.scripts.scripts", *arguments]


@contextmanager
def local_cluster(
    cpus: int | None = None,
    environment: Mapping[str, str] | None = None,
    python: str = sys.executable,
    prefix: Sequence[str] = (),
    keep: bool = False,
) -> Iterator[LocalCluster]:
    """Start a head node, yield it and stop it again; with `keep` it goes on, unless an error ended the block.

    cpus: logical CPUs (default: 4 or the machine's, if more); environment: added to every process; python: whose
    packages the workers have; prefix: put before the command, such as `ip netns exec NAME`.
    Raises SpringtideError if it does not come up.
    """
    temp_dir = Path(tempfile.mkdtemp(prefix="springtide-", dir="/tmp"))  # short: socket names have a length limit
    gcs, dashboard, agent, metrics, client = free_ports(5)
    # The scripts of the chosen Python come first, so that `python` in a job's entry point is that Python.
    path = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])
    variables = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        **SMALL_MACHINE,
        "PATH": path,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **(environment or {}),
    }
    client_variables = {**variables, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    cluster = LocalCluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", client_variables, python, temp_dir)
    options = {
        "node-ip-address": "127.0.0.1",
        "port": gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "metrics-export-port": metrics,
        "ray-client-server-port": client,
        "num-cpus": cpus or max(4, os.cpu_count() or 1),
        "object-store-memory": 500 << 20,
        "temp-dir": temp_dir,
    }
    command = [*prefix, *cluster.ray("start", "--head", "--disable-usage-stats")]
    command += [f"--{name}={value}" for name, value in options.items()]
    log = temp_dir.with_suffix(".log")
    kept = False
    try:
        with log.open("w") as output:
            started = subprocess.run(
                command, env={**variables, TAG: str(temp_dir)}, stdout=output, stderr=subprocess.STDOUT, check=False,
                timeout=START_SECONDS,
            )  # fmt: skip
        if started.returncode:
            raise SpringtideError(f"ray start failed: {' '.join(log.read_text().split())[-400:]}")
        yield cluster
        kept = keep
    except subprocess.TimeoutExpired:
        raise SpringtideError(f"ray start did not finish within {START_SECONDS} s; see {log}") from None
    finally:
        if not kept:
            stop(temp_dir)
            log.unlink(missing_ok=True)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def stop(temp_dir: Path) -> None:
    """End every process of the cluster that was started with this temp dir, then remove the folder."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + STOP_SECONDS
        while pids := _pids_of(temp_dir):
            for pid in pids:
                try:
                    os.kill(pid, name)
                except ProcessLookupError:
                    continue
            if time.monotonic() > deadline:
                break
            time.sleep(0.3)
    shutil.rmtree(temp_dir, ignore_errors=True)


def _pids_of(temp_dir: Path) -> list[int]:
    """Processes that name the folder in their command line or carry it as TAG, and the descendants of those.

    Ray's client server names no folder and is nobody's child.
    """
    tag = f"{TAG}={temp_dir}".encode()
    parents: dict[int, int] = {}
    named: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        try:
            line = (entry / "cmdline").read_bytes()
            tagged = tag in (entry / "environ").read_bytes().split(b"\0")
            status = (entry / "stat").read_text()
        except OSError:
            continue
        fields = status.rpartition(")")[2].split()
        if fields[0] == "Z":
            continue
        parents[pid] = int(fields[1])
        if (tagged or str(temp_dir).encode() in line) and pid != os.getpid():
            named.add(pid)
    found = set(named)
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found and pid not in found}
        grown = bool(more)
        found |= more
    return sorted(found - {os.getpid()})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("local_cluster: give the folder of the cluster that is to end, as its start printed it")
    stop(Path(sys.argv[1]))
