"""Counting a log before training: popularity, transitions, who took what and when, the scale of ratings.

Files are counted one by one, wherever they are, and merged; what needs the whole log at once is in tabulate.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import scipy.sparse as sp

from springtide.config import ModelConfig
from springtide.model.memory import count_transitions
from springtide.training.sequences import Sequences, from_table


@dataclass(frozen=True)
class Statistics:
    """Counts over training events only; those of disjoint users add up."""

    popularity: np.ndarray  # [I] int64
    transitions: sp.csr_matrix  # [I, I] float32
    ratings: tuple[float, float, float]  # number, sum, sum of squares
    taken: sp.csr_matrix  # [U, I] int64: the time in ms at which a user last took an item, plus one
    wanted: np.ndarray  # [E] int64 items of the events that may be predicted,
    wanted_at: np.ndarray  # [E] int64 their times in ms,
    wanted_first: np.ndarray  # [E] bool and whether they are the first of their users

    @property
    def rating_stats(self) -> tuple[float, float]:
        """Mean and standard deviation of the ratings; (0, 1) without any."""
        count, total, squares = self.ratings
        if not count:
            return 0.0, 1.0
        mean = total / count
        return mean, max(1e-3, (squares / count - mean**2)) ** 0.5


def collect(sequences: Sequences, items: int, config: ModelConfig) -> Statistics:
    """Statistics of some users' training events."""
    spans = [slice(int(a), int(b)) for a, b in zip(sequences.start, sequences.train_end, strict=True)]

    def trained(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array[s] for s in spans]) if spans else array[:0]

    ratings = trained(sequences.ratings).astype(np.float64)
    ratings = ratings[~np.isnan(ratings)]
    rows, targets, times = trained(sequences.items), trained(sequences.targets), trained(sequences.timestamps)
    transitions = sp.csr_matrix((items, items), dtype=np.float32)
    if config.memory:
        pairs = ((sequences.items[s], sequences.targets[s]) for s in spans)
        transitions = count_transitions(pairs, items, config.memory_distances, config.memory_decay)
    user = np.repeat(np.arange(len(spans)), [s.stop - s.start for s in spans])
    return Statistics(
        np.bincount(rows, minlength=items),
        transitions,
        (len(ratings), float(ratings.sum()), float((ratings**2).sum())),
        _last_taken(user[targets], rows[targets], times[targets], (len(spans), items)),
        rows[targets],
        times[targets],
        np.diff(user[targets], prepend=-1) != 0,
    )


def _last_taken(user: np.ndarray, item: np.ndarray, at: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    order = np.lexsort((at, item, user))
    user, item, at = user[order], item[order], at[order]
    last = np.ones(len(user), bool)
    last[:-1] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
    return sp.csr_matrix((at[last] + 1, (user[last], item[last])), shape=shape, dtype=np.int64)


def collect_file(path: Path, items: int, config: ModelConfig, holdout_share: float, refit: bool) -> Statistics:
    """`collect` over one Parquet file of sequences."""
    return collect(from_table(pq.read_table(path), holdout_share, refit), items, config)


def merge(parts: list[Statistics]) -> Statistics:
    """Add up statistics of disjoint users. Summed in the order given, so that a rerun gives equal bits."""
    popularity, transitions, ratings = parts[0].popularity, parts[0].transitions, np.array(parts[0].ratings)
    for part in parts[1:]:
        popularity, transitions, ratings = (
            popularity + part.popularity,
            transitions + part.transitions,
            ratings + part.ratings,
        )
    transitions.sort_indices()
    taken = sp.vstack([part.taken for part in parts], format="csr")
    names = ("wanted", "wanted_at", "wanted_first")
    wanted = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
    totals = (float(ratings[0]), float(ratings[1]), float(ratings[2]))
    return Statistics(popularity, transitions, totals, taken, *wanted)
