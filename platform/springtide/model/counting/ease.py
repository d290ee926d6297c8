"""EASE: a linear model of all items on all others, in closed form (Steck 2019, arXiv 1905.03375)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import linalg, sparse

from springtide.model.counting.log import TrainingLog, halving, history_weights

if TYPE_CHECKING:
    from springtide.model.batch import History

LARGEST = 5_000  # items of the linear model: the most popular ones of a larger catalogue
_DOUBLE = 6_000  # items up to which the inverse is computed in double precision
_BLOCK = 512


@dataclass(frozen=True)
class EaseSettings:
    l2: float = 200.0  # added to the diagonal of the Gram matrix
    half_life: float = 5.0  # events after which a history item weighs half; inf = all alike
    log_half_life: float = float("inf")  # share of the log's span after which a training event weighs half


@dataclass(frozen=True)
class Ease:
    """score(b) = sum over history items a of 0.5^(age / half_life) · weights[a, b]; 0 for items without a column."""

    weights: np.ndarray  # [J, J] float32
    rows: np.ndarray  # [J] their catalogue rows, ascending
    catalogue: int
    half_life: float

    def score(self, histories: Sequence[History], now: np.ndarray | None = None) -> np.ndarray:
        asked = history_weights(histories, self.catalogue, halving(self.half_life))
        if len(self.rows) == self.catalogue:
            return np.asarray(asked @ self.weights)
        scores = np.zeros((len(histories), self.catalogue), dtype=np.float32)
        scores[:, self.rows] = sparse.csr_array(asked[:, self.rows]) @ self.weights
        return scores


@dataclass(frozen=True)
class Gram:
    """Co-occurrence of weighted events: X'X with X [U, J] all events, and X'Y with Y those that may be predicted."""

    rows: np.ndarray  # [J] catalogue rows
    catalogue: int
    own: np.ndarray  # [J, J]
    wanted: np.ndarray | None  # [J, J]; None: all events may be predicted, so Y is X


def gram(log: TrainingLog, log_half_life: float) -> Gram:
    """The counts of the `LARGEST` items with the most events."""
    events = np.bincount(log.items, minlength=log.catalogue)
    rows = np.sort(np.argsort(-events, kind="stable")[:LARGEST])
    taken = sparse.csr_array(log.incidence(log.within_bounds, log_half_life)[:, rows])
    own = (taken.T @ taken).toarray()
    if log.targets.all():
        return Gram(rows, log.catalogue, own, None)
    aimed = sparse.csr_array(log.incidence(log.within_bounds & log.targets, log_half_life)[:, rows])
    return Gram(rows, log.catalogue, own, (taken.T @ aimed).toarray())


def fit_ease(counts: Gram, settings: EaseSettings) -> Ease:
    """The weights that predict each item from all others but itself, by least squares with a ridge of `l2`."""
    inverse = inverted(counts.own, settings.l2)
    if counts.wanted is None:
        weights = inverse / -np.diag(inverse)
    else:
        weights = inverse @ counts.wanted.astype(inverse.dtype, copy=False)
        weights -= inverse * (np.diag(weights) / np.diag(inverse))
    np.fill_diagonal(weights, 0.0)
    return Ease(weights.astype(np.float32, copy=False), counts.rows, counts.catalogue, settings.half_life)


def regularised_inverse(rows: sparse.csr_array, l2: float) -> np.ndarray:
    """(X'X + l2 · 1)^-1 [I, I] of rows X [U, I]; float64, or float32 for more than 6,000 items. l2 must be above 0."""
    return inverted((rows.T @ rows).toarray(), l2)


def inverted(matrix: np.ndarray, l2: float) -> np.ndarray:
    """(matrix + l2 · 1)^-1 of a positive semi-definite matrix [I, I], which stays as it is."""
    ridged: Any = matrix.astype(np.float64 if len(matrix) <= _DOUBLE else np.float32)
    ridged[np.diag_indices_from(ridged)] += l2
    factor, lower = linalg.cho_factor(ridged, lower=True, overwrite_a=True, check_finite=False)
    (from_factor,) = linalg.get_lapack_funcs(("potri",), (factor,))  # half the work of solving for the identity
    inverse, failed = from_factor(factor, lower=lower, overwrite_c=True)
    if failed:
        raise np.linalg.LinAlgError(f"no inverse: LAPACK potri says {failed}")
    for start in range(0, len(inverse), _BLOCK):  # LAPACK fills the lower triangle; the other one block by block
        end = start + _BLOCK
        inverse[:start, start:end] = inverse[start:end, :start].T
        corner = inverse[start:end, start:end]
        corner[:] = np.tril(corner) + np.tril(corner, -1).T
    return inverse.T  # its own transpose, in the order of memory that products want
