"""Batch recommendations: the contract's columns, and the same scores offline as behind Serve."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from springtide import ranks
from springtide.bundle import load_bundle
from springtide.config import RecommendConfig
from springtide.evaluation.recommend import RecommendBatch, histories_of
from springtide.schemas import RECOMMENDATIONS, SEQUENCES
from springtide.serving.engine import Engine, ScoreRequest
from toy import toy_bundle, toy_log


def sequences(users: int = 12) -> pa.Table:
    """The toy log as SEQUENCES, everything in training."""
    rows: dict[str, list[dict[str, object]]] = {}
    for event in toy_log(users):
        rows.setdefault(str(event["user_id"]), []).append(event)
    return pa.table(
        {
            "user_id": list(rows),
            "items": [[int(str(e["item_id"])[1:]) for e in r] for r in rows.values()],
            "actions": [[1 if e["action"] == "purchase" else 2 for e in r] for r in rows.values()],
            "ratings": [[e["rating"] for e in r] for r in rows.values()],
            "timestamps": [[e["timestamp"] for e in r] for r in rows.values()],
            "parts": [[0] * len(r) for r in rows.values()],
            "targets": [[True] * len(r) for r in rows.values()],
        },
        schema=SEQUENCES,
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toy_bundle(tmp_path_factory.mktemp("toy")))


def test_the_table_is_the_contract(bundle: str) -> None:
    table = RecommendBatch(bundle, RecommendConfig(k=7), exclude_seen=True)(sequences())
    assert table.schema == RECOMMENDATIONS
    seen = {str(e["user_id"]): set[str]() for e in toy_log(12)}
    for event in toy_log(12):
        seen[str(event["user_id"])].add(str(event["item_id"]))
    for user, items in seen.items():
        own = table.filter(pa.compute.equal(table["user_id"], user))
        assert own["rank"].to_pylist() == list(range(1, 8))
        assert own["score"].to_pylist() == sorted(own["score"].to_pylist(), reverse=True)
        assert not items & set(own["item_id"].to_pylist())


def test_a_large_catalogue_is_ranked_in_smaller_steps(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = RecommendBatch(bundle, RecommendConfig(k=7), exclude_seen=True)(sequences())
    monkeypatch.setattr(ranks, "CELLS", 5 * 40)  # five users at a time
    steps = RecommendBatch(bundle, RecommendConfig(k=7), exclude_seen=True)(sequences())
    assert steps.drop(["score"]).equals(whole.drop(["score"]))
    np.testing.assert_allclose(steps["score"].to_numpy(), whole["score"].to_numpy(), rtol=1e-5)
    assert len(RecommendBatch(bundle, RecommendConfig(), exclude_seen=True)(sequences().slice(0, 0))) == 0


def test_a_user_who_has_seen_almost_all_gets_the_rest(bundle: str) -> None:
    everything = pa.table(
        {
            "user_id": ["u"], "items": [list(range(38))], "actions": [[1] * 38], "ratings": [[float("nan")] * 38],
            "timestamps": [list(range(38))], "parts": [[0] * 38], "targets": [[True] * 38],
        },
        schema=SEQUENCES,
    )  # fmt: skip
    table = RecommendBatch(bundle, RecommendConfig(k=10), exclude_seen=True)(everything)
    assert sorted(table["item_id"].to_pylist()) == ["i38", "i39"]
    assert table["rank"].to_pylist() == [1, 2]


def test_offline_scores_equal_those_behind_serve(bundle: str) -> None:
    offline = RecommendBatch(bundle, RecommendConfig(k=5), exclude_seen=True)(sequences())
    engine = Engine(load_bundle(bundle), "toy")
    logs: dict[str, list[dict[str, object]]] = {}
    for event in toy_log(12):
        logs.setdefault(str(event["user_id"]), []).append(event)
    for user, events in logs.items():
        answer = engine.score([ScoreRequest(events=events, k=5, exclude_seen=True)])[0]
        assert isinstance(answer, dict)
        own = offline.filter(pa.compute.equal(offline["user_id"], user))
        assert [item["item_id"] for item in answer["items"]] == own["item_id"].to_pylist()
        np.testing.assert_allclose([item["score"] for item in answer["items"]], own["score"].to_numpy(), atol=2e-5)


def test_a_log_that_numbers_its_actions_anew_gets_the_same_lists(bundle: str) -> None:
    known = RecommendBatch(bundle, RecommendConfig(k=7), exclude_seen=True)
    names = ["", "cart", *known.recommender.actions[1:]]  # every number but that of the unknown is one higher
    table = sequences()
    numbers = [[n + 1 if n else 0 for n in row] for row in table["actions"].to_pylist()]
    column = pa.array(numbers, SEQUENCES.field("actions").type)
    other = table.set_column(table.column_names.index("actions"), "actions", column)
    grown = RecommendBatch(bundle, RecommendConfig(k=7), exclude_seen=True, actions=names)
    assert max(map(max, numbers)) >= len(known.recommender.actions)  # out of range as they are
    assert grown(other).equals(known(table))


def test_it_is_asked_for_now_and_not_for_when_each_user_was_there(bundle: str) -> None:
    """As over HTTP: what was popular years ago, when a user was last there, is not what is popular."""
    batch = RecommendBatch(bundle, RecommendConfig(k=7), exclude_seen=True)
    recommender, histories = batch.recommender, histories_of(sequences())
    channels = recommender.model.channels
    assert channels.weigh is not None and recommender.log_end is not None
    with torch.no_grad():
        channels.weigh.bias[channels.names.index("recent_popularity")] = 2.0
    seen, now = [history.items for history in histories], np.full(len(histories), recommender.log_end + 1)
    assert all(history.timestamps[-1] <= recommender.log_end for history in histories)
    of_now, of_then = recommender.best(histories, 7, seen, now)[1], recommender.best(histories, 7, seen)[1]
    np.testing.assert_allclose(batch(sequences())["score"].to_numpy().reshape(of_now.shape), of_now, rtol=1e-5)
    assert np.abs(of_now - of_then).max() > 0.1
