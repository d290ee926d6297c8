"""How often items were taken, where an event weighs half after a half-life: what is popular now."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TIES = 1e-6  # weight of all events where those of late say nothing


@dataclass(frozen=True)
class DecayedCounts:
    """Of I items, as they were at one moment. As time goes by all of them fade alike, in the end to 0."""

    counts: np.ndarray  # [I] float64
    moment: int  # ms
    half_life: float  # ms; inf = every event weighs alike

    def after(self, items: np.ndarray, times: np.ndarray) -> DecayedCounts:
        """With more events: catalogue rows and ms. The moment is that of the latest event, if it is later.

        Of a silence after the moment at most a half-life passes, for nothing is known of it: a model may be served long
        after its log ended, and where all counts had faded the first event would be all that is popular. An event that
        comes late, from within a silence that is over, is as old as its time says.
        """
        later = np.unique(times[times > self.moment])
        passed = np.minimum(np.diff(later, prepend=self.moment), self.half_life).cumsum()  # ms, at each
        now = passed[-1] if len(later) else 0.0
        since = (times - self.moment).astype(np.float64)
        since[times > self.moment] = passed[np.searchsorted(later, times[times > self.moment])]
        counts = self.counts * 0.5 ** (now / self.half_life)
        np.add.at(counts, items, 0.5 ** ((now - since) / self.half_life))
        return DecayedCounts(counts, int(times.max(initial=self.moment)), self.half_life)

    def grown(self, count: int) -> DecayedCounts:
        """With `count` more items that have no event."""
        return DecayedCounts(np.pad(self.counts, (0, count)), self.moment, self.half_life)


def popular_scores(counts: np.ndarray, events: np.ndarray) -> np.ndarray:
    """[I] float32 scores for whom nothing is known of: log(1 + decayed counts); of equals the one with more events.

    Long after the last event all counts have faded to nothing, and what was popular then is the best guess.
    """
    return (np.log1p(counts) + TIES * np.log1p(events)).astype(np.float32)


def decayed_table(
    items: np.ndarray, times: np.ndarray, catalogue: int, half_life: float, edges: np.ndarray
) -> np.ndarray:
    """[T, I] float64: the counts before each of `edges` [T] ms, ascending, of events (catalogue rows, ms)."""
    bucket = np.searchsorted(edges, times, side="right")  # an event at an edge is not before it
    before = bucket < len(edges)
    items, times, bucket = items[before], times[before], bucket[before]
    # Each bucket's events, weighed as they count at its own edge; then carried on from edge to edge.
    weight = 0.5 ** ((edges[bucket] - times) / half_life)
    flat = np.bincount(bucket * catalogue + items, weight, len(edges) * catalogue)
    table = flat.astype(np.float64, copy=False).reshape(len(edges), catalogue)
    for row in range(1, len(edges)):
        table[row] += table[row - 1] * 0.5 ** ((edges[row] - edges[row - 1]) / half_life)
    return table
