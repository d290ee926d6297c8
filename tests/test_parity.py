"""The score sample of a bundle: the same model passes, and another one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide import parity
from springtide.bundle import check_parity, load_bundle
from springtide.errors import SpringtideError
from toy import toy_bundle


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_bundle(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize(
    "values", [{}, {"model__text_dim": 0}, {"model__request_time": True}, {"model__memory": False}], ids=str
)
def test_a_bundle_scores_as_when_it_was_written(tmp_path: Path, values: dict[str, Any]) -> None:
    bundle = load_bundle(toy_bundle(tmp_path, **values))
    assert len(bundle.parity["cases"]) == parity.CASES
    assert {len(case["items"]) for case in bundle.parity["cases"]} == {parity.TOP}
    assert sum("query_item" in case for case in bundle.parity["cases"]) == parity.CASES // parity.QUERY_EVERY
    assert all(case["scores"] == sorted(case["scores"], reverse=True) for case in bundle.parity["cases"])
    deviation = check_parity(bundle)
    assert deviation < 1e-6


def test_another_model_is_refused(path: Path, tmp_path: Path) -> None:
    other = load_bundle(toy_bundle(tmp_path, seed=1))
    kept = json.loads((path / "parity.json").read_text())
    with pytest.raises(SpringtideError, match="scores otherwise than when it was written: sample 0 is off by"):
        parity.check(other.recommender, kept, "bundle other")


@given(st.sampled_from(range(parity.CASES)), st.sampled_from(range(parity.TOP)), st.sampled_from([0.9, 1.1, 2.5]))
@settings(max_examples=30)
def test_one_score_beyond_the_tolerance_is_noticed(path: Path, case: int, place: int, allowed: float) -> None:
    """allowed: how far one kept score is moved, in tolerances."""
    kept = json.loads((path / "parity.json").read_text())
    scores = kept["cases"][case]["scores"]
    if place == 0:  # the greatest score is the measure itself: move it down, so that it stays the measure
        scores[place] -= allowed * parity.TOLERANCE * max(1.0, *map(abs, scores))
    else:
        scores[place] += allowed * parity.TOLERANCE * max(1.0, *map(abs, scores))
    recommender = load_bundle(path).recommender
    if allowed < 1:
        assert parity.check(recommender, kept, "it") == pytest.approx(allowed * parity.TOLERANCE, rel=0.02)
    else:
        with pytest.raises(SpringtideError, match=f"sample {case} is off"):
            parity.check(recommender, kept, "it")


def test_weights_that_are_not_numbers_do_not_pass(path: Path) -> None:
    bundle = load_bundle(path)
    with torch.no_grad():
        for weight in bundle.recommender.model.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(SpringtideError, match="scores otherwise"):
        check_parity(bundle)


@pytest.mark.parametrize(
    "broken", [{}, {"cases": [{}]}, {"cases": 1}, {"cases": [{"events": [], "now": "x"}]}], ids=str
)
def test_an_unreadable_sample_is_told(path: Path, broken: dict[str, Any]) -> None:
    with pytest.raises(SpringtideError, match=r"parity\.json cannot be read"):
        parity.check(load_bundle(path).recommender, broken, "bundle")


def test_the_sample_holds_every_length(path: Path) -> None:
    lengths = [len(case["events"]) for case in json.loads((path / "parity.json").read_text())["cases"]]
    assert (min(lengths), max(lengths)) == (1, parity.LONGEST)
    assert np.all(np.diff(lengths) >= 0)
