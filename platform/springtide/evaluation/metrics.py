"""Ranking metrics and their bootstrap intervals. Arrays in, arrays out; no files, no Ray, no HTTP.

A *rank* is the place of a user's one target in the list recommended to them, from 1; 0 means that it is not there.
With one target of rank r: HR@k = [r <= k], NDCG@k = [r <= k] / log2(r + 1), MRR@k = [r <= k] / r, recall@k = HR@k and
precision@k = HR@k / k (Järvelin & Kekäläinen 2002; the ideal DCG of one target is 1). Lists rank the whole catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

MRR_AT = 20
SEED = 20240607  # of every bootstrap: the same users are drawn for every scorer, which is what makes it paired
_CELLS = 4_000_000  # users times resamples drawn at once
_LISTS = 10_000  # whose diversity is looked at together


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


def user_metrics(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Every metric of every user.

    ranks: [U] integers, 0 = not in the list. Returns arrays [U] float64 under `hr@k`, `ndcg@k`, `recall@k`,
    `precision@k` for each k, and `mrr@20`. Ranks must come from lists at least max(k, 20) long to mean what they say.
    """
    ranks = np.asarray(ranks, dtype=np.int64)
    listed = np.maximum(ranks, 1)  # avoids log2(1) and 1 / 0 where the hit is false anyway
    out: dict[str, np.ndarray] = {}
    for k in sorted(set(ks)):
        hit = ((ranks > 0) & (ranks <= k)).astype(np.float64)
        out[f"hr@{k}"] = hit
        out[f"ndcg@{k}"] = hit / np.log2(listed + 1)
        out[f"recall@{k}"] = hit
        out[f"precision@{k}"] = hit / k
    out[f"mrr@{MRR_AT}"] = ((ranks > 0) & (ranks <= MRR_AT)) / listed
    return out


