"""The best items of a large catalogue without scoring all of it: candidates from an index and counts, scored exactly.

Candidates of a request are what the index finds for the part of its scores that is a product, the items of which
transitions and neighbours of its history say most, those that borrow most from these, and whatever the index does not
know as it is now. Scores are exact; only an item that is no candidate can be missed. How many are is measured when a
bundle is written. An answer never has fewer items than the catalogue would allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from springtide.model import ann
from springtide.model.question import NOTHING, Question, query_parts, score_rows
from springtide.ranks import top_k

if TYPE_CHECKING:
    from springtide.model.recommender import Recommender

DEPTH = 1000  # rows that are taken from an index: what its codes blur is among them
EXACT_BELOW = 10_000  # allowed items up to which all are scored, as quick as asking the index
BORROWERS = 256  # kept of an item that lends
SPOKEN_FOR = 2000  # rows that transitions and neighbours may add
LENT_FROM, BORROWED = 64, 1000  # lenders that a request looks at, and pairs with a borrower that it takes of them
DRIFTED = 2000  # items whose popularity has changed most since the index was made, which are always candidates


@dataclass(frozen=True)
class Index:
    """What a bundle holds to find candidates among I items."""

    parts: tuple[str, ...]  # of the keys, see question.part_names
    # histories: over the keys; queries, if the items have texts: over the encoder's vectors of them.
    indexes: Mapping[str, ann.Ann]
    lenders: np.ndarray  # [U] int64 catalogue rows, ascending
    borrowers: np.ndarray  # [U, N] int32 catalogue rows, -1 = none
    shares: np.ndarray  # [U, N] float32: what a lender's score counts for each of them

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as plain arrays, for a safetensors file."""
        found = {"lenders": self.lenders, "borrowers": self.borrowers, "shares": self.shares}
        for kind, index in self.indexes.items():
            found |= {f"{kind}.{name}": value for name, value in ann.pack(index).items()}
        return found


def from_arrays(arrays: dict[str, np.ndarray], parts: tuple[str, ...], items: int) -> Index:
    """The Index that `arrays` came from. Raises ValueError or KeyError if they are not one over so many items."""
    kinds = sorted({kind for kind, dot, _ in (name.partition(".") for name in arrays) if dot})
    found = {
        kind: ann.unpack({name: arrays[f"{kind}.{name}"] for name in ("index", "widths", "probes")}, items)
        for kind in kinds
    }
    if len(found["histories"].widths) != len(parts):
        raise ValueError(f"the index has keys of {len(found['histories'].widths)} parts, the model {len(parts)}")
    return Index(parts, found, arrays["lenders"], arrays["borrowers"], arrays["shares"])


class Retrieval:
    """An Index over the catalogue of a Recommender on the CPU, which it follows as that changes."""

    def __init__(self, index: Index, recommender: Recommender) -> None:
        """The recommender must be as it was when the index was made."""
        self.index = index
        self._of = recommender
        channels = recommender.model.channels
        self._levels = channels.log_popularity.clone()
        self._recent = None if channels.recent is None else channels.recent.table[-1].clone()
        self._counted = self._changed = self._drifted = NOTHING

    def changed(self, rows: np.ndarray) -> None:
        """These catalogue rows are new or have another text."""
        self._changed = np.union1d(self._changed, rows)

    def observed(self, rows: np.ndarray) -> None:
        """These catalogue rows have been counted again."""
        self._counted = rows = np.union1d(self._counted, rows)
        old = rows[rows < len(self._levels)]
        channels = self._of.model.channels
        drift = (channels.log_popularity[old] - self._levels[old]).numpy()
        if self._recent is not None and channels.recent is not None:
            drift = drift + (channels.recent.table[-1, old] - self._recent[old]).numpy()
        most = np.argsort(-np.abs(drift), kind="stable")[:DRIFTED]
        self._drifted = old[most]

    def best(self, question: Question, count: int, barred: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The `count` best items that are not `barred` [I] bool: catalogue rows [n] int64 and scores [n] float32.

        Best first, ties by row. n < count only if fewer items may be recommended at all.
        """
        recommender = self._of
        allowed = recommender.recommendable if question.products else recommender.found_by_query
        if barred is not None:
            allowed = allowed & ~barred
        left = int(np.count_nonzero(allowed))
        if left <= max(EXACT_BELOW, count):
            rows = np.flatnonzero(allowed)
        else:
            depth = max(DEPTH, 2 * count)
            rows = self._candidates(question, depth, allowed, exhaustive=False)
            if len(rows) < count:
                rows = self._candidates(question, depth, allowed, exhaustive=True)
            if len(rows) < count:  # what is allowed has come since the index was made
                rows = np.flatnonzero(allowed)
        scores = score_rows(question, rows, recommender.model, recommender.text_vectors, recommender.popularity)
        order = top_k(scores[None], count)[0]
        return rows[order], scores[order]

    def _candidates(self, question: Question, depth: int, allowed: np.ndarray, exhaustive: bool) -> np.ndarray:
        """Allowed catalogue rows, ascending."""
        found, indexes = [self._changed, self._drifted], self.index.indexes
        asked: dict[str, list[np.ndarray]] = {}
        if question.products:
            asked["histories"] = query_parts(question, self.index.parts, indexes["histories"].widths)
            found += [self._spoken_for(question), self._borrowing(question)]
        if question.text is not None:
            asked["queries"] = [question.text]
        for kind, query in asked.items():
            index = indexes[kind]
            found.append(ann.search(index.with_probes(index.lists) if exhaustive else index, query, depth, allowed))
        among = np.zeros(len(allowed), bool)
        for rows in found:
            among[rows] = True
        return np.flatnonzero(among & allowed)

    def _borrowing(self, question: Question) -> np.ndarray:
        """The rows that borrow most of what transitions and neighbours say: [n], with repeats, n <= BORROWED."""
        index = self.index
        if question.counted is None or not len(index.lenders):
            return NOTHING
        lendable = question.counted.numpy()[index.lenders]
        most = _greatest(lendable, LENT_FROM)
        lent = index.shares[most] * lendable[most, None]
        pairs = _greatest(lent.ravel(), BORROWED)
        rows = index.borrowers[most].ravel()[pairs]
        return rows[rows >= 0]

    def _spoken_for(self, question: Question) -> np.ndarray:
        """The rows of which transitions and neighbours say most: [n], n <= SPOKEN_FOR."""
        if question.counted is None:
            return NOTHING
        return question.touched[_greatest(question.counted.numpy()[question.touched], SPOKEN_FOR)]


def _greatest(values: np.ndarray, most: int) -> np.ndarray:
    """The places of the `most` greatest of values [n], in no order."""
    return np.argpartition(-values, most)[:most] if len(values) > most else np.arange(len(values))
