"""What was counted in a log before any training, as arrays: the fixed half of a model, and how it is saved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from springtide.model.cosines import Pairs
from springtide.model.decayed import DecayedCounts
from springtide.model.fusion import FusionModel


@dataclass(frozen=True)
class Tables:
    """Counts over the events that a model may learn from, over I catalogue items."""

    popularity: np.ndarray  # [I] int64 events
    rating_stats: tuple[float, float]  # mean, standard deviation
    transitions: sp.csr_matrix  # [I, I] float32, see memory.count_transitions
    inverse: np.ndarray  # [M, M] float32, see neighbours.Neighbours
    neighbour_items: np.ndarray  # [M] int64
    pairs: Pairs  # that are not among the M
    end: int  # ms, time of the last event that may be predicted
    half_life: float  # ms, inf = every event weighs alike
    recent: np.ndarray  # [T, I] float32 decayed counts, see channels.RecentPopularity
    recent_edges: np.ndarray  # [T] int64 ms
    recent_half_life: float  # ms
    lenders: np.ndarray  # [I, N] int64, see borrowing.nearest_by_text
    cosines: np.ndarray  # [I, N] float32
    popular: DecayedCounts  # of the events that may be predicted: the order for users of whom nothing is known

    def fill(self, model: FusionModel) -> None:
        """Put the counts into the channels that the model has."""
        channels = model.channels
        if channels.memory is not None:
            channels.memory.load_counts(self.transitions)
        if channels.neighbours is not None:
            channels.neighbours.load(self.inverse, self.neighbour_items, self.end, self.half_life, self.pairs)
        if channels.recent is not None:
            channels.recent.load(self.recent, self.recent_edges, self.recent_half_life)
        if channels.borrowing is not None:
            channels.borrowing.load(self.lenders, self.cosines)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as plain arrays, for a safetensors file."""
        return {
            "popularity": self.popularity.astype(np.int64),
            "rating_stats": np.array(self.rating_stats, np.float64),
            "counts": self.transitions.data.astype(np.float32),
            "indices": self.transitions.indices.astype(np.int64),
            "indptr": self.transitions.indptr.astype(np.int64),
            "inverse": np.ascontiguousarray(self.inverse, np.float32),
            "neighbour_items": self.neighbour_items.astype(np.int64),
            "pairs": self.pairs.counts.data.astype(np.float32),
            "pair_indices": self.pairs.counts.indices.astype(np.int32),
            "pair_indptr": self.pairs.counts.indptr.astype(np.int64),
            "pair_norms": np.stack([self.pairs.norms, self.pairs.heard_from, self.pairs.near_from]),
            "times": np.array([self.end, self.half_life, self.recent_half_life], np.float64),
            "recent": np.ascontiguousarray(self.recent, np.float32),
            "recent_edges": self.recent_edges.astype(np.int64),
            "lenders": self.lenders.astype(np.int32),
            "cosines": np.ascontiguousarray(self.cosines, np.float32),
            "popular": np.ascontiguousarray(self.popular.counts, np.float64),
            "popular_at": np.array([self.popular.moment, self.popular.half_life], np.float64),
        }


def from_arrays(arrays: dict[str, np.ndarray]) -> Tables:
    """The Tables that `arrays` came from."""
    size = len(arrays["popularity"])
    end, half_life, recent_half_life = arrays["times"].tolist()
    mean, deviation = arrays["rating_stats"].tolist()
    popular = arrays.get("popular", arrays["popularity"].astype(np.float64))  # a bundle of before has all events alike
    moment, fades = arrays.get("popular_at", np.array([end, np.inf])).tolist()
    pairs = sp.csr_matrix((arrays["pairs"], arrays["pair_indices"], arrays["pair_indptr"]), shape=(size, size))
    return Tables(
        arrays["popularity"],
        (mean, deviation),
        sp.csr_matrix((arrays["counts"], arrays["indices"], arrays["indptr"]), shape=(size, size)),
        arrays["inverse"],
        arrays["neighbour_items"],
        Pairs(pairs, *arrays["pair_norms"]),
        int(end),
        half_life,
        arrays["recent"],
        arrays["recent_edges"],
        recent_half_life,
        arrays["lenders"].astype(np.int64),
        arrays["cosines"],
        DecayedCounts(popular, int(moment), fades),
    )
