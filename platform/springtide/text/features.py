"""What the model knows of an item's text: the encoder's vector, the spelling, or both, whitened."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from springtide.ranks import gains, hide, places
from springtide.text.spelling import Spelling, fit_spelling
from springtide.text.whitening import Whitening, fit_whitening

RECENT = 10  # events of a history by which features are judged
KINDS = ("meaning", "spelling", "both")
_BETWEEN = "\0"  # n-grams in one string: none holds it, see spelling._plain


@dataclass(frozen=True)
class TextFeatures:
    """From texts and the encoder's vectors of them to features; fitted on one catalogue, good for items of later."""

    meaning: Whitening | None
    spelling: tuple[Spelling, Whitening] | None

    def apply(self, vectors: np.ndarray, texts: list[str]) -> np.ndarray:
        """[N, width] float32; about unit variance in each dimension over the catalogue, zero without a text.

        vectors: [N, D] of the encoder, zero row = no text.
        """
        parts = [np.zeros((len(texts), 0), np.float32)]
        if self.meaning is not None:
            parts.append(self.meaning.apply(vectors))
        if self.spelling is not None:
            spelling, whitening = self.spelling
            parts.append(whitening.apply(spelling.apply(texts)))
        return np.concatenate(parts, 1)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as plain arrays, for a safetensors file."""
        out: dict[str, np.ndarray] = {}
        if self.meaning is not None:
            out |= {"meaning.mean": self.meaning.mean, "meaning.axes": self.meaning.axes}
        if self.spelling is not None:
            spelling, whitening = self.spelling
            letters = np.frombuffer(_BETWEEN.join(spelling.ngrams).encode(), np.uint8)
            out |= {"spelling.ngrams": letters, "spelling.idf": spelling.idf, "spelling.svd": spelling.axes}
            out |= {"spelling.mean": whitening.mean, "spelling.axes": whitening.axes}
        return {name: np.ascontiguousarray(array) for name, array in out.items()}


def from_arrays(arrays: dict[str, np.ndarray]) -> TextFeatures:
    """The TextFeatures that `arrays` came from."""
    meaning = spelling = None
    if "meaning.mean" in arrays:
        meaning = Whitening(arrays["meaning.mean"], arrays["meaning.axes"])
    if "spelling.ngrams" in arrays:
        letters = arrays["spelling.ngrams"].tobytes().decode()
        of_texts = Spelling(letters.split(_BETWEEN) if letters else [], arrays["spelling.idf"], arrays["spelling.svd"])
        spelling = of_texts, Whitening(arrays["spelling.mean"], arrays["spelling.axes"])
    return TextFeatures(meaning, spelling)


def fit_features(kind: str, vectors: np.ndarray, texts: list[str], width: int) -> TextFeatures:
    """Fit one of KINDS on a catalogue, with at most 1.5 * width features.

    vectors: [I, D] of the encoder, zero row = no text. With both, spelling has half as many dimensions as meaning.
    """
    meaning = fit_whitening(vectors, width) if kind in ("meaning", "both") else None
    if kind == "meaning":
        return TextFeatures(meaning, None)
    own = width if kind == "spelling" else width // 2
    spelling = fit_spelling(texts, own)
    return TextFeatures(meaning, (spelling, fit_whitening(spelling.apply(texts), own)))


def judge_features(features: np.ndarray, cases: list[tuple[np.ndarray, int]], exclude_seen: bool) -> float:
    """How well nearness of texts alone tells what comes next: mean NDCG without a cut-off.

    cases: (items of a history, oldest first and not empty, the item that came next). What is near is told by the last
    RECENT of them; with exclude_seen all are hidden.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    total = 0.0
    for items, target in cases:
        scores = (unit @ unit[items[-RECENT:]].mean(0))[None]
        if exclude_seen:
            hide(scores, [items])
        total += float(gains(places(scores, np.array([target])))[0])
    return total / max(1, len(cases))
