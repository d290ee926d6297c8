"""The counting baselines: their counts worked by hand, what they may see, and that tuning never loses."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from springtide.evaluation import baselines as b
from springtide.evaluation.ranking import build_cases, flatten, target_ranks
from springtide.model.recommender import History
from springtide.schemas import SEQUENCES, VALID


def table(items: list[list[int]], parts: list[list[int]], targets: list[list[bool]] | None = None) -> pa.Table:
    return pa.table(
        {
            "user_id": [f"u{n:05}" for n in range(len(items))],
            "items": items,
            "actions": [[1] * len(row) for row in items],
            "ratings": [[float("nan")] * len(row) for row in items],
            "timestamps": [list(range(len(row))) for row in items],
            "parts": parts,
            "targets": targets or [[True] * len(row) for row in items],
        },
        schema=SEQUENCES,
    )


def log_of(items: list[list[int]], catalogue: int, targets: list[list[bool]] | None = None) -> b.TrainingLog:
    return b.training_log(flatten(table(items, [[0] * len(row) for row in items], targets), catalogue))


def history(*items: int) -> History:
    n = len(items)
    return History(np.array(items, dtype=np.int64), np.ones(n, dtype=np.int64), np.full(n, np.nan, dtype=np.float32),
                   np.arange(n, dtype=np.int64))  # fmt: skip


def test_only_training_events_are_counted() -> None:
    events = flatten(table([[0, 1, 2, 3], [1, 1, 3]], [[0, 0, 1, 2], [0, 0, 2]]), 4)
    log = b.training_log(events)
    assert log.items.tolist() == [0, 1, 1, 1] and log.users.tolist() == [0, 0, 1, 1]
    scores = b.fit_popularity(log).score([history(), history(2)])
    assert scores.shape == (2, 4) and np.argsort(-scores[0]).tolist() == [1, 0, 2, 3]  # ties by row


def test_transition_counts_by_distance() -> None:
    log = log_of([[0, 1, 2], [0, 2]], 3)
    assert b.transition_counts(log, 2, 0.5).toarray().tolist() == [[0, 1, 1.5], [0, 0, 1], [0, 0, 0]]
    assert b.transition_counts(log, 9, 0.5).nnz == 3  # never across users, however far one looks


def test_only_what_may_be_predicted_is_a_destination() -> None:
    log = log_of([[0, 1, 2]], 3, [[True, False, True]])
    assert b.transition_counts(log, 1, 1.0).toarray().tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    pairs = b.co_occurrence(log).pairs.toarray()
    assert pairs[0].tolist() == [0, 0, 1] and pairs[:, 1].tolist() == [0, 0, 0] and pairs[1].tolist() == [1, 0, 1]
    assert np.argsort(-b.fit_popularity(log).score([history()])[0], kind="stable").tolist() == [0, 2, 1]


def test_transition_scores_by_hand() -> None:
    log = log_of([[0, 1, 2], [0, 2]], 3)
    settings = b.TransitionSettings(distances=1, gamma=1.0, smoothing=3.0, recent=2, decay=0.5, tail=0.0)
    model = b.fit_transitions(log, b.transition_counts(log, 1, 1.0), settings)
    # 1 is the last event (weight 2/3) and 0 the one before (1/3); 2 before them is beyond `recent`
    scores = model.score([history(2, 0, 1), history()])
    expected = [0, np.log(2) / 3, np.log(2) / 3 + np.log(2) * 2 / 3]
    assert scores[0] == pytest.approx(expected, abs=1e-6) and scores[1] == pytest.approx([0, 0, 0])


def test_item_knn_by_hand() -> None:
    log = log_of([[0, 1], [0, 1, 2], [0]], 3)
    counts = b.co_occurrence(log)
    assert counts.pairs.toarray().tolist() == [[0, 2, 1], [2, 0, 1], [1, 1, 0]]
    model = b.fit_item_knn(counts, b.ItemKnnSettings(neighbours=9, shrinkage=1.0, alpha=0.5, half_life=1.0))
    cosine_01, cosine_02, cosine_12 = 2 / (6**0.5 + 1), 1 / (3**0.5 + 1), 1 / (2**0.5 + 1)
    scores = model.score([history(0, 1)])
    assert scores[0] == pytest.approx([cosine_01, cosine_01 / 2, cosine_12 + cosine_02 / 2], abs=1e-6)
    nearest = b.fit_item_knn(counts, b.ItemKnnSettings(neighbours=1, shrinkage=1.0, half_life=float("inf")))
    assert np.diff(nearest.similarity.indptr).tolist() == [1, 1, 1] and nearest.similarity[[0], [1]][0] > 0


def cyclic(users: int, items: int = 30) -> pa.Table:
    """Users who walk round a ring of items, so that what comes next is certain."""
    starts = np.random.default_rng(2).integers(0, items, users)
    rows = [((start + np.arange(12)) % items).tolist() for start in starts]
    return table(rows, [[0] * 10 + [1, 2]] * users)


def test_tuning_never_loses_to_the_defaults_and_learns_the_ring() -> None:
    events = flatten(cyclic(200), 30)
    valid = build_cases(events, VALID, "leave_one_out")
    fitted = b.fit_baselines(events, valid, exclude_seen=True)
    assert list(fitted) == ["popularity", "item_knn", "transitions"]
    ranks = target_ranks(valid, fitted["transitions"].baseline.score, exclude_seen=True, batch_size=64)
    assert (ranks == 1).all() and fitted["transitions"].validation == pytest.approx(1.0)
    assert fitted["popularity"].settings == {} and (fitted["popularity"].validation or 0) < 0.5
    assert set(fitted["item_knn"].settings) == {"neighbours", "shrinkage", "alpha", "half_life"}


def test_without_validation_cases_the_defaults_are_fitted() -> None:
    events = flatten(table([[0, 1, 2], [1, 2, 0]], [[0, 0, 2], [0, 0, 2]]), 3)
    fitted = b.fit_baselines(events, build_cases(events, VALID, "leave_one_out"), exclude_seen=True)
    assert fitted["transitions"].validation is None and fitted["transitions"].settings["distances"] == 4
    assert all(f.baseline.score([history(0), history()]).shape == (2, 3) for f in fitted.values())


def test_a_log_without_training_events_still_scores() -> None:
    events = flatten(table([[0, 1]], [[2, 2]]), 3)
    fitted = b.fit_baselines(events, build_cases(events, VALID, "temporal"), exclude_seen=True)
    for found in fitted.values():
        assert np.isfinite(found.baseline.score([history(), history(1)])).all()


def test_very_long_histories_are_cut_for_neighbours_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(b, "_PAIRS", 100 * 100)
    log = log_of([list(range(300))], 300)
    assert b.co_occurrence(log).pairs.nnz == 100 * 99
    assert b.transition_counts(log, 1, 1.0).nnz == 299


def test_large_catalogues_keep_the_best_neighbours_and_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    log = log_of([rng.integers(0, 60, 8).tolist() for _ in range(80)], 60)
    settings = b.ItemKnnSettings(neighbours=5)
    whole = b.fit_item_knn(b.co_occurrence(log), settings).similarity.toarray()
    monkeypatch.setattr(b, "_ALL_NEIGHBOURS", 10)
    monkeypatch.setattr(b, "_KEPT_NEIGHBOURS", 40)
    assert np.allclose(np.sort(whole), np.sort(b.fit_item_knn(b.co_occurrence(log), settings).similarity.toarray()))
