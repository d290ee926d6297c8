"""Prequential replay of a temporal split: ask about every later event in time order, score the answer, then reveal it.

A test right after the cut says how good a frozen model is; people who use a recommender live are served one that has
seen what they just did. The replay measures both on the same events: `frozen` reveals nothing after the cut, `history`
reveals a user's own events one by one, `live` also lets the scorer count everybody's events as they come.

Arrays in, arrays out; no files, no Ray. After Dawid (1984) and Vinagre, Jorge & Gama (2014).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from springtide.evaluation.metrics import SEED, Estimate, interval, ratio_interval, resampled_means, user_metrics
from springtide.evaluation.ranking import FlatSequences, candidates, refuse_nan
from springtide.model.batch import History
from springtide.ranks import block_size, places

SESSION_GAP_MS = 30 * 60 * 1000  # a longer pause before an event begins a session
CHUNK = 256  # events revealed at once to a live scorer's counts: so many,
CHUNKS = 500  # or more of a long replay, as what it costs to tell grows with the catalogue

Ask = Callable[[Sequence[History], np.ndarray], np.ndarray]  # histories, now [B] int64 ms -> scores [B, I]


class Live(Protocol):
    """A scorer that goes on learning while it answers."""

    def score(self, histories: Sequence[History], now: np.ndarray) -> np.ndarray:
        """[B, I] scores; now: [B] int64 ms, the time of each request."""
        ...

    def observe(self, histories: Sequence[History], events: Sequence[History]) -> None:
        """Learn that events[i], in time order, followed histories[i] of the same user."""
        ...


@dataclass(frozen=True)
class Plan:
    """Which events happen, and which of them are asked about. Rows are those of `events`, in time order."""

    events: FlatSequences
    revealed: np.ndarray  # [E] every event of the part
    asked: np.ndarray  # [T] those that are predicted
    users: np.ndarray  # [T] their users
    begins: np.ndarray  # [U] a user's first row in the part; the next user's first row, if there is none
    cut: int  # int64 ms, the first moment after all before the part; the part's own, if there is nothing before
    skipped: int  # events of the users asked about that repeat an item of their history, which is no candidate
    eligible: int  # events of all users that could have been asked about
    exclude_seen: bool

    @property
    def chunk(self) -> int:
        """Events that are revealed at once."""
        return max(CHUNK, -(-len(self.revealed) // CHUNKS))

    @property
    def session_starts(self) -> np.ndarray:
        """[T] bool: is this the user's first event, or one after a pause of more than half an hour?"""
        events = self.events
        first = self.asked == events.offsets[self.users]
        return first | (events.timestamps[self.asked] - events.timestamps[self.asked - 1] > SESSION_GAP_MS)


def make_plan(events: FlatSequences, part: int, limit: int, exclude_seen: bool, seed: int = SEED) -> Plan | None:
    """The replay of a part, or None if it holds no event to predict.

    Equal times keep the order of the sequences. Above `limit` events to predict, whole users are drawn at random until
    it is reached (at least one): the first events in time would be those of other people.
    """
    users = events.users
    in_part = np.flatnonzero(events.parts == part)
    revealed = in_part[np.argsort(events.timestamps[in_part], kind="stable")]
    begins = events.offsets[1:].copy()
    begins[users[in_part[::-1]]] = in_part[::-1]  # the first row stands

    wanted = revealed[events.targets[revealed]]
    repeats = _repeats(events)[wanted] if exclude_seen else np.zeros(len(wanted), dtype=bool)
    eligible = wanted[~repeats]
    if not len(eligible):
        return None
    chosen = _draw_users(users[eligible], len(events.user_ids), limit, seed)
    asked = eligible[chosen[users[eligible]]]
    before = events.timestamps[events.parts < part]
    cut = int(before.max() + 1 if before.size else events.timestamps[revealed[0]])
    skipped = int(chosen[users[wanted[repeats]]].sum())
    return Plan(events, revealed, asked, users[asked], begins, cut, skipped, len(eligible), exclude_seen)


