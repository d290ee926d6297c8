"""Making the index of a bundle, and measuring what it finds of what exact scoring would have answered.

A request reads as few lists of the index as still find the share of the best items that is asked for, on one half of a
sample of requests; the recall that is reported is that on the other half.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from springtide.model import ann
from springtide.model.batch import EMPTY, History
from springtide.model.question import key_parts, part_names
from springtide.model.recommender import Recommender
from springtide.model.retrieval import BORROWERS, DEPTH, Index, Retrieval

Json = dict[str, Any]
K = 10  # recall is of the best so many
SAMPLE = 400  # requests of each kind
BATCH = 8  # of them scored exactly at once
QUERY_COSINE = 0.7  # of a query and the text that it is after, as sentence encoders give it
LEAST = 1 / 64  # of the lists: almost free, and a margin for requests unlike those of the sample
SEED = 0

Ask = tuple[Sequence[History], np.ndarray | None]  # histories, and free-text queries [B, D]


def make_index(recommender: Recommender, histories: Sequence[History], recall: float) -> tuple[Retrieval, Json]:
    """An index over the recommender's catalogue, and its figures.

    histories: of users, two at least, to choose and measure by; recall: of the K best items, from 0 to 1. The figures
    are {"items", "depth", "histories": {...}, "queries": {...}}, each with lists, probes, bytes, build_seconds,
    recall@10 and the requests it was measured on.
    """
    model = recommender.model
    began = time.perf_counter()
    indexes = {"histories": ann.build(key_parts(model, recommender.vectors), SEED)}
    index = Index(part_names(model), indexes, *_borrowers(recommender))
    seconds = {"histories": time.perf_counter() - began}
    if recommender.text_vectors is not None:
        began = time.perf_counter()
        index = _with(index, "queries", ann.build([recommender.text_vectors], SEED))
        seconds["queries"] = time.perf_counter() - began
    figures: Json = {"items": len(recommender.item_ids), "depth": DEPTH}
    for kind, ask in sample(recommender, histories).items():
        chosen = _choose_probes(recommender, index, kind, ask, recall)
        index = _with(index, kind, chosen)
        found = measure_recall(recommender, Retrieval(index, recommender), _half(ask, 1))
        size = sum(array.nbytes for array in ann.pack(chosen).values())
        figures[kind] = {
            "lists": chosen.lists,
            "probes": chosen.probes,
            "bytes": size,
            "build_seconds": round(seconds[kind], 1),
            f"recall@{K}": found,
            "requests": len(_half(ask, 1)[0]),
        }
    return Retrieval(index, recommender), figures


def sample(recommender: Recommender, histories: Sequence[History]) -> dict[str, Ask]:
    """The requests that recall is measured on: histories, and in the place of queries what is like the text of an item.

    No item's text is its own query: each is turned away from it to a cosine of QUERY_COSINE in a random direction.
    """
    rng = np.random.default_rng(SEED)
    some = [history for history in histories if len(history)]
    picked = rng.choice(len(some), min(SAMPLE, len(some)), replace=False)
    found: dict[str, Ask] = {"histories": ([some[place] for place in picked], None)}
    texts = recommender.text_vectors
    described = np.zeros(0, np.int64) if texts is None else np.flatnonzero(np.abs(texts).sum(1) > 0)
    if texts is not None and len(described) > 1:
        rows = rng.choice(described, min(SAMPLE, len(described)), replace=False)
        away = rng.standard_normal((len(rows), texts.shape[1]))
        away /= np.linalg.norm(away, axis=1, keepdims=True)
        turned = QUERY_COSINE * texts[rows] + (1 - QUERY_COSINE**2) ** 0.5 * away
        turned /= np.linalg.norm(turned, axis=1, keepdims=True)
        found["queries"] = ([EMPTY] * len(rows), turned.astype(np.float32))
    return found


def measure_recall(recommender: Recommender, retrieval: Retrieval, ask: Ask) -> float:
    """The mean share of the K best items by exact scoring that `retrieval` finds."""
    return _recall(recommender, retrieval, ask, _exact(recommender, ask))


def _with(index: Index, kind: str, one: ann.Ann) -> Index:
    return replace(index, indexes={**index.indexes, kind: one})


def _half(ask: Ask, which: int) -> Ask:
    histories, queries = ask
    return histories[which::2], None if queries is None else queries[which::2]


def _exact(recommender: Recommender, ask: Ask) -> list[np.ndarray]:
    """The rows of the K best items of each request."""
    histories, queries = ask
    found: list[np.ndarray] = []
    for start in range(0, len(histories), BATCH):
        part = slice(start, start + BATCH)
        logits = recommender.score(histories[part], None if queries is None else queries[part]).logits
        found += [rows[rows >= 0] for rows in recommender.top_k(logits, K)[0]]
    return found


def _recall(recommender: Recommender, retrieval: Retrieval, ask: Ask, exact: list[np.ndarray]) -> float:
    histories, queries = ask
    questions, _ = recommender.questions(histories, queries)
    shares = [
        len(np.intersect1d(retrieval.best(question, K)[0], best)) / max(1, len(best))
        for question, best in zip(questions, exact, strict=True)
        if question is not None
    ]
    return round(float(np.mean(shares)), 4)


def _choose_probes(recommender: Recommender, index: Index, kind: str, ask: Ask, recall: float) -> ann.Ann:
    """The index of one kind with the fewest lists read that reach the recall, or all, doubled from LEAST of them on."""
    whole = index.indexes[kind]
    half = _half(ask, 0)
    exact = _exact(recommender, half)
    probes = max(1, round(LEAST * whole.lists))
    while probes < whole.lists:
        tried = whole.with_probes(probes)
        if _recall(recommender, Retrieval(_with(index, kind, tried), recommender), half, exact) >= recall:
            return tried
        probes *= 2
    return whole


def _borrowers(recommender: Recommender) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See Index: the lenders [U], and of each the BORROWERS for which it counts most, with what it counts."""
    borrowing = recommender.model.channels.borrowing
    lending = None if borrowing is None else borrowing.lending()
    if lending is None:
        return np.zeros(0, np.int64), np.zeros((0, BORROWERS), np.int32), np.zeros((0, BORROWERS), np.float32)
    pairs = lending.weights.tocoo()
    order = np.lexsort((-pairs.data, pairs.col))
    lender, borrower, share = pairs.col[order], pairs.row[order], pairs.data[order]
    rank = np.arange(len(lender)) - np.searchsorted(lender, np.arange(len(lending.rows)))[lender]
    kept = (rank < BORROWERS) & (share > 0)
    borrowers = np.full((len(lending.rows), BORROWERS), -1, np.int32)
    shares = np.zeros((len(lending.rows), BORROWERS), np.float32)
    borrowers[lender[kept], rank[kept]], shares[lender[kept], rank[kept]] = borrower[kept], share[kept]
    return lending.rows, borrowers, shares
