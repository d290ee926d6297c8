"""What does Serve cost? POST /v1/recommend by history: Springtide, and the bare model behind FastAPI and uvicorn.

    python benchmarks/serve.py [--rounds 2] [--seconds 5] [--connections 1 8 32] [--keep DIR]

Three systems, the same bundle, histories and load generator, one after the other in every round: `bare` (one process),
`serve` (default proxy), `tuned` (cluster started with HAProxy and the throughput mode). Requests per second and
latencies are of the median round. CPU is that of all the system's processes, the cluster's own included; the load
generator runs on the same cores and is not in it. Before any load, all systems must give the same answers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from harness import REPO, describe, job, machine, run_measured, scratch, table, write_experiment, write_result
from isolation import Command, Place, isolated_place, wait_until_answered
from springtide.local_cluster import free_ports
from synthetic import write_log

TUNED = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
SYSTEMS: dict[str, dict[str, str] | None] = {"bare": None, "serve": {}, "tuned": TUNED}
CHECKED = 10  # answers compared before the load
LONGEST = 100  # events of a history that is sent
ASK = """
import json, sys, urllib.request
for line in open(sys.argv[2], 'rb'):
    request = urllib.request.Request(sys.argv[1], line.strip(), {'Content-Type': 'application/json'})
    print(json.dumps([i['item_id'] for i in json.load(urllib.request.urlopen(request, timeout=20))['items']]))
