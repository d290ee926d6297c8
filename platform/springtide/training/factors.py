"""Where item vectors begin: a factorisation of the transition counts, so that like items start out near each other.

The top eigenvectors of the positive pointwise mutual information of what is taken close together, as word vectors
implicitly are (Levy and Goldberg 2014, "Neural word embedding as implicit matrix factorization").
"""

from __future__ import annotations

import logging

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import ArpackError, eigsh

log = logging.getLogger(__name__)
RESTARTS = 100  # most of the factorisation: 20 are enough where the counts have a shape, and nothing is if not
NOTHING = 1e-3  # length of a row, in root mean squares, below which an item is in none of the factors
SMOOTHING = 0.75  # power of an item's frequency as a context, or rare pairs would say most


def item_factors(transitions: sp.csr_matrix, dim: int) -> np.ndarray:
    """Factors [I, dim] float32 of counts C[a, b], with a mean square of 1 / dim; zero rows where they say nothing.

    That is for what was never counted, or is not in the `dim` greatest factors. All are zero where fewer than dim + 2
    items were counted, or no pair more often than by chance: there is nothing to factorise.
    """
    pairs = (transitions + transitions.T).tocoo()
    factors = np.zeros((transitions.shape[0], dim), np.float32)
    frequency = np.asarray(pairs.sum(1)).ravel()
    counted = np.flatnonzero(frequency > 0)
    if len(counted) < dim + 2:
        return factors
    context = frequency**SMOOTHING
    ratio = pairs.data * context.sum() / frequency[pairs.row]
    told = np.maximum(np.log(ratio / context[pairs.col]), 0)
    matrix = sp.csr_matrix((told, (pairs.row, pairs.col)), shape=pairs.shape)[counted][:, counted]
    matrix = (matrix + matrix.T) / 2  # smoothing favours one side
    matrix.eliminate_zeros()
    if not matrix.nnz:  # every pair is as frequent as chance would have it
        return factors
    start = np.random.default_rng(0).normal(size=len(counted))  # given, so that the same counts begin alike
    try:
        values, vectors = eigsh(matrix, k=dim, which="LA", v0=start, maxiter=RESTARTS)
    except ArpackError as error:
        log.warning("the transition counts cannot be factorised (%s), so item vectors begin at random", error)
        return factors
    found = vectors * np.sqrt(values.clip(min=0))
    found[(found**2).sum(1) < NOTHING**2 * (found**2).sum(1).mean()] = 0
    told_of = found.any(1)
    if told_of.any():
        size = np.sqrt((found[told_of] ** 2).mean())
        factors[counted] = found / (size * dim**0.5)
    return factors