def replay_frozen(plan: Plan, ask: Ask, batch_size: int = CHUNK) -> np.ndarray:
    """[T] the place of every event's item in the full ranking as of the cut, from 1; 0 = not a candidate."""
    ranks = np.zeros(len(plan.asked), dtype=np.int64)
    order = np.argsort(plan.users, kind="stable")  # a user's answer is the same all along, so it is asked for once
    for start, stop in _blocks(plan, len(order), batch_size):
        block = order[start:stop]
        users, which = np.unique(plan.users[block], return_inverse=True)
        now = np.full(len(users), plan.cut, dtype=np.int64)
        ranks[block] = _ask(plan, ask, users, plan.begins[users], now, plan.asked[block], which)
    return ranks


def replay_history(plan: Plan, ask: Ask, batch_size: int = CHUNK) -> np.ndarray:
    """[T] likewise, asked at the moment of the event and with everything that the user did before it."""
    ranks = np.zeros(len(plan.asked), dtype=np.int64)
    for start, stop in _blocks(plan, len(ranks), batch_size):
        ranks[start:stop] = _ask_at(plan, ask, plan.users[start:stop], plan.asked[start:stop])
    return ranks


def replay_live(plan: Plan, live: Live, chunk: int | None = None) -> np.ndarray:
    """[T] as `replay_history`, with `live.observe` told of everybody's events after every chunk.

    A user's own history is exact at every event; what `live` counts is at most one chunk old. chunk: events, absent:
    the plan's.
    """
    chunk = chunk or plan.chunk
    events = plan.events
    is_asked = np.zeros(len(events.items), dtype=bool)
    is_asked[plan.asked] = True
    users = events.users[plan.revealed]
    ranks = np.zeros(len(events.items), dtype=np.int64)
    for start in range(0, len(plan.revealed), chunk):
        rows, owners = plan.revealed[start : start + chunk], users[start : start + chunk]
        scored, who = rows[is_asked[rows]], owners[is_asked[rows]]
        for first, last in _blocks(plan, len(scored), chunk):
            ranks[scored[first:last]] = _ask_at(plan, live.score, who[first:last], scored[first:last])
        # Within a user, time order is row order, so what a user did in this chunk lies in adjacent rows.
        active, counts = np.unique(owners, return_counts=True)
        begin = rows[np.lexsort((rows, owners))][np.cumsum(counts) - counts]
        live.observe(
            [events.history(int(u), int(b)) for u, b in zip(active, begin, strict=True)],
            [events.between(int(b), int(b + n)) for b, n in zip(begin, counts, strict=True)],
        )
    return ranks[plan.asked]


def describe(plan: Plan) -> dict[str, Any]:
    """The plan in numbers."""
    return {
        "events": len(plan.asked),
        "eligible_events": plan.eligible,
        "users": len(np.unique(plan.users)),
        "skipped_repeats": plan.skipped,
        "revealed_events": len(plan.revealed),
        "chunk": plan.chunk,
        "session_gap_minutes": SESSION_GAP_MS // 60_000,
    }


