"""Item texts by their spelling: n-grams of characters, weighed by TF-IDF, in few dimensions (latent semantic analysis).

An encoder says little in a language that it was not trained on. Spelling needs no language: items whose names share
words, stems or signs are near, in any script.
"""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

NGRAMS = (2, 4)  # characters, within words
MAX_NGRAMS = 60_000  # the most frequent ones
FITTED = 50_000  # texts that weights and dimensions are fitted on; more would only take longer


def lexical_vectors(texts: list[str], width: int) -> np.ndarray:
    """[I, min(width, ...)] float32 unit rows; a zero row for a text that shares no n-gram with another.

    After Deerwester et al., Indexing by Latent Semantic Analysis (1990). The same texts give the same vectors.
    """
    rows = TfidfVectorizer(
        analyzer="char_wb", ngram_range=NGRAMS, sublinear_tf=True, min_df=2, max_features=MAX_NGRAMS, dtype=np.float32
    )
    some = texts[:: -(-len(texts) // FITTED)] if texts else []
    try:
        counts = rows.fit_transform(some)
    except ValueError:  # no n-gram occurs twice
        return np.zeros((len(texts), 0), np.float32)
    width = min(width, counts.shape[1] - 1, counts.shape[0] - 1)
    if width < 1 or len(set(some)) < 2:
        return np.zeros((len(texts), 0), np.float32)
    axes = TruncatedSVD(width, random_state=0).fit(counts)
    found = axes.transform(rows.transform(texts))
    return (found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)).astype(np.float32)
