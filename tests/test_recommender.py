"""The object that answers: histories out of events, scores, the best K, interests and neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from springtide.bundle import load_bundle
from springtide.model.batch import EMPTY, History
from springtide.model.decayed import TIES
from springtide.model.recommender import QUERY_TEMPERATURE, Recommender
from toy import ITEMS_IN_TOY, toy_bundle

WINDOW = 20


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    return load_bundle(toy_bundle(tmp_path_factory.mktemp("toy"))).recommender


def history(length: int, seed: int = 0) -> History:
    rng = np.random.default_rng(seed)
    times = 10**12 + np.cumsum(rng.integers(0, 10**7, length))
    return History(
        rng.integers(0, ITEMS_IN_TOY, length),
        rng.integers(0, 3, length),
        rng.integers(1, 6, length).astype(np.float32),
        times,
    )


def queries(recommender: Recommender, *items: int | None) -> np.ndarray:
    """The text vector of each item as a query; None = no query."""
    assert recommender.text_vectors is not None
    nothing = np.full(recommender.text_vectors.shape[1], np.nan, np.float32)
    return np.stack([nothing if item is None else recommender.text_vectors[item] for item in items])


# ---------------------------------------------------------------- history
def test_events_are_put_in_time_order_and_unknown_items_told(recommender: Recommender) -> None:
    events: list[dict[str, Any]] = [
        {"item_id": "i03", "timestamp": 30, "action": "view", "rating": 4},
        {"item_id": "nowhere", "timestamp": 5},
        {"item_id": "i01", "timestamp": 10, "action": "purchase"},
        {"item_id": "i02", "timestamp": 30, "action": "dance", "rating": None},
        {"item_id": "nothing"},
    ]
    known, unknown = recommender.history(events)
    assert known.items.tolist() == [1, 3, 2]  # equal times keep their order
    assert known.timestamps.tolist() == [10, 30, 30]
    assert known.actions.tolist() == [recommender.actions.index("purchase"), recommender.actions.index("view"), 0]
    np.testing.assert_array_equal(known.ratings, np.array([np.nan, 4, np.nan], np.float32))
    assert unknown == ["nowhere", "nothing"]
    assert (known.items.dtype, known.ratings.dtype, known.timestamps.dtype) == (np.int64, np.float32, np.int64)


def test_an_event_without_time_follows_the_one_before_it(recommender: Recommender) -> None:
    events: list[dict[str, Any]] = [
        {"item_id": "i05"},
        {"item_id": "i01", "timestamp": 7},
        {"item_id": "i02"},
        {"item_id": "i03", "timestamp": 3},
    ]
    known, _ = recommender.history(events)
    assert known.items.tolist() == [3, 5, 1, 2]
    assert known.timestamps.tolist() == [3, 7, 7, 7]
    # ... even if that one is of an unknown item
    events = [{"item_id": "gone", "timestamp": 9}, {"item_id": "i01"}, {"item_id": "i02", "timestamp": 4}]
    known, _ = recommender.history(events)
    assert known.items.tolist() == [2, 1]


def test_no_known_event_is_an_empty_history(recommender: Recommender) -> None:
    assert len(recommender.history([])[0]) == 0
    known, unknown = recommender.history([{"item_id": "gone"}])
    assert known is EMPTY and unknown == ["gone"]


# ---------------------------------------------------------------- branches
def test_disagreement_is_the_cosine_distance_of_the_branches(recommender: Recommender) -> None:
    histories = [history(3, 1), EMPTY, history(70, 2), history(1, 3)]
    found = recommender.disagreement(histories)
    assert found.dtype == np.float32 and np.isnan(found).tolist() == [False, True, False, False]
    for row in (0, 2, 3):
        interest = recommender._read([histories[row]], None)[1]
        long, short = (np.asarray(branch[0, 0].tolist()) for branch in (interest.long, interest.short))
        cosine = long @ short / (np.linalg.norm(long) * np.linalg.norm(short))
        assert found[row] == pytest.approx(1 - cosine, abs=1e-5)
    assert len(set(found[[0, 2, 3]].tolist())) == 3
    assert np.isnan(recommender.disagreement([EMPTY])).all() and recommender.disagreement([]).shape == (0,)


# ---------------------------------------------------------------- scores
def test_a_batch_scores_like_single_requests(recommender: Recommender) -> None:
    histories = [history(3, 1), EMPTY, history(70, 2), history(1, 3), history(WINDOW, 4)]
    asked = queries(recommender, None, 4, 5, None, None)
    now = np.array([h.timestamps[-1] + 1000 if len(h) else 0 for h in histories])
    together = recommender.score(histories, asked, now)
    assert together.logits.dtype == np.float32 and together.logits.shape == (5, ITEMS_IN_TOY)
    for row, one in enumerate(histories):
        alone = recommender.score([one], asked[row : row + 1], now[row : row + 1])
        np.testing.assert_allclose(together.logits[row], alone.logits[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(together.gate_short[row], alone.gate_short[0], rtol=1e-5)
    assert np.isnan(together.gate_short).tolist() == [False, True, False, False, False]


def test_only_the_window_is_read(recommender: Recommender) -> None:
    long = history(70, 2)
    offset_free = long[slice(70 - WINDOW, 70)]
    full, cut = recommender.score([long]).logits, recommender.score([offset_free]).logits
    assert np.corrcoef(full[0], cut[0])[0, 1] > 0.99  # the length of the history still is an input of the gate


def test_nothing_known_of_a_user_gives_popularity(recommender: Recommender) -> None:
    scored = recommender.score([EMPTY, EMPTY])
    np.testing.assert_allclose(scored.logits[1], np.log1p(recommender.popularity) * (1 + TIES), rtol=1e-6)
    assert recommender.score([]).logits.shape == (0, ITEMS_IN_TOY)


def test_a_query_alone_ranks_by_cosine_and_with_a_history_adds_to_it(recommender: Recommender) -> None:
    past, asked = history(6), queries(recommender, 7)
    alone = recommender.score([EMPTY], asked).logits[0]
    assert recommender.text_vectors is not None
    np.testing.assert_allclose(alone, recommender.text_vectors @ asked[0] / QUERY_TEMPERATURE, rtol=1e-4, atol=1e-4)
    assert alone.argmax() == 7
    both, plain = recommender.score([past], asked).logits[0], recommender.score([past]).logits[0]
    np.testing.assert_allclose(both, plain + alone, rtol=1e-4, atol=1e-4)
    none = recommender.score([past], queries(recommender, None)).logits[0]
    np.testing.assert_array_equal(none, plain)


def test_scoring_changes_nothing(recommender: Recommender) -> None:
    before = recommender.popularity.copy(), recommender.item_vectors.copy()
    first = recommender.score([history(5)]).logits
    recommender.score([EMPTY], queries(recommender, 1))
    np.testing.assert_array_equal(first, recommender.score([history(5)]).logits)
    np.testing.assert_array_equal(before[0], recommender.popularity)
    np.testing.assert_array_equal(before[1], recommender.item_vectors)


def test_items_neither_trained_nor_described_are_never_recommended(recommender: Recommender) -> None:
    popularity, text = recommender.popularity.copy(), recommender.text_vectors
    assert text is not None
    text = text.copy()
    popularity[[3, 4]], text[[4, 5]] = 0, 0  # 3 is only described, 4 is nothing, 5 is only trained
    same = recommender
    odd = Recommender(same.model, same.item_ids, same.titles, same.categories, same.actions, popularity, text)
    logits = odd.score([history(5), EMPTY, EMPTY], queries(recommender, None, None, 4)).logits
    assert np.flatnonzero(np.isneginf(logits).any(0)).tolist() == [4]
    assert np.isneginf(logits[:, 4]).all()
    assert 4 not in odd.top_k(logits, ITEMS_IN_TOY)[0]
    assert 4 not in odd.similar(3, ITEMS_IN_TOY)[0]
    textless = Recommender(same.model, same.item_ids, same.titles, same.categories, same.actions, popularity, None)
    assert np.flatnonzero(np.isneginf(textless.score([history(5)]).logits[0])).tolist() == [3, 4]
    with pytest.raises(ValueError, match="no item texts"):
        textless.score([EMPTY], queries(recommender, 1))


def test_a_model_that_reads_no_text_recommends_unseen_items_to_queries_only(tmp_path: Path) -> None:
    same = load_bundle(toy_bundle(tmp_path, model__text_dim=0)).recommender
    same.model.item_vectors.known[3] = False
    popularity = same.popularity.copy()
    popularity[3] = 0
    blind = Recommender(
        same.model, same.item_ids, same.titles, same.categories, same.actions, popularity, same.text_vectors
    )
    asked = queries(blind, None, None, 3, 3)
    logits = blind.score([history(5), EMPTY, EMPTY, history(5)], asked).logits
    assert np.isneginf(logits[:, 3]).tolist() == [True, True, False, True]
    assert logits[2].argmax() == 3
    assert np.isfinite(np.delete(logits, 3, axis=1)).all()


# ---------------------------------------------------------------- top K
logit_tables = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    elements=st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0]),
)


@given(logit_tables, st.integers(1, 12), st.data())
@settings(max_examples=150)
def test_top_k_equals_a_sort(recommender: Recommender, logits: np.ndarray, k: int, data: st.DataObject) -> None:
    exclude = [np.array(data.draw(st.lists(st.integers(0, logits.shape[1] - 1), max_size=4)), np.int64) for _ in logits]
    before = logits.copy()
    rows, scores = recommender.top_k(logits, k, exclude)
    np.testing.assert_array_equal(logits, before)
    width = min(k, logits.shape[1])
    assert rows.shape == scores.shape == (len(logits), width)
    for row, values in enumerate(logits):
        left = [i for i in range(len(values)) if i not in exclude[row] and np.isfinite(values[i])]
        best = sorted(left, key=lambda i: (-values[i], i))[:width]
        assert rows[row].tolist() == best + [-1] * (width - len(best))
        assert scores[row].tolist() == [values[i] for i in best] + [-np.inf] * (width - len(best))


def test_top_k_without_excludes(recommender: Recommender) -> None:
    logits = np.array([[1.0, 3.0, 3.0, 2.0]], np.float32)
    assert recommender.top_k(logits, 2)[0].tolist() == [[1, 2]]
    assert recommender.top_k(logits, 10**9)[0].tolist() == [[1, 2, 3, 0]]
    assert recommender.top_k(logits, 0)[0].shape == (1, 0)


# ---------------------------------------------------------------- interests and neighbours
@pytest.mark.parametrize("length", [1, 3, 4, 5, WINDOW, WINDOW + 30])
def test_interests_sum_to_one_within_their_windows(recommender: Recommender, length: int) -> None:
    past = history(length)
    told = recommender.interests(past)
    assert told.attention_long.shape == told.attention_short.shape == (length,)
    assert told.attention_long.sum() == pytest.approx(1, abs=1e-5)
    assert told.attention_short.sum() == pytest.approx(1, abs=1e-5)
    assert not told.attention_long[:-WINDOW].any() and (told.attention_long[-WINDOW:] > 0).all()
    assert not told.attention_short[:-4].any() and (told.attention_short[-4:] > 0).all()
    assert told.gate_short == pytest.approx(recommender.score([past]).gate_short[0], abs=1e-6)
    assert len(set(told.items_long.tolist())) == len(set(told.items_short.tolist())) == 10


def test_interests_of_nobody_are_empty(recommender: Recommender) -> None:
    told = recommender.interests(EMPTY)
    assert len(told.attention_long) == len(told.items_short) == 0 and np.isnan(told.gate_short)


def test_similar_items_by_cosine(recommender: Recommender) -> None:
    rows, scores = recommender.similar(3, 5)
    vectors = recommender.item_vectors / np.linalg.norm(recommender.item_vectors, axis=1, keepdims=True)
    cosine = vectors @ vectors[3]
    expected = [i for i in np.argsort(-cosine, kind="stable") if i != 3][:5]
    assert rows.tolist() == expected
    np.testing.assert_allclose(scores, cosine[expected], rtol=1e-5)
    assert len(recommender.similar(3, 10**6)[0]) == ITEMS_IN_TOY - 1
