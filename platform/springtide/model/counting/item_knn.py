"""Item-KNN: what else was taken by those who took what is in the history (Sarwar et al. 2001)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from springtide.model.counting.log import TrainingLog, halving, history_weights

if TYPE_CHECKING:
    from springtide.model.batch import History

_ALL_NEIGHBOURS = 5_000  # catalogues up to this size keep every co-occurrence
_KEPT_NEIGHBOURS = 300  # larger ones this many for each item


@dataclass(frozen=True)
class ItemKnnSettings:
    neighbours: int = 100  # history items that count for each candidate, the most similar ones
    shrinkage: float = 10.0  # added to the denominator: pairs seen together rarely count less
    alpha: float = 0.5  # popularity penalty of the history item against that of the candidate; 0.5 is the cosine
    half_life: float = float("inf")  # events after which a history item weighs half; inf = all alike


@dataclass(frozen=True)
class CoOccurrence:
    """How many users took both items: pairs[b, a] with b as a target and a as any event."""

    pairs: sparse.csr_array  # [I, I]
    destinations: np.ndarray  # [I] users who took the item as a target
    sources: np.ndarray  # [I] users who took it at all


@dataclass(frozen=True)
class ItemKnn:
    """score(b) = sum over history items a near b of 0.5^(age / half_life) · similarity(a, b)."""

    similarity: sparse.csr_array  # [I, I] float32, [a, b]
    half_life: float

    def score(self, histories: Sequence[History], now: np.ndarray | None = None) -> np.ndarray:
        weights = history_weights(histories, self.similarity.shape[0], halving(self.half_life))
        return (weights @ self.similarity).toarray()


def co_occurrence(log: TrainingLog) -> CoOccurrence:
    """Pairs of items over users, in blocks of candidates, never dense."""
    count = log.catalogue
    taken, wanted = log.incidence(log.within_bounds), log.incidence(log.within_bounds & log.targets)
    destinations, sources = np.asarray(wanted.sum(axis=0)).ravel(), np.asarray(taken.sum(axis=0)).ravel()
    by_item, blocks = sparse.csr_array(wanted.T), []
    for start in range(0, count, 1000):
        block = sparse.csr_array(by_item[start : start + 1000] @ taken)
        if count > _ALL_NEIGHBOURS:
            cosine = _normalised(block, destinations[start : start + 1000], sources, 0.5, 10.0)
            block = _where(block, _best_of_rows(cosine, _KEPT_NEIGHBOURS))
        blocks.append(block)
    pairs: Any = sparse.csr_array(sparse.vstack(blocks))
    row = np.repeat(np.arange(count), np.diff(pairs.indptr))
    return CoOccurrence(_where(pairs, row != pairs.indices), destinations, sources)  # nobody is their own neighbour


def nearest(counts: CoOccurrence, alpha: float, shrinkage: float, neighbours: int) -> sparse.csr_array:
    """[I, I] float32: for each candidate (row) its similarity to the items nearest to it."""
    near = _normalised(counts.pairs, counts.destinations, counts.sources, alpha, shrinkage)
    return _where(near, _best_of_rows(near, neighbours))


def fit_item_knn(near: sparse.csr_array, settings: ItemKnnSettings) -> ItemKnn:
    """near: `nearest` of the same alpha and shrinkage, with as many neighbours or more."""
    kept = _where(near, _best_of_rows(near, settings.neighbours))
    return ItemKnn(sparse.csr_array(kept.T), settings.half_life)


def _normalised(
    pairs: sparse.csr_array, destinations: np.ndarray, sources: np.ndarray, alpha: float, shrinkage: float
) -> sparse.csr_array:
    weights = (sources**alpha).astype(np.float32)[pairs.indices]
    weights *= np.repeat((destinations ** (1 - alpha)).astype(np.float32), np.diff(pairs.indptr))
    weights += np.float32(shrinkage)
    np.divide(pairs.data, weights, out=weights)
    return sparse.csr_array((weights, pairs.indices, pairs.indptr), shape=pairs.shape)


def _best_of_rows(matrix: sparse.csr_array, keep: int) -> np.ndarray:
    """Mask over matrix.data of the `keep` largest values in each row."""
    mask = np.ones(matrix.nnz, dtype=bool)
    for row in np.flatnonzero(np.diff(matrix.indptr) > keep):
        cells = slice(matrix.indptr[row], matrix.indptr[row + 1])
        mask[cells][np.argpartition(-matrix.data[cells], keep)[keep:]] = False
    return mask


def _where(matrix: sparse.csr_array, mask: np.ndarray) -> sparse.csr_array:
    kept = np.concatenate([[0], np.cumsum(mask)])[matrix.indptr]
    return sparse.csr_array((matrix.data[mask], matrix.indices[mask], kept), shape=matrix.shape)
