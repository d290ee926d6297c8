"""Whitening: principal components of frozen text vectors, scaled to unit variance (Su et al., arXiv 2103.15316).

Frozen sentence vectors crowd into a narrow cone; whitening spreads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Whitening:
    """x -> (x - mean) axes."""

    mean: np.ndarray  # [D] float64
    axes: np.ndarray  # [D, width] float64

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """[N, D] -> [N, width] float32. Zero rows (no text) stay zero."""
        out = np.zeros((len(vectors), self.axes.shape[1]), np.float32)
        described = np.abs(vectors).sum(1) > 0
        out[described] = ((vectors[described].astype(np.float64) - self.mean) @ self.axes).astype(np.float32)
        return out


def fit_whitening(vectors: np.ndarray, width: int) -> Whitening:
    """Fit on the described rows of `vectors` [N, D]. The width is at most D and one less than those rows."""
    rows = vectors[np.abs(vectors).sum(1) > 0].astype(np.float64)
    width = min(width, vectors.shape[1], max(0, len(rows) - 1))
    if not width:
        return Whitening(np.zeros(vectors.shape[1]), np.zeros((vectors.shape[1], 0)))
    mean = rows.mean(0)
    rows = rows - mean
    values, axes = np.linalg.eigh(rows.T @ rows / len(rows))
    best = np.argsort(values)[::-1][:width]
    scale = np.sqrt(values[best] + 1e-6 + 0.01 * values[best[0]])  # a floor, or the last components are noise
    signs = np.sign(axes[np.abs(axes[:, best]).argmax(0), best])  # eigenvectors have no sign of their own: fix one
    return Whitening(mean, axes[:, best] * signs / scale)
