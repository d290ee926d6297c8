"""Metrics against numbers worked out by hand, and against the project's accuracy yardstick where it is at hand."""

from __future__ import annotations

import importlib.util
import os
from math import log2
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from springtide.evaluation import metrics as m


def mean(values: np.ndarray) -> float:
    return float(values.mean())


def test_ranks_give_the_figures_worked_by_hand() -> None:
    got = m.user_metrics(np.array([6, 20, 1, 0]), [1, 5, 10, 20])
    assert [mean(got[f"hr@{k}"]) for k in (1, 5, 10, 20)] == [0.25, 0.25, 0.5, 0.75]
    assert mean(got["ndcg@10"]) == pytest.approx((1 / log2(7) + 1) / 4, abs=1e-12)
    assert mean(got["ndcg@20"]) == pytest.approx((1 / log2(7) + 1 / log2(21) + 1) / 4, abs=1e-12)
    assert mean(got["mrr@20"]) == pytest.approx((1 / 6 + 1 / 20 + 1) / 4, abs=1e-12)
    assert mean(got["recall@10"]) == 0.5 and mean(got["precision@10"]) == pytest.approx(0.05)


def test_second_place_first_place_and_no_list() -> None:
    got = m.user_metrics(np.array([1, 2, 0]), [1, 5, 10])
    assert mean(got["hr@1"]) == pytest.approx(1 / 3) and mean(got["hr@5"]) == pytest.approx(2 / 3)
    assert mean(got["ndcg@10"]) == pytest.approx((1 + 1 / log2(3)) / 3, abs=1e-12)
    assert mean(got["mrr@20"]) == pytest.approx(0.5, abs=1e-12)


def test_mrr_stops_at_twenty_even_in_longer_lists() -> None:
    got = m.user_metrics(np.array([21]), [50])
    assert got["mrr@20"][0] == 0 and got["ndcg@50"][0] == pytest.approx(1 / log2(22))


def test_all_targets_count_each_item_once() -> None:
    lists = np.array([[4, 7, 2, -1], [1, 2, 3, 4], [9, 8, 7, 6]])
    # user 0 took 7, 2, 7 and 9; user 1 took 5; user 2 took 8
    got = m.user_metrics_all(lists, np.array([7, 2, 7, 9, 5, 8]), np.array([0, 4, 5, 6]))
    assert got["recall_all@10"] == pytest.approx([2 / 3, 0, 1])
    ideal = 1 + 1 / log2(3) + 1 / 2
    assert got["ndcg_all@10"] == pytest.approx([(1 / log2(3) + 1 / 2) / ideal, 0, 1 / log2(3)], abs=1e-12)


def test_recall_of_all_targets_is_over_at_most_k() -> None:
    got = m.user_metrics_all(np.arange(20)[None], np.arange(30), np.array([0, 30]))
    assert got["recall_all@10"][0] == 1 and got["recall_all@20"][0] == 1 and got["ndcg_all@10"][0] == pytest.approx(1)


def test_coverage_counts_distinct_items_of_the_catalogue() -> None:
    lists = np.array([[0, 1, 2], [1, 0, -1]])
    assert m.coverage(lists, 4, 2) == 0.5 and m.coverage(lists, 4, 3) == 0.75


def test_novelty_is_in_bits_of_the_share_of_training_events() -> None:
    popularity = np.array([8, 4, 2, 1, 1, 0])  # of 16: 1, 2, 3, 4, 4 bits, and 4 for the item without an event
    lists = np.array([[0, 1, 2], [5, 3, -1], [-1, -1, -1]])
    assert m.novelty(lists, popularity, 3) == pytest.approx([2, 4, np.nan], nan_ok=True)
    assert m.novelty(lists, popularity, 1) == pytest.approx([1, 4, np.nan], nan_ok=True)


def test_diversity_of_categories() -> None:
    categories = np.zeros((5, 20), dtype=bool)
    for item, own in enumerate([(0, 1), (1, 2), (0, 1), (19,), ()]):
        categories[item, list(own)] = True
    table = sp.csr_array(categories.astype(np.int64))
    # Jaccard: 0 and 1 share one of three, 0 and 2 all, 1 and 2 one of three, 3 nothing; 4 has none and does not count.
    lists = np.array([[0, 1, 2, -1], [0, 3, -1, -1], [0, 4, 2, -1], [3, 4, -1, -1]])
    assert m.category_diversity(lists, table, 4) == pytest.approx([1 - 5 / 9, 1, 0, np.nan], nan_ok=True)
    assert m.category_diversity(lists, table, 2) == pytest.approx([2 / 3, 1, np.nan, np.nan], nan_ok=True)


