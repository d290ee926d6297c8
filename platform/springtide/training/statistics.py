"""What the model knows of the catalogue before it is trained: popularity, transition counts, the scale of ratings."""

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
    """Counts over training events only."""

    popularity: np.ndarray  # [I] int64
    transitions: sp.csr_matrix  # [I, I] float32
    ratings: tuple[float, float, float]  # number, sum, sum of squares

    @property
    def rating_stats(self) -> tuple[float, float]:
        """Mean and standard deviation of the ratings; (0, 1) without any."""
        count, total, squares = self.ratings
        if not count:
            return 0.0, 1.0
        mean = total / count
        return mean, max(1e-3, (squares / count - mean**2)) ** 0.5


def collect(sequences: Sequences, items: int, config: ModelConfig) -> Statistics:
    """Statistics of some users' training events; those of several blocks add up (`merge`)."""
    spans = [slice(int(a), int(b)) for a, b in zip(sequences.start, sequences.train_end, strict=True)]
    trained = np.concatenate([sequences.items[s] for s in spans]) if spans else np.zeros(0, np.int64)
    ratings = np.concatenate([sequences.ratings[s] for s in spans]).astype(np.float64) if spans else np.zeros(0)
    ratings = ratings[~np.isnan(ratings)]
    pairs = ((sequences.items[s], sequences.targets[s]) for s in spans)
    transitions = sp.csr_matrix((items, items), dtype=np.float32)
    if config.memory:
        transitions = count_transitions(pairs, items, config.memory_distances, config.memory_decay)
    return Statistics(
        np.bincount(trained, minlength=items),
        transitions,
        (len(ratings), float(ratings.sum()), float((ratings**2).sum())),
    )


def collect_file(path: Path, items: int, config: ModelConfig, holdout_share: float) -> Statistics:
    """`collect` over one Parquet file of sequences."""
    return collect(from_table(pq.read_table(path), holdout_share), items, config)


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
    return Statistics(popularity, transitions, (float(ratings[0]), float(ratings[1]), float(ratings[2])))
