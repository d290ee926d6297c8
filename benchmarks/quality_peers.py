"""The counting peers of peers.json made again, so that our lists can be compared with theirs user by user.

peers.json keeps only means. The best counting peer of each log is fitted here once more with the settings that were
chosen for it; its NDCG@10 must come out as it is written there, or it is not compared with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy import sparse

from springtide.config import load_settings
from springtide.data.prepared import load_prepared
from springtide.evaluation.baselines import Fits, training_log
from springtide.evaluation.metrics import paired_ratio, resampled_means, user_metrics
from springtide.evaluation.ranking import Cases, Score, build_cases, flatten, headline_mask, target_ranks
from springtide.model.counting.item_knn import ItemKnnSettings
from springtide.model.counting.log import Kernel, TrainingLog, history_weights
from springtide.model.counting.transitions import transition_counts
from springtide.schemas import PARTS, VALID

RESAMPLES = 2000
APART = 0.005  # most by which the figure of a peer made again may differ from the one in peers.json, as a share of it
Fit = Callable[[TrainingLog], Score]


def pctm(distances: int, power: float, kernel: Kernel, popularity: float, smoothing: float = 1000.0) -> Fit:
    """Smoothed transition counts: sum_j w_j log(1 + C[a_j, b] I / tau) + lambda log(1 + popularity(b))."""

    def fit(log: TrainingLog) -> Score:
        said = transition_counts(log, distances, power, float("inf"))
        said.data = np.log1p(said.data * (log.catalogue / smoothing)).astype(np.float32)
        prior = (popularity * np.log1p(log.counts())).astype(np.float32)

        def score(histories: Any, now: Any = None) -> np.ndarray:
            asked: sparse.csr_array = history_weights(histories, log.catalogue, kernel)
            return np.asarray((asked @ said).toarray() + prior)

        return score

    return fit


def item_knn_recency(decay: float) -> Fit:
    """Cosine neighbours, 300 of each item, a history item k steps back counting exp(-decay k)."""
    settings = ItemKnnSettings(neighbours=300, shrinkage=10.0, alpha=0.5, half_life=np.log(2) / decay)
    return lambda log: Fits(log).item_knn(settings).score


def fading(rate: float) -> Kernel:
    """rate^k for the event k steps back."""
    return lambda ages, _: rate**ages


def head_and_tail(head: int, share: float, rate: float) -> Kernel:
    """A share of the weight on the last `head` events, fading by `rate`; the rest spread evenly over those before."""

    def kernel(ages: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        near = rate**ages * (1 - rate) / (1 - rate ** np.minimum(lengths, head))
        older = np.maximum(lengths - head, 0)
        return np.where(ages < head, np.where(older > 0, share, 1) * near, (1 - share) / np.maximum(older, 1))

    return kernel


# Log -> the name in peers.json, and how it was fitted.
COUNTING: dict[str, tuple[str, Fit]] = {
    "ml-100k": ("PCTM (refitted)", pctm(10, 1.0, fading(0.7), 0.0)),
    "ml-latest-small": ("PCTM (refitted)", pctm(20, 1.0, fading(0.7), -0.1)),
    "amazon-sports": ("PCTM (refitted)", pctm(20, 0.5, head_and_tail(7, 0.8, 0.6), -0.1)),
    "online-retail": ("item-KNN, recency (refitted)", item_knn_recency(0.1)),
    "online-retail-loo": ("item-KNN, recency (refitted)", item_knn_recency(0.8)),
}


class AnotherFigure(ValueError):
    """A peer made again that is not what it was."""


def judged(config: Path, overrides: tuple[str, ...] = ()) -> Cases:
    """The headline users of an experiment's test part."""
    settings = load_settings(config, overrides)
    prepared = load_prepared(settings.workspace)
    cases = build_cases(flatten(prepared.sequences(), prepared.items.num_rows), PARTS["test"], settings.data.split)
    return cases.take(np.flatnonzero(headline_mask(cases)[0]))


def counting_peer(log: str, cases: Cases, published: float) -> np.ndarray:
    """[C] NDCG@10 of the log's counting peer for each case, seen items left out as in all of peers.json.

    Raises AnotherFigure if their mean is not `published`.
    """
    name, fit = COUNTING[log]
    ranks = target_ranks(cases, fit(training_log(cases.events, VALID)), exclude_seen=True, batch_size=256)
    found = np.asarray(user_metrics(ranks, [10])["ndcg@10"])
    if abs(found.mean() - published) > APART * published:
        raise AnotherFigure(f"{name}, made again, has NDCG@10 {found.mean():.5f} and not {published:.5f}")
    return found


def of_lists(cases: Cases, lists: Path, item_ids: list[str]) -> np.ndarray:
    """[C] NDCG@10 of lists in a Parquet file (user, items best first); a user without a list has 0."""
    table = pl.read_parquet(lists)
    best = dict(zip(table["user"].to_list(), table["items"].to_list(), strict=True))
    users = [cases.events.user_ids[int(user)].as_py() for user in cases.users]
    ranks = np.zeros(len(cases), np.int64)
    for case, (user, target) in enumerate(zip(users, cases.targets.tolist(), strict=True)):
        wanted, items = item_ids[target], best.get(user, [])
        ranks[case] = items.index(wanted) + 1 if wanted in items else 0
    return np.asarray(user_metrics(ranks, [10])["ndcg@10"])


def chance_between(seeds: Sequence[np.ndarray]) -> float | None:
    """How far two seeds may lie apart though both models are equally good, as a share of their mean: the standard error
    of the difference of their means over the same users, [C] each; the mean over all pairs. None below two seeds.
    """
    pairs = list(itertools.combinations(seeds, 2))
    errors = [np.std(one - other, ddof=1) / np.sqrt(len(one)) for one, other in pairs]
    mean = np.mean([seed.mean() for seed in seeds])
    return float(np.mean(errors) / mean) if pairs and mean else None


def ratio(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float] | None:
    """Our mean by theirs over the same users, with a paired 95 % bootstrap interval; None if theirs is 0."""
    samples = resampled_means(np.column_stack([theirs, ours]), RESAMPLES)
    found = paired_ratio(theirs, ours, samples[:, 0], samples[:, 1])
    return None if found is None else {"value": found.value, "lo": found.low, "hi": found.high}
