"""How each scorer is called and drawn, the same in the terminal, in every table and in every plot.

Kin share a hue and differ in lightness: a counting model and its recency variant. All pairs were chosen to stay apart
with red, green or blue blindness too, and dashes tell lines apart where colours cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LineStyle = str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Series:
    label: str
    short: str
    light: str  # colour on a light page, at least 3 : 1 against white
    dark: str  # and on a dark one
    dash: LineStyle = "-"


SERIES = {
    "model": Series("Springtide model", "Model", "#2f6bf2", "#4a80ff"),
    "transitions": Series("Transition counts", "Transitions", "#d06c0c", "#e97f11", "--"),
    "item_knn_recency": Series("Item-KNN, recency", "KNN, recency", "#00a05c", "#00a862", "-."),
    "item_knn": Series("Item-KNN", "Item-KNN", "#0a5f3b", "#6cf5b6", (0, (5, 1))),
    "ease": Series("EASE", "EASE", "#ad63c0", "#e9a6f9", (0, (1, 1))),
    "recent_popularity": Series("Recent popularity", "Recent pop.", "#2a2e38", "#6d7178", (0, (6, 2, 1, 2, 1, 2))),
    "popularity": Series("Popularity", "Popularity", "#828d97", "#dce0eb", ":"),
}
OTHER = Series("", "", "#7a6a00", "#d8c247", (0, (8, 2)))  # a scorer of another name


def style_of(name: str) -> Series:
    return SERIES.get(name, OTHER)


def label_of(name: str) -> str:
    return style_of(name).label or name.replace("_", " ")


def short_of(name: str) -> str:
    return style_of(name).short or name.replace("_", " ")


def css_of(name: str) -> str:
    """The name of the page's colour variable of a scorer."""
    return f"--{name.replace('_', '-')}" if name in SERIES else "--other"


def from_best(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Scorer -> its figures: the model, then the baselines from best to worst."""
    order = sorted(metrics["baselines"], key=lambda name: -metrics["baselines"][name]["ndcg@10"]["value"])
    return {"model": metrics["model"], **{name: metrics["baselines"][name] for name in order}}


def leading(scorers: Iterable[str], most: int = 4) -> list[str]:
    """The scorers that a plot of lines shows: the model and the best baselines; more would hide one another."""
    return list(scorers)[:most]
