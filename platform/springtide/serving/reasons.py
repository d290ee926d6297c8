"""Reasons of one answer in the caller's terms: shares of each score, the past events behind it, and one sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from springtide.model.recommender import Interests, Reasons

Json = dict[str, Any]
BECAUSE = 3  # most past events told for an item
LONGEST_TITLE = 80  # characters of a title that a sentence quotes


def explain_items(
    reasons: Reasons,
    interests: Interests | None,
    event: Callable[[int], Json],
    taken: np.ndarray,
    adjusted: np.ndarray | None = None,
) -> list[Json]:
    """{shares, because, sentence} of each of N items.

    interests: of the same history, None without one; event: tells the event at a place of the history; taken: [N]
    whether anybody took the item, else what counts say of it is borrowed; adjusted: [N] what policies added to the
    scores, then the share `policy`.
    """
    shares = reasons.shares if adjusted is None else reasons.shares | {"policy": adjusted}
    fitting = {} if interests is None else _fitting(interests, event)
    out = []
    for column in range(reasons.through.shape[1]):
        own = {name: float(values[column]) for name, values in shares.items()}
        through = reasons.through[:, column]
        order = np.argsort(-through, kind="stable")[:BECAUSE]
        because = [{**event(int(i)), "weight": round(float(through[i]), 6)} for i in order if through[i] > 0]
        told = {name: round(value, 6) + 0.0 for name, value in own.items()}  # no -0.0
        out.append(
            {"shares": told, "because": because, "sentence": sentence(own, because, fitting, bool(taken[column]))}
        )
    return out


def sentence(shares: Mapping[str, float], because: list[Json], fitting: Mapping[str, Json], taken: bool = True) -> str:
    """One readable sentence on the greatest share.

    because: past events that the score came through, heaviest first; fitting: the event that weighs most in a branch,
    by the branch's share; taken: whether anybody took the item.
    """
    name = max((name for name in shares if name != "policy"), key=lambda name: shares[name])
    if shares[name] <= 0:
        return "It fits best among what is left."
    match name:
        case "query":
            return "It matches what you asked for."
        case "popularity":
            return "Many people take it." if taken else "It is new."
        case "memory" if because:
            what = "this too" if taken else "what is like this"
            return f"Because you took {_quoted(because[0])}, and people who did often take {what}."
        case "text" if because:
            return f"Because its description is close to that of {_quoted(because[0])}, which you took."
        case "short" if name in fitting:
            return f"It fits what you were after lately, above all {_quoted(fitting[name])}."
        case "long" if name in fitting:
            return f"It fits your lasting taste, above all {_quoted(fitting[name])}."
    return "It fits your taste."


def _fitting(interests: Interests, event: Callable[[int], Json]) -> dict[str, Json]:
    """The event that weighs most in each branch; none for a branch that is not there."""
    attention = {"long": interests.attention_long, "short": interests.attention_short}
    return {name: event(int(weights.argmax())) for name, weights in attention.items() if weights.max(initial=0) > 0}


def _quoted(event: Json) -> str:
    title = event["title"] or event["item_id"]
    return f'"{title}"' if len(title) <= LONGEST_TITLE else f'"{title[: LONGEST_TITLE - 1].rstrip()}…"'
