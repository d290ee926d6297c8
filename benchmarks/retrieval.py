"""How long does one recommendation from a large catalogue take, on one core, without HTTP, by all scores and by index?

    python benchmarks/retrieval.py [--items 1000000] [--requests 200] [--text 384] [--topics 5000] [--recall 0.98]

A made-up model of the default shape (dim 64, 128 text components, every counting channel, 256 successors of the popular
items) over a catalogue whose popularity falls like Zipf's answers through the same Engine as the Scorer, one request at
a time: first by scoring all items, then by an index made as for a bundle, the same requests. Texts gather in topics and
a history in three of them; --topics 0 scatters both at random, the hardest an index can meet. Weights are random: they
do not change what is computed. Wall and CPU milliseconds; on a machine that others use the CPU figures are the ones to
compare. Recall is the share of the ten items by all scores that the index finds too.
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
from springtide.model.cosines import HEARD, NEAREST, Pairs
from springtide.model.decayed import DecayedCounts
from springtide.model.fusion import FusionModel
from springtide.model.indexing import make_index
from springtide.model.recommender import Recommender
from springtide.model.tables import Tables
from springtide.serving.engine import Engine, ScoreRequest
from springtide.text.features import TextFeatures

END_MS = 1_700_000_000_000
LENDERS, LENDING = 8, 20_000  # as model/borrowing.py: of an item, and items that may lend
CATEGORIES = 20
WITHIN_TOPIC = 0.8  # how far texts of a topic are spread, of how far topics are
INDEX_REQUESTS = 200  # histories to choose how much the index reads, and as many to measure it by
COLUMNS = ("p50_ms", "p99_ms", "cpu_p50_ms", "cpu_p99_ms")
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=200, help="of each kind")
    parser.add_argument("--text", type=int, default=384, help="width of the encoder's vectors")
    parser.add_argument("--topics", type=int, help="of the texts; absent: one for 200 items, 0: none")
    parser.add_argument("--recall", type=float, default=0.98, help="asked of the index, as train.ann_recall")
    options = parser.parse_args()
    topics = options.items // 200 if options.topics is None else options.topics
    torch.set_num_threads(1)
    facts = machine()
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    engine, popularity, topic_of = make_engine(options.items, options.text, topics, rng)
    engine.warm_up()
    memory = {"resident_gib": round(psutil.Process().memory_info().rss / 2**30, 2)}
    print(describe(facts))
    print(
        f"{options.items:,} items, made in {time.perf_counter() - began:.0f} s; {memory['resident_gib']} GiB resident"
    )

    by_topic = np.argsort(topic_of, kind="stable")
    starts = np.searchsorted(topic_of[by_topic], np.arange(max(1, topics) + 1))

    def history(length: int) -> list[Json]:
        chosen = rng.integers(0, max(1, topics), 3 if topics else 1)
        pool = np.concatenate([by_topic[starts[one] : starts[one + 1]] for one in chosen])
        items = rng.choice(pool, length, p=popularity[pool] / popularity[pool].sum())
        times = END_MS - np.cumsum(rng.integers(1000, 10**7, length))[::-1]
        return [{"item_id": f"i{i}", "timestamp": int(t), "action": "view"} for i, t in zip(items, times, strict=True)]

    recommender = engine.bundle.recommender
    texts = recommender.text_vectors
    assert texts is not None

    def query() -> np.ndarray:
        near = texts[rng.integers(options.items)] + 0.5 * options.text**-0.5 * rng.standard_normal(options.text)
        return (near / np.linalg.norm(near)).astype(np.float32)

    kinds: dict[str, Callable[[], ScoreRequest]] = {
        "history of 20": lambda: ScoreRequest(history(20), now=END_MS + 1),
        "history of 200": lambda: ScoreRequest(history(200), now=END_MS + 1),
        "one category": lambda: ScoreRequest(history(20), categories=("c3",), now=END_MS + 1),
        "unseen items only": lambda: ScoreRequest(history(20), exclude_seen=True, now=END_MS + 1),
        "query": lambda: ScoreRequest([], query(), now=END_MS + 1),
        "history and query": lambda: ScoreRequest(history(20), query(), now=END_MS + 1),
    }
    requests = {name: [make() for _ in range(options.requests)] for name, make in kinds.items()}
    exact = {name: measure(engine, some) for name, some in requests.items()}
    memory["exact_gib"] = round(psutil.Process().memory_info().rss / 2**30, 2)

    histories = [recommender.history(history(20))[0] for _ in range(2 * INDEX_REQUESTS)]
    began = time.perf_counter()
    retrieval, figures = make_index(recommender, histories, options.recall)
    figures["seconds"] = round(time.perf_counter() - began, 1)
    recommender.use_index(retrieval.index)
    recommender.release()
    engine.warm_up()
    memory["index_gib"] = round(psutil.Process().memory_info().rss / 2**30, 2)
    by_index = {name: measure(engine, some) for name, some in requests.items()}
    memory["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)

    rows = [
        [name, *(f"{found[name][0][column]:.1f}" for found in (exact, by_index) for column in COLUMNS),
         f"{shared(exact[name][1], by_index[name][1]):.3f}"]
        for name in requests
    ]  # fmt: skip
    heads = [f"{how} {what}" for how in ("exact", "index") for what in ("p50 ms", "p99", "CPU p50", "CPU p99")]
    print(table(["request", *heads, "recall@10"], rows))
    for kind in ("histories", "queries"):
        print(f"index for {kind}: {figures[kind]}")
    print(f"making, choosing and measuring it took {figures['seconds']} s")
    print(
        f"resident: {memory['exact_gib']} GiB by all scores, {memory['index_gib']} GiB by index; peak of the process, "
        f"the making included: {memory['peak_gib']} GiB"
    )
    found = {
        name: {
            "exact": exact[name][0],
            "index": by_index[name][0],
            "recall@10": shared(exact[name][1], by_index[name][1]),
        }
        for name in requests
    }
    body = {"machine": facts, "items": options.items, "topics": topics, "memory": memory, "index": figures}
    print(write_result("retrieval", body | {"requests": found}))


def shared(exact: list[list[str]], found: list[list[str]]) -> float:
    """The mean share of the exact answers' items that the others have."""
    return round(
        float(np.mean([len({*one} & {*other}) / len(one) for one, other in zip(exact, found, strict=True)])), 4
    )


