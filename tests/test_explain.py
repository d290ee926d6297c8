"""Shares sum to the score, and events to what came through them, for every fusion, preset and kind of request."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.bundle import load_bundle
from springtide.model.batch import EMPTY, History
from springtide.model.decayed import TIES
from springtide.model.explain import SHARES
from springtide.model.fuse import split
from springtide.model.recommender import Recommender
from springtide.presets import PRESETS
from springtide.serving.engine import Engine, Refusal, ScoreRequest
from toy import ITEMS_IN_TOY, toy_bundle

FUSIONS = ("gate", "attention", "time_decay", "concat", "sum", "model")
MODELS = [{"fusion": name} for name in FUSIONS] + [
    {"long_branch": "none"},
    {"short_branch": "none"},
    {"neighbour_items": 15},
    {"neighbours": False, "text_dim": 0},
    {"request_time": True, "popularity": False},
    *({"preset": name, "dim": 16} for name in PRESETS if name != "gated_fusion"),
]


@cache
def recommender(number: int) -> Recommender:
    """A model of random weights, those that start at zero included."""
    values = {f"model__{name}": value for name, value in MODELS[number].items()}
    found = load_bundle(toy_bundle(Path(mkdtemp()), seed=number, **values)).recommender
    torch.manual_seed(number)
    with torch.no_grad():
        for name, weight in found.model.named_parameters():
            if name.startswith(("channels", "fuse")) or name == "log_temperature":
                weight.add_(0.3 * torch.randn_like(weight))
    return found


def history_of(items: list[int], seed: int) -> History:
    rng = np.random.default_rng(seed)
    n = len(items)
    return History(
        np.array(items, np.int64),
        rng.integers(0, 3, n),
        rng.integers(1, 6, n).astype(np.float32),
        10**12 + np.cumsum(rng.integers(0, 10**7, n)),
    )


@given(
    st.integers(0, len(MODELS) - 1),
    st.lists(st.integers(0, ITEMS_IN_TOY - 1), max_size=30),
    st.lists(st.integers(0, ITEMS_IN_TOY - 1), min_size=1, max_size=12, unique=True),
    st.none() | st.integers(0, ITEMS_IN_TOY - 1),
    st.integers(0, 10),
)
@settings(max_examples=150)
def test_shares_sum_to_the_score(number: int, items: list[int], rows: list[int], asked: int | None, seed: int) -> None:
    model = recommender(number)
    history = history_of(items, seed) if items else EMPTY
    text = model.text_vectors
    query = None if asked is None or text is None else text[asked]
    now = int(history.timestamps[-1]) + 86_400_000 * seed if items else 10**12
    scored = model.score([history], None if query is None else query[None], np.array([now]))
    reasons = model.explain(history, np.array(rows), query, now)
    assert tuple(reasons.shares) == SHARES
    total = np.sum(list(reasons.shares.values()), axis=0)
    wanted = scored.logits[0, rows]
    kept = np.isfinite(wanted)
    assert np.abs(total - wanted)[kept].max(initial=0) < 1e-4
    assert reasons.through.shape == (len(items), len(rows))
    if items:
        np.testing.assert_allclose(
            reasons.through.sum(0), reasons.shares["memory"] + reasons.shares["text"], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("number", range(len(FUSIONS)))
def test_the_branches_parts_are_those_of_the_fusion(number: int) -> None:
    """Scaling what one branch says scales its part and leaves the other's, once the weights are there."""
    model = recommender(number).model
    long, short = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    gate = torch.rand(2, 3, 16)
    with torch.inference_mode():
        of_long, of_short = split(model.fuse, long, short, gate)
        twice, same = split(model.fuse, 2 * long, short, gate)
    torch.testing.assert_close(twice, 2 * of_long)
    torch.testing.assert_close(same, of_short)


def test_what_is_explained_is_of_the_moment_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is told the time weighs its branches otherwise an hour and a month later; 0 is a moment too."""
    bundle = load_bundle(toy_bundle(Path(mkdtemp()), model__request_time=True))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in bundle.recommender.model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    engine, gates, clock = Engine(bundle, "toy"), set(), 10**12 + 30 * 86_400_000
    monkeypatch.setattr(time, "time", lambda: clock / 1000)
    events = [{"item_id": item, "timestamp": 10**12 + n} for n, item in enumerate(bundle.recommender.item_ids[:5])]
    for now in (0, 10**12 + 3_600_000, clock):
        answer = engine.score([ScoreRequest(events, explain=True, now=now)])[0]
        assert not isinstance(answer, Refusal)
        assert answer["explanation"]["gate"] == answer["gate"]
        gates.add(answer["gate"]["short"])
    assert len(gates) == 3
    assert engine.interests(events)["gate"] == answer["gate"]


def test_only_concat_has_a_joint_share() -> None:
    history = history_of([1, 2, 3], 0)
    for number, name in enumerate(FUSIONS):
        joint = recommender(number).explain(history, np.arange(5)).shares["joint"]
        assert (np.abs(joint).max() > 1e-3) == (name == "concat"), name


def test_popular_items_are_explained_by_popularity_alone() -> None:
    model = recommender(0)
    shares = model.explain(EMPTY, np.arange(4)).shares
    np.testing.assert_allclose(shares.pop("popularity"), np.log1p(model.popularity[:4]) * (1 + TIES), rtol=1e-6)
    assert all(not share.any() for share in shares.values())


def test_an_event_brings_its_successor() -> None:
    """In the toy log item n + 1 follows item n, so the last event is what speaks for it."""
    model = recommender(0)
    history = history_of([30, 12, 5], 0)
    assert model.explain(history, np.array([6])).through[:, 0].argmax() == 2
    assert model.explain(history, np.array([13])).through[:, 0].argmax() == 1
