"""What does Serve cost? POST /v1/recommend and /v1/events: Springtide, and the bare model behind FastAPI and uvicorn.

    python benchmarks/serve.py [--rounds 2] [--seconds 4] [--connections 1 8 32] [--keep DIR]
    python benchmarks/serve.py --pairs 5 [--seconds 3]     # FastAPI and `tuned` alone, side by side

Systems with the same bundle, histories and load generator, one after the other in every round: the model in a loop
without HTTP (`in process`, in batches of as many requests as others have connections), `fastapi` (one process),
`default` (Serve's own proxy) and `tuned` (HAProxy and throughput mode). Recommendations are asked by a history in the
request, by a stored user, with queries that are all new, and with queries that repeat. Then, at half of the most
requests per second that the system answered so, requests come at a fixed rate, and the 99th percentile counts from when
each was due. Figures are medians of the rounds. CPU is that of all the system's processes, the cluster's own included;
the load generator runs on the same cores and is not in it. Before any load all systems must give the same answers.

Minutes lie between the systems of a round, in which shared machines change their speed. With --pairs both run all the
time and are asked in turn, so that it strikes both; an idle cluster takes some hundredths of a core meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from harness import REPO, describe, job, machine, run_measured, scratch, table, write_experiment, write_result
from isolation import Place, isolated_place
from serve_requests import KINDS, Requests, write_lines
from serve_systems import SYSTEMS, Figures, Running, in_process, started
from synthetic import write_log

CHECKED = 10  # answers compared before the load
HALF = "half load"
EVENTS = {"events singly": 1, "events by 100": 100}  # in a request
BARE = ("in process", "fastapi")  # without an event log: no stored users, no events
TOLD = {"history": "by history", "user": "by stored user", "query": "new query", "repeated": "repeated query"}
Rounds = dict[str, list[dict[str, Figures]]]  # system -> of each round: "kind, connections" -> figures


def make_bundle(root: Path, items: int) -> Path:
    """Prepare, embed and train on a synthetic log; an epoch is enough to be served. Returns the workspace."""
    log, workspace = root / "log", root / "workspace"
    catalogue = {"paths": str(log / "items.parquet"), "columns": {"title": "title"}}
    config = write_experiment(root / "experiment.yaml", workspace, log, "parquet", data={"items": catalogue},
                              train={"epochs": 1, "workers": 1})  # fmt: skip
    if not (workspace / "bundle").exists():
        if not log.exists():
            write_log(log, events=items * 10, users=items // 2, items=items)
        for stage in ("prepare", "embed", "train"):
            print(f"  {stage} ...", flush=True)
            run_measured(job(stage, config), root / "logs" / f"{stage}.log")
    return workspace


def install_wrk() -> None:
    """Get wrk if this is root on Debian; without it, load.py falls back to aiohttp."""
    if not shutil.which("wrk") and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["apt-get", "-qq", "update"], ["apt-get", "-qq", "install", "-y", "wrk"]):
            subprocess.run(command, check=False, capture_output=True)


def measure(
    name: str, running: Running, requests: Requests, root: Path, args: argparse.Namespace
) -> dict[str, Figures]:
    """Every kind of request at each number of connections, then at half of the most; events last."""
    found: dict[str, Figures] = {}
    for kind in (kind for kind in args.kinds if not (kind == "user" and name in BARE)):
        for number, count in enumerate(args.connections):
            warm = write_lines(root / "warm.jsonl", requests.recommend(kind, 1000 + number))
            bodies = write_lines(root / "bodies.jsonl", requests.recommend(kind, number))
            running.load("/v1/recommend", warm, count, 1)
            found[f"{kind}, {count}"] = running.load("/v1/recommend", bodies, count, args.seconds)
        most = max(found[f"{kind}, {count}"]["requests_per_second"] for count in args.connections)
        bodies = write_lines(root / "bodies.jsonl", requests.recommend(kind, len(args.connections)))
        paced = running.load("/v1/recommend", bodies, max(args.connections), args.seconds, most / 2)
        found[f"{kind}, {HALF}"] = paced
    for kind, batch in EVENTS.items() if name not in BARE else ():
        bodies = write_lines(root / "events.jsonl", requests.events(batch, 200))
        for count in (count for count in args.connections if count > 1):
            result = running.load("/v1/events", bodies, count, args.seconds)
            result["events_per_second"] = result["whole"] * batch / result["seconds"]
            found[f"{kind}, {count}"] = result
    return found


def run_rounds(place: Place, root: Path, workspace: Path, args: argparse.Namespace) -> Rounds:
    """All systems in turn, as often as asked. Raises SystemExit if their answers differ."""
    requests = Requests(workspace, args.histories)
    checked = write_lines(root / "checked.jsonl", list(requests.recommend("history", 0))[:CHECKED])
    runs: Rounds = {name: [] for name in ("in process", *args.systems)}
    answers: dict[str, str] = {}
    for round_ in range(args.rounds):
        runs["in process"].append(alone(workspace, requests, root, args))
        for name in args.systems:
            begin = time.perf_counter()
            with started(place, root, workspace, name) as running:
                up = time.perf_counter() - begin
                answers[name] = running.asked(checked)
                runs[name].append(measure(name, running, requests, root, args))
            rates = ", ".join(f"{what}: {r['requests_per_second']:.0f}/s" for what, r in runs[name][-1].items())
            print(f"  round {round_ + 1} {name} (up in {up:.0f} s)  {rates}", flush=True)
        if len(set(answers.values())) > 1:
            raise SystemExit(f"the systems recommend different items: {answers}")
    return runs


def in_pairs(root: Path, workspace: Path, args: argparse.Namespace) -> list[list[str]]:
    """FastAPI and `tuned`, asked one right after the other: medians, and the ratio of each pair's rates."""
    requests, rows = Requests(workspace, args.histories), []
    with (
        isolated_place() as first,
        isolated_place() as second,
        started(first, root, workspace, "fastapi", *["--inline"] * args.inline) as bare,
        started(second, root, workspace, "tuned") as own,
    ):
        for kind in ("history", "query"):
            for count in args.connections:
                found: list[tuple[Figures, Figures]] = []
                for pair in range(args.pairs + 1):  # the first one warms up
                    bodies = write_lines(root / "bodies.jsonl", requests.recommend(kind, 100 * count + pair))
                    one, other = (each.load("/v1/recommend", bodies, count, args.seconds) for each in (bare, own))
                    found.append((one, other))
                ratios = [other["requests_per_second"] / one["requests_per_second"] for one, other in found[1:]]
                row = [f"{TOLD[kind]}, {count}"]
                for side in range(2):
                    row += [
                        f"{statistics.median(pair[side][key] for pair in found[1:]):.1f}"
                        for key in ("requests_per_second", "p50_ms", "p99_ms", "cpu_ms_per_request")
                    ]
                rows.append([*row, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"])
                print("  " + "  ".join(rows[-1]), flush=True)
    return rows


def alone(workspace: Path, requests: Requests, root: Path, args: argparse.Namespace) -> dict[str, Figures]:
    """The model in a loop, without HTTP."""
    bodies = write_lines(root / "bodies.jsonl", requests.recommend("history", 0))
    return {f"history, {batch}": in_process(workspace, bodies, batch, args.seconds) for batch in args.connections}


def summarise(runs: list[dict[str, Figures]]) -> dict[str, Figures]:
    """Medians over the rounds."""
    return {
        what: {
            key: round(statistics.median(run[what][key] for run in runs), 3)
            for key, value in figures.items()
            if isinstance(value, (int, float))
        }
        for what, figures in runs[0].items()
    }


def recommend_rows(summary: dict[str, dict[str, Figures]], args: argparse.Namespace) -> list[list[str]]:
    """A row for each kind, number of connections and system; the last column compares with FastAPI."""
    rows = []
    for kind in args.kinds:
        for count in [*args.connections, HALF]:
            base = summary.get("fastapi", {}).get(f"{kind}, {count}")
            for name, figures in summary.items():
                if (own := figures.get(f"{kind}, {count}")) is None:
                    continue
                times = [f"{own[key]:.1f}" for key in ("p50_ms", "p99_ms", "cpu_ms_per_request")]
                ratio = (
                    f"{own['requests_per_second'] / base['requests_per_second']:.2f}" if base and count != HALF else ""
                )
                rows.append([f"{TOLD[kind]}, {count}, {name}", f"{own['requests_per_second']:,.0f}", *times,
                             f"{own['errors']:.0f}", ratio])  # fmt: skip
    return rows


def event_rows(summary: dict[str, dict[str, Figures]]) -> list[list[str]]:
    return [
        [f"{what} connections, {name}", f"{own['events_per_second']:,.0f}", f"{own['p50_ms']:.1f}",
         f"{own['p99_ms']:.1f}", f"{own['errors']:.0f}"]
        for name, figures in summary.items()
        for what, own in figures.items()
        if "events_per_second" in own
    ]  # fmt: skip


def text_rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [[name, *(f"{value:,}" for value in figures.values())] for name, figures in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=0, help="ask FastAPI and `tuned` in turn, so often, and stop")
    parser.add_argument("--inline", action="store_true", help="with --pairs: FastAPI scores each request by itself")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--items", type=int, default=20_000, help="of the made-up log, before k-core")
    parser.add_argument("--histories", type=int, default=500)
    parser.add_argument("--keep", type=Path, help="folder for logs and data, kept afterwards")
    args = parser.parse_args()
    install_wrk()
    facts = machine()
    with scratch(args.keep) as root:
        workspace = make_bundle(root, args.items)
        catalogue = pq.read_metadata(workspace / "bundle" / "items.parquet").num_rows  # without those of too few events
        if args.pairs:
            rows = in_pairs(root, workspace, args)
            sides = [f"{side} {key}" for side in ("fastapi", "tuned") for key in ("/s", "p50 ms", "p99 ms", "CPU ms")]
            print(f"\n{describe(facts)}; {catalogue:,} items, {args.pairs} pairs of {args.seconds:g} s")
            print(table(["POST /v1/recommend, connections", *sides, "tuned/fastapi", "least-most"], rows))
            print(f"written to {write_result('serve-pairs', {'machine': facts, 'rows': rows}).relative_to(REPO)}")
            return
        with isolated_place() as place:
            if not place.isolated:
                print("note: no network namespace (not root): Ray's ports are open on every interface while this runs")
            runs = run_rounds(place, root, workspace, args)
            isolated = place.isolated
        texts = json.loads(Place().ask([sys.executable, "benchmarks/serve_text.py"], {**os.environ}))
    facts["load_after"] = [round(value, 2) for value in os.getloadavg()]
    summary = {name: summarise(own) for name, own in runs.items()}
    print(f"\n{describe(facts)}; load afterwards {facts['load_after'][0]:g}; "
          f"{'network namespace' if isolated else 'loopback'}; {catalogue:,} items, {args.rounds} rounds")  # fmt: skip
    head = ["requests/s", "p50 ms", "p99 ms", "CPU ms/request", "errors", "of fastapi"]
    print(table(["POST /v1/recommend, connections", *head], recommend_rows(summary, args)))
    print("\n" + table(["POST /v1/events", "events/s", "p50 ms", "p99 ms", "errors"], event_rows(summary)))
    columns = list(next(iter(texts.values())))
    print("\n" + table(["texts per CPU second, tokens x together", *columns], text_rows(texts)))
    results = {"machine": facts, "isolated": isolated, "items": catalogue, "systems": summary, "texts": texts,
               "rounds": runs}  # fmt: skip
    print(f"written to {write_result('serve', results).relative_to(REPO)}")


if __name__ == "__main__":
    main()
