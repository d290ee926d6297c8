"""Retrieval by an index: the answers of exact scoring where it reads enough, k items under any filter, its recall."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.bundle import INDEX, Bundle, check_parity, load_bundle
from springtide.errors import SpringtideError
from springtide.files import write_manifest
from springtide.model import ann, retrieval
from springtide.model.batch import EMPTY, History
from springtide.model.indexing import make_index, measure_recall, sample
from springtide.model.recommender import NewItem, Recommender
from toy import ITEMS_IN_TOY, toy_bundle

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_catalogues(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 40 items are many."""
    monkeypatch.setattr(retrieval, "EXACT_BELOW", 0)
    monkeypatch.setattr(ann, "SELECT_FROM", 3)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_bundle(tmp_path_factory.mktemp("toy"), train__ann_items=40)


@pytest.fixture(scope="module")
def bundle(path: Path) -> Bundle:
    return load_bundle(path)


def history(items: list[int]) -> History:
    count = len(items)
    times = 10**12 + 10**6 * np.arange(count)
    return History(np.array(items), np.ones(count, np.int64), np.full(count, np.nan, np.float32), times)


def lend(recommender: Recommender) -> None:
    """Let half of the items be rare enough to borrow."""
    borrowing = recommender.model.channels.borrowing
    assert borrowing is not None
    rng = np.random.default_rng(0)
    lenders = rng.integers(20, ITEMS_IN_TOY, (ITEMS_IN_TOY, 3))
    borrowing.load(lenders, rng.uniform(-1, 1, lenders.shape).astype(np.float32))
    borrowing.events[:20] = torch.arange(20) % 7


def whole(recommender: Recommender) -> None:
    """Give it an index of which every list is read."""
    index = make_index(recommender, [history([n, n + 1]) for n in range(30)], 1.0)[0].index
    everything = {kind: one.with_probes(one.lists) for kind, one in index.indexes.items()}
    recommender.use_index(replace(index, indexes=everything))


def same(found: tuple[np.ndarray, np.ndarray], exact: tuple[np.ndarray, np.ndarray]) -> None:
    """Equal scores rank by rank, and the same items but for ties of rounding."""
    np.testing.assert_allclose(found[1], exact[1], atol=2e-5, rtol=1e-5)
    apart = found[0] != exact[0]
    near = np.abs(exact[1][apart] - found[1][apart]) < 1e-4
    assert near.all()


@given(
    rows=st.lists(st.lists(st.integers(0, ITEMS_IN_TOY - 1), max_size=30), min_size=1, max_size=4),
    k=st.integers(1, 50),
    asked=st.booleans(),
    barred=st.lists(st.integers(0, ITEMS_IN_TOY - 1), max_size=ITEMS_IN_TOY),
)
@settings(max_examples=80)
def test_with_all_lists_read_it_answers_as_exact_scoring_does(
    lending: Recommender, rows: list[list[int]], k: int, asked: bool, barred: list[int]
) -> None:
    recommender, found = lending, lending.retrieval
    assert found is not None and recommender.text_vectors is not None
    histories = [history(items) if items else EMPTY for items in rows]
    queries = recommender.text_vectors[: len(rows)] if asked else None
    logits = recommender.score(histories, queries).logits
    questions, gate = recommender.questions(histories, queries)
    np.testing.assert_allclose(gate, recommender.score(histories, queries).gate_short)
    mask = np.zeros(ITEMS_IN_TOY, bool)
    mask[barred] = True
    for row, question in enumerate(questions):
        if question is None:
            assert not rows[row] and not asked
            continue
        exact = recommender.top_k(logits[row : row + 1], k, [np.flatnonzero(mask)])
        keep = exact[0][0] >= 0
        same(found.best(question, k, mask), (exact[0][0][keep], exact[1][0][keep]))


