"""Where item vectors begin: like items near each other, and nothing for what was never counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import ArpackError

from springtide.model.inputs import ItemVectors
from springtide.training import factors as module
from springtide.training.factors import item_factors
from toy import toy_settings

GROUPS, SIZE, DIM = 6, 5, 4  # items that are taken together, how many to a group


def counts() -> sp.csr_matrix:
    """Within a group often, across groups now and then; the last two items never."""
    rng = np.random.default_rng(0)
    group = np.arange(GROUPS * SIZE) // SIZE
    table = np.where(group[:, None] == group, rng.integers(20, 40, (len(group), len(group))), 1).astype(np.float32)
    return sp.csr_matrix(np.pad(table, (0, 2)))


def test_what_is_taken_together_begins_together() -> None:
    factors = item_factors(counts(), GROUPS)
    unit = factors[:-2] / np.linalg.norm(factors[:-2], axis=1, keepdims=True)
    cosine = unit @ unit.T
    group = np.arange(GROUPS * SIZE) // SIZE
    same = group[:, None] == group
    assert cosine[same].min() > 0.9 and np.abs(cosine[~same]).max() < 0.3
    assert factors.dtype == np.float32 and not factors[-2:].any()
    np.testing.assert_allclose((factors[:-2] ** 2).mean(), 1 / GROUPS, rtol=1e-4)


def test_items_outside_the_greatest_factors_stay_as_they_were_drawn() -> None:
    groups = sp.block_diag([sp.csr_matrix(np.full((SIZE, SIZE), 20 + n, np.float32)) for n in range(3 * DIM)])
    factors = item_factors(groups.tocsr(), DIM)
    lengths = np.linalg.norm(factors, axis=1)
    assert set((lengths > 0).tolist()) == {True, False} and lengths[lengths > 0].min() > 0.1
    np.testing.assert_allclose((factors[lengths > 0] ** 2).mean(), 1 / DIM, rtol=1e-4)


def test_it_is_the_same_every_time() -> None:
    np.testing.assert_array_equal(item_factors(counts(), DIM), item_factors(counts(), DIM))


def test_too_few_items_have_nothing_to_factorise() -> None:
    few = sp.csr_matrix(np.pad(np.ones((DIM + 1, DIM + 1), np.float32), (0, 9)))
    assert not item_factors(few, DIM).any()
    assert not item_factors(sp.csr_matrix((9, 9), dtype=np.float32), DIM).any()
    alike = sp.csr_matrix(np.ones((9, 9), np.float32))  # every pair as often as chance would have it
    assert not item_factors(alike, DIM).any()


def test_counts_that_cannot_be_factorised_leave_vectors_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ArpackError(-9999)

    monkeypatch.setattr(module, "eigsh", fails)
    assert not item_factors(counts(), DIM).any()


def test_rows_without_factors_stay_as_they_were_drawn() -> None:
    config = toy_settings(Path("none"), model__dim=DIM, model__text_dim=0).model
    torch.manual_seed(0)
    vectors = ItemVectors(config, torch.zeros(3, 0), torch.ones(3, dtype=torch.bool))
    assert vectors.ids is not None
    drawn = vectors.ids.weight.detach().clone()
    vectors.begin_with(torch.tensor([[1.0] * DIM, [0.0] * DIM, [2.0] * DIM]))
    assert torch.equal(vectors.ids.weight, torch.stack([torch.ones(DIM), drawn[1], torch.full((DIM,), 2.0)]))
    assert vectors.ids.weight.requires_grad
