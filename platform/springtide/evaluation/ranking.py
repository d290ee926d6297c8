"""Who is asked, and what they are recommended: evaluation cases out of the sequences, and full-catalogue ranking.

For the part `valid` a user's history is their training events; for `test` it is training and validation events. The
target is the first event of the part that may be predicted. Nothing at or after the part's first event, not even its
time, is shown to a scorer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from springtide.errors import SpringtideError
from springtide.model.answers import Scores
from springtide.model.batch import History, after_all
from springtide.model.recommender import Recommender
from springtide.ranks import block_size, hide, places, top_k
from springtide.schemas import SEQUENCES, TRAIN, check_schema

WARM, COLD_USER, COLD_ITEM = "warm", "cold_user", "cold_item"
LEAST_WARM = 0.1  # share of the users that must be warm for the headline to be about them alone

Score = Callable[[Sequence[History]], np.ndarray]  # histories -> [B, I] scores, -inf where never to be recommended


@dataclass(frozen=True)
class FlatSequences:
    """The sequences table as flat arrays: user u's events are rows offsets[u]:offsets[u + 1], oldest first."""

    user_ids: pa.Array  # [U], ascending, so that figures do not depend on how the table was sharded
    offsets: np.ndarray  # [U + 1] int64
    items: np.ndarray  # [N] int64 catalogue rows; the rest likewise [N]
    actions: np.ndarray
    ratings: np.ndarray
    timestamps: np.ndarray
    parts: np.ndarray
    targets: np.ndarray  # bool: may this event be predicted?
    catalogue: int  # number of items, I

    @property
    def users(self) -> np.ndarray:
        """[N] the user number of every event."""
        return np.repeat(np.arange(len(self.user_ids)), np.diff(self.offsets))

    def history(self, user: int, end: int) -> History:
        """A user's events before row `end`."""
        return self.between(int(self.offsets[user]), end)

    def between(self, start: int, end: int) -> History:
        """The events in rows start:end, all of one user."""
        rows = slice(start, end)
        return History(self.items[rows], self.actions[rows], self.ratings[rows], self.timestamps[rows])

    def fitted(self, last: int) -> np.ndarray:
        """[I] int64 events of each item in the parts up to `last`."""
        return np.bincount(self.items[self.parts <= last], minlength=self.catalogue)


@dataclass(frozen=True)
class Cases:
    """One question per user of a part, in ascending order of user id."""

    events: FlatSequences
    users: np.ndarray  # [C] user numbers
    ends: np.ndarray  # [C] the history is rows offsets[user]:end
    rows: np.ndarray  # [C] row of the first target in the part
    targets: np.ndarray  # [C] catalogue row of the first target in the part
    all_targets: np.ndarray  # every target in the part, case after case
    all_offsets: np.ndarray  # [C + 1] where each case's targets lie in `all_targets`
    slices: np.ndarray  # [C] of WARM, COLD_USER, COLD_ITEM
    new_items: np.ndarray  # [C] bool: nothing that was fitted has an event of the target
    fitted: int  # the last part that was fitted

    def __len__(self) -> int:
        return len(self.users)

    @property
    def lengths(self) -> np.ndarray:
        """[C] number of history events."""
        return self.ends - self.events.offsets[self.users]

    def history(self, case: int) -> History:
        return self.events.history(int(self.users[case]), int(self.ends[case]))

    def histories(self, start: int = 0, stop: int | None = None) -> list[History]:
        return [self.history(case) for case in range(start, len(self) if stop is None else min(stop, len(self)))]

    def take(self, cases: np.ndarray) -> Cases:
        """The cases with these numbers, in this order."""
        counts = np.diff(self.all_offsets)[cases]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        rows = np.arange(offsets[-1]) + np.repeat(self.all_offsets[:-1][cases] - offsets[:-1], counts)
        return Cases(
            self.events, self.users[cases], self.ends[cases], self.rows[cases], self.targets[cases],
            self.all_targets[rows], offsets, self.slices[cases], self.new_items[cases], self.fitted,
        )  # fmt: skip


@dataclass(frozen=True)
class Ranking:
    """What one scorer recommends to every case."""

    ranks: np.ndarray  # [C] int64: place of the target in the list from 1, 0 = not in it
    lists: np.ndarray  # [C, K] int64 catalogue rows, best first, -1 = no more


def asked_at(histories: Sequence[History], split: str, log_end: int | None) -> np.ndarray:
    """[B] int64 ms: when a model is asked for what comes after these histories, as validation and the baselines are.

    Under `temporal` all are asked at once, when the log that it knows has ended (log_end: ms); else each with their
    last event.
    """
    if split == "temporal":
        return after_all(histories, log_end or 0)
    return np.array([history.timestamps[-1] if len(history) else 0 for history in histories], np.int64)


def ask_model(recommender: Recommender, histories: Sequence[History], split: str) -> Scores:
    """A model's scores [B, I] of what comes after each history, and its gate; see `asked_at`."""
    return recommender.score(histories, now=asked_at(histories, split, recommender.log_end))


