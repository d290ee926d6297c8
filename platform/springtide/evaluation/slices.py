"""NDCG@10 of every scorer for parts of the users: by history, by popularity of the target, by what the branches say.

Also items that training never saw, which only their text can rank. Arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from springtide.evaluation.metrics import mean_estimates, resampled_means, user_metrics
from springtide.evaluation.ranking import COLD_USER, Cases, Score, headline_mask, restricted, target_ranks
from springtide.model.batch import History


class Disagreeing(Protocol):
    """A model with two branches that may be after different things."""

    def disagreement(self, histories: Sequence[History]) -> np.ndarray:
        """[B] float32: 0 = both branches point the same way, 2 = opposite ways, NaN = nothing to go by."""
        ...


def by_history_length(cases: Cases, ndcg: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Quartiles of the number of history events, over the headline cases. ndcg: scorer -> [C]."""
    mask = headline_mask(cases)[0]
    return quartiles(cases.lengths[mask], _where(ndcg, mask))


def by_target_popularity(cases: Cases, ndcg: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Targets without an event that was fitted, then quartiles of the others' numbers of those. ndcg: scorer -> [C].

    Over all users who have a training event, so that cold items count under every split; over all users if none has.
    """
    known = cases.slices != COLD_USER
    known = known if known.any() else np.ones(len(cases), dtype=bool)
    counts = cases.events.fitted(cases.fitted)[cases.targets]
    new, seen = known & (counts == 0), known & (counts > 0)
    groups = quartiles(counts[new], _where(ndcg, new)) if new.any() else []
    return groups + (quartiles(counts[seen], _where(ndcg, seen)) if seen.any() else [])


def by_disagreement(
    cases: Cases, ndcg: Mapping[str, np.ndarray], model: Disagreeing, batch_size: int
) -> list[dict[str, Any]]:
    """Quartiles of the distance between the branches' interest vectors, over the headline cases with a history."""
    mask = headline_mask(cases)[0] & (cases.lengths > 0)
    distance = np.full(len(cases), np.nan)
    for start in range(0, len(cases), batch_size):
        distance[start : start + batch_size] = model.disagreement(cases.histories(start, start + batch_size))
    mask &= np.isfinite(distance)
    if not mask.any():
        return []
    return quartiles(distance[mask], _where(ndcg, mask))


def quartiles(values: np.ndarray, ndcg: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Mean of each scorer's figures in quartiles of values [U]; equal values stay together. ndcg: scorer -> [U]."""
    bounds = np.unique(np.quantile(values, [0.25, 0.5, 0.75], method="lower"))
    group = np.searchsorted(bounds, values, side="left")
    return [
        {"from": values[group == g].min().item(), "to": values[group == g].max().item(),
         "users": int((group == g).sum()),
         "ndcg@10": {name: float(figures[group == g].mean()) for name, figures in ndcg.items()}}
        for g in np.unique(group)
    ]  # fmt: skip


def new_items(
    cases: Cases, scorers: Mapping[str, Score], *, exclude_seen: bool, batch_size: int, resamples: int
) -> dict[str, Any] | None:
    """How targets without an event that was fitted are ranked: in the whole catalogue, and among such items alone.

    Returns {"targets", "candidates", "chance_hr@10", "scorers": {name: {"catalogue" | "new_only": {"hr@10",
    "ndcg@10"}}}} with intervals over users, or None if there is no such target. `chance_hr@10` is what a random order
    of the new items would reach among them.
    """
    asked = cases.take(np.flatnonzero(cases.new_items))
    if not len(asked):
        return None
    new = cases.events.fitted(cases.fitted) == 0
    names, columns = [], []
    for name, score in scorers.items():
        for kind, scorer in (("catalogue", score), ("new_only", restricted(score, new))):
            figures = user_metrics(target_ranks(asked, scorer, exclude_seen=exclude_seen, batch_size=batch_size), [10])
            for key in ("hr@10", "ndcg@10"):
                names.append((name, kind, key))
                columns.append(figures[key])
    table = np.column_stack(columns)
    out: dict[str, Any] = {name: {"catalogue": {}, "new_only": {}} for name in scorers}
    for (name, kind, key), estimate in zip(
        names, mean_estimates(table, resampled_means(table, resamples)), strict=True
    ):
        out[name][kind][key] = {"value": estimate.value, "lo": estimate.low, "hi": estimate.high}
    count = int(new.sum())
    return {"targets": len(asked), "candidates": count, "chance_hr@10": min(10, count) / count, "scorers": out}


def _where(ndcg: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[mask] for name, values in ndcg.items()}