"""


def make_bundle(root: Path, items: int) -> Path:
    """Prepare and train on a synthetic log; an epoch is enough to be served. Returns the workspace."""
    log, workspace = root / "log", root / "workspace"
    config = write_experiment(root / "experiment.yaml", workspace, log, "parquet", model={"text_dim": 0},
                              train={"epochs": 1, "workers": 1})  # fmt: skip
    if not (workspace / "bundle").exists():
        if not log.exists():
            write_log(log, events=items * 10, users=items // 2, items=items)
        for stage in ("prepare", "train"):
            print(f"  {stage} ...", flush=True)
            run_measured(job(stage, config), root / "logs" / f"{stage}.log")
    return workspace


def write_bodies(workspace: Path, path: Path, requests: int, seed: int = 0) -> None:
    """Requests with the histories of random users, a line each; and the first CHECKED beside them."""
    prepared = workspace / "prepared"
    names = pl.read_parquet(prepared / "items" / "*.parquet").sort("item")["item_id"].to_list()
    actions = json.loads((prepared / "vocabulary.json").read_text())["actions"]
    users = pl.read_parquet(prepared / "sequences" / "*.parquet").select("items", "actions", "timestamps")
    chosen = np.random.default_rng(seed).choice(len(users), min(requests, len(users)), replace=False)
    lines = []
    for items, kinds, times in users[np.sort(chosen).tolist()].iter_rows():
        events = [{"item_id": names[i], "action": actions[a], "timestamp": t}
                  for i, a, t in zip(items[-LONGEST:], kinds[-LONGEST:], times[-LONGEST:], strict=True)]  # fmt: skip
        lines.append(json.dumps({"history": events, "k": 10}, separators=(",", ":")))
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".check").write_text("\n".join(lines[:CHECKED]) + "\n")


@contextmanager
def bare(place: Place, root: Path, workspace: Path) -> Iterator[str]:
    """The bare model; yields its address."""
    (port,) = free_ports(1)
    log = root / "logs" / "bare.log"
    command: Command = [sys.executable, "benchmarks/serve_bare.py", workspace / "bundle", str(port)]
    place.start(command, log, place.environment({}))
    url = f"http://127.0.0.1:{port}"
    wait_until_answered(place, f"{url}/readyz", 60, log)
    try:
        yield url
    finally:
        place.stop()


@contextmanager
def springtide(place: Place, root: Path, workspace: Path, modes: dict[str, str], name: str) -> Iterator[str]:
    """A cluster of its own with Springtide on Serve; yields its address."""
    gcs, dashboard, http = free_ports(3)
    log = root / "logs" / f"{name}.log"
    serve = yaml.safe_load((REPO / "serve_configs" / "local.yaml").read_text())
    serve["http_options"]["port"] = http
    config = root / f"serve-{name}.yaml"
    config.write_text(yaml.safe_dump(serve, sort_keys=False))
    env = place.environment({"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", **modes})
    session = tempfile.mkdtemp(prefix="stb", dir="/tmp")  # sockets lie in it, and their names have a length limit
    ray = Path(sys.executable).parent / "ray"
    try:
        options = [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                   f"--num-cpus={max(2, os.cpu_count() or 2)}", f"--object-store-memory={200 << 20}",
                   f"--temp-dir={session}", "--disable-usage-stats"]  # fmt: skip
        place.run([ray, "start", "--head", "--node-ip-address=127.0.0.1", *options], log, env)
        place.run(job("deploy", root / "experiment.yaml", f"serve.config={config}"), log, env)
        yield f"http://127.0.0.1:{http}"
    finally:
        place.stop()
        shutil.rmtree(session, ignore_errors=True)


def measure(place: Place, url: str, bodies: Path, connections: list[int], seconds: float) -> dict[int, dict[str, Any]]:
    """Warm up, then load at each number of connections."""
    env = {**os.environ}  # without the tag: its CPU time is not the system's
    found = {}
    for count in connections:
        command: Command = [sys.executable, "benchmarks/load.py", f"{url}/v1/recommend", bodies, str(count)]
        place.ask([*command, "1"], env)
        cpu = place.cpu_seconds()
        result = json.loads(place.ask([*command, str(seconds)], env).splitlines()[-1])
        result["cpu_ms_per_request"] = (place.cpu_seconds() - cpu) * 1e3 / max(1, result["requests"])
        result["requests_per_second"] = result["requests"] / result["seconds"]
        found[count] = result
    return found


def install_wrk() -> None:
    """Get wrk if this is root on Debian; without it, load.py falls back to aiohttp."""
    if not shutil.which("wrk") and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["apt-get", "-qq", "update"], ["apt-get", "-qq", "install", "-y", "wrk"]):
            subprocess.run(command, check=False, capture_output=True)


def run_rounds(place: Place, root: Path, workspace: Path, args: argparse.Namespace) -> dict[str, list[dict[int, Any]]]:
    """All systems in turn, as often as asked. Raises SystemExit if their answers differ."""
    bodies = root / "bodies.jsonl"
    write_bodies(workspace, bodies, args.histories)
    runs: dict[str, list[dict[int, Any]]] = {name: [] for name in args.systems}
    answers: dict[str, str] = {}
    for round_ in range(args.rounds):
        for name in args.systems:
            modes = SYSTEMS[name]
            begin = time.perf_counter()
            server = bare(place, root, workspace) if modes is None else springtide(place, root, workspace, modes, name)
            with server as url:
                started = time.perf_counter() - begin
                command: Command = [sys.executable, "-c", ASK, f"{url}/v1/recommend", bodies.with_suffix(".check")]
                answers[name] = place.ask(command, {**os.environ})
                runs[name].append(measure(place, url, bodies, args.connections, args.seconds))
            rates = ", ".join(f"{c}: {r['requests_per_second']:.0f}/s" for c, r in runs[name][-1].items())
            print(f"  round {round_ + 1} {name} (up in {started:.0f} s)  {rates}", flush=True)
        if len(set(answers.values())) > 1:
            raise SystemExit(f"the systems recommend different items: {answers}")
    return runs


def summarise(runs: list[dict[int, Any]], connections: int) -> dict[str, float]:
    """Medians over the rounds."""
    keys = ("requests_per_second", "p50_ms", "p99_ms", "cpu_ms_per_request", "errors")
    return {key: round(statistics.median(run[connections][key] for run in runs), 3) for key in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--items", type=int, default=20_000, help="size of the synthetic catalogue")
    parser.add_argument("--histories", type=int, default=500)
    parser.add_argument("--keep", type=Path, help="folder for logs and data, kept afterwards")
    args = parser.parse_args()
    install_wrk()
    facts = machine()
    with scratch(args.keep) as root:
        workspace = make_bundle(root, args.items)
        with isolated_place() as place:
            if not place.isolated:
                print("note: no network namespace (not root): Ray's ports are open on every interface while this runs")
            runs = run_rounds(place, root, workspace, args)
            isolated = place.isolated
    results: dict[str, Any] = {"machine": facts, "isolated": isolated, "items": args.items, "systems": {}}
    rows = []
    for count in args.connections:
        base = summarise(runs["bare"], count) if "bare" in runs else None
        for name, own in runs.items():
            figures = summarise(own, count)
            ratio = figures["requests_per_second"] / base["requests_per_second"] if base else float("nan")
            results["systems"].setdefault(name, {})[count] = {**figures, "ratio": round(ratio, 3)}
            times = [f"{figures[key]:.1f}" for key in ("p50_ms", "p99_ms", "cpu_ms_per_request")]
            rows.append([f"{count} connections, {name}", f"{figures['requests_per_second']:,.0f}", *times,
                         f"{figures['errors']:.0f}", f"{ratio:.2f}"])  # fmt: skip
    results["rounds"] = runs
    print(f"\n{describe(facts)}; {'network namespace' if isolated else 'loopback'}; {args.items:,} items")
    print(table(["POST /v1/recommend", "requests/s", "p50 ms", "p99 ms", "CPU ms/request", "errors", "ratio"], rows))
    print(f"written to {write_result('serve', results).relative_to(REPO)}")


if __name__ == "__main__":
    main()
