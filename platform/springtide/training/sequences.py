"""A worker's share of the histories as flat arrays: training windows, batches and validation cases.

Every training position of a window is a target; prefixes are never materialised. Batches are cut out with one gather.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from springtide.config import ModelConfig
from springtide.model.batch import Batch, History, pad_rows
from springtide.schemas import TRAIN, VALID
from springtide.training.own_counts import own_counts
from springtide.training.sampling import Sampling, Since, crop, disturb

OWNED = 4_000_000  # most padded places of what the owners of a batch took
BUCKET = 1024  # windows that are sorted by length together


@dataclass(frozen=True)
class Sequences:
    """Histories of U users laid end to end: E events in all."""

    items: np.ndarray  # [E] int64
    actions: np.ndarray  # [E] int64
    ratings: np.ndarray  # [E] float32
    timestamps: np.ndarray  # [E] int64
    targets: np.ndarray  # [E] bool, may be predicted
    start: np.ndarray  # [U] first event of each user
    train_end: np.ndarray  # [U] one past the last training event
    valid_target: np.ndarray  # [U] the event to predict in validation, -1 = none
    # See own_counts.py; empty: not counted, and every target's own transitions are told by distance.
    own_row: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [E]
    own: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.float32))  # [R, J]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in vars(self).values())

    def history(self, user: int, end: int) -> History:
        """A user's events before flat position `end`."""
        part = slice(int(self.start[user]), end)
        return History(self.items[part], self.actions[part], self.ratings[part], self.timestamps[part])


def from_table(table: pa.Table, holdout_share: float, refit: bool = False) -> Sequences:
    """Flatten a SEQUENCES table, users in user_id order so that the order of arrival does not matter.

    holdout_share: where the validation part asks nobody with a history, this share of the users with 3 targets or more
    (chosen by a hash of the id) has its last training target held out. 0 = none. refit: validation events are training
    events too, and nothing is held out.
    """
    table = table.combine_chunks().sort_by("user_id")
    lengths = pa.compute.list_value_length(table["items"]).to_numpy().astype(np.int64)
    start = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) if len(lengths) else np.zeros(0, np.int64)

    def flat(name: str, dtype: type[np.generic]) -> np.ndarray:
        return pa.compute.list_flatten(table[name]).to_numpy(zero_copy_only=False).astype(dtype)

    parts, targets = flat("parts", np.int8), flat("targets", np.bool_)
    if refit:
        parts, holdout_share = np.where(parts == VALID, np.int8(TRAIN), parts), 0.0
    user = np.repeat(np.arange(len(lengths)), lengths)
    train_end = start + np.bincount(user[parts == TRAIN], minlength=len(lengths))
    valid_target = np.full(len(lengths), -1, np.int64)
    places = np.flatnonzero((parts == VALID) & targets)
    valid_target[user[places[::-1]]] = places[::-1]  # the first one stands
    if holdout_share:
        for row, user_id in enumerate(table["user_id"].to_pylist()):
            if zlib.crc32(b"holdout:" + user_id.encode()) % 10_000 < holdout_share * 10_000:
                own = np.flatnonzero(targets[start[row] : train_end[row]])
                if len(own) >= 3:
                    valid_target[row] = train_end[row] = start[row] + own[-1]
    return Sequences(
        flat("items", np.int64), flat("actions", np.int64), flat("ratings", np.float32), flat("timestamps", np.int64),
        targets, start, train_end, valid_target,
    )  # fmt: skip


def concatenate(parts: list[Sequences]) -> Sequences:
    """Several blocks of whole users as one."""
    shifts = np.concatenate([[0], np.cumsum([len(p.items) for p in parts])[:-1]])
    width = max(p.own.shape[1] * bool(len(p.own)) for p in parts)
    if width:
        parts = [p if len(p.own) else _none_of_own(p, width) for p in parts]
    joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in vars(parts[0])}
    counted = np.cumsum([0, *(len(p.own) for p in parts[:-1])])
    joined["own_row"] = np.concatenate(
        [np.where(p.own_row >= 0, p.own_row + begin, -1) for p, begin in zip(parts, counted, strict=True)]
    )
    for name in ("start", "train_end"):
        joined[name] = np.concatenate([getattr(p, name) + shift for p, shift in zip(parts, shifts, strict=True)])
    joined["valid_target"] = np.concatenate(
        [np.where(p.valid_target >= 0, p.valid_target + shift, -1) for p, shift in zip(parts, shifts, strict=True)]
    )
    return Sequences(**joined)


