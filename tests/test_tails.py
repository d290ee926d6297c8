"""The latest events of users: in time order, a few of each, for those who were seen last."""

from __future__ import annotations

from typing import Any

from springtide.serving.tails import Tails


def did(*pairs: tuple[str, int]) -> list[dict[str, Any]]:
    return [{"item_id": item, "timestamp": at, "action": "view"} for item, at in pairs]


def test_the_latest_events_in_order_of_time() -> None:
    tails = Tails(events=3)
    tails.add("u", did(("a", 1), ("b", 5)))
    tails.add("u", did(("c", 3), ("d", 5)))
    assert [(e["item_id"], e["timestamp"]) for e in tails.of("u")] == [("c", 3), ("b", 5), ("d", 5)]


def test_whoever_was_seen_least_lately_makes_room() -> None:
    tails = Tails(users=2)
    for user in "uvuw":
        tails.add(user, did(("a", 1)))
    assert [user for user in "uvw" if user in tails] == ["u", "w"] and tails.of("v") == []