def flatten(sequences: pa.Table, catalogue: int) -> FlatSequences:
    """Flat arrays of a table of the schema SEQUENCES, users in ascending order of id.

    Raises SpringtideError for another schema, or for items outside the catalogue of that many items.
    """
    table = check_schema(sequences, SEQUENCES, "the sequences table").sort_by("user_id").combine_chunks()
    columns = {name: _chunk(table[name]) for name in table.column_names}
    lengths = np.asarray(pc.list_value_length(columns["items"]), dtype=np.int64)

    def flat(name: str, dtype: type) -> np.ndarray:
        values = columns[name].flatten().to_numpy(zero_copy_only=False)
        return values.astype(dtype, copy=False)

    items = flat("items", np.int64)
    if items.size and not 0 <= items.min() <= items.max() < catalogue:
        raise SpringtideError(f"the sequences name items outside the catalogue of {catalogue}; run prepare again")
    return FlatSequences(
        user_ids=columns["user_id"],
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=items,
        actions=flat("actions", np.int64),
        ratings=flat("ratings", np.float32),
        timestamps=flat("timestamps", np.int64),
        parts=flat("parts", np.int8),
        targets=flat("targets", np.bool_),
        catalogue=catalogue,
    )


def build_cases(events: FlatSequences, part: int, split: str, fitted: int = TRAIN) -> Cases:
    """The cases of a part (schemas.VALID or TEST). fitted: the last part that what is judged has learned from.

    Slices tell cases apart under the split `temporal` only: `cold_user` has no training event, else `cold_item` if the
    target has none, else `warm`. A user without a target in the part is no case.
    """
    users = events.users
    wanted = np.flatnonzero((events.parts == part) & events.targets)
    asked, first, counts = np.unique(users[wanted], return_index=True, return_counts=True)
    later = np.flatnonzero(events.parts >= part)
    known, first_later = np.unique(users[later], return_index=True)
    ends = later[first_later][np.searchsorted(known, asked)]
    targets = events.items[wanted[first]]

    in_train = events.parts == TRAIN
    new_items = events.fitted(fitted)[targets] == 0
    slices = np.full(len(asked), WARM, dtype="<U9")
    if split == "temporal":
        slices[~np.isin(targets, np.unique(events.items[in_train]))] = COLD_ITEM
        slices[~np.isin(asked, np.unique(users[in_train]))] = COLD_USER
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return Cases(events, asked, ends, wanted[first], targets, events.items[wanted], offsets, slices, new_items, fitted)


def headline_mask(cases: Cases) -> tuple[np.ndarray, str]:
    """Which cases [C] the headline figures are about, and their name: `warm`, or `all` if hardly any user is warm."""
    warm = cases.slices == WARM
    return (warm, WARM) if warm.sum() > LEAST_WARM * len(cases) else (np.ones(len(cases), dtype=bool), "all")


def repeated_targets(cases: Cases) -> int:
    """How many targets are already in their history: under exclude_seen they can only be missed."""
    lengths = cases.lengths
    owner = np.repeat(np.arange(len(cases)), lengths)
    first = cases.events.offsets[cases.users]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], lengths)
    return len(np.unique(owner[cases.events.items[rows] == cases.targets[owner]]))


def rank_cases(cases: Cases, score: Score, *, depth: int, exclude_seen: bool, batch_size: int) -> Ranking:
    """Recommend `depth` items of the whole catalogue to every case. Equal scores rank by catalogue row.

    Raises SpringtideError if a scorer answers NaN.
    """
    ranks = np.zeros(len(cases), dtype=np.int64)
    lists = np.full((len(cases), depth), -1, dtype=np.int64)
    for start, scores in _scored(cases, score, exclude_seen, batch_size):
        best = top_k(scores, depth)
        stop = start + len(scores)
        lists[start:stop, : best.shape[1]] = best
        hit = best == cases.targets[start:stop, None]
        ranks[start:stop] = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0)
    return Ranking(ranks, lists)


def target_ranks(cases: Cases, score: Score, *, exclude_seen: bool, batch_size: int) -> np.ndarray:
    """[C] the target's place among the whole catalogue (0: excluded); cheaper than lists when only ranks are wanted."""
    ranks = np.zeros(len(cases), dtype=np.int64)
    for start, scores in _scored(cases, score, exclude_seen, batch_size):
        ranks[start : start + len(scores)] = places(scores, cases.targets[start : start + len(scores)])
    return ranks


def candidates(scores: np.ndarray, histories: Sequence[History], exclude_seen: bool) -> np.ndarray:
    """A copy of scores [B, I] as float32, with the items of each history at -inf if seen items are left out."""
    out = np.array(scores, dtype=np.float32, order="C")
    if exclude_seen:
        hide(out, [history.items for history in histories])
    return out


def restricted(score: Score, kept: np.ndarray) -> Score:
    """The scorer with the items outside `kept` [I] bool never recommended."""

    def scored(histories: Sequence[History]) -> np.ndarray:
        return np.where(kept, score(histories), np.float32(-np.inf))

    return scored


def _scored(cases: Cases, score: Score, exclude_seen: bool, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first case, scores [B, I] float32 with seen items at -inf) batch by batch."""
    step = block_size(batch_size, cases.events.catalogue)
    for start in range(0, len(cases), step):
        histories = cases.histories(start, start + step)
        scores = candidates(score(histories), histories, exclude_seen)
        refuse_nan(scores, cases.events, cases.users[start : start + step])
        yield start, scores


def refuse_nan(scores: np.ndarray, events: FlatSequences, users: np.ndarray) -> None:
    """Raise SpringtideError that names the first of these users [B] whose scores [B, I] hold NaN."""
    wrong = np.flatnonzero(np.isnan(scores).any(axis=1))
    if wrong.size:
        user = events.user_ids[int(users[wrong[0]])]
        raise SpringtideError(f"the scores of user {user} hold NaN and cannot be ranked; train the model again")


def _chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