@pytest.fixture(scope="module")
def lending(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    recommender = load_bundle(toy_bundle(tmp_path_factory.mktemp("lending"))).recommender
    lend(recommender)
    whole(recommender)
    return recommender


@pytest.mark.parametrize(
    "off",
    [
        {"model__memory": False, "model__neighbours": False, "model__recent_popularity": False},
        {"model__text_neighbours": False, "model__popularity": False},
        {"model__text_neighbours": False, "model__popularity": False, "model__memory": False,
         "model__neighbours": False, "model__recent_popularity": False},
        {"model__borrowing": False},
        {"model__neighbour_items": 12},
    ],
)  # fmt: skip
def test_whatever_channels_the_model_has(off: dict[str, Any], tmp_path: Path) -> None:
    recommender = load_bundle(toy_bundle(tmp_path, train__ann_items=40, **off)).recommender
    whole(recommender)
    asked = [history([1, 2, 3]), history([39])]
    for found, exact in zip(recommender.best(asked, 8), recommender.top_k(recommender.score(asked).logits, 8),
                            strict=True):  # fmt: skip
        np.testing.assert_allclose(found, exact, atol=2e-5)
    for question in recommender.questions([history([1, 2, 3, 1, 2, 3]), history([39])], None)[0]:
        # Each row that counts may speak for is named once: only so many of the best are looked at.
        assert question is not None and (np.diff(question.touched) > 0).all()
        others = np.setdiff1d(np.arange(ITEMS_IN_TOY), question.touched)
        assert question.counted is None or not question.counted[others].any()


def test_a_small_catalogue_has_no_index(tmp_path: Path) -> None:
    plain = load_bundle(toy_bundle(tmp_path, train__ann_items=41))
    assert plain.recommender.retrieval is None and "index" not in plain.metrics
    assert not (plain.path / INDEX).exists()


def test_recall_is_measured_and_stored(bundle: Bundle) -> None:
    figures, found = bundle.metrics["index"], bundle.recommender.retrieval
    assert found is not None and figures["items"] == ITEMS_IN_TOY
    cases = [bundle.recommender.history(case["events"])[0] for case in bundle.parity["cases"]]
    for kind, (histories, queries) in sample(bundle.recommender, cases).items():
        half = histories[1::2], None if queries is None else queries[1::2]
        assert figures[kind]["recall@10"] == measure_recall(bundle.recommender, found, half)
        assert figures[kind]["requests"] == len(half[0])
        index = found.index.indexes[kind]
        assert (index.lists, index.probes) == (figures[kind]["lists"], figures[kind]["probes"])


def test_a_loaded_index_answers_as_the_one_written(path: Path) -> None:
    first, second = load_bundle(path).recommender, load_bundle(path).recommender
    asked = [history([3, 4]), history([17])]
    for one, other in zip(first.best(asked, 10), second.best(asked, 10), strict=True):
        np.testing.assert_array_equal(one, other)


def test_parity_holds_and_lets_go_of_the_keys(path: Path) -> None:
    fresh = load_bundle(path)
    assert check_parity(fresh) < 1e-5
    assert fresh.recommender._frozen is None


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return toy_bundle(tmp_path, train__ann_items=40)


def test_a_damaged_index_is_refused_by_name(copy: Path) -> None:
    data = bytearray((copy / INDEX).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / INDEX).write_bytes(data)
    with pytest.raises(SpringtideError, match=f"{INDEX} differs from its checksum; write the bundle again"):
        load_bundle(copy)


def test_an_index_without_a_checksum_is_not_trusted(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"][INDEX]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SpringtideError, match=f"no checksum of {INDEX}"):
        load_bundle(copy)


def test_an_index_that_the_metrics_tell_of_must_be_there(copy: Path) -> None:
    (copy / INDEX).unlink()
    write_manifest(copy)
    with pytest.raises(SpringtideError, match="cannot load the bundle"):
        load_bundle(copy)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_file_that_is_no_index_is_refused(copy: Path, share: float) -> None:
    from safetensors.numpy import load_file, save_file

    arrays = load_file(copy / INDEX)
    arrays["histories.index"] = arrays["histories.index"][: int(share * len(arrays["histories.index"]))].copy()
    save_file(arrays, copy / INDEX)
    write_manifest(copy)
    with pytest.raises(SpringtideError, match="cannot load the bundle .*FAISS cannot read the index"):
        load_bundle(copy)


def test_the_index_of_another_catalogue_is_refused(copy: Path) -> None:
    rng = np.random.default_rng(0)
    other = ann.build([rng.normal(size=(50, width)).astype(np.float32) for width in (16, 8, 1, 1)])
    with pytest.raises(ValueError, match="holds 50 items, the catalogue 40"):
        ann.unpack(ann.pack(other), 40)


def test_an_added_item_is_found(path: Path) -> None:
    recommender = load_bundle(path).recommender
    texts = recommender.text_vectors
    assert texts is not None
    features = recommender.model.item_vectors.text
    recommender.put_items([NewItem("new", "New", ["even"], texts[5], features[5].numpy())])
    row = recommender.index["new"]
    found, scores = recommender.best([history([5, 5, 5])], len(recommender.item_ids))
    assert row in found[0]
    exact = recommender.score([history([5, 5, 5])]).logits[0]
    np.testing.assert_allclose(scores[0], exact[found[0]], atol=2e-5)
    questions, _ = recommender.questions([EMPTY], texts[5:6])
    assert recommender.retrieval is not None and questions[0] is not None
    assert row in recommender.retrieval.best(questions[0], 2)[0]


def test_a_new_text_is_found(path: Path) -> None:
    recommender = load_bundle(path).recommender
    texts, features = recommender.text_vectors, recommender.model.item_vectors.text
    assert texts is not None and recommender.retrieval is not None
    recommender.put_items([NewItem("i07", "Like item 30", [], texts[30], features[30].numpy())])
    questions, _ = recommender.questions([EMPTY], texts[30:31])
    assert questions[0] is not None
    assert sorted(recommender.retrieval.best(questions[0], 2)[0].tolist()) == [7, 30]


def test_what_is_observed_counts_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recommender, asked = load_bundle(path).recommender, [history([5, 6])]
    new = history([7] * 50)
    recommender.observe(asked, [History(new.items, new.actions, new.ratings, new.timestamps + 10**9)])
    exact = recommender.score(asked).logits
    monkeypatch.setattr(retrieval, "DEPTH", 1)
    found, scores = recommender.best(asked, 5)
    assert 7 in found[0]
    np.testing.assert_allclose(scores[0], exact[0][found[0]], atol=2e-5)


@given(st.integers(1, 60), st.integers(0, 2000), st.integers(0, 2**31), st.integers(1, 12))
@settings(max_examples=60)
def test_a_search_of_all_lists_finds_as_many_as_are_allowed(
    index: ann.Ann, count: int, allowed: int, seed: int, probes: int
) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros(2000, bool)
    mask[rng.choice(2000, allowed, replace=False)] = True
    query = [rng.normal(size=6).astype(np.float32), rng.normal(size=1).astype(np.float32)]
    found = ann.search(index.with_probes(10**9), query, count, mask)
    assert len(np.unique(found)) == len(found) == min(count, allowed)
    assert mask[found].all()
    fewer = ann.search(index.with_probes(probes), query, count, mask)
    assert mask[fewer].all() and len(np.unique(fewer)) == len(fewer) <= count


@pytest.fixture(scope="module")
def index() -> ann.Ann:
    rng = np.random.default_rng(1)
    return ann.build([rng.normal(size=(2000, 6)).astype(np.float32), rng.normal(size=(2000, 1)).astype(np.float32)])