def test_diversity_of_vectors() -> None:
    vectors = np.array([[2.0, 0], [0, 3], [5, 0], [-1, 0], [0, 0]])
    # cosines: 0-1 0, 0-2 1, 1-2 0, 0-3 -1; item 4 has no vector
    lists = np.array([[0, 1, 2], [0, 3, -1], [0, 4, 2], [0, -1, -1]])
    assert m.vector_diversity(lists, vectors, 3) == pytest.approx([2 / 3, 2, 0, np.nan], nan_ok=True)


def test_diversities_agree_where_sets_are_vectors() -> None:
    """With one category an item, both the Jaccard similarity and the cosine are 1 or 0."""
    rng = np.random.default_rng(3)
    table = np.eye(6, dtype=bool)[rng.integers(0, 6, 50)]
    lists = np.array([rng.permutation(50)[:12] for _ in range(30)])
    by_set, by_vector = (
        m.category_diversity(lists, sp.csr_array(table.astype(np.int64)), 10),
        m.vector_diversity(lists, table, 10),
    )
    assert by_set == pytest.approx(by_vector) and 0 < by_set.min() < by_set.max() <= 1


def test_gini_of_what_is_shown() -> None:
    assert m.gini(np.array([[0, 1], [2, 3]]), 4, 2) == pytest.approx(0)  # all alike
    assert m.gini(np.array([[0, 1], [0, 2]]), 4, 1) == pytest.approx(3 / 4)  # one of four alone: 1 - 1 / 4
    # Shown 0, 1, 1, 2 times: the 16 ordered pairs differ by 12 in sum, so 12 / 16 over twice the mean of 1.
    assert m.gini(np.array([[1, 3], [2, 3]]), 4, 2) == pytest.approx(12 / 16 / 2)
    assert m.gini(np.full((2, 3), -1), 4, 3) == 0


def test_hit_curve() -> None:
    assert m.hit_curve(np.array([1, 3, 0, 9]), 4).tolist() == [0.25, 0.25, 0.5, 0.5]


def test_bootstrap_is_repeatable_and_surrounds_the_mean() -> None:
    values = np.random.default_rng(0).random((300, 2))
    samples = m.resampled_means(values, 500)
    assert np.array_equal(samples, m.resampled_means(values, 500))
    for estimate in m.mean_estimates(values, samples):
        assert estimate.low < estimate.value < estimate.high
    # the standard error of a mean of uniforms over 300 users is 1 / sqrt(12 * 300)
    assert samples.std(axis=0) == pytest.approx(np.full(2, 1 / np.sqrt(3600)), rel=0.1)


def test_pairing_narrows_the_ratio() -> None:
    rng = np.random.default_rng(1)
    a = rng.random(400)
    b = a * 1.2
    samples = m.resampled_means(np.column_stack([a, b]), 300)
    ratio = m.paired_ratio(a, b, samples[:, 0], samples[:, 1])
    assert ratio is not None and ratio.value == pytest.approx(1.2)
    assert ratio.low == pytest.approx(1.2) and ratio.high == pytest.approx(1.2)
    assert m.paired_difference(a, b, samples[:, 0], samples[:, 1]).low > 0


def test_a_ratio_to_nothing_is_none() -> None:
    zeros, ones = np.zeros(5), np.ones(5)
    assert m.paired_ratio(zeros, ones, np.zeros(10), np.ones(10)) is None


def test_resamples_without_a_hit_to_divide_by_say_nothing_of_a_ratio() -> None:
    a = np.zeros(500)
    a[:5] = 1.0
    few, fewer = (m.resampled_means(np.column_stack([a[n:], 2 * a[n:]]), 2000) for n in (0, 4))
    ratio = m.paired_ratio(a, 2 * a, few[:, 0], few[:, 1])  # five hits: some 0.7 % of the resamples have none
    assert not few[:, 0].all() and ratio is not None and (ratio.low, ratio.high) == (2, 2)
    assert m.paired_ratio(a[4:], 2 * a[4:], fewer[:, 0], fewer[:, 1]) is None  # one hit: more than a third have none


@given(st.lists(st.integers(0, 60), min_size=1, max_size=50))
def test_metrics_stay_in_range_and_grow_with_k(ranks: list[int]) -> None:
    got = m.user_metrics(np.array(ranks), [1, 5, 10, 20])
    assert all(((v >= 0) & (v <= 1)).all() for v in got.values())
    for small, large in ((1, 5), (5, 10), (10, 20)):
        assert (got[f"ndcg@{small}"] <= got[f"ndcg@{large}"]).all() and (got[f"hr@{small}"] <= got[f"hr@{large}"]).all()


