"""Whitening: principal components of frozen text vectors, scaled to unit variance (Su et al., arXiv 2103.15316).

Frozen sentence vectors crowd into a narrow cone; whitening spreads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK = 16_384  # rows


@dataclass(frozen=True)
class Whitening:
    """x -> (x - mean) axes."""

    mean: np.ndarray  # [D] float64
    axes: np.ndarray  # [D, width] float64

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """[N, D] -> [N, width] float32. Zero rows (no text) stay zero."""
        out = np.zeros((len(vectors), self.axes.shape[1]), np.float32)
        for part, rows in _blocks(vectors):
            out[part] = (rows - self.mean) @ self.axes
        return out


def fit_whitening(vectors: np.ndarray, width: int) -> Whitening:
    """Fit on the described rows of `vectors` [N, D]. The width is at most D and one less than those rows."""
    size, dim = sum(len(rows) for _, rows in _blocks(vectors)), vectors.shape[1]
    width = min(width, dim, max(0, size - 1))
    if not width:
        return Whitening(np.zeros(dim), np.zeros((dim, 0)))
    mean = sum((rows.sum(0) for _, rows in _blocks(vectors)), start=np.zeros(dim)) / size
    spread = np.zeros((dim, dim))
    for _, rows in _blocks(vectors):
        spread += (rows - mean).T @ (rows - mean)
    values, axes = np.linalg.eigh(spread / size)
    best = np.argsort(values)[::-1][:width]
    scale = np.sqrt(values[best] + 1e-6 + 0.01 * values[best[0]])  # a floor, or the last components are noise
    signs = np.sign(axes[np.abs(axes[:, best]).argmax(0), best])  # eigenvectors have no sign of their own: fix one
    return Whitening(mean, axes[:, best] * signs / scale)


def _blocks(vectors: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(places, rows in float64) of the described rows, some at a time: all at once would be several times `vectors`."""
    for begin in range(0, len(vectors), BLOCK):
        some = vectors[begin : begin + BLOCK]
        described = np.flatnonzero(some.any(1))
        yield begin + described, some[described].astype(np.float64)
