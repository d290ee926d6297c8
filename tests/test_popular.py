"""The Ingress' own popular items: exactly the k best that pass, whatever is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.errors import SpringtideError
from springtide.serving.engine import ScoreRequest
from springtide.serving.policies import Policies
from springtide.serving.popular import PopularItems, load_popular
from toy import toy_bundle

NAMES = st.sampled_from([f"i{n}" for n in range(12)])
CATEGORIES = st.sampled_from(["a", "b", "c"])


FILTERS = st.fixed_dictionaries(
    {
        "categories": st.lists(CATEGORIES, max_size=2).map(tuple),
        "allow_items": st.none() | st.lists(NAMES, max_size=6).map(tuple),
    }
)


@given(
    catalogue=st.lists(st.tuples(st.integers(0, 5), st.lists(CATEGORIES, max_size=3)), max_size=10),
    k=st.integers(1, 12),
    seen=st.lists(NAMES, max_size=4),
    exclude_seen=st.sampled_from([None, True, False]),
    asked=FILTERS,
    exclude_items=st.lists(NAMES, max_size=4).map(tuple),
    configured=FILTERS,
    block_items=st.lists(NAMES, max_size=2).map(tuple),
    exclude_categories=st.lists(CATEGORIES, max_size=1).map(tuple),
)
def test_the_best_k_that_pass(
    catalogue: list[Any],
    k: int,
    seen: list[str],
    exclude_seen: bool | None,
    asked: dict[str, Any],
    exclude_items: tuple[str, ...],
    configured: dict[str, Any],
    block_items: tuple[str, ...],
    exclude_categories: tuple[str, ...],
) -> None:
    table = pa.table(
        {
            "item_id": pa.array([f"i{n}" for n in range(len(catalogue))], pa.string()),
            "title": pa.array([f"Title {n}" for n in range(len(catalogue))], pa.string()),
            "categories": pa.array([names for _, names in catalogue], pa.list_(pa.string())),
            "events": pa.array([events for events, _ in catalogue], pa.int64()),
        }
    )
    policies = Policies(block_items=block_items, exclude_categories=exclude_categories, **configured)
    history = [{"item_id": item_id} for item_id in seen]
    request = ScoreRequest(history, k=k, exclude_seen=exclude_seen, exclude_items=exclude_items, **asked)
    scores = np.log1p(table["events"].to_numpy())
    answer = PopularItems(table, scores, "m@1", True, policies).answer(request)

    def passes(n: int, names: list[str]) -> bool:
        item_id = f"i{n}"
        return (
            item_id not in {*exclude_items, *block_items}
            and not set(names) & set(exclude_categories)
            and (exclude_seen is False or item_id not in seen)
            and all(not some["categories"] or set(names) & set(some["categories"]) for some in (asked, configured))
            and all(some["allow_items"] is None or item_id in some["allow_items"] for some in (asked, configured))
        )

    expected = sorted((-events, n) for n, (events, names) in enumerate(catalogue) if passes(n, names))[:k]
    assert [item["item_id"] for item in answer["items"]] == [f"i{n}" for _, n in expected]
    assert [item["title"] for item in answer["items"]] == [f"Title {n}" for _, n in expected]
    assert [item["score"] for item in answer["items"]] == pytest.approx([np.log1p(-e) for e, _ in expected], abs=1e-6)
    assert (answer["source"], answer["degraded"]) == ("popular", True)


def test_what_counts_as_seen_is_the_engines_rule(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path)
    history = [{"item_id": "i39", "action": "view"}, {"item_id": "i38", "action": "purchase"}]

    def best(**policies: Any) -> str:
        answer = load_popular(bundle, "toy", Policies(**policies)).answer(ScoreRequest(history, k=1))
        return str(answer["items"][0]["item_id"])

    assert best() == "i37"
    assert best(seen_actions=("purchase",)) == "i39"
    assert best(action_weights={"view": 0.0}) == "i39"
    assert best(exclude_seen=False) == "i39"


def test_read_from_a_bundle(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path)
    answer = load_popular(bundle, "toy").answer(ScoreRequest([{"item_id": "i39"}], k=2))
    assert [item["item_id"] for item in answer["items"]] == ["i38", "i37"]
    assert answer["model"].startswith("toy@")
    (bundle / "items.parquet").write_bytes(b"not parquet")
    with pytest.raises(SpringtideError, match="popular items"):
        load_popular(bundle, "toy")
