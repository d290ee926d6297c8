"""How many durable events per second does the event log take? SQLite, and Redis where redis-server is installed.

    python benchmarks/events.py [--seconds 5] [--keep DIR]

Events are appended one by one from 8 and 32 threads, and in batches of 100 from 4, each call waiting until its events
are on disk. `flushes` is the yardstick of the disk: how often a second it makes one small write durable. `read` is one
user's history of 1,000 events, from the store and from the cache of the Ingress.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from harness import describe, machine, scratch, table, write_result
from springtide.errors import SpringtideError
from springtide.local_cluster import free_ports
from springtide.serving.history_cache import HistoryCache
from springtide.serving.store import HistoryStore, open_store

LOADS = ((8, 1), (32, 1), (4, 100))  # threads, events of a call
READS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--keep", type=Path, help="folder for the logs, on the disk to be measured")
    options = parser.parse_args()
    facts = machine()
    with scratch(options.keep) as root:
        found: dict[str, Any] = {"machine": facts, "flushes_per_second": round(flushes(root, options.seconds))}
        for name, opened in (("sqlite", sqlite), ("redis", redis)):
            if name == "redis" and shutil.which("redis-server") is None:
                print("redis-server is not installed (tests/install_redis.sh does it): SQLite only")
                continue
            with opened(root) as url:
                found[name] = measure(url, options.seconds)
    print(describe(facts))
    print(f"{found['flushes_per_second']} flushes per second\n")
    rows = []
    for name in ("sqlite", "redis"):
        for row in found.get(name, {}).get("loads", []):
            rows.append([name, str(row["threads"]), str(row["batch"]), f"{row['per_second']:,.0f}",
                         f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}"])  # fmt: skip
    print(table(["store", "threads", "events a call", "events/s", "p50 ms", "p99 ms"], rows))
    for name in ("sqlite", "redis"):
        if name in found:
            print(f"{name}: a history of 1,000 events in {found[name]['read_ms']:.2f} ms, "
                  f"{found[name]['cached_ms']:.3f} ms from the cache")  # fmt: skip
    print(f"\nwritten to {write_result('events', found)}")


def flushes(root: Path, seconds: float) -> float:
    count, begin = 0, time.perf_counter()
    with (root / "flushes").open("wb", buffering=0) as file:
        while (took := time.perf_counter() - begin) < seconds:
            file.write(b"x" * 100)
            os.fdatasync(file.fileno())
            count += 1
    return count / took


@contextmanager
def sqlite(root: Path) -> Iterator[str]:
    yield str(root / "events.sqlite3")


@contextmanager
def redis(root: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(root), "--save", "",
               "--appendonly", "yes", "--appendfsync", "always"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        url = f"redis://127.0.0.1:{port}/0"
        deadline = time.monotonic() + 20
        while True:
            try:
                open_store(url, timeout_s=1).close()
                break
            except SpringtideError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()


def measure(url: str, seconds: float) -> dict[str, Any]:
    store = open_store(url)
    loads = [load(store, threads, batch, seconds) for threads, batch in LOADS]
    appended = sum(row["events"] for row in loads)
    if store.count() != appended:
        raise SystemExit(f"{url}: {store.count()} events stored, {appended} acknowledged")
    store.append([event(f"read-{n}", "reader", n) for n in range(1000)])
    cache = HistoryCache(store, 1000, 10_000)
    result = {"loads": loads, "read_ms": timed(lambda: store.history("reader")), "cached_ms": timed(
        lambda: cache.read("reader"))}  # fmt: skip
    store.close()
    return result


def load(store: HistoryStore, threads: int, batch: int, seconds: float) -> dict[str, Any]:
    """Append for so long; every thread sends its next call when the one before is acknowledged."""
    until = time.perf_counter() + seconds
    took: list[list[float]] = [[] for _ in range(threads)]

    def work(number: int) -> None:
        call = 0
        while (begin := time.perf_counter()) < until:
            name = f"{threads}-{batch}-{number}-{call}"
            new = store.append([event(f"{name}-{n}", f"user-{(call * batch + n) % 5000}", call) for n in range(batch)])
            assert new == batch
            took[number].append(time.perf_counter() - begin)
            call += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    calls = np.concatenate([np.asarray(times) for times in took])
    p50, p99 = np.percentile(calls, [50, 99]) * 1000
    events = len(calls) * batch
    return {"threads": threads, "batch": batch, "events": events, "per_second": events / (time.perf_counter() - begin),
            "p50_ms": float(p50), "p99_ms": float(p99)}  # fmt: skip


def event(event_id: str, user_id: str, timestamp: int) -> dict[str, Any]:
    return {"event_id": event_id, "user_id": user_id, "item_id": f"item-{timestamp % 997}", "timestamp": timestamp,
            "action": "view"}  # fmt: skip


def timed(work: Callable[[], Any]) -> float:
    """Median milliseconds of a call."""
    took = []
    for _ in range(READS):
        begin = time.perf_counter()
        work()
        took.append(time.perf_counter() - begin)
    return float(np.median(took)) * 1000


if __name__ == "__main__":
    main()
