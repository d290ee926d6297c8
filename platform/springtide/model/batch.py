"""The tensors of one training or scoring step, and how histories are cut and padded into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class History:
    """One user's events, oldest first, known items only. n events."""

    items: np.ndarray  # [n] int64 catalogue rows
    actions: np.ndarray  # [n] int64 action numbers, 0 = unknown
    ratings: np.ndarray  # [n] float32, NaN = none given
    timestamps: np.ndarray  # [n] int64 milliseconds

    def __len__(self) -> int:
        return len(self.items)

    def before(self, end: int) -> History:
        """The first `end` events."""
        return self[slice(0, end)]

    def __getitem__(self, part: slice) -> History:
        return History(self.items[part], self.actions[part], self.ratings[part], self.timestamps[part])


EMPTY = History(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Batch:
    """B rows of L events, padded on the right. A pad is item 0 with `mask` False."""

    items: Tensor  # [B, L] int64 catalogue rows
    actions: Tensor  # [B, L] int64
    ratings: Tensor  # [B, L] float32, NaN = none
    timestamps: Tensor  # [B, L] int64 ms
    mask: Tensor  # [B, L] bool, True = a real event
    offset: Tensor  # [B] int64 events of the user before this row's first one
    now: Tensor  # [B, L] int64 ms: when the item after event t is asked for
    targets: Tensor  # [B, L] int64 the next item, -1 = nothing to predict here
    after: Tensor | None = None  # [B, L + A] the item t + 1 for every t, beyond the row's end as well; -1 = no target
    own: Tensor | None = None  # [B, L, J] float32 see training.own_counts; NaN: told by distance
    target_ratings: Tensor | None = None  # [B, L] float32 what the next item was rated, NaN = none; None: no ratings
    shown: Tensor | None = None  # [B, L] int64 what the network sees instead of `items`, -1 = nothing; None: `items`
    # The owner's training items, -1 = pad, when and where each was last taken: what to leave out of item-item models.
    owned: Tensor | None = None  # [B, K] int64
    owned_at: Tensor | None = None  # [B, K] int64 ms
    owned_place: Tensor | None = None  # [B, K] int64 where in the row it was last taken, before or beyond it as well

    def to(self, device: torch.device) -> Batch:
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in vars(self).items()}
        return Batch(**moved)  # type: ignore[arg-type]


def pad_rows(rows: Sequence[np.ndarray], dtype: type[np.generic], fill: float = 0) -> np.ndarray:
    """Stack arrays of unequal length into [len(rows), longest], padded on the right with `fill`."""
    lengths = np.array([len(row) for row in rows])
    out = np.full((len(rows), max(1, int(lengths.max(initial=1)))), fill, dtype)
    if len(rows):
        out[np.arange(out.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return out


def after_all(histories: Sequence[History], log_end: int) -> np.ndarray:
    """[B] int64 ms: the first moment after the log's end and each history's, when all that is known has happened.

    A moment earlier, popularity of the log's last days would not count yet: see channels.RecentPopularity.
    """
    return np.array([max([log_end, *history.timestamps[-1:]]) + 1 for history in histories], np.int64)


def read_events(
    events: Sequence[Mapping[str, Any]], index: Mapping[str, int], actions: Mapping[str, int]
) -> tuple[History, list[str]]:
    """Events as of Recommender.history, by the catalogue rows of item ids and the numbers of actions."""
    times = [event.get("timestamp") for event in events]
    last = next((t for t in times if t is not None), 0)
    filled_in = [last := last if time is None else time for time in times]
    known = [event for event in events if event["item_id"] in index]
    unknown = [event["item_id"] for event in events if event["item_id"] not in index]
    if not known:
        return EMPTY, unknown
    own = [t for t, event in zip(filled_in, events, strict=True) if event["item_id"] in index]
    filled = np.array(own, np.int64)
    order = np.argsort(filled, kind="stable")
    ratings = [np.nan if event.get("rating") is None else float(event["rating"]) for event in known]
    history = History(
        np.array([index[event["item_id"]] for event in known], np.int64)[order],
        np.array([actions.get(event.get("action") or "", 0) for event in known], np.int64)[order],
        np.array(ratings, np.float32)[order],
        filled[order],
    )
    return history, unknown


def scoring_batch(histories: Sequence[History], window: int, now: np.ndarray | None = None) -> Batch:
    """The last `window` events of each history, ready to score what comes next.

    `now` [B] int64 ms is the time of the request; without it, that of the last event. Histories must not be empty.
    """
    tails = [history[slice(max(0, len(history) - window), None)] for history in histories]
    timestamps = pad_rows([h.timestamps for h in tails], np.int64)
    mask = np.arange(timestamps.shape[1]) < np.array([len(h) for h in tails])[:, None]
    asked = np.array([h.timestamps[-1] for h in tails]) if now is None else now
    return Batch(
        items=torch.from_numpy(pad_rows([h.items for h in tails], np.int64)),
        actions=torch.from_numpy(pad_rows([h.actions for h in tails], np.int64)),
        ratings=torch.from_numpy(pad_rows([h.ratings for h in tails], np.float32, np.nan)),
        timestamps=torch.from_numpy(timestamps),
        mask=torch.from_numpy(mask),
        offset=torch.tensor([len(h) - len(t) for h, t in zip(histories, tails, strict=True)]),
        now=torch.from_numpy(np.broadcast_to(asked[:, None], timestamps.shape).astype(np.int64)),
        targets=torch.full(timestamps.shape, -1),
    )
