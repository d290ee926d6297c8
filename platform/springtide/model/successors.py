"""Counting which item comes after which, at several distances: the counts that transition models are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp


def count_successors(
    items: np.ndarray,
    users: np.ndarray,
    wanted: np.ndarray,
    catalogue: int,
    kernel: Sequence[float],
    weights: np.ndarray | None = None,
) -> sp.csr_matrix:
    """C[a, b] = the sum, over distances d = 1, 2, .., of kernel[d - 1] times the weight of each b that came d after a.

    items [E] int: histories laid end to end, each in time order; users [E]: whose they are; wanted [E] bool: what is
    not wanted is nobody's successor; weights [E] of the events as successors, absent = 1. Returns [I, I] float32.
    """
    total = sp.csr_matrix((catalogue, catalogue), dtype=np.float32)
    for distance, share in enumerate(kernel, 1):
        follows = (users[distance:] == users[:-distance]) & wanted[distance:]
        before, after = items[:-distance][follows], items[distance:][follows]
        weight = np.full(len(before), share, np.float32)
        if weights is not None:
            weight *= weights[distance:][follows].astype(np.float32)
        total = total + sp.csr_matrix((weight, (before, after)), shape=(catalogue, catalogue))
    total.sort_indices()
    return total
