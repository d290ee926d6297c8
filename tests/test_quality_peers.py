"""Peers made again for a comparison user by user: their formulas, and that another figure than theirs is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from quality_peers import (
    COUNTING,
    AnotherFigure,
    chance_between,
    counting_peer,
    fading,
    head_and_tail,
    item_knn_recency,
    of_lists,
    pctm,
    ratio,
)
from quality_report import load_peers
from springtide.evaluation.baselines import training_log
from springtide.evaluation.ranking import Cases, build_cases, flatten
from springtide.schemas import SEQUENCES, TEST, TRAIN, VALID

ITEMS = 12
IDS = [f"i{number}" for number in range(ITEMS)]


def ring(users: int = 12, length: int = 7) -> Cases:
    """Item i is followed by i + 1; the last event is the test, the one before validates."""
    rows = [[(user + step) % ITEMS for step in range(length)] for user in range(users)]
    parts = [TRAIN] * (length - 2) + [VALID, TEST]
    table = pa.Table.from_pydict(
        {
            "user_id": [f"u{user:02d}" for user in range(users)],
            "items": rows,
            "actions": [[1] * length] * users,
            "ratings": [[3.0] * length] * users,
            "timestamps": [[10**12 + 1000 * step for step in range(length)]] * users,
            "parts": [parts] * users,
            "targets": [[True] * length] * users,
        },
        SEQUENCES,
    )
    return build_cases(flatten(table, ITEMS), TEST, "leave_one_out")


def test_every_log_has_a_counting_peer_that_is_published() -> None:
    for log, entry in load_peers().items():
        assert COUNTING[log][0] in {peer["name"] for peer in entry["peers"]}


def test_pctm_is_the_published_formula() -> None:
    cases = ring()
    log = training_log(cases.events, VALID)
    history = cases.history(0)
    scores = pctm(3, 0.5, fading(0.7), -0.1)(log)([history])[0]
    counts = np.zeros((ITEMS, ITEMS))
    for start in range(12):
        row = [(start + step) % ITEMS for step in range(6)]
        for place, item in enumerate(row):
            for distance in range(1, min(3, place) + 1):
                counts[row[place - distance], item] += distance**-0.5
    for item in range(ITEMS):
        told = sum(
            0.7**age * math.log1p(counts[past, item] * ITEMS / 1000) for age, past in enumerate(history.items[::-1])
        )
        assert scores[item] == pytest.approx(told - 0.1 * math.log1p(log.counts()[item]), rel=1e-4)


def test_item_knn_fades_with_every_event() -> None:
    cases = ring()
    score = item_knn_recency(0.5)(training_log(cases.events, VALID))
    whole, last = cases.history(0), cases.history(0)[slice(-1, None)]
    before = cases.history(0).before(len(whole) - 1)
    expected = score([last])[0] + math.exp(-0.5) * score([before])[0]
    np.testing.assert_allclose(score([whole])[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("length", "head"), [(3, 1.0), (7, 1.0), (20, 0.8)])
def test_a_kernel_with_a_tail_shares_out_one(length: int, head: float) -> None:
    weight = head_and_tail(7, 0.8, 0.6)(np.arange(length, dtype=float), np.full(length, float(length)))
    assert weight.sum() == pytest.approx(1) and weight[:7].sum() == pytest.approx(head)
    assert weight[1] == pytest.approx(0.6 * weight[0])


def test_a_peer_that_does_not_come_out_as_published_is_not_compared_with() -> None:
    cases = ring()
    for log in COUNTING:
        with pytest.raises(AnotherFigure, match=r"\(refitted\), made again, has NDCG@10 .* and not 2.00000"):
            counting_peer(log, cases, 2.0)
    found = counting_peer("ml-100k", cases, 1.0)
    assert found.shape == (12,) and found.mean() == 1  # what comes next is never in doubt


def test_lists_are_judged_by_the_place_of_the_target(tmp_path: Path) -> None:
    cases = ring()
    users = [cases.events.user_ids[int(user)].as_py() for user in cases.users]
    lists = {
        user: [IDS[(target + 1) % ITEMS], IDS[target]]
        for user, target in zip(users, cases.targets.tolist(), strict=True)
    }
    del lists[users[0]]
    lists[users[1]] = ["another"]
    path = tmp_path / "ranks.parquet"
    pl.DataFrame({"user": list(lists), "items": list(lists.values())}).write_parquet(path)
    found = of_lists(cases, path, IDS)
    assert found.tolist() == [0.0, 0.0] + [pytest.approx(1 / math.log2(3))] * 10
    halved = ratio(found, found / 2)
    assert halved is not None
    assert [halved[bound] for bound in ("value", "lo", "hi")] == pytest.approx([0.5] * 3)
    assert ratio(np.zeros(12), found) is None


def test_chance_between_seeds_is_what_drawing_other_users_would_do() -> None:
    draw = np.random.default_rng(0)
    hits = draw.random((2, 400, 500)) < 0.1  # two models, as good as one another, judged by 400 draws of 500 users
    differences = hits[0].mean(1) - hits[1].mean(1)
    expected = np.mean([chance_between([one, other]) for one, other in zip(*hits.astype(float), strict=True)])
    assert expected == pytest.approx(differences.std() / 0.1, rel=0.1)
    assert chance_between([hits[0, 0].astype(float)]) is None and chance_between([np.zeros(3), np.zeros(3)]) is None
