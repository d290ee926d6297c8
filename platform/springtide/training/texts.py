"""Which features of the items' texts a model is trained with, and fitting them on the prepared catalogue."""

from __future__ import annotations

import logging

import numpy as np

from springtide.config import Settings
from springtide.data.prepared import Prepared
from springtide.errors import SpringtideError
from springtide.model.batch import History
from springtide.text.embed import load_vectors
from springtide.text.features import KINDS, TextFeatures, fit_features, judge_features

log = logging.getLogger(__name__)


def choose_text(settings: Settings, prepared: Prepared, cases: list[tuple[History, int]]) -> str:
    """The kind of features by which items that follow one another are nearest, unless the settings name one."""
    kind, vectors = settings.model.text_features, _vectors(settings, prepared)
    if kind != "auto" or vectors is None:
        return "meaning" if kind == "auto" else kind
    texts, width = prepared.items["text"].to_pylist(), settings.model.text_dim
    asked = [(history.items, target) for history, target in cases]
    found = {
        kind: judge_features(
            fit_features(kind, vectors, texts, width).apply(vectors, texts), asked, settings.data.exclude_seen
        )
        for kind in KINDS
    }
    chosen, told = max(KINDS, key=lambda kind: found[kind]), ", ".join(f"{kind} {found[kind]:.4f}" for kind in KINDS)
    log.info("text features: %s (how well each alone tells what validation users took: %s)", chosen, told)
    return chosen


def fit_texts(settings: Settings, prepared: Prepared, kind: str) -> TextFeatures:
    """The features, fitted on the whole catalogue; of none where the settings or the log have no text.

    Raises SpringtideError if the items have texts that `embed` has not encoded yet, or encoded before they changed.
    """
    vectors = _vectors(settings, prepared)
    if vectors is None:
        return TextFeatures(None, None)
    return fit_features(kind, vectors, prepared.items["text"].to_pylist(), settings.model.text_dim)


def feature_rows(settings: Settings, prepared: Prepared, features: TextFeatures) -> np.ndarray:
    """[I, width] float32 of the catalogue. Raises as fit_texts."""
    vectors, texts = _vectors(settings, prepared), prepared.items["text"].to_pylist()
    return features.apply(np.zeros((len(texts), 0), np.float32) if vectors is None else vectors, texts)


def _vectors(settings: Settings, prepared: Prepared) -> np.ndarray | None:
    """The encoder's vectors [I, D]; None where the settings or the log have no text. Raises as fit_texts."""
    vectors = load_vectors(settings, prepared.items)  # also for text_dim 0: the bundle takes them along for queries
    if not settings.model.text_dim or not prepared.report["catalogue"]["with_text"]:
        if not settings.model.id_embeddings:
            raise SpringtideError(
                "model.id_embeddings is off and no item has a text, so items have no vector; turn it on"
            )
        return None
    if vectors is None:
        raise SpringtideError(
            "the items have texts but no vectors yet; run the embed job first, or set model.text_dim=0"
        )
    return vectors
