"""Items added to a model in use: recommended at once, as training would have had them, and the others untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from springtide.bundle import load_bundle
from springtide.model.batch import EMPTY, History
from springtide.model.recommender import NewItem, Recommender
from toy import ITEMS_IN_TOY, toy_bundle

torch.set_num_threads(1)


def history(*items: int) -> History:
    n = len(items)
    times = 1_600_000_000_000 + np.arange(n) * 1000
    return History(np.array(items), np.ones(n, np.int64), np.full(n, 4, np.float32), times)


def recommender(folder: Path, **values: object) -> Recommender:
    return load_bundle(toy_bundle(folder, **values)).recommender


def twin_of(of: Recommender, row: int, item_id: str) -> NewItem:
    """An item with another's texts."""
    assert of.text_vectors is not None
    return NewItem(item_id, "Twin", ["new"], of.text_vectors[row], of.model.item_vectors.text[row].numpy())


@pytest.mark.parametrize(
    "values", [{}, {"model__preset": "gru", "model__text_dim": 8}, {"model__neighbour_items": 10}], ids=str
)
def test_what_was_there_scores_as_before(tmp_path: Path, values: dict[str, object]) -> None:
    model = recommender(tmp_path, **values)
    asked = [history(1, 2, 3), history(5), EMPTY]
    before = model.score(asked).logits
    model.put_items([twin_of(model, 3, "new"), twin_of(model, 4, "other")])
    after = model.score(asked).logits
    assert after.shape == (3, ITEMS_IN_TOY + 2)
    # Log popularity is centred over the catalogue, so a larger one moves every score of a history alike.
    moved = after[:, :ITEMS_IN_TOY] - before
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:, :1], moved.shape), atol=1e-4)
    assert model.item_ids[-2:] == ["new", "other"] and model.index["other"] == ITEMS_IN_TOY + 1
    assert np.isfinite(after[:2]).all()


def test_a_twin_is_what_its_text_says(tmp_path: Path) -> None:
    """The same query finds both; a history sees it as one of its kind without counts."""
    model = recommender(tmp_path)
    model.put_items([twin_of(model, 7, "twin")])
    row = model.index["twin"]
    assert model.text_vectors is not None
    found = model.score([EMPTY], model.text_vectors[7][None])
    assert found.logits[0, row] == pytest.approx(found.logits[0, 7], abs=1e-4)
    project = model.model.item_vectors.project
    assert project is not None
    with torch.no_grad():
        np.testing.assert_allclose(model.item_vectors[row], project(model.model.item_vectors.text)[7], atol=1e-6)
    borrowing = model.model.channels.borrowing
    assert borrowing is not None and borrowing.lenders[row, 0] == 7 and borrowing.cosines[row, 0] > 0.999


def test_an_added_item_is_part_of_histories_and_counts(tmp_path: Path) -> None:
    model = recommender(tmp_path)
    model.put_items([twin_of(model, 2, "new")])
    row = model.index["new"]
    parsed, unknown = model.history([{"item_id": "new"}, {"item_id": "i03"}])
    assert not unknown and parsed.items.tolist() == [row, 3]
    before = model.score([history(row)]).logits[0, 9]
    for _ in range(20):
        model.observe([history(row)], [history(9)])
        model.observe([EMPTY], [history(row)])
    assert model.score([history(row)]).logits[0, 9] > before
    assert model.popularity[row] == 20 and model.score([EMPTY]).logits[0, row] == pytest.approx(np.log1p(20), rel=1e-5)
    model.put_items([twin_of(model, 5, "later")])  # what was observed stays
    assert model.popularity[row] == 20 and model.score([history(row)]).logits[0, 9] > before


def test_an_item_put_again_is_replaced(tmp_path: Path) -> None:
    model = recommender(tmp_path)
    model.put_items([twin_of(model, 2, "new")])
    model.put_items([twin_of(model, 6, "new"), twin_of(model, 8, "i00")])
    assert len(model.item_ids) == ITEMS_IN_TOY + 1
    assert model.text_vectors is not None
    np.testing.assert_array_equal(model.text_vectors[-1], model.text_vectors[6])
    np.testing.assert_array_equal(model.text_vectors[0], model.text_vectors[8])
    assert model.titles[0] == model.titles[-1] == "Twin" and model.categories[0] == ["new"]
    borrowing = model.model.channels.borrowing
    assert borrowing is not None and borrowing.lenders[-1, 0] == 6  # of the text that it has now


def test_an_item_without_a_text_is_kept_and_not_recommended(tmp_path: Path) -> None:
    model = recommender(tmp_path)
    width = model.model.item_vectors.text.shape[1]
    model.put_items([NewItem("mute", "", [], np.zeros(384, np.float32), np.zeros(width, np.float32))])
    assert model.score([history(1), EMPTY]).logits[:, -1].tolist() == [-np.inf, -np.inf]
    assert np.isfinite(model.score([history(model.index["mute"], 3)]).logits[0, :-1]).all()
