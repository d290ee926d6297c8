"""Policies of the answers: the section `policies` of Scorer's user_config, all of them in one place.

In order: which events of a history count, which items may be answered, what is added to scores, and how k items are
chosen among the best. Only filters and strict caps can make an answer shorter than k while the catalogue has items
left; everything else reorders. What a request says itself wins over `exclude_seen` and `diversity` here and adds to the
filters: an item must pass both.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

Json = dict[str, Any]
Name = Annotated[str, Field(min_length=1, max_length=512)]
Weight = Annotated[float, Field(ge=0, le=1)]
Most = Annotated[int, Field(ge=0, le=1000)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Caps(Section):
    """Most items of a category in one answer. An item counts in each of its categories."""

    per_category: int | None = Field(None, ge=1, le=1000)  # None: no cap but those named below
    categories: dict[Name, Most] = {}  # other numbers for some categories
    # Soft: rather than answer fewer than k items, caps give way once no other item is left. Strict: they never do.
    strict: bool = False


class Exploration(Section):
    """Chance in the choice, so that logs tell how other items would have done. Each item then says how likely it was.

    epsilon: at every rank, with that chance any of the candidates instead of the best. softmax: at every rank, a
    candidate with a chance in proportion to exp(score / temperature) (Plackett-Luce).
    """

    kind: Literal["off", "epsilon", "softmax"] = "off"
    epsilon: float = Field(0.05, ge=0, le=1)
    temperature: float = Field(1.0, ge=1e-3, le=1e3)  # in units of score
    candidates: int = Field(50, ge=1, le=1000)  # the best so many, and never fewer than k, take part


class Policies(Section):
    # Of the history. A weight is the share of an action's events that count, from the newest back: 0 drops all of them,
    # 0.5 every second one. Actions that are not named, and events without an action, weigh 1.
    action_weights: dict[Name, Weight] = {}
    exclude_seen: bool | None = None  # leave out items of the history; None: as the model was trained
    seen_actions: tuple[Name, ...] | None = (
        None  # whose items are seen, of any weight; None: of every event that counts
    )
    # Before scores are ranked: what may be answered at all.
    categories: tuple[Name, ...] = ()  # items of any of these; none named: of all
    exclude_categories: tuple[Name, ...] = ()  # and of none of these
    allow_items: tuple[Name, ...] | None = None  # only these
    block_items: tuple[Name, ...] = ()  # never these
    # After: popularity_damping * ln(1 + events of the item) is taken off a score.
    popularity_damping: float = Field(0.0, ge=0, le=100)
    diversity: float = Field(0.0, ge=0, le=1)  # 0: by score alone; towards 1: unlike one another
    caps: Caps = Caps()
    exploration: Exploration = Exploration()

    @property
    def filtering(self) -> bool:
        return self.allow_items is not None or bool(self.categories or self.exclude_categories or self.block_items)


# ---------------------------------------------------------------- of the history
def counting_events(events: Sequence[Json], weights: Mapping[str, float]) -> list[Json]:
    """The events, oldest first, that enter the history. weights: in [0, 1], by action; others weigh 1.

    Of an action of weight w, the newest event enters (if w > 0), and of its newest n events ceil(n * w) do.
    """
    if not weights:
        return list(events)
    kept, before = [], Counter[str]()
    for event in reversed(events):
        action = event.get("action") or ""
        weight, newer = weights.get(action, 1.0), before[action]
        before[action] += 1
        if math.ceil((newer + 1) * weight) > math.ceil(newer * weight):
            kept.append(event)
    return kept[::-1]


def items_of(events: Sequence[Json], actions: Collection[str]) -> set[str]:
    """Ids of the items of the events of these actions."""
    return {event["item_id"] for event in events if event.get("action") in actions}


# ---------------------------------------------------------------- of the scores
def damping_of(popularity: np.ndarray, damping: float) -> np.ndarray:
    """What popularity [I] (events) takes off each score: [I] float32, not above 0."""
    return np.float32(-damping) * np.log1p(popularity).astype(np.float32)


def generator(chance: str | None) -> np.random.Generator:
    """The chance of one request: the same for the same text, so that an answer can be made again; None: fresh."""
    if chance is None:
        return np.random.default_rng()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(chance.encode()).digest()[:16]))
