"""Choosing k items of an answer among the best: caps, diversity and exploration in one pass from rank 1 down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from springtide.serving.policies import Caps, Exploration, generator

# (rows that may not come again [n] int64, how many) -> the best of the others: rows [C] int64, scores [C], best first
Draw = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
CANDIDATES_PER_ITEM = 4  # that diversity and caps choose each item from


@dataclass(frozen=True)
class Rules:
    """How one request chooses."""

    k: int
    diversity: float = 0.0
    caps: Caps = Caps()
    exploration: Exploration = Exploration()

    @property
    def plain(self) -> bool:
        """The best k and nothing else."""
        return not (self.diversity or self.capped or self.exploring)

    @property
    def capped(self) -> bool:
        return self.caps.per_category is not None or bool(self.caps.categories)

    @property
    def exploring(self) -> bool:
        return self.exploration.kind != "off"

    @property
    def candidates(self) -> int:
        """How many of the best rows are wanted at first."""
        several = CANDIDATES_PER_ITEM if self.diversity or self.capped else 1
        return max(self.k * several, self.exploration.candidates if self.exploring else 0)


@dataclass
class Chosen:
    """An answer in the making, in order of choice."""

    rows: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    # Of each item at its rank, given those above it; their product is that of the list. 1 without exploration.
    propensities: list[float] = field(default_factory=list)

    def sorted_by_score(self) -> Chosen:
        order = np.lexsort((np.asarray(self.rows), -np.asarray(self.scores)))
        return Chosen(*([values[i] for i in order] for values in (self.rows, self.scores, self.propensities)))


@dataclass
class Room:
    """What the caps leave. rows_of: rows of a category; categories: of a row."""

    caps: Caps
    categories: Sequence[Sequence[str]]
    rows_of: Callable[[Iterable[str]], np.ndarray]
    taken: dict[str, int] = field(default_factory=dict)

    def take(self, row: int) -> bool:
        """Count a row in; True if one of its categories became full."""
        before = len(self.full())
        for category in set(self.categories[row]):
            self.taken[category] = self.taken.get(category, 0) + 1
        return len(self.full()) > before

    def full(self) -> set[str]:
        named, others = self.caps.categories, self.caps.per_category
        closed = {category for category, most in named.items() if self.taken.get(category, 0) >= most}
        if others is not None:
            closed |= {category for category, n in self.taken.items() if category not in named and n >= others}
        return closed

    def open(self, rows: np.ndarray) -> np.ndarray:
        """[C] bool: rows none of whose categories is full."""
        full = self.full()
        return np.fromiter((full.isdisjoint(self.categories[row]) for row in rows.tolist()), bool, len(rows))


def choose(
    draw: Draw,
    rules: Rules,
    vectors: np.ndarray,
    categories: Sequence[Sequence[str]],
    rows_of: Callable[[Iterable[str]], np.ndarray],
    chance: str | None = None,
) -> Chosen:
    """k distinct rows, or all that `draw` has if those are fewer; fewer too if strict caps leave no other item.

    vectors: [I, d] for diversity; categories: of each row; rows_of: all rows of some categories, for caps; chance:
    seeds exploration. In order of score, but for diversity and exploration, whose order of choice stays.
    """
    if rules.plain:
        rows, scores = draw(np.empty(0, np.int64), rules.k)
        return Chosen(rows.tolist(), scores.tolist(), [1.0] * len(rows))
    chosen, room = Chosen(), Room(rules.caps, categories, rows_of) if rules.capped else None
    rng = generator(chance)
    spread: float | None = None
    while len(chosen.rows) < rules.k:
        spent = np.asarray(chosen.rows, np.int64)
        rows, scores = draw(spent if room is None else np.concatenate([spent, rows_of(room.full())]), rules.candidates)
        if not len(rows):
            if room is None or rules.caps.strict:
                break
            room = None  # soft caps give way now that no other item is left
            continue
        if spread is None:
            spread = float(scores[0] - scores[-1]) or 1.0
        _choose_among(rows, scores, chosen, rules, vectors, room, spread, rng)
    return chosen if rules.diversity or rules.exploring else chosen.sorted_by_score()


def _choose_among(
    rows: np.ndarray,
    scores: np.ndarray,
    chosen: Chosen,
    rules: Rules,
    vectors: np.ndarray,
    room: Room | None,
    spread: float,
    rng: np.random.Generator,
) -> None:
    """Add to `chosen` until it has k items or no candidate [C] may be taken.

    Diversity is maximal marginal relevance (Carbonell and Goldstein, 1998) in units of score: an item is worth
    (1 - diversity) * score - diversity * spread * (greatest cosine to what is chosen).
    """
    free = np.ones(len(rows), bool)
    unit, nearest = np.zeros((0, 0)), np.zeros(len(rows))
    if rules.diversity:
        unit = _unit(vectors[rows])
        if chosen.rows:
            nearest = (unit @ _unit(vectors[chosen.rows]).T).max(1)
    while len(chosen.rows) < rules.k and free.any():
        value = (1 - rules.diversity) * scores - rules.diversity * spread * nearest
        place, propensity = pick(value, np.flatnonzero(free), rules.exploration, rng)
        free[place] = False
        if rules.diversity:
            cosine = unit @ unit[place]
            nearest = np.maximum(nearest, cosine) if chosen.rows else cosine
        chosen.rows.append(int(rows[place]))
        chosen.scores.append(float(scores[place]))
        chosen.propensities.append(propensity)
        if room is not None and room.take(int(rows[place])):
            free &= room.open(rows)


def pick(value: np.ndarray, free: np.ndarray, how: Exploration, rng: np.random.Generator) -> tuple[int, float]:
    """One of the places `free` [F] of value [C], and how likely it was."""
    best = int(value[free].argmax())
    if how.kind == "off":
        return int(free[best]), 1.0
    if how.kind == "softmax":
        odds = np.exp((value[free] - value[free[best]]) / how.temperature)
        odds = odds / odds.sum()
    else:
        odds = np.full(len(free), how.epsilon / len(free))
        odds[best] += 1 - how.epsilon
    reach = odds.cumsum()
    drawn = int(np.searchsorted(reach / reach[-1], rng.random(), side="right"))
    return int(free[drawn]), float(odds[drawn])


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit
