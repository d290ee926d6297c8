"""The model beside the baselines over the same users: figures, intervals, paired ratios, and what the lists hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from springtide.evaluation import metrics as measure
from springtide.evaluation.ranking import (
    COLD_ITEM,
    COLD_USER,
    WARM,
    Cases,
    Ranking,
    headline_mask,
    repeated_targets,
)

RATIOS = ("ndcg@10", "hr@10", "mrr@20")
LIST = 10  # places of a list that coverage, novelty and diversity look at


@dataclass(frozen=True)
class Catalogue:
    """What novelty and diversity need to know of the items."""

    popularity: np.ndarray  # [I] training events
    categories: sp.csr_array | None  # [I, C], see category_table; None: diversity is that of the vectors
    vectors: np.ndarray | None  # [I, D]


def compare(
    cases: Cases, rankings: Mapping[str, Ranking], ks: Sequence[int], resamples: int, split: str
) -> dict[str, Any]:
    """Metrics of "model" and of every other ranking over the same cases, with paired bootstrap intervals.

    Intervals and comparisons are over the headline users: the warm ones under `temporal` (all, if hardly any is warm).
    Coverage counts the lists of every user.
    """
    chosen, headline = headline_mask(cases)
    names = list(rankings)
    per_user = {name: _per_user(cases, rankings[name], ks, split) for name in names}
    keys = list(per_user["model"])
    values = np.column_stack([per_user[name][key][chosen] for name in names for key in keys])
    samples = measure.resampled_means(values, resamples)
    estimates = iter(measure.mean_estimates(values, samples))
    figures: dict[str, dict[str, Any]] = {name: {key: _json(next(estimates)) for key in keys} for name in names}
    for name in names:
        for k in ks:
            value = measure.coverage(rankings[name].lists, cases.events.catalogue, k)
            figures[name][f"coverage@{k}"] = {"value": value}

    def column(name: str, key: str) -> int:
        return names.index(name) * len(keys) + keys.index(key)

    baselines = [name for name in names if name != "model"]
    paired: dict[str, Any] = {}
    for name in baselines:
        paired[name] = {}
        for key in RATIOS:
            a, b = column(name, key), column("model", key)
            pair = (values[:, a], values[:, b], samples[:, a], samples[:, b])
            ratio = measure.paired_ratio(*pair)
            difference = _json(measure.paired_difference(*pair))
            paired[name][key] = {"ratio": _json(ratio) if ratio else None, "difference": difference}
    best = max(baselines, key=lambda name: figures[name]["ndcg@10"]["value"])
    slices = {}
    for name in (WARM, COLD_USER, COLD_ITEM) if split == "temporal" else ():
        mask = cases.slices == name
        if mask.any() and name != headline:
            means = {n: {key: {"value": float(per_user[n][key][mask].mean())} for key in keys} for n in names}
            slices[name] = {"users": int(mask.sum()), "model": means.pop("model"), "baselines": means}
    longest = max(20, *ks)
    return {
        "model": figures["model"],
        "baselines": {name: figures[name] for name in baselines},
        "best_baseline": best,
        "ratio_to_best": {key: paired[best][key]["ratio"] for key in RATIOS},
        "paired": paired,
        "users": int(chosen.sum()),
        "headline": headline,
        "slices": slices,
        "repeated_targets": repeated_targets(cases),
        "new_item_targets": int(cases.new_items.sum()),
        "bootstrap": resamples,
        "baseline_settings": {},
        "curves": {n: measure.hit_curve(rankings[n].ranks[chosen], longest).tolist() for n in names},
    }


def beyond_accuracy(lists: np.ndarray, catalogue: Catalogue) -> dict[str, dict[str, float]]:
    """novelty@10, diversity@10 and gini@10 of the lists [U, K] of every user, {name: {"value"}}.

    Diversity is over category sets where the catalogue has any, else over item vectors; without both it is left out.
    """
    out = {"novelty@10": _mean(measure.novelty(lists, catalogue.popularity, LIST))}
    if catalogue.categories is not None:
        out["diversity@10"] = _mean(measure.category_diversity(lists, catalogue.categories, LIST))
    elif catalogue.vectors is not None:
        out["diversity@10"] = _mean(measure.vector_diversity(lists, catalogue.vectors, LIST))
    out["gini@10"] = measure.gini(lists, len(catalogue.popularity), LIST)
    return {name: {"value": value} for name, value in out.items() if np.isfinite(value)}


def category_table(categories: Sequence[Sequence[str]]) -> sp.csr_array | None:
    """[I, C] with a one for each category of each item; None if no item has a category.

    Sparse, because a column that is a brand or a tag has nearly as many values as the catalogue has items.
    """
    sets = [set(own) for own in categories]
    columns = {name: column for column, name in enumerate(sorted(set().union(*sets)))}
    if not columns:
        return None
    rows = np.repeat(np.arange(len(sets)), [len(own) for own in sets])
    taken = np.array([columns[name] for own in sets for name in own])
    return sp.csr_array((np.ones(len(rows), np.int64), (rows, taken)), shape=(len(sets), len(columns)))


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def gate_histogram(gate_short: np.ndarray) -> dict[str, Any] | None:
    """Twenty bins over 0..1 of the short branch's weight per user; None if no user has a history."""
    known = gate_short[np.isfinite(gate_short)]
    if not known.size:
        return None
    counts, edges = np.histogram(np.clip(known, 0, 1), bins=20, range=(0, 1))
    return {"mean": float(known.mean()), "edges": [round(float(e), 4) for e in edges], "counts": counts.tolist()}


def _per_user(cases: Cases, ranking: Ranking, ks: Sequence[int], split: str) -> dict[str, np.ndarray]:
    values = measure.user_metrics(ranking.ranks, ks)
    if split == "temporal":
        values |= measure.user_metrics_all(ranking.lists, cases.all_targets, cases.all_offsets)
    return values


def _json(estimate: measure.Estimate) -> dict[str, float]:
    return {"value": estimate.value, "lo": estimate.low, "hi": estimate.high}
