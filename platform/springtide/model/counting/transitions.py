"""Transition counts: what came next, or soon after, whenever something of the recent history was taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from springtide.model.counting.log import TrainingLog, history_weights
from springtide.model.successors import count_successors

if TYPE_CHECKING:
    from springtide.model.batch import History


@dataclass(frozen=True)
class TransitionSettings:
    distances: int = 10  # b counts as a successor of a up to this many events later,
    power: float = 1.0  # at distance d with weight d^-power
    log_half_life: float = float("inf")  # share of the log's span after which a successor weighs half
    smoothing: float = 1000.0  # tau: pseudo-events spread evenly over the catalogue
    recent: int = 20  # history events that are asked for their successors,
    decay: float = 0.6  # the one j events before the last with weight decay^j
    tail: float = 0.1  # share of the weight spread evenly over those events
    popularity: float = 0.0  # lambda, in units of the mean count score; negative favours the less popular


@dataclass(frozen=True)
class Transitions:
    """score(b) = sum_j w_j · log(1 + C[a_j, b] · I / tau) + lambda · log popularity(b).

    C holds smoothed multi-distance transition counts (PCTM, "sequential capacity probes", RecSys 2026); the logarithm
    is the log probability of b after a_j under Dirichlet smoothing, less what is the same for every b.
    """

    successors: sparse.csr_array  # [I, I] float32: the logarithms
    prior: np.ndarray  # [I] lambda · log popularity
    recent: int
    decay: float
    tail: float

    def score(self, histories: Sequence[History], now: np.ndarray | None = None) -> np.ndarray:
        weights = history_weights(histories, len(self.prior), self._kernel, self.recent)
        return (weights @ self.successors).toarray() + self.prior

    def _kernel(self, ages: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Weights of events by age (0 = last) in histories of these lengths; they sum to 1 over a history."""
        total = lengths if self.decay == 1 else (1 - self.decay**lengths) / (1 - self.decay)
        return (1 - self.tail) * self.decay**ages / total + self.tail / lengths


def transition_counts(log: TrainingLog, distances: int, power: float, log_half_life: float) -> sparse.csr_array:
    """C[a, b] = sum over d of d^-power times the weight of the targets b that came d events after a. [I, I] float32."""
    kernel = [distance**-power for distance in range(1, distances + 1)]
    weights = log.weights(log_half_life)
    return sparse.csr_array(count_successors(log.items, log.users, log.targets, log.catalogue, kernel, weights))


def fit_transitions(log: TrainingLog, counts: sparse.csr_array, settings: TransitionSettings) -> Transitions:
    """counts: those of the log under the same distances, power and log_half_life."""
    successors = counts.copy()
    successors.data = np.log1p(counts.data * (log.catalogue / settings.smoothing)).astype(np.float32)
    logs = np.log1p(log.counts())
    # In units of the scores, or smoothing would change what a lambda is worth and neither could be searched alone.
    unit = (float(successors.data.mean()) if successors.nnz else 1.0) / max(float(logs.mean()), 1e-9)
    prior = settings.popularity * unit * logs
    return Transitions(successors, prior.astype(np.float32), settings.recent, settings.decay, settings.tail)
