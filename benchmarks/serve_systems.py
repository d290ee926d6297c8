"""The systems that benchmarks/serve.py compares: how each is started, and how the load is put on it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness import REPO, job
from isolation import Command, Place, wait_until_answered
from springtide.local_cluster import free_ports

TUNED = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
SYSTEMS: dict[str, dict[str, str] | None] = {"fastapi": None, "default": {}, "tuned": TUNED}
ASK = """
import json, sys, urllib.request
for line in open(sys.argv[2], 'rb'):
    request = urllib.request.Request(sys.argv[1], line.strip(), {'Content-Type': 'application/json'})
    print(json.dumps([i['item_id'] for i in json.load(urllib.request.urlopen(request, timeout=20))['items']]))
"""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Running:
    """A system that answers at `url`; `logs` holds what it writes."""

    place: Place
    url: str

    def asked(self, bodies: Path) -> str:
        """The item ids answered to each body."""
        return self.place.ask([sys.executable, "-c", ASK, f"{self.url}/v1/recommend", bodies], {**os.environ})

    def load(self, route: str, bodies: Path, connections: int, seconds: float, rate: float | None = None) -> Figures:
        """What load.py found, with the rate of whole answers and the CPU time of all the system's processes per one."""
        env = {**os.environ}  # without the tag: its CPU time is not the system's
        command: Command = [sys.executable, "benchmarks/load.py", self.url + route, bodies, str(connections),
                            str(seconds), *([] if rate is None else ["--rate", f"{rate:.3f}"])]  # fmt: skip
        cpu = self.place.cpu_seconds()
        result: Figures = json.loads(self.place.ask(command, env).splitlines()[-1])
        result["cpu_ms_per_request"] = (self.place.cpu_seconds() - cpu) * 1e3 / max(1, result["whole"])
        result["requests_per_second"] = result["whole"] / result["seconds"]
        return result


def in_process(workspace: Path, bodies: Path, batch: int, seconds: float) -> Figures:
    """The bare model without HTTP, in a process of its own."""
    command: Command = [sys.executable, "benchmarks/serve_bare.py", workspace / "bundle", "--loop", bodies, str(batch),
                        str(seconds)]  # fmt: skip
    result: Figures = json.loads(Place().ask(command, {**os.environ}).splitlines()[-1])
    result["requests_per_second"] = result["requests"] / result["seconds"]
    return result


@contextmanager
def started(place: Place, root: Path, workspace: Path, name: str, *options: str) -> Iterator[Running]:
    """A system by its name in SYSTEMS, ended afterwards. options: of serve_bare.py."""
    modes = SYSTEMS[name]
    own = _bare(place, root, workspace, options) if modes is None else _springtide(place, root, modes, name)
    with own as url:
        yield Running(place, url)


@contextmanager
def _bare(place: Place, root: Path, workspace: Path, options: tuple[str, ...]) -> Iterator[str]:
    (port,) = free_ports(1)
    log = root / "logs" / "fastapi.log"
    command: Command = [sys.executable, "benchmarks/serve_bare.py", workspace / "bundle", str(port), *options]
    place.start(command, log, place.environment({}))
    url = f"http://127.0.0.1:{port}"
    wait_until_answered(place, f"{url}/readyz", 120, log)
    try:
        yield url
    finally:
        place.stop()


@contextmanager
def _springtide(place: Place, root: Path, modes: dict[str, str], name: str) -> Iterator[str]:
    """A cluster of its own with an event log of its own, in which no event of an earlier load is."""
    gcs, dashboard, http = free_ports(3)
    log = root / "logs" / f"{name}.log"
    session = tempfile.mkdtemp(prefix="stb", dir="/tmp")  # sockets lie in it, and their names have a length limit
    serve = yaml.safe_load((REPO / "serve_configs" / "local.yaml").read_text())
    serve["http_options"]["port"] = http
    serve["applications"][0]["args"]["store"] = f"{session}/history.sqlite3"
    config = root / f"serve-{name}.yaml"
    config.write_text(yaml.safe_dump(serve, sort_keys=False))
    env = place.environment({"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", **modes})
    ray = Path(sys.executable).parent / "ray"
    try:
        options = [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                   f"--num-cpus={max(2, os.cpu_count() or 2)}", f"--object-store-memory={200 << 20}",
                   f"--temp-dir={session}", "--disable-usage-stats"]  # fmt: skip
        place.run([ray, "start", "--head", "--node-ip-address=127.0.0.1", *options], log, env)
        place.run(job("deploy", root / "experiment.yaml", f"serve.config={config}"), log, env)
        wait_until_answered(place, f"http://127.0.0.1:{http}/readyz", 120, log)
        yield f"http://127.0.0.1:{http}"
    finally:
        place.stop()
        shutil.rmtree(session, ignore_errors=True)