def _none_of_own(sequences: Sequences, width: int) -> Sequences:
    """The same, said in full: no event has own counts."""
    return replace(sequences, own_row=np.full(len(sequences.items), -1, np.int64), own=np.zeros((0, width), np.float32))


def with_own_counts(sequences: Sequences, config: ModelConfig) -> Sequences:
    """The same with what has to leave the transition counts where items come more than once."""
    if not config.memory:
        return sequences
    lengths = np.diff(np.append(sequences.start, len(sequences.items)))
    users = np.repeat(np.arange(len(lengths)), lengths)
    trained = np.arange(len(users)) < sequences.train_end[users]
    row, own = own_counts(
        sequences.items, users, sequences.targets & trained,
        config.memory_distances, config.memory_decay, config.memory_recent,
    )  # fmt: skip
    return replace(sequences, own_row=row, own=own) if len(own) else sequences


def training_windows(sequences: Sequences, length: int) -> np.ndarray:
    """[W, 3] int64 (first event, one past the last input, events of the user before it).

    A user's training events are cut from the newest backwards into windows of `length` inputs; each event but the
    user's first is the target of exactly one window.
    """
    inputs = np.maximum(sequences.train_end - sequences.start - 1, 0)  # the last training event is target only
    pieces = -(-inputs // length)
    user = np.repeat(np.arange(len(inputs)), pieces)
    back = np.arange(len(user)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # 0 = the newest window
    end = (sequences.train_end - 1)[user] - back * length
    first = np.maximum(end - length, sequences.start[user])
    return np.stack([first, end, first - sequences.start[user]], 1)


def training_batch(sequences: Sequences, windows: np.ndarray, ahead: int = 0) -> Batch:
    """Gather windows [B, 3] into padded tensors; targets are the events one step later.

    ahead: how many more of the owner's training targets after each window the batch knows, for what to hold out.
    """
    first, end, offset = windows.T
    place = first[:, None] + np.arange(int((end - first).max()))  # [B, L]
    mask = place < end[:, None]
    place = np.where(mask, place, first[:, None])
    wanted = mask & sequences.targets[place + 1]

    def gather(array: np.ndarray, fill: float) -> torch.Tensor:
        return torch.from_numpy(np.where(mask, array[place], np.array(fill, array.dtype)))

    users = np.searchsorted(sequences.start, first, side="right") - 1
    owned, owned_at, owned_place = _owned(sequences, users)
    later = first[:, None] + 1 + np.arange(mask.shape[1] + ahead)
    trained = later < sequences.train_end[users][:, None]
    later = np.where(trained, later, first[:, None])
    own = None
    if len(sequences.own):
        row = np.where(wanted, sequences.own_row[place + 1], -1)
        own = torch.from_numpy(np.where(row[..., None] >= 0, sequences.own[row], np.float32(np.nan)))
    return Batch(
        items=gather(sequences.items, 0),
        actions=gather(sequences.actions, 0),
        ratings=gather(sequences.ratings, np.nan),
        timestamps=gather(sequences.timestamps, 0),
        mask=torch.from_numpy(mask),
        offset=torch.from_numpy(offset),
        now=torch.from_numpy(np.where(mask, sequences.timestamps[place + 1], 0)),
        targets=torch.from_numpy(np.where(wanted, sequences.items[place + 1], -1)),
        after=torch.from_numpy(np.where(trained & sequences.targets[later], sequences.items[later], -1)),
        own=own,
        target_ratings=torch.from_numpy(np.where(wanted, sequences.ratings[place + 1], np.float32(np.nan))),
        owned=torch.from_numpy(owned),
        owned_at=torch.from_numpy(owned_at),
        owned_place=torch.from_numpy(owned_place - first[:, None]),
    )


def _owned(sequences: Sequences, users: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each user's training targets, once each, when last taken, as in Statistics.taken, and where: [B, K], -1 = pad."""
    rows, places = [], []
    owners, which = np.unique(users, return_inverse=True)  # a heavy user has many windows
    for user in owners:
        part = slice(int(sequences.start[user]), int(sequences.train_end[user]))
        wanted = np.flatnonzero(sequences.targets[part])[::-1] + part.start
        items, first = np.unique(sequences.items[wanted], return_index=True)
        rows.append(items)
        places.append(wanted[first])
    place = pad_rows(places, np.int64, -1)[which]
    return pad_rows(rows, np.int64, -1)[which], np.where(place >= 0, sequences.timestamps[place], 0), place


def epoch_batches(sequences: Sequences, sampling: Sampling, seed: tuple[int, ...]) -> Iterator[Batch]:
    """All training windows once, in an order drawn from `seed`, cut into batches of about equal size.

    Windows of like length share a batch, as far as BUCKET random windows allow: padding costs as much as events do.
    """
    rng = np.random.default_rng(seed)
    windows = training_windows(sequences, sampling.length)
    if sampling.since is not None:
        windows = windows[new_since(sequences, windows[:, 1], sampling.since)]  # the last target of each
    windows = crop(windows[rng.permutation(len(windows))], sampling.crop, rng)
    sizes = windows[:, 1] - windows[:, 0]
    order = np.lexsort((sizes, np.arange(len(windows)) // BUCKET))
    owner = np.searchsorted(sequences.start, windows[order, 0], side="right") - 1
    batches = list(_cut(sizes[order], (sequences.train_end - sequences.start)[owner], sampling))
    for number in rng.permutation(len(batches)):
        yield disturb(training_batch(sequences, windows[order[slice(*batches[number])]], sampling.ahead), sampling, rng)


def _cut(sizes: np.ndarray, owned: np.ndarray, sampling: Sampling) -> Iterator[tuple[int, int]]:
    """(begin, end) of batches with at most so many windows and padded events, each with one window or more.

    owned: [W] events of each window's owner; all that owners took is padded as well, so a heavy user shares a batch
    with few.
    """
    begin = 0
    while begin < len(sizes):
        some = slice(begin, begin + sampling.sequences)
        rows = np.arange(1, len(sizes[some]) + 1)
        area = np.maximum.accumulate(sizes[some]) * rows
        too_many = (area > sampling.positions) | (np.maximum.accumulate(owned[some]) * rows > OWNED)
        end = begin + max(1, int(too_many.argmax()) if too_many.any() else len(rows))
        yield begin, end
        begin = end


def new_since(sequences: Sequences, events: np.ndarray, since: Since) -> np.ndarray:
    """[N] bool of flat positions [N]: was each event unknown then, because of its time or because it was held out?

    Held out were the last events of a history as it was then, which times tell but for what came after all training.
    """
    ends = np.append(sequences.start[1:], len(sequences.items))
    user = np.searchsorted(sequences.start, events, side="right") - 1
    last = np.minimum(events + since.held_out, ends[user] - 1)  # held out then, if this one is of later
    new: np.ndarray = sequences.timestamps[last] > since.time
    return new


def count_new(path: Path, since: Since) -> int:
    """How many targets of a Parquet file of sequences, validation events among them, are new since then."""
    sequences = from_table(pq.read_table(path), 0, refit=True)
    ends = np.append(sequences.start[1:], len(sequences.items))
    trained = np.arange(len(sequences.items)) < np.repeat(sequences.train_end, ends - sequences.start)
    first = np.isin(np.arange(len(sequences.items)), sequences.start)
    events = np.flatnonzero(trained & sequences.targets & ~first)
    return int(new_since(sequences, events, since).sum())


def validation_cases(sequences: Sequences, limit: int) -> list[tuple[History, int]]:
    """(training events, first item to predict after them) of at most `limit` users, as evaluation's part `valid`."""
    return [
        (sequences.history(u, int(sequences.train_end[u])), int(sequences.items[sequences.valid_target[u]]))
        for u in validated_users(sequences, limit)
    ]


def validated_users(sequences: Sequences, limit: int) -> np.ndarray:
    """Rows of at most `limit` users of `validation_cases`, ascending; of more, the same ones are drawn every time.

    Not the first, for they stand by their ids, which often tell how long somebody has been there.
    """
    users = np.flatnonzero((sequences.valid_target >= 0) & (sequences.train_end > sequences.start))
    if len(users) <= limit:
        return users
    return np.sort(np.random.default_rng(0).permutation(users)[:limit])
