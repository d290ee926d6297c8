"""Item texts by their spelling: n-grams of characters, weighed by TF-IDF, in few dimensions (latent semantic analysis).

An encoder says little in a language that it was not trained on. Spelling needs no language: items whose names share
words, stems or signs are near, in any script.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

NGRAMS = (2, 4)  # characters, within words
MAX_NGRAMS = 60_000  # the most frequent ones
FITTED = 50_000  # texts that weights and dimensions are fitted on; more would only take longer


@dataclass(frozen=True)
class Spelling:
    """Texts -> unit vectors. After Deerwester et al., Indexing by Latent Semantic Analysis (1990)."""

    ngrams: list[str]  # [V]
    idf: np.ndarray  # [V] float32
    axes: np.ndarray  # [V, width] float32

    def apply(self, texts: list[str]) -> np.ndarray:
        """[N, width] float32 unit rows; a zero row for a text of no known n-gram."""
        if not self.ngrams or not texts:
            return np.zeros((len(texts), self.axes.shape[1]), np.float32)
        counting = _vectorizer(vocabulary=self.ngrams)
        counting.idf_ = self.idf
        found = np.asarray(counting.transform(texts) @ self.axes)
        return (found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def fit_spelling(texts: list[str], width: int) -> Spelling:
    """Fit on catalogue texts; width 0 where no n-gram is shared by two of them. The same texts give the same result."""
    nothing = Spelling([], np.zeros(0, np.float32), np.zeros((0, 0), np.float32))
    some = texts[:: -(-len(texts) // FITTED)] if texts else []
    counting = _vectorizer(min_df=2, max_features=MAX_NGRAMS)
    try:
        counts = counting.fit_transform(some)
    except ValueError:  # no n-gram occurs twice
        return nothing
    width = min(width, counts.shape[1] - 1, counts.shape[0] - 1)
    if width < 1 or len(set(some)) < 2:
        return nothing
    axes = TruncatedSVD(width, random_state=0).fit(counts).components_.T.astype(np.float32)
    return Spelling(counting.get_feature_names_out().tolist(), counting.idf_.astype(np.float32), axes)


def _vectorizer(**options: object) -> TfidfVectorizer:
    return TfidfVectorizer(
        analyzer="char_wb", ngram_range=NGRAMS, sublinear_tf=True, dtype=np.float32, preprocessor=_plain, **options
    )


def _plain(text: str) -> str:
    """NUL, which no reader sees, stands between the n-grams in a file."""
    return text.lower().replace("\0", " ")