def measure(engine: Engine, requests: list[ScoreRequest]) -> tuple[dict[str, float], list[list[str]]]:
    """Milliseconds, and the items of each answer."""
    wall, cpu, items = [], [], []
    for request in requests:
        begin, busy = time.perf_counter(), time.process_time()
        (answer,) = engine.score([request])
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - busy)
        if not isinstance(answer, dict) or len(answer["items"]) != request.k:
            raise SystemExit(f"not an answer of {request.k} items: {answer}")
        items.append([item["item_id"] for item in answer["items"]])
    found = {}
    for name, seconds in (("", wall), ("cpu_", cpu)):
        found |= {f"{name}p{p}_ms": round(1000 * float(np.percentile(seconds, p)), 2) for p in (50, 99)}
    return found, items


def make_engine(
    items: int, text_width: int, topics: int, rng: np.random.Generator
) -> tuple[Engine, np.ndarray, np.ndarray]:
    """The engine, the items' popularity [I] and their topics [I]."""
    data = {"events": {"paths": "none.csv"}, "exclude_seen": False}
    model_config = {"dim": 64, "text_dim": 128}
    settings = parse_settings({"name": "retrieval", "workspace": "none", "data": data, "model": model_config})
    popularity = 1 + (3e5 / (rng.permutation(items) + 5)).astype(np.int64)
    topic_of = rng.integers(0, topics, items) if topics else np.zeros(items, np.int64)
    texts = rng.standard_normal((items, text_width), np.float32)
    if topics:
        centres = rng.standard_normal((topics, text_width), np.float32)
        for start in range(0, items, 10**5):
            part = slice(start, start + 10**5)
            texts[part] = centres[topic_of[part]] + WITHIN_TOPIC * texts[part]
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    features = texts[:, :128] * text_width**0.5  # of a rotation that whitens, as random directions already are
    torch.manual_seed(0)
    model = FusionModel(settings.model, 2, torch.from_numpy(features), torch.ones(items, dtype=torch.bool),
                        torch.from_numpy(popularity.copy()))  # fmt: skip
    tables = make_tables(popularity, settings.model.memory_neighbours, settings.model.neighbour_items, rng)
    tables.fill(model)
    with torch.no_grad():
        weigh = model.channels.weigh
        assert weigh is not None
        weigh.bias[-2:] = 0.3  # of recent popularity and popularity, which start at 0
        weigh.bias[:3] = -3.0  # of the counts, who are candidates anyway: what the index finds must decide
        model.channels.damping.fill_(0.1)
    ids = [f"i{row}" for row in range(items)]
    categories = [[f"c{row % CATEGORIES}"] for row in range(items)]
    recommender = Recommender(model, ids, ids, categories, ["<unknown>", "view"], popularity, texts, tables)
    bundle = Bundle(Path("none"), "synthetic", settings, {}, recommender, {}, TextFeatures(None, None))
    return Engine(bundle, "retrieval"), popularity, topic_of


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
    return Tables(popularity, (3.0, 1.0), transitions, inverse, known, make_pairs(popularity, known, rng), END_MS,
                  float("inf"), recent, edges, 1e9, lenders, cosines,
                  DecayedCounts(popularity.astype(np.float64), END_MS, float("inf")))  # fmt: skip


def make_pairs(popularity: np.ndarray, dense: np.ndarray, rng: np.random.Generator) -> Pairs:
    """At most NEAREST items that speak for each item that is not among `dense`, popular ones for HEARD of them."""
    items = len(popularity)
    tail = np.setdiff1d(np.arange(items), dense)
    candidate = np.repeat(tail, np.minimum(NEAREST, 3 * popularity[tail]))
    speaks = np.searchsorted(np.cumsum(popularity), rng.integers(0, popularity.sum(), len(candidate)), side="right")
    order = np.argsort(speaks, kind="stable")
    speaks, candidate = speaks[order], candidate[order]
    kept = np.arange(len(speaks)) - np.searchsorted(speaks, speaks) < HEARD
    values = rng.random(np.count_nonzero(kept), np.float32) + 0.5
    counts = sp.csr_matrix((values, (speaks[kept], candidate[kept])), shape=(items, items))
    none = np.zeros(items, np.float32)
    return Pairs(counts, popularity.astype(np.float32), none, none)


if __name__ == "__main__":
    main()
