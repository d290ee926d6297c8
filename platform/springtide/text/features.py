"""What the model knows of an item's text: the encoder's vector, the spelling, or both, whitened."""

from __future__ import annotations

import numpy as np

from springtide.text.embed import whiten
from springtide.text.lexical import lexical_vectors

KINDS = ("meaning", "spelling", "both")


def make_features(kind: str, vectors: np.ndarray, texts: list[str], width: int) -> np.ndarray:
    """[I, <= 1.5 * width] float32 features of one of KINDS, each dimension of unit variance over the described items.

    vectors: [I, D] of the encoder, zero row = no text. With both, spelling has half as many dimensions as meaning.
    """
    parts = []
    if kind in ("meaning", "both"):
        parts.append(whiten(vectors, width))
    if kind in ("spelling", "both"):
        own = width if kind == "spelling" else width // 2
        parts.append(whiten(lexical_vectors(texts, own), own))
    return np.concatenate(parts, 1)


def judge_features(features: np.ndarray, cases: list[tuple[np.ndarray, int]], exclude_seen: bool) -> float:
    """How well nearness of texts alone tells what comes next: mean NDCG without a cut-off.

    cases: (recent items of a history, oldest first and not empty, the item that came next).
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    total = 0.0
    for items, target in cases:
        scores = unit @ unit[items].mean(0)
        own = scores[target]
        if exclude_seen:
            scores[items] = -np.inf
        total += 1 / np.log2(2 + np.count_nonzero(scores > own) + np.count_nonzero(scores[:target] == own))
    return total / max(1, len(cases))
