"""What the Ingress answers by itself while no Scorer does: a bundle's popular items, filtered as the caller asked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from springtide.errors import SpringtideError
from springtide.model.decayed import popular_scores
from springtide.schemas import ITEMS, check_schema
from springtide.serving.engine import ScoreRequest
from springtide.serving.filters import Catalogue, barred, barred_by, index_catalogue
from springtide.serving.policies import Policies, counting_events, items_of

Json = dict[str, Any]
MOST = 100_000  # items kept, so that a large catalogue does not weigh on every Ingress
_COLUMNS = ("item_id", "title", "categories")


class PopularItems:
    """The most popular items of one bundle; the first of the catalogue first of equal scores. Never changes."""

    def __init__(
        self,
        items: pa.Table,
        scores: np.ndarray,
        label: str,
        exclude_seen: bool,
        policies: Policies | None = None,
    ) -> None:
        """items: the columns item_id, title and categories of schemas.ITEMS; scores: [I]; label: name@version.

        Of policies the filters apply, and what counts as seen; an order by popularity knows no caps and no diversity.
        """
        self.label, self._exclude_seen, self._policies = label, exclude_seen, policies or Policies()
        if self._policies.filtering:
            kept = ~barred_by(_catalogue_of(items), self._policies)
            items, scores = items.filter(pa.array(kept)), scores[kept]
        order = np.argsort(-scores, kind="stable")[:MOST]
        ranked = items.take(pa.array(order))
        self._ids, self._titles = ranked["item_id"].to_pylist(), ranked["title"].to_pylist()
        self._scores = scores[order].astype(np.float64).round(6).tolist()
        self._catalogue = _catalogue_of(ranked)

    def answer(self, request: ScoreRequest) -> Json:
        """A degraded answer to a request: k items if the MOST hold k that pass."""
        out = barred(
            self._catalogue,
            categories=request.categories,
            allow_items=request.allow_items,
            block_items=request.exclude_items,
        )
        out[self._catalogue.rows(self._seen(request))] = True
        return {
            "items": [
                {"item_id": self._ids[rank], "score": self._scores[rank], "title": self._titles[rank]}
                for rank in np.flatnonzero(~out)[: request.k].tolist()
            ],
            "model": self.label,
            "source": "popular",
            "gate": {"long": None, "short": None},
            "degraded": True,
        }

    def _seen(self, request: ScoreRequest) -> set[str]:
        """Ids that the answer leaves out as seen, by the rule of the engine."""
        choices = (request.exclude_seen, self._policies.exclude_seen, self._exclude_seen)
        if not next(choice for choice in choices if choice is not None):
            return set()
        if self._policies.seen_actions is not None:
            return items_of(request.events, self._policies.seen_actions)
        return {event["item_id"] for event in counting_events(request.events, self._policies.action_weights)}


def load_popular(bundle: str | Path, name: str, policies: Policies | None = None) -> PopularItems:
    """The popular items of a bundle, labelled as its Scorer does. Raises SpringtideError if a file cannot be read."""
    path = Path(bundle)
    try:
        version = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()[:12]
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))["settings"]
        items = check_schema(pq.read_table(path / "items.parquet"), ITEMS, str(path / "items.parquet"))
        seen = bool(settings["data"]["exclude_seen"])
        return PopularItems(items.select(_COLUMNS), _scores(items, path), f"{name}@{version}", seen, policies)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, pa.ArrowException) as error:
        raise SpringtideError(
            f"cannot read the popular items of the bundle {path}: {' '.join(str(error).split())[:300]}; train it again"
        ) from None


def _scores(items: pa.Table, bundle: Path) -> np.ndarray:
    """[I] what the model gives newcomers."""
    events = items["events"].to_numpy()
    with safe_open(bundle / "memory.safetensors", "numpy") as arrays:
        popular = arrays.get_tensor("popular") if "popular" in arrays.keys() else events  # noqa: SIM118 - no mapping
    return popular_scores(popular, events)


def _catalogue_of(items: pa.Table) -> Catalogue:
    index = {item_id: row for row, item_id in enumerate(items["item_id"].to_pylist())}
    return index_catalogue(index, items["categories"].to_pylist())
