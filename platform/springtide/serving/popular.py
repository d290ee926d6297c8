"""What the Ingress answers by itself while no Scorer does: a bundle's popular items, filtered as the caller asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from springtide.errors import SpringtideError
from springtide.schemas import ITEMS, check_schema
from springtide.serving.filters import barred_by, index_catalogue
from springtide.serving.policies import Policies

Json = dict[str, Any]
_COLUMNS = ("item_id", "title", "categories", "events")


class PopularItems:
    """The catalogue of one bundle, most training events first; of equals, the first of the catalogue first."""

    def __init__(self, items: pa.Table, label: str, exclude_seen: bool, policies: Policies | None = None) -> None:
        """items: the columns item_id, title, categories and events of schemas.ITEMS; label: name@version; exclude_seen:
        where neither a request nor the policies say. Of the policies, the filters hold here too."""
        if policies is not None:
            if policies.filtering:
                items = items.filter(pa.array(~_barred(items, policies)))
            exclude_seen = exclude_seen if policies.exclude_seen is None else policies.exclude_seen
        order = np.argsort(-items["events"].to_numpy(), kind="stable")
        ranked = items.take(pa.array(order)).combine_chunks()
        self.label, self._exclude_seen = label, exclude_seen
        self._ids, self._titles = ranked["item_id"], ranked["title"]
        self._scores = np.log1p(ranked["events"].to_numpy()).round(6)
        self._ranks_of = _ranks_by_category(ranked["categories"])

    def answer(
        self,
        k: int,
        seen: Sequence[str] = (),
        *,
        exclude_seen: bool | None = None,
        categories: Collection[str] = (),
        exclude_items: Collection[str] = (),
        allow_items: Collection[str] | None = None,
    ) -> Json:
        """A degraded answer to `recommend`; an item's score is ln(1 + training events).

        seen: ids of the history, left out if exclude_seen says so (None: as the model was trained). Holds k items
        whenever the catalogue has k that pass.
        """
        hidden = set(exclude_items)
        if self._exclude_seen if exclude_seen is None else exclude_seen:
            hidden.update(seen)
        ranks = self._ranks(categories)
        if allow_items is not None:
            allowed = pc.is_in(self._ids, pa.array(list(allow_items), pa.string())).to_numpy(zero_copy_only=False)
            ranks = ranks[allowed[ranks]]
        ranks = ranks[: k + len(hidden)]  # of these at most len(hidden) are skipped
        ids = self._ids.take(pa.array(ranks)).to_pylist()
        kept = [pair for pair in zip(ranks.tolist(), ids, strict=True) if pair[1] not in hidden][:k]
        return {
            "items": [
                {"item_id": item_id, "score": float(self._scores[rank]), "title": self._titles[rank].as_py()}
                for rank, item_id in kept
            ],
            "model": self.label,
            "source": "popular",
            "gate": {"long": None, "short": None},
            "degraded": True,
        }

    def _ranks(self, categories: Collection[str]) -> np.ndarray:
        if not categories:
            return np.arange(len(self._ids))
        found = [self._ranks_of[category] for category in categories if category in self._ranks_of]
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)


def load_popular(bundle: str | Path, name: str, policies: Policies | None = None) -> PopularItems:
    """The popular items of a bundle, labelled as its Scorer does. Raises SpringtideError if a file cannot be read."""
    path = Path(bundle)
    try:
        version = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()[:12]
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))["settings"]
        items = check_schema(pq.read_table(path / "items.parquet"), ITEMS, str(path / "items.parquet"))
        trained = bool(settings["data"]["exclude_seen"])
        return PopularItems(items.select(_COLUMNS), f"{name}@{version}", trained, policies)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise SpringtideError(
            f"cannot read the popular items of the bundle {path}: {' '.join(str(error).split())[:300]}; train it again"
        ) from None


def _barred(items: pa.Table, policies: Policies) -> np.ndarray:
    index = {item_id: row for row, item_id in enumerate(items["item_id"].to_pylist())}
    return barred_by(index_catalogue(index, items["categories"].to_pylist()), policies)


def _ranks_by_category(categories: pa.ChunkedArray) -> dict[str, np.ndarray]:
    lists = categories.combine_chunks()
    coded = lists.flatten().dictionary_encode()
    names = coded.dictionary.to_pylist()
    if not names:
        return {}
    codes, owners = coded.indices.to_numpy(), pc.list_parent_indices(lists).to_numpy()
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(names) + 1))
    return {name: owners[order[bounds[i] : bounds[i + 1]]] for i, name in enumerate(names)}
