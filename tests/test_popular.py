"""The Ingress' own popular items: exactly the k best that pass, whatever is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.errors import SpringtideError
from springtide.serving.policies import Policies
from springtide.serving.popular import PopularItems, load_popular
from toy import toy_bundle

NAMES = st.sampled_from([f"i{n}" for n in range(12)])
CATEGORIES = st.sampled_from(["a", "b", "c"])


@given(
    catalogue=st.lists(st.tuples(st.integers(0, 5), st.lists(CATEGORIES, max_size=3)), max_size=10),
    k=st.integers(1, 12),
    seen=st.lists(NAMES, max_size=4),
    exclude_seen=st.sampled_from([None, True, False]),
    categories=st.lists(CATEGORIES, max_size=3),
    exclude_items=st.lists(NAMES, max_size=4),
    allow_items=st.none() | st.lists(NAMES, max_size=6),
)
@settings(deadline=None)
def test_the_best_k_that_pass(
    catalogue: list[Any],
    k: int,
    seen: list[str],
    exclude_seen: bool | None,
    categories: list[str],
    exclude_items: list[str],
    allow_items: list[str] | None,
) -> None:
    table = pa.table(
        {
            "item_id": pa.array([f"i{n}" for n in range(len(catalogue))], pa.string()),
            "title": pa.array([f"Title {n}" for n in range(len(catalogue))], pa.string()),
            "categories": pa.array([names for _, names in catalogue], pa.list_(pa.string())),
            "events": pa.array([events for events, _ in catalogue], pa.int64()),
        }
    )
    answer = PopularItems(table, "m@1", exclude_seen=True).answer(
        k,
        seen,
        exclude_seen=exclude_seen,
        categories=categories,
        exclude_items=exclude_items,
        allow_items=allow_items,
    )
    passing = [
        (-events, n)
        for n, (events, names) in enumerate(catalogue)
        if (not categories or set(names) & set(categories))
        and f"i{n}" not in exclude_items
        and (exclude_seen is False or f"i{n}" not in seen)
        and (allow_items is None or f"i{n}" in allow_items)
    ]
    expected = sorted(passing)[:k]
    assert [item["item_id"] for item in answer["items"]] == [f"i{n}" for _, n in expected]
    assert [item["title"] for item in answer["items"]] == [f"Title {n}" for _, n in expected]
    assert [item["score"] for item in answer["items"]] == pytest.approx([np.log1p(-e) for e, _ in expected], abs=1e-6)
    assert (answer["source"], answer["degraded"]) == ("popular", True)


def test_read_from_a_bundle(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path)
    answer = load_popular(bundle, "toy").answer(2, ["i39"])
    assert [item["item_id"] for item in answer["items"]] == ["i38", "i37"]
    assert answer["model"].startswith("toy@")
    policies = Policies(exclude_seen=False, categories=("odd",), block_items=("i37",))
    answer = load_popular(bundle, "toy", policies).answer(2, ["i39"])
    assert [item["item_id"] for item in answer["items"]] == ["i39", "i35"]
    (bundle / "items.parquet").write_bytes(b"not parquet")
    with pytest.raises(SpringtideError, match="popular items"):
        load_popular(bundle, "toy")
