"""The counting baselines: their counts worked by hand, what they may see, and that tuning never loses."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from springtide.evaluation import baselines as b
from springtide.evaluation.ranking import build_cases, flatten, target_ranks
from springtide.model.counting import ease, item_knn
from springtide.model.counting import log as counting_log
from springtide.model.counting.ease import EaseSettings, fit_ease, gram, regularised_inverse
from springtide.model.counting.item_knn import ItemKnnSettings, co_occurrence, fit_item_knn, nearest
from springtide.model.counting.log import TrainingLog
from springtide.model.counting.popularity import PopularitySettings, fit_popularity
from springtide.model.counting.transitions import TransitionSettings, fit_transitions, transition_counts
from springtide.model.recommender import History
from springtide.schemas import SEQUENCES, VALID

INF = float("inf")


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


def log_of(items: list[list[int]], catalogue: int, targets: list[list[bool]] | None = None) -> TrainingLog:
    return b.training_log(flatten(table(items, [[0] * len(row) for row in items], targets), catalogue))


def history(*items: int) -> History:
    n = len(items)
    return History(np.array(items, dtype=np.int64), np.ones(n, dtype=np.int64), np.full(n, np.nan, dtype=np.float32),
                   np.arange(n, dtype=np.int64))  # fmt: skip


def test_only_training_events_are_counted() -> None:
    events = flatten(table([[0, 1, 2, 3], [1, 1, 3]], [[0, 0, 1, 2], [0, 0, 2]]), 4)
    log = b.training_log(events)
    assert log.items.tolist() == [0, 1, 1, 1] and log.users.tolist() == [0, 0, 1, 1]
    scores = fit_popularity(log, PopularitySettings()).score([history(), history(2)])
    assert scores.shape == (2, 4) and np.argsort(-scores[0]).tolist() == [1, 0, 2, 3]  # ties by row


def test_transition_counts_by_distance() -> None:
    log = log_of([[0, 1, 2], [0, 2]], 3)
    assert transition_counts(log, 2, 1.0, INF).toarray().tolist() == [[0, 1, 1.5], [0, 0, 1], [0, 0, 0]]  # 1 + 1/2
    assert transition_counts(log, 2, 2.0, INF).toarray().tolist() == [[0, 1, 1.25], [0, 0, 1], [0, 0, 0]]
    assert transition_counts(log, 9, 1.0, INF).nnz == 3  # never across users, however far one looks


def test_only_what_may_be_predicted_is_a_destination() -> None:
    log = log_of([[0, 1, 2]], 3, [[True, False, True]])
    assert transition_counts(log, 1, 1.0, INF).toarray().tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    pairs = co_occurrence(log).pairs.toarray()
    assert pairs[:, 0].tolist() == [0, 0, 1] and not pairs[1].any() and pairs[:, 1].tolist() == [1, 0, 1]  # [b, a]
    scores = fit_popularity(log, PopularitySettings()).score([history()])[0]
    assert np.argsort(-scores, kind="stable").tolist() == [0, 2, 1]


def test_transitions_of_long_ago_count_less() -> None:
    log = TrainingLog(np.zeros(3, int), np.array([0, 1, 2]), np.ones(3, bool), np.array([0, 500, 1000]), 3)
    # 1 came half the log before its end, which is one half-life; 2 is the end
    assert transition_counts(log, 2, 1.0, 0.5).toarray().tolist() == [[0, 0.5, 0.5], [0, 0, 1], [0, 0, 0]]
    assert log.incidence(log.targets, 0.5).toarray().tolist() == [[0.25, 0.5, 1]]


def test_transition_scores_by_hand() -> None:
    log = log_of([[0, 1, 2], [0, 2]], 3)
    settings = TransitionSettings(distances=1, smoothing=3.0, recent=2, decay=0.5, tail=0.0)
    model = fit_transitions(log, transition_counts(log, 1, 1.0, INF), settings)
    # 1 is the last event (weight 2/3) and 0 the one before (1/3); 2 before them is beyond `recent`
    scores = model.score([history(2, 0, 1), history()])
    expected = [0, np.log(2) / 3, np.log(2) / 3 + np.log(2) * 2 / 3]
    assert scores[0] == pytest.approx(expected, abs=1e-6) and scores[1] == pytest.approx([0, 0, 0])


def test_item_knn_by_hand() -> None:
    log = log_of([[0, 1], [0, 1, 2], [0]], 3)
    counts = co_occurrence(log)
    assert counts.pairs.toarray().tolist() == [[0, 2, 1], [2, 0, 1], [1, 1, 0]]
    near = nearest(counts, 0.5, 1.0, 9)
    model = fit_item_knn(near, ItemKnnSettings(neighbours=9, shrinkage=1.0, alpha=0.5, half_life=1.0))
    cosine_01, cosine_02, cosine_12 = 2 / (6**0.5 + 1), 1 / (3**0.5 + 1), 1 / (2**0.5 + 1)
    scores = model.score([history(0, 1)])
    assert scores[0] == pytest.approx([cosine_01, cosine_01 / 2, cosine_12 + cosine_02 / 2], abs=1e-6)
    one = fit_item_knn(near, ItemKnnSettings(neighbours=1, shrinkage=1.0, half_life=INF))
    kept = one.similarity.toarray()  # [a, b]: each candidate b keeps the nearest history item
    assert (kept > 0).sum(0).tolist() == [1, 1, 1] and kept[0, 1] > 0 and kept[1, 0] > 0


def cyclic(users: int, items: int = 30) -> pa.Table:
    """Users who walk round a ring of items, so that what comes next is certain."""
    starts = np.random.default_rng(2).integers(0, items, users)
    rows = [((start + np.arange(12)) % items).tolist() for start in starts]
    return table(rows, [[0] * 10 + [1, 2]] * users)


def test_tuning_never_loses_to_the_defaults_and_learns_the_ring() -> None:
    events = flatten(cyclic(200), 30)
    valid = build_cases(events, VALID, "leave_one_out")
    fitted = b.fit_baselines(events, valid, exclude_seen=True)
    assert list(fitted) == ["popularity", "recent_popularity", "item_knn", "item_knn_recency", "ease", "transitions"]
    ranks = target_ranks(valid, fitted["transitions"].baseline.score, exclude_seen=True, batch_size=64)
    assert (ranks == 1).all() and fitted["transitions"].validation == pytest.approx(1.0)
    assert fitted["popularity"].settings == {} and (fitted["popularity"].validation or 0) < 0.5
    assert set(fitted["item_knn"].settings) == {"neighbours", "shrinkage", "alpha"}
    assert set(fitted["item_knn_recency"].settings) == {"neighbours", "shrinkage", "alpha", "half_life"}
    for plain, recent in (("popularity", "recent_popularity"), ("item_knn", "item_knn_recency")):
        assert (fitted[plain].validation or 0) <= (fitted[recent].validation or 0) + 1e-9 or plain == "popularity"


def test_without_validation_cases_the_defaults_are_fitted() -> None:
    events = flatten(table([[0, 1, 2], [1, 2, 0]], [[0, 0, 2], [0, 0, 2]]), 3)
    fitted = b.fit_baselines(events, build_cases(events, VALID, "leave_one_out"), exclude_seen=True)
    assert fitted["transitions"].validation is None and fitted["transitions"].settings["distances"] == 10
    assert all(f.baseline.score([history(0), history()]).shape == (2, 3) for f in fitted.values())


def test_a_log_without_training_events_still_scores() -> None:
    events = flatten(table([[0, 1]], [[2, 2]]), 3)
    fitted = b.fit_baselines(events, build_cases(events, VALID, "temporal"), exclude_seen=True)
    for found in fitted.values():
        assert np.isfinite(found.baseline.score([history(), history(1)])).all()


def test_very_long_histories_are_cut_for_neighbours_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting_log, "_PAIRS", 100 * 100)
    log = log_of([list(range(300))], 300)
    assert co_occurrence(log).pairs.nnz == 100 * 99
    assert transition_counts(log, 1, 1.0, INF).nnz == 299


def test_large_catalogues_keep_the_best_neighbours_and_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    log = log_of([rng.integers(0, 60, 8).tolist() for _ in range(80)], 60)
    settings = ItemKnnSettings(neighbours=5)
    whole = fit_item_knn(nearest(co_occurrence(log), 0.5, 10.0, 5), settings).similarity.toarray()  # [a, b]
    monkeypatch.setattr(item_knn, "_ALL_NEIGHBOURS", 10)
    monkeypatch.setattr(item_knn, "_KEPT_NEIGHBOURS", 40)
    cut = fit_item_knn(nearest(co_occurrence(log), 0.5, 10.0, 5), settings).similarity.toarray()
    assert np.allclose(np.sort(whole, axis=0), np.sort(cut, axis=0))


# ---------------------------------------------------------------- EASE, trends, refit
def test_ease_equals_its_formula_and_leaves_the_diagonal_out() -> None:
    rng = np.random.default_rng(4)
    log = log_of([rng.choice(9, 4, replace=False).tolist() for _ in range(40)], 9)
    x = np.zeros((40, 9))
    x[log.users, log.items] = 1
    inverse = np.linalg.inv(x.T @ x + 3 * np.eye(9))
    expected = inverse / -np.diag(inverse)
    np.fill_diagonal(expected, 0)
    model = fit_ease(gram(log, INF), EaseSettings(l2=3.0, half_life=INF))
    np.testing.assert_allclose(model.weights, expected, atol=1e-5)
    np.testing.assert_allclose(model.score([history(1, 4)])[0], expected[1] + expected[4], atol=1e-5)
    np.testing.assert_allclose(regularised_inverse(log.incidence(log.within_bounds), 3.0), inverse, atol=1e-6)


def test_ease_predicts_only_what_may_be_predicted_and_never_from_itself() -> None:
    """Each column against a ridge regression of its own, on all events of all other items."""
    rng = np.random.default_rng(5)
    rows = [rng.choice(7, 4, replace=False).tolist() for _ in range(30)]
    log = log_of(rows, 7, [rng.random(4).round().astype(bool).tolist() for _ in rows])
    x, y = np.zeros((30, 7)), np.zeros((30, 7))
    x[log.users, log.items] = 1
    y[log.users[log.targets], log.items[log.targets]] = 1
    weights = fit_ease(gram(log, INF), EaseSettings(l2=2.0)).weights
    for item in range(7):
        others = np.delete(np.arange(7), item)
        of = x[:, others]
        expected = np.linalg.solve(of.T @ of + 2 * np.eye(6), of.T @ y[:, item])
        np.testing.assert_allclose(weights[others, item], expected, atol=1e-5)
        assert weights[item, item] == 0


def test_ease_halves_old_history_events() -> None:
    model = fit_ease(gram(log_of([[0, 1, 2], [0, 1], [1, 2]], 3), INF), EaseSettings(l2=1.0, half_life=1.0))
    expected = model.weights[2] + model.weights[1] / 2 + model.weights[0] / 4
    np.testing.assert_allclose(model.score([history(0, 1, 2)])[0], expected, atol=1e-6)


def test_the_inverse_is_exact_across_blocks_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ease, "_BLOCK", 4)
    x = (np.random.default_rng(6).random((20, 11)) < 0.3).astype(np.float32)
    found = regularised_inverse(sparse.csr_array(x), 0.5)
    np.testing.assert_allclose(found @ (x.T @ x + 0.5 * np.eye(11)), np.eye(11), atol=1e-9)
    assert (found == found.T).all() and found.flags.c_contiguous


def test_ease_of_a_large_catalogue_is_over_its_popular_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ease, "LARGEST", 3)
    model = fit_ease(gram(log_of([[0, 2, 4], [0, 2, 4], [1, 3, 4]], 6), INF), EaseSettings())
    assert model.rows.tolist() == [0, 2, 4]
    scores = model.score([history(0)])[0]
    assert scores[2] > 0 and scores[4] > 0 and not scores[[0, 1, 3, 5]].any()


def test_recent_popularity_follows_a_change_of_taste() -> None:
    log = TrainingLog(np.arange(8), np.array([0] * 5 + [1] * 3), np.ones(8, bool), np.arange(8) * 100, 2)
    ever, lately = (
        fit_popularity(log, PopularitySettings(half_life)).score([history()])[0] for half_life in (INF, 0.1)
    )
    assert ever.argmax() == 0 and lately.argmax() == 1
    assert log.counts(1.0).tolist() == pytest.approx([sum(0.5 ** (a / 7) for a in (7, 6, 5, 4, 3)),
                                                     sum(0.5 ** (a / 7) for a in (2, 1, 0))])  # fmt: skip


def test_a_refit_counts_validation_events_and_never_test_events() -> None:
    events = flatten(table([[0, 1, 2], [0, 1, 2], [3, 1, 4]], [[0, 1, 2], [0, 1, 2], [0, 1, 2]]), 5)
    valid = build_cases(events, VALID, "leave_one_out")
    for refit, taken in ((False, [0, 3]), (True, [0, 1, 3])):
        fitted = b.fit_baselines(events, valid, exclude_seen=True, refit=refit)
        places = fitted["popularity"].baseline.score([history()])[0]
        counted = np.bincount(events.items[events.parts <= (VALID if refit else 0)], minlength=5)
        assert np.argsort(-places).tolist() == np.argsort(-counted, kind="stable").tolist()
        assert np.flatnonzero(counted).tolist() == taken
        follows = fitted["transitions"].baseline.score([history(0)])[0]
        assert (follows[1] > follows[4]) == refit  # 0 -> 1 ends in validation; what ends in the test is never counted


@pytest.mark.parametrize("refit", [False, True])
def test_no_score_depends_on_test_events(refit: bool) -> None:
    rng = np.random.default_rng(7)
    rows = [rng.integers(0, 12, 9).tolist() for _ in range(40)]
    parts = [[0] * 6 + [1, 2, 2]] * 40
    scores = []
    for shift in (0, 5):
        changed = [[*row[:7], *((item + shift) % 12 for item in row[7:])] for row in rows]
        events = flatten(table(changed, parts), 12)
        fitted = b.fit_baselines(events, build_cases(events, VALID, "temporal"), exclude_seen=False, refit=refit)
        asked = [history(0, 3, 5), history()]
        scores.append({name: found.baseline.score(asked) for name, found in fitted.items()})
    for name, values in scores[0].items():
        assert (values == scores[1][name]).all(), name