def user_metrics_all(lists: np.ndarray, targets: np.ndarray, offsets: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics against every item that a user took in the part, not only the first.

    lists: [U, K] catalogue rows, best first, -1 = no more. targets: the users' target rows one after another, those of
    user u at offsets[u]:offsets[u + 1] (offsets: [U + 1]); repeats count once. Returns [U] float64 under
    `recall_all@10`, `recall_all@20` (hits / min(number of targets, k)) and `ndcg_all@10`.
    """
    lists = np.asarray(lists, dtype=np.int64)
    users = len(lists)
    owner = np.repeat(np.arange(users), np.diff(offsets))
    width = int(max(lists.max(initial=0), np.max(targets, initial=0))) + 1
    wanted = np.unique(owner * width + np.asarray(targets, dtype=np.int64))
    sizes = np.bincount(wanted // width, minlength=users)
    hits = np.isin(np.arange(users)[:, None] * width + lists, wanted) & (lists >= 0)
    out = {}
    for k in (10, 20):
        out[f"recall_all@{k}"] = hits[:, :k].sum(axis=1) / np.maximum(np.minimum(sizes, k), 1)
    discount = 1 / np.log2(np.arange(10) + 2)
    gained = hits[:, :10] @ discount[: min(10, hits.shape[1])]
    ideal = np.concatenate([[1.0], np.cumsum(discount)])[np.minimum(sizes, 10)]
    out["ndcg_all@10"] = gained / ideal
    return out


def coverage(lists: np.ndarray, catalogue: int, k: int) -> float:
    """Share of the catalogue that is in at least one user's first k. lists: [U, K] catalogue rows, -1 = no more."""
    shown = np.unique(np.asarray(lists)[:, :k])
    return float((shown >= 0).sum() / max(catalogue, 1))


def hit_curve(ranks: np.ndarray, longest: int) -> np.ndarray:
    """HR@1 .. HR@longest as [longest] float64, from ranks [U]."""
    ranks = np.asarray(ranks)
    counts = np.bincount(ranks[(ranks > 0) & (ranks <= longest)], minlength=longest + 1)[1:]
    return np.cumsum(counts) / max(len(ranks), 1)


# ---------------------------------------------------------------- beyond accuracy: what the lists are made of
def novelty(lists: np.ndarray, popularity: np.ndarray, k: int) -> np.ndarray:
    """How surprising each user's first k items are: mean of -log2(share of all training events), in bits. [U] float64.

    lists: [U, K] catalogue rows, -1 = no more; popularity: [I] training events. An item without any counts as one with
    a single event. NaN for an empty list (Zhou et al. 2010).
    """
    bits = np.log2(max(float(np.sum(popularity)), 1.0)) - np.log2(np.maximum(popularity, 1))
    first = np.asarray(lists)[:, :k]
    shown = first >= 0
    total = np.where(shown, bits[first.clip(min=0)], 0.0).sum(axis=1)
    return _share(total, shown.sum(axis=1))


def category_diversity(lists: np.ndarray, categories: sp.csr_array, k: int) -> np.ndarray:
    """1 - mean Jaccard similarity of the category sets over all pairs in each user's first k items. [U] float64.

    lists: [U, K] catalogue rows, -1 = no more; categories: [I, C] ones and nothing else. A pair with an item without
    categories says nothing and is left out; NaN where no pair is left (Ziegler et al. 2005).
    """
    sizes = np.diff(categories.indptr)
    first = np.asarray(lists)[:, :k]
    out = np.empty(len(first))
    for start in range(0, len(first), _LISTS):
        block = first[start : start + _LISTS]
        usable = (block >= 0) & (sizes[block] > 0)
        alike, pairs = np.zeros(len(block)), np.zeros(len(block))
        for a in range(block.shape[1]):
            for b in range(a):
                both = usable[:, a] & usable[:, b]
                left, right = block[both, a], block[both, b]
                shared = categories[left].multiply(categories[right]).sum(axis=1)
                alike[both] += shared / (sizes[left] + sizes[right] - shared)
                pairs += both
        out[start : start + len(block)] = 1 - _share(alike, pairs)
    return out


def vector_diversity(lists: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """1 - mean cosine of the item vectors over all pairs in each user's first k items. [U] float64, NaN without a pair.

    lists: [U, K] catalogue rows, -1 = no more; vectors: [I, D], a zero row = no vector, left out.
    """
    norms = np.linalg.norm(vectors, axis=1)
    unit = vectors / np.maximum(norms, 1e-12)[:, None]
    first = np.asarray(lists)[:, :k]
    out = np.empty(len(first))
    step = max(1, _CELLS // max(1, vectors.shape[1] * k))
    for start in range(0, len(first), step):
        block = first[start : start + step]
        usable = (block >= 0) & (norms[block] > 0)
        count = usable.sum(axis=1)
        # The squared length of the sum of n unit vectors is n plus twice the sum of all pairs' cosines.
        total = np.where(usable[..., None], unit[block], 0.0).sum(axis=1)
        out[start : start + len(block)] = 1 - _share((total**2).sum(axis=1) - count, count * (count - 1))
    return out


def gini(lists: np.ndarray, catalogue: int, k: int) -> float:
    """How unevenly the users' first k items spread over the catalogue: 0 = all shown alike, towards 1 = one item only.

    The Gini coefficient of the number of times each of the `catalogue` items is shown, never-shown ones included; 0 if
    nothing is shown. lists: [U, K] catalogue rows, -1 = no more.
    """
    first = np.asarray(lists)[:, :k]
    shown = np.sort(np.bincount(first[first >= 0], minlength=catalogue))
    total = shown.sum()
    if not total:
        return 0.0
    return float(2 * (np.arange(1, len(shown) + 1) @ shown) / (len(shown) * total) - (len(shown) + 1) / len(shown))


def _share(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """parts / wholes, NaN where the whole is nothing."""
    return np.where(wholes > 0, parts / np.maximum(wholes, 1), np.nan)


# ---------------------------------------------------------------- intervals
def resampled_means(values: np.ndarray, resamples: int, seed: int = SEED) -> np.ndarray:
    """Means over users of many bootstrap resamples of the users (Efron 1979).

    values: [U, M], one row a user. Returns [resamples, M]. Columns of one call share their resamples, so differences
    and ratios between columns are paired.
    """
    values = np.asarray(values, dtype=np.float64)
    users = len(values)
    rng = np.random.Generator(np.random.PCG64(seed))
    out = np.empty((resamples, values.shape[1]))
    step = max(1, min(50, _CELLS // max(users, 1)))
    chances = np.full(users, 1 / users)
    for start in range(0, resamples, step):
        times_drawn = rng.multinomial(users, chances, size=min(step, resamples - start))
        out[start : start + len(times_drawn)] = times_drawn @ values / users
    return out


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of samples [n]."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def mean_estimates(values: np.ndarray, samples: np.ndarray) -> list[Estimate]:
    """One Estimate for each column of values [U, M], given its resampled means [n, M]."""
    return [Estimate(float(values[:, j].mean()), *interval(samples[:, j])) for j in range(values.shape[1])]


def paired_difference(a: np.ndarray, b: np.ndarray, a_samples: np.ndarray, b_samples: np.ndarray) -> Estimate:
    """mean(b) - mean(a) over the same users [U], from paired resampled means [n]."""
    return Estimate(float(b.mean() - a.mean()), *interval(b_samples - a_samples))


def paired_ratio(a: np.ndarray, b: np.ndarray, a_samples: np.ndarray, b_samples: np.ndarray) -> Estimate | None:
    """mean(b) / mean(a) over the same users [U], from paired resampled means [n]; None as in `ratio_interval`."""
    bounds = ratio_interval(a_samples, b_samples) if a.mean() else None
    return Estimate(float(b.mean() / a.mean()), *bounds) if bounds else None


def ratio_interval(below: np.ndarray, above: np.ndarray) -> tuple[float, float] | None:
    """The interval of above / below from paired samples [n]; None if too many have nothing below to divide by.

    A few such samples are left out; with more of them than an interval leaves outside on one side it has no upper end.
    """
    defined = below > 0
    return interval(above[defined] / below[defined]) if defined.mean() >= 0.975 else None
