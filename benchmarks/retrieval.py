"""How long does one recommendation from a large catalogue take, on one core and without HTTP?

    python benchmarks/retrieval.py [--items 1000000] [--requests 200] [--text 384]

A made-up model of the default shape (dim 64, 128 text components, every counting channel, 256 successors of the popular
items) over a catalogue whose popularity falls like Zipf's answers through the same Engine as the Scorer, one request at
a time. Weights are random: they do not change what is computed. Wall and CPU milliseconds; on a machine that others use
the CPU figures are the ones to compare.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before numpy is imported, or its products take every core.
os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import numpy as np
import psutil
import scipy.sparse as sp
import torch

from harness import describe, machine, table, write_result
from springtide.bundle import Bundle
from springtide.config import parse_settings
from springtide.model.fusion import FusionModel
from springtide.model.recommender import Recommender
from springtide.model.tables import Tables
from springtide.serving.engine import Engine, ScoreRequest
from springtide.text.features import TextFeatures

END_MS = 1_700_000_000_000
LENDERS, LENDING = 8, 20_000  # as model/borrowing.py: of an item, and items that may lend
CATEGORIES = 20
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=200, help="of each kind")
    parser.add_argument("--text", type=int, default=384, help="width of the encoder's vectors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    engine, popularity = make_engine(options.items, options.text, rng)
    engine.warm_up()
    memory = {"resident_gib": round(psutil.Process().memory_info().rss / 2**30, 2)}
    print(describe(facts))
    print(
        f"{options.items:,} items, made in {time.perf_counter() - began:.0f} s; {memory['resident_gib']} GiB resident"
    )

    def history(length: int) -> list[Json]:
        items = rng.choice(options.items, length, p=popularity / popularity.sum())
        times = END_MS - np.cumsum(rng.integers(1000, 10**7, length))[::-1]
        return [{"item_id": f"i{i}", "timestamp": int(t), "action": "view"} for i, t in zip(items, times, strict=True)]

    query = rng.normal(size=options.text).astype(np.float32)
    query /= np.linalg.norm(query)
    kinds: dict[str, Callable[[], ScoreRequest]] = {
        "history of 20": lambda: ScoreRequest(history(20), now=END_MS + 1),
        "history of 200": lambda: ScoreRequest(history(200), now=END_MS + 1),
        "one category": lambda: ScoreRequest(history(20), categories=("c3",), now=END_MS + 1),
        "unseen items only": lambda: ScoreRequest(history(20), exclude_seen=True, now=END_MS + 1),
        "query": lambda: ScoreRequest([], query, now=END_MS + 1),
        "history and query": lambda: ScoreRequest(history(20), query, now=END_MS + 1),
    }
    measured = {name: measure(engine, [make() for _ in range(options.requests)]) for name, make in kinds.items()}
    memory["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    columns = ("p50_ms", "p99_ms", "cpu_p50_ms", "cpu_p99_ms")
    rows = [[name, *(f"{found[column]:.1f}" for column in columns)] for name, found in measured.items()]
    print(table(["request", "p50 ms", "p99 ms", "CPU p50", "CPU p99"], rows))
    print(f"peak of the process, the making included: {memory['peak_gib']} GiB")
    print(write_result("retrieval", {"machine": facts, "items": options.items, "memory": memory, "requests": measured}))


def measure(engine: Engine, requests: list[ScoreRequest]) -> dict[str, float]:
    wall, cpu = [], []
    for request in requests:
        begin, busy = time.perf_counter(), time.process_time()
        (answer,) = engine.score([request])
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - busy)
        if not isinstance(answer, dict) or len(answer["items"]) != request.k:
            raise SystemExit(f"not an answer of {request.k} items: {answer}")
    found = {}
    for name, seconds in (("", wall), ("cpu_", cpu)):
        found |= {f"{name}p{p}_ms": round(1000 * float(np.percentile(seconds, p)), 2) for p in (50, 99)}
    return found


def make_engine(items: int, text_width: int, rng: np.random.Generator) -> tuple[Engine, np.ndarray]:
    """The engine and the items' popularity [I]."""
    data = {"events": {"paths": "none.csv"}, "exclude_seen": False}
    model_config = {"dim": 64, "text_dim": 128}
    settings = parse_settings({"name": "retrieval", "workspace": "none", "data": data, "model": model_config})
    popularity = 1 + (3e5 / (rng.permutation(items) + 5)).astype(np.int64)
    features = rng.standard_normal((items, 128), np.float32)
    torch.manual_seed(0)
    model = FusionModel(settings.model, 2, torch.from_numpy(features), torch.ones(items, dtype=torch.bool),
                        torch.from_numpy(popularity.copy()))  # fmt: skip
    tables = make_tables(popularity, settings.model.memory_neighbours, settings.model.neighbour_items, rng)
    tables.fill(model)
    texts = rng.standard_normal((items, text_width), np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    ids = [f"i{row}" for row in range(items)]
    categories = [[f"c{row % CATEGORIES}"] for row in range(items)]
    recommender = Recommender(model, ids, ids, categories, ["<unknown>", "view"], popularity, texts, tables)
    bundle = Bundle(Path("none"), "synthetic", settings, {}, recommender, {}, TextFeatures(None, None))
    return Engine(bundle, "retrieval"), popularity


def make_tables(popularity: np.ndarray, successors: int, neighbours: int, rng: np.random.Generator) -> Tables:
    items = len(popularity)
    degree = np.minimum(successors, 3 * popularity)
    starts = np.concatenate([[0], np.cumsum(degree)])
    follows = rng.integers(0, items, starts[-1]).astype(np.int32)
    weights = rng.random(starts[-1], np.float32) + 0.5
    transitions = sp.csr_matrix((weights, follows, starts), shape=(items, items))
    ranked = np.argsort(-popularity, kind="stable")
    known = np.sort(ranked[:neighbours])
    inverse = 0.01 * rng.standard_normal((len(known), len(known)), np.float32)
    np.fill_diagonal(inverse, 1.0)
    edges = END_MS - 10**8 * np.arange(64)[::-1]
    recent = rng.random((len(edges), items), np.float32) * popularity
    lenders = ranked[rng.integers(0, min(LENDING, items), (items, LENDERS))]
    cosines = rng.uniform(0.2, 0.9, (items, LENDERS)).astype(np.float32)
    return Tables(popularity, (3.0, 1.0), transitions, inverse, known, END_MS, float("inf"), recent, edges, 1e9,
                  lenders, cosines)  # fmt: skip


if __name__ == "__main__":
    main()
