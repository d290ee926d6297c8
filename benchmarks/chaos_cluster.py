"""The cluster that benchmarks/chaos.py breaks: started and deployed to in a network namespace, with what breaks it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from harness import REPO, job, tail
from isolation import Command, Place, wait_until_answered
from springtide.local_cluster import free_ports

sys.path.insert(0, str(REPO / "tests"))

from toy import toy_bundle, toy_settings
from write_workspace import write_workspace

# As README.md recommends: an Ingress that dies over a request costs a second try at another one, not the request, and
# a proxy that dies is missed within a second; Serve's default looks three times, 10 s apart.
TUNED = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).parent / "springtide-haproxy"),
}
PROXY = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25"}
# Ray gives its workers the lowest priority but four. Callers would be served first on the cores they share with them.
PRIORITY = {"RAY_worker_niceness": "0"}
SCORER = "ServeReplica:springtide:Scorer"
READY_S = 120
LOST = """
import json, sys
from springtide.serving.store import open_store
store, wanted, cursor = open_store(sys.argv[1]), set(json.load(open(sys.argv[2]))['acknowledged']), 0
while True:
    events, after = store.since(cursor)
    wanted.difference_update(event['event_id'] for event in events)
    if after == cursor:
        break
    cursor = after
print(len(wanted))
"""
Json = dict[str, Any]


@dataclass
class Cluster:
    """A running cluster with Springtide on it. `root` holds its workspace, logs and configurations."""

    place: Place
    root: Path
    session: Path
    env: dict[str, str]
    gcs: int
    http: int
    redis_port: int
    full: Path | None  # a small file system, or None where none could be mounted
    config: Json
    store: str
    deployed: Json = field(default_factory=dict)
    nodes: list[list[psutil.Process]] = field(default_factory=list)  # raylets beside the head's

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    @property
    def log(self) -> Path:
        return self.root / "logs" / "cluster.log"

    # ------------------------------------------------------------ Springtide
    def deploy(self, config: Json, timeout: float = 300) -> None:
        """Apply a Serve configuration by the deploy job. Raises SystemExit with its log if it fails."""
        self.place.run(self._deploying(config), self.log, self.env, timeout)
        self.deployed = config

    def deploy_refused(self, config: Json, reason: str) -> None:
        """Apply a configuration that must be refused. Raises SystemExit if it is not, or not for this reason."""
        if self.place.start(self._deploying(config), self.log, self.env).wait(300) == 0:
            raise SystemExit("a bad bundle was deployed without a word")
        if reason not in (said := tail(self.log, 30)):
            raise SystemExit(f"the bad bundle was refused, but not with {reason!r}:\n{said}")

    def _deploying(self, config: Json) -> Command:
        path = self.root / "serve.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return job("deploy", self.root / "experiment.yaml", f"serve.config={path}")

    def with_store(self, store: str) -> Json:
        """The configuration over another event log."""
        config = deepcopy(self.config)
        config["applications"][0]["args"]["store"] = store
        return config

    def train_again(self, seed: int) -> None:
        toy_bundle(self.root / "workspace", seed=seed)

    def wait_ready(self) -> None:
        wait_until_answered(self.place, f"{self.url}/readyz", READY_S, self.log)

    def lost(self, acknowledged: Path) -> int:
        """How many acknowledged events the event log does not hold."""
        store = self.deployed["applications"][0]["args"]["store"]
        return int(self.place.ask([sys.executable, "-c", LOST, store, acknowledged], self.env))

    # ------------------------------------------------------------ what breaks
    def kill(self, title: str, place: int = 0) -> None:
        """kill -9 of one process whose command line holds `title`: of the oldest, or that one of them by age. Raises
        SystemExit if there is none."""
        found = [process for process in self.processes() if title in process[1]]
        if not found:
            raise SystemExit(f"nothing called {title} runs among {sorted({name[:60] for _, name in self.processes()})}")
        sorted((process for process, _ in found), key=lambda process: process.create_time())[place].kill()

    def processes(self) -> list[tuple[psutil.Process, str]]:
        """Everything in the namespace, with its command line."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.place.prefix[-1]], check=True, capture_output=True, text=True
        )
        found = []
        for pid in listed.stdout.split():
            try:
                process = psutil.Process(int(pid))
                found.append((process, " ".join(process.cmdline())))
            except psutil.Error:
                continue
        return found

    def start_redis(self) -> None:
        folder = self.root / "redis"
        folder.mkdir(exist_ok=True)
        options = ["--bind", "127.0.0.1", "--port", str(self.redis_port), "--dir", folder, "--save", "",
                   "--appendonly", "yes", "--appendfsync", "always"]  # fmt: skip
        self.place.start(["redis-server", *options], self.root / "logs" / "redis.log", self.env)

    def stop_redis(self) -> None:
        for process, title in self.processes():
            if "redis-server" in title:
                process.terminate()
                process.wait(20)

    def add_node(self) -> None:
        """A second raylet with room for one Scorer."""
        before = {process.pid for process, _ in self.processes()}
        agent, metrics = free_ports(2)
        options = [f"--address=127.0.0.1:{self.gcs}", "--node-ip-address=127.0.0.1", "--num-cpus=1",
                   f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
                   f"--object-store-memory={100 << 20}", "--disable-usage-stats"]  # fmt: skip
        self.place.run([_ray(), "start", *options], self.log, self.env)
        self.nodes.append([p for p, title in self.processes() if p.pid not in before and "raylet" in title])

    def kill_node(self) -> None:
        """kill -9 of the raylet added last and of everything that it started. Raises SystemExit if no Scorer was."""
        family = {process for raylet in self.nodes.pop() for process in [*raylet.children(recursive=True), raylet]}
        if not any(process in family and SCORER in title for process, title in self.processes()):
            raise SystemExit("no Scorer ran on the node that was to be lost")
        for process in family:
            with suppress(psutil.Error):
                process.kill()