# ---------------------------------------------------------------- against the yardstick's own code
@pytest.fixture(scope="module")
def yardstick() -> ModuleType:
    path = os.environ.get("SPRINGTIDE_YARDSTICK")
    if not path:
        pytest.skip("SPRINGTIDE_YARDSTICK does not name yardstick.py; the figures worked by hand above stand in for it")
    spec = importlib.util.spec_from_file_location("yardstick", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["loo", "temporal"])
def test_yardstick_agrees(yardstick: ModuleType, tmp_path: Path, kind: str) -> None:
    import pandas as pd

    rng = np.random.default_rng(5)
    frame = pd.DataFrame(
        {"user": [f"u{n}" for n in rng.integers(0, 60, 3000)], "item": [f"i{n}" for n in rng.integers(0, 80, 3000)],
         "timestamp": np.sort(rng.integers(0, 900, 3000))}
    )  # fmt: skip
    yardstick.write_split(yardstick.prepare(frame, 2), str(tmp_path), kind, "random", 2)
    split = yardstick.Split(str(tmp_path / kind))
    rows = {item: n for n, item in enumerate(split.items)}
    truth, history = split.truth("test"), split.history("test")
    lists = np.full((len(truth), 20), -1)
    for n, user in enumerate(truth["user"]):
        fresh = [rows[i] for i in rng.permutation(split.items) if i not in set(history.get(user, ()))][: 20 - n % 7]
        lists[n, : len(fresh)] = fresh
    named = {u: [split.items[i] for i in row if i >= 0] for u, row in zip(truth["user"], lists, strict=True)}
    other = {u: items[::-1] for u, items in named.items()}
    expected, against = yardstick.score(split, named), yardstick.compare(split, other, named)

    def ours(table: np.ndarray) -> dict[str, np.ndarray]:
        hit = table == truth["target"].map(rows).to_numpy()[:, None]
        got = m.user_metrics(np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0), [1, 5, 10, 20])
        if kind == "temporal":
            owned = [[rows[i] for i in items] for items in truth["targets"]]
            offsets = np.cumsum([0, *map(len, owned)])
            got |= m.user_metrics_all(table, np.concatenate(owned), offsets)
        return got

    def backwards(row: np.ndarray) -> np.ndarray:
        return np.concatenate([row[row >= 0][::-1], row[row < 0]])

    warm = (truth["slice"] == "warm").to_numpy()
    a, b = ours(np.array([backwards(row) for row in lists])), ours(lists)
    checked: list[Any] = [c for c in against if c.lower() in b]
    assert {"HR@10", "NDCG@10", "MRR@20"} <= set(checked)
    for name in checked:
        pair = np.column_stack([a[name.lower()][warm], b[name.lower()][warm]])
        samples = m.resampled_means(pair, 2000)
        estimate = m.mean_estimates(pair, samples)[1]
        told = (expected[name], expected[f"{name}.lo"], expected[f"{name}.hi"])
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx(told, abs=1e-9)
        difference = m.paired_difference(pair[:, 0], pair[:, 1], samples[:, 0], samples[:, 1])
        assert (difference.low, difference.high) == pytest.approx(
            (against[name]["diff_lo"], against[name]["diff_hi"]), abs=1e-9
        )
        ratio = m.paired_ratio(pair[:, 0], pair[:, 1], samples[:, 0], samples[:, 1])
        if ratio:
            found = (ratio.value, ratio.low, ratio.high)
            assert found == pytest.approx(
                (against[name]["ratio"], against[name]["ratio_lo"], against[name]["ratio_hi"]), rel=1e-9
            )
    assert m.coverage(lists, len(split.items), 10) == pytest.approx(expected["coverage@10"], abs=1e-12)


def test_novelty_and_diversity_equal_loops() -> None:
    rng = np.random.default_rng(0)
    lists = np.stack([rng.permutation(12)[:6] for _ in range(5)])
    lists[1, 3:] = -1
    lists[2, 1:] = -1
    popularity, vectors = rng.integers(0, 9, 12), rng.normal(size=(12, 4))
    vectors[3] = 0  # an item without text
    novel, varied = m.novelty(lists, popularity, 4), m.vector_diversity(lists, vectors, 4)
    for user, row in enumerate(lists):
        bits = [-np.log2(max(1, popularity[i]) / popularity.sum()) for i in row[:4] if i >= 0]
        assert novel[user] == pytest.approx(np.mean(bits))
        found = [vectors[i] / np.linalg.norm(vectors[i]) for i in row[:4] if i >= 0 and i != 3]
        pairs = [1 - a @ b for n, a in enumerate(found) for b in found[n + 1 :]]
        assert varied[user] == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True)
    assert np.isnan(m.novelty(np.full((2, 3), -1), popularity, 3)).all()