def summarise(plan: Plan, ranks: Mapping[str, np.ndarray], resamples: int) -> dict[str, Any]:
    """Figures of several replays of one plan, with intervals over users.

    ranks: name -> [T]. A figure is the mean over events; the bootstrap draws users with all their events, the same ones
    for every name, so ratios are paired. Returns {"all" | "session_start" | "within_session": {"events", "modes":
    {name: {"ndcg@10", "hr@10", "user_mean_ndcg@10"}}, "ratios": {"b/a": estimate or None}}}; the ratios are those of
    every name to each one before it, of NDCG@10. A subset without events is left out.
    """
    starts = plan.session_starts
    subsets = {"all": np.ones(len(starts), dtype=bool), "session_start": starts, "within_session": ~starts}
    _, owner = np.unique(plan.users, return_inverse=True)
    people = int(owner.max()) + 1
    values = {name: user_metrics(found, [10]) for name, found in ranks.items()}
    out: dict[str, Any] = {}
    for subset, mask in subsets.items():
        if not mask.any():
            continue

        def sums(weights: np.ndarray, mask: np.ndarray = mask) -> np.ndarray:
            return np.bincount(owner[mask], weights=weights[mask], minlength=people)

        counts = sums(np.ones(len(mask)))
        keys = [(name, key) for name in ranks for key in ("ndcg@10", "hr@10")]
        table = np.column_stack([counts, *(sums(values[name][key]) for name, key in keys)])
        samples = resampled_means(table, resamples)
        # A resample without a single event of the subset has no mean; few users can draw one.
        samples = samples[samples[:, 0] > 0]
        modes: dict[str, dict[str, Any]] = {name: {} for name in ranks}
        for column, (name, key) in enumerate(keys, start=1):
            mean = Estimate(float(table[:, column].sum() / counts.sum()), *interval(samples[:, column] / samples[:, 0]))
            modes[name][key] = _json(mean)
            if key == "ndcg@10":
                by_user = table[counts > 0, column] / counts[counts > 0]
                modes[name]["user_mean_ndcg@10"] = {"value": float(by_user.mean())}
        column_of = {name: 1 + keys.index((name, "ndcg@10")) for name in ranks}
        names = list(ranks)
        ratios = {
            f"{b}/{a}": _ratio(table[:, column_of[a]], table[:, column_of[b]], samples[:, [column_of[a], column_of[b]]])
            for place, b in enumerate(names) for a in names[:place]
        }  # fmt: skip
        out[subset] = {"events": int(mask.sum()), "modes": modes, "ratios": ratios}
    return out


def _blocks(plan: Plan, count: int, batch_size: int) -> Iterator[tuple[int, int]]:
    step = block_size(batch_size, plan.events.catalogue)
    return ((start, min(start + step, count)) for start in range(0, count, step))


def _ask_at(plan: Plan, ask: Ask, users: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Places of the items of `rows` [B], asked for just before they happen."""
    return _ask(plan, ask, users, rows, plan.events.timestamps[rows], rows, np.arange(len(rows)))


def _ask(
    plan: Plan, ask: Ask, users: np.ndarray, ends: np.ndarray, now: np.ndarray, rows: np.ndarray, which: np.ndarray
) -> np.ndarray:
    """Places of the items of `rows` [B] given requests (user, end of history, now) [R]; which: [B] their requests."""
    histories = [plan.events.history(int(user), int(end)) for user, end in zip(users, ends, strict=True)]
    scores = candidates(ask(histories, now), histories, plan.exclude_seen)
    refuse_nan(scores, plan.events, users)
    return places(scores[which], plan.events.items[rows])


def _repeats(events: FlatSequences) -> np.ndarray:
    """[N] bool: the user took the item before."""
    pairs = events.users * events.catalogue + events.items
    _, first = np.unique(pairs, return_index=True)
    again = np.ones(len(pairs), dtype=bool)
    again[first] = False
    return again


def _draw_users(owners: np.ndarray, users: int, limit: int, seed: int) -> np.ndarray:
    """[users] bool: whose events are asked about, given the owner of each event: at most `limit` events.

    Users are drawn at random, and who has more events than are left is passed over; if all have, the lightest is taken.
    """
    counts = np.bincount(owners, minlength=users)
    order = np.random.default_rng(seed).permutation(users)
    order = order[counts[order] > 0]
    chosen = np.zeros(users, dtype=bool)
    for user, count in zip(order.tolist(), counts[order].tolist(), strict=True):
        if count <= limit:
            chosen[user] = True
            limit -= count
    if len(order) and not chosen.any():
        chosen[order[counts[order].argmin()]] = True
    return chosen


def _ratio(a: np.ndarray, b: np.ndarray, samples: np.ndarray) -> dict[str, float] | None:
    bounds = ratio_interval(samples[:, 0], samples[:, 1]) if a.sum() else None
    return _json(Estimate(float(b.sum() / a.sum()), *bounds)) if bounds else None


def _json(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "lo": estimate.low, "hi": estimate.high}
