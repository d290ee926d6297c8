"""An engine with an index: the answers of one without where the index reads all, and k items whatever is filtered."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from springtide.bundle import Bundle, load_bundle
from springtide.config import RecommendConfig
from springtide.evaluation.recommend import RecommendBatch
from springtide.model import ann, retrieval
from springtide.serving.engine import Engine, ScoreRequest
from springtide.serving.policies import Caps, Exploration, Policies
from toy import ITEMS_IN_TOY, toy_bundle

torch.set_num_threads(1)
IDS = [f"i{n:02d}" for n in range(ITEMS_IN_TOY)]
NOW = 1_600_000_000_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_bundle(tmp_path_factory.mktemp("toy"), train__ann_items=40)


@pytest.fixture(scope="module")
def bundle(path: Path) -> Bundle:
    return load_bundle(path)


@pytest.fixture(scope="module")
def exact(path: Path) -> Bundle:
    bundle = load_bundle(path)
    bundle.recommender.use_index(None)
    return bundle


@pytest.fixture
def small_catalogues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "EXACT_BELOW", 0)
    monkeypatch.setattr(ann, "SELECT_FROM", 3)


@pytest.fixture
def finds_little(small_catalogues: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an index is asked, it finds one row, unless it must read everything."""
    search = ann.search

    def one(index: ann.Ann, *arguments: Any) -> np.ndarray:
        found = search(index, *arguments)
        return found if index.probes == index.lists + 1 else found[:1]

    monkeypatch.setattr(ann.Ann, "with_probes", lambda index, probes: replace(index, probes=probes + 1))
    monkeypatch.setattr(ann, "search", one)
    for name in ("SPOKEN_FOR", "BORROWED", "LENT_FROM"):
        monkeypatch.setattr(retrieval, name, 1)


some_items = st.lists(st.sampled_from(IDS), max_size=40).map(tuple)
some_names = st.lists(st.sampled_from(["even", "odd"]), max_size=2).map(tuple)
all_policies = st.builds(
    Policies,
    exclude_categories=st.just(()) | some_names,
    allow_items=st.none() | some_items,
    block_items=some_items,
    popularity_damping=st.sampled_from([0.0, 0.5]),
    diversity=st.sampled_from([0.0, 0.4]),
    caps=st.builds(
        Caps,
        per_category=st.none() | st.integers(1, 4),
        categories=st.dictionaries(st.sampled_from(["even", "odd"]), st.integers(0, 3)),
        strict=st.booleans(),
    ),
    exploration=st.builds(
        Exploration, kind=st.sampled_from(["off", "off", "epsilon", "softmax"]), candidates=st.integers(1, 40)
    ),
)
all_requests = st.builds(
    ScoreRequest,
    events=st.lists(st.fixed_dictionaries({"item_id": st.sampled_from(IDS)}), max_size=8),
    query=st.none() | st.integers(0, 9).map(lambda seed: unit(np.random.default_rng(seed).normal(size=384))),
    k=st.integers(1, 45),
    exclude_seen=st.sampled_from([None, True, False]),
    categories=some_names,
    exclude_items=some_items,
    allow_items=st.none() | some_items,
    chance=st.sampled_from(["a", "b"]),
    now=st.just(NOW),
)


def unit(vector: np.ndarray) -> np.ndarray:
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def answer_of(bundle: Bundle, policies: Policies, request: ScoreRequest) -> list[dict[str, Any]]:
    answer = Engine(bundle, "toy", policies).score([request, request])[1]
    assert isinstance(answer, dict)
    items: list[dict[str, Any]] = answer["items"]
    return items


def passing(policies: Policies, request: ScoreRequest, hide: bool) -> set[str]:
    """By the words of the settings, one item at a time."""
    hide = hide if request.exclude_seen is None else request.exclude_seen
    seen = {event["item_id"] for event in request.events if hide}
    kept = set()
    for row, item_id in enumerate(IDS):
        own = "even" if row % 2 == 0 else "odd"
        if (
            (not request.categories or own in request.categories)
            and own not in policies.exclude_categories
            and all(some is None or item_id in some for some in (policies.allow_items, request.allow_items))
            and item_id not in (*policies.block_items, *request.exclude_items)
            and item_id not in seen
        ):
            kept.add(item_id)
    return kept


@given(policies=all_policies, request=all_requests)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_k_items_whenever_the_catalogue_has_k_that_pass(
    finds_little: None, bundle: Bundle, policies: Policies, request: ScoreRequest
) -> None:
    found = [item["item_id"] for item in answer_of(bundle, policies, request)]
    free = passing(policies, request, bundle.settings.data.exclude_seen)
    assert len(set(found)) == len(found) <= request.k
    assert set(found) <= free
    taken = Counter("even" if int(item_id[1:]) % 2 == 0 else "odd" for item_id in found)
    if policies.caps.strict:
        assert all(n <= policies.caps.categories.get(c, policies.caps.per_category or n) for c, n in taken.items())
    else:
        assert len(found) == min(request.k, len(free))


@given(policies=all_policies, request=all_requests)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_index_that_reads_all_answers_as_no_index(
    small_catalogues: None, bundle: Bundle, exact: Bundle, policies: Policies, request: ScoreRequest
) -> None:
    one, other = (answer_of(each, policies, request) for each in (bundle, exact))
    assert [item["item_id"] for item in one] == [item["item_id"] for item in other]
    np.testing.assert_allclose([i["score"] for i in one], [i["score"] for i in other], atol=3e-5)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.get("propensity") == pytest.approx(theirs.get("propensity"), abs=1e-4)


def test_shares_of_an_explanation_sum_to_the_score(small_catalogues: None, bundle: Bundle) -> None:
    request = ScoreRequest([{"item_id": "i03"}, {"item_id": "i09"}], unit(np.ones(384)), explain=True, now=NOW)
    for item in answer_of(bundle, Policies(popularity_damping=0.3), request):
        assert sum(item["explanation"]["shares"].values()) == pytest.approx(item["score"], abs=1e-4)


def test_offline_answers_are_those_behind_serve(small_catalogues: None, path: Path, bundle: Bundle) -> None:
    histories = [[1, 2, 3], [30, 4], [17]]
    times = [[NOW - 1000 * n for n in range(len(row), 0, -1)] for row in histories]
    table = pa.table(
        {
            "user_id": ["a", "b", "c"],
            "items": histories,
            "actions": [[1] * len(row) for row in histories],
            "ratings": [[3.0] * len(row) for row in histories],
            "timestamps": times,
        }
    )
    offline = RecommendBatch(str(path), RecommendConfig(k=7), exclude_seen=True)(table)
    for user, items, when in zip("abc", histories, times, strict=True):
        events = [
            {"item_id": IDS[item], "timestamp": time, "action": "purchase", "rating": 3.0}
            for item, time in zip(items, when, strict=True)
        ]
        answer = answer_of(bundle, Policies(), ScoreRequest(events, k=7, exclude_seen=True, now=when[-1]))
        own = offline.filter(pa.compute.equal(offline["user_id"], user))
        assert [item["item_id"] for item in answer] == own["item_id"].to_pylist()
        np.testing.assert_allclose([item["score"] for item in answer], own["score"].to_numpy(), atol=2e-5)
