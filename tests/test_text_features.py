"""Text features: spelling needs no language, both are whitened, and the choice follows what was taken next."""

from __future__ import annotations

import numpy as np
import pytest

from springtide.text import whitening
from springtide.text.features import KINDS, fit_features, from_arrays, judge_features
from springtide.text.spelling import fit_spelling

CHINESE = ["红色雨伞", "红色雨衣", "蓝色茶杯", "蓝色茶壶", "木头玩具", "木头小车"]


def lexical_vectors(texts: list[str], width: int) -> np.ndarray:
    return fit_spelling(texts, width).apply(texts)


def make_features(kind: str, vectors: np.ndarray, texts: list[str], width: int) -> np.ndarray:
    return fit_features(kind, vectors, texts, width).apply(vectors, texts)


def nearest(vectors: np.ndarray) -> list[int]:
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -1)
    return cosine.argmax(1).tolist()


def test_spelling_finds_kin_in_a_script_without_spaces() -> None:
    assert nearest(lexical_vectors(CHINESE, 4)) == [1, 0, 3, 2, 5, 4]


@pytest.mark.parametrize("texts", [[], [""], ["a"], ["", "", ""], ["one", "two"], ["same"] * 5, ["x y", ""] * 3])
def test_texts_with_nothing_to_tell(texts: list[str]) -> None:
    found = lexical_vectors(texts, 8)
    assert len(found) == len(texts) and np.isfinite(found).all()
    assert (np.abs(found).sum(1)[[not text for text in texts]] == 0).all()
    for kind in KINDS:
        features = make_features(kind, np.ones((len(texts), 3), np.float32), texts, 2)
        assert len(features) == len(texts) and np.isfinite(features).all()


def test_the_same_texts_give_the_same_vectors() -> None:
    np.testing.assert_array_equal(lexical_vectors(CHINESE, 4), lexical_vectors(CHINESE, 4))


def test_widths_of_each_kind() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["red", "blue", "cup", "pot", "toy", "hat", "box"], 3)) for _ in range(60)]
    vectors = rng.normal(size=(60, 16)).astype(np.float32)
    widths = {kind: make_features(kind, vectors, texts, 8).shape[1] for kind in KINDS}
    assert widths == {"meaning": 8, "spelling": 8, "both": 12}
    both = make_features("both", vectors, texts, 8)
    np.testing.assert_array_equal(both[:, :8], make_features("meaning", vectors, texts, 8))
    assert both.std(0).min() > 0.4 and both.std(0).max() < 1.1


@pytest.mark.parametrize("kind", KINDS)
def test_items_of_later_get_the_features_that_they_would_have_had(kind: str) -> None:
    rng = np.random.default_rng(1)
    texts, vectors = [*CHINESE, "a\0b", "a\0b\0c", *CHINESE[:4]], rng.normal(size=(12, 5)).astype(np.float32)
    made = fit_features(kind, vectors, texts, 4)
    again = from_arrays(made.arrays())
    whole = made.apply(vectors, texts)
    np.testing.assert_array_equal(again.apply(vectors, texts), whole)
    np.testing.assert_allclose(again.apply(vectors[3:5], texts[3:5]), whole[3:5], atol=1e-6)
    assert not again.apply(np.zeros((1, 5), np.float32), [""]).any() and again.apply(vectors[:0], []).shape[0] == 0


def test_no_text_at_all() -> None:
    nothing = from_arrays({})
    assert nothing.apply(np.zeros((3, 0), np.float32), ["", "", ""]).shape == (3, 0)


def test_a_judgement_by_hand() -> None:
    """Item 1 is nearest to item 0, item 2 the farthest; seen items are no candidates where they are excluded."""
    features = np.array([[1, 0], [1, 0.1], [-1, 0], [0, 1]], np.float32)
    first, third = 1 / np.log2(2), 1 / np.log2(4)
    assert judge_features(features, [(np.array([0]), 1)], True) == pytest.approx(first)
    assert judge_features(features, [(np.array([0]), 1)], False) == pytest.approx(1 / np.log2(3))
    assert judge_features(features, [(np.array([0]), 1), (np.array([0]), 2)], True) == pytest.approx(
        (first + third) / 2
    )
    assert judge_features(features, [], True) == 0


def test_items_without_a_text_never_come_before_those_with_one_by_chance() -> None:
    features = np.array([[0, 0], [0, 0], [0, 0]], np.float32)
    assert judge_features(features, [(np.array([0]), 2)], True) == pytest.approx(1 / np.log2(3))  # ties by row


def test_whitening_some_rows_at_a_time_is_whitening_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(2).normal(size=(50, 6)).astype(np.float32)
    vectors[::7] = 0
    whole = whitening.fit_whitening(vectors, 4)
    monkeypatch.setattr(whitening, "BLOCK", 8)
    parts = whitening.fit_whitening(vectors, 4)
    np.testing.assert_allclose(parts.apply(vectors), whole.apply(vectors), rtol=1e-5, atol=1e-6)
    assert not parts.apply(vectors)[::7].any()