def _ray() -> Path:
    return Path(sys.executable).parent / "ray"


def configuration(http: int, store: str) -> Json:
    """serve_configs/local.yaml with two of what answers and one TextEncoder."""
    config: Json = yaml.safe_load((REPO / "serve_configs" / "local.yaml").read_text())
    config["http_options"]["port"] = http
    config["applications"][0]["args"]["store"] = store
    for deployment in config["applications"][0]["deployments"]:
        if deployment["name"] in ("Ingress", "Scorer"):
            deployment["num_replicas"] = 2
            deployment["max_surge_percent"] = 50
    return config


@contextmanager
def small_disk(folder: Path, mebibytes: int = 24) -> Iterator[Path | None]:
    """A file system of its own that is quickly full; None where it cannot be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "springtide", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


@contextmanager
def running(place: Place, root: Path, full: Path | None, haproxy: bool) -> Iterator[Cluster]:
    """A cluster with Springtide deployed to it, over a small untrained bundle."""
    workspace = root / "workspace"
    if not workspace.exists():
        write_workspace(workspace)
        toy_bundle(workspace)
        settings = json.loads(toy_settings(workspace).model_dump_json())
        (root / "experiment.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    gcs, dashboard, http, redis_port = free_ports(4)
    session = Path(tempfile.mkdtemp(prefix="stc", dir="/tmp"))  # sockets lie in it, and their names have a limit
    files = {"RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{session}/haproxy/haproxy.cfg",
             "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{session}/haproxy/admin.sock",
             "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{session}/haproxy",
             "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{session}/haproxy/server-state"}  # fmt: skip
    modes = {**PRIORITY, **PROXY, **({**TUNED, **files} if haproxy else {})}
    env = place.environment({"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", **modes})
    store = str(workspace / "history.sqlite3")
    cluster = Cluster(place, root, session, env, gcs, http, redis_port, full, configuration(http, store), store)
    try:
        options = [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=4",
                   f"--object-store-memory={200 << 20}", f"--temp-dir={session}", "--disable-usage-stats"]  # fmt: skip
        place.run([_ray(), "start", "--head", "--node-ip-address=127.0.0.1", *options], cluster.log, env)
        cluster.deploy(cluster.config)
        yield cluster
    finally:
        for process, _ in cluster.processes() if place.isolated else []:
            try:
                process.kill()
            except psutil.Error:
                continue
        place.stop()
        shutil.rmtree(session, ignore_errors=True)
