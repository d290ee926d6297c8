"""Hard filters before ranking: which rows of a catalogue may not be answered, as masks without a loop over items."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from springtide.serving.policies import Policies


@dataclass(frozen=True)
class Catalogue:
    """I items by id and by category."""

    index: Mapping[str, int]  # item id -> row
    categories: Sequence[Sequence[str]]  # of each row
    rows_of: Mapping[str, np.ndarray]  # category -> its rows, ascending

    def __len__(self) -> int:
        return len(self.categories)

    def rows(self, item_ids: Iterable[str]) -> np.ndarray:
        """Rows of the ids that are known, [n] int64."""
        return np.fromiter((self.index[item_id] for item_id in item_ids if item_id in self.index), np.int64)

    def in_any(self, categories: Iterable[str]) -> np.ndarray:
        """Rows of the items of any of these categories, with repeats, [n] int64."""
        found = [self.rows_of[category] for category in categories if category in self.rows_of]
        return np.concatenate(found) if found else np.empty(0, np.int64)


def index_catalogue(item_ids: Mapping[str, int], categories: Sequence[Sequence[str]]) -> Catalogue:
    """item_ids: id -> row; categories: of each row."""
    rows: dict[str, list[int]] = {}
    for row, names in enumerate(categories):
        for name in names:
            rows.setdefault(name, []).append(row)
    return Catalogue(item_ids, categories, {name: np.asarray(found, np.int64) for name, found in rows.items()})


def barred_by(catalogue: Catalogue, policies: Policies) -> np.ndarray:
    """[I] bool: rows that fail the configured filters."""
    return barred(
        catalogue,
        categories=policies.categories,
        exclude_categories=policies.exclude_categories,
        allow_items=policies.allow_items,
        block_items=policies.block_items,
    )


def barred(
    catalogue: Catalogue,
    *,
    categories: Collection[str] = (),
    exclude_categories: Collection[str] = (),
    allow_items: Collection[str] | None = None,
    block_items: Collection[str] = (),
) -> np.ndarray:
    """[I] bool: rows that fail a filter. Empty `categories` and absent `allow_items` let all pass."""
    out = np.zeros(len(catalogue), bool)
    for wanted in (
        catalogue.in_any(categories) if categories else None,
        None if allow_items is None else catalogue.rows(allow_items),
    ):
        if wanted is not None:
            outside = np.ones(len(catalogue), bool)
            outside[wanted] = False
            out |= outside
    out[catalogue.in_any(exclude_categories)] = True
    out[catalogue.rows(block_items)] = True
    return out
