"""Neighbours by cosine, for pairs of items that a dense linear model has no room for: those with one of the long tail.

With X [users, items] as in neighbours.py and C = X'X, item a speaks for item b by C[a, b] / (sqrt(C[a, a] C[b, b]) +
shrinkage), the shrunk cosine of item-KNN (Sarwar et al. 2001): pairs that few users made count less. Each candidate
keeps the NEAREST that speak for it loudest, and each item the HEARD candidates that it speaks for loudest.

In training the pairs that a user made themselves are inside C and give the answer away, so they are taken out: with x
the user's row, C[a, b] - x[a] x[b] and C[b, b] - x[b]^2 for each b of theirs. A pair that would not have been kept
without them counts as nothing. C[a, a] stays, for it holds the user's own event when they ask as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from springtide.model.memory import keep_best

NEAREST, HEARD = 100, 1000
MOST = 500  # items of a user beyond which their pairs say little, and are more than those of all others
COUNTED = 5_000_000  # pairs that are counted at once
SPARSE = 1 / 8  # what is said at many moments, as a share of all cells: up to so much, single places are added faster


@dataclass(frozen=True)
class Pairs:
    """The pairs that were kept, over I catalogue items."""

    counts: sp.csr_matrix  # [I, I] float32 C[a, b], the events of a row by ascending b
    norms: np.ndarray  # [I] float32 C[a, a]
    heard_from: np.ndarray  # [I] float32: of each a, the largest similarity left out of its row, 0 = none was
    near_from: np.ndarray  # [I] float32: the same of each b and those that speak for it


def no_pairs(catalogue: int) -> Pairs:
    """The Pairs of a log of which none are kept."""
    zero = np.zeros(catalogue, np.float32)
    return Pairs(sp.csr_matrix((catalogue, catalogue), dtype=np.float32), zero, zero, zero)


def count_pairs(rows: sp.csr_array, dense: np.ndarray, shrinkage: float) -> Pairs:
    """The Pairs of X [U, I] but for those of two items of `dense` [M], of which another model knows more.

    What is held at once follows the work: about COUNTED pairs, and those of one candidate at least.
    """
    catalogue = rows.shape[1]
    rows = rows[np.diff(rows.indptr) <= MOST]
    norms = np.asarray(rows.power(2).sum(axis=0)).ravel().astype(np.float32)
    tail = np.ones(catalogue, bool)
    tail[dense] = False
    parts, near_from = [], np.zeros(catalogue, np.float32)
    # Candidates of the tail meet everything, the others the tail alone.
    for candidates, speaking in ((np.flatnonzero(tail), np.arange(catalogue)), (dense, np.flatnonzero(tail))):
        by_candidate, speakers = sp.csr_array(rows[:, candidates].T), sp.csr_array(rows[:, speaking])
        work = (by_candidate != 0) @ np.diff(speakers.indptr)
        cuts = np.flatnonzero(np.diff(np.cumsum(work) // COUNTED)) + 1
        for block in np.split(np.arange(len(candidates)), cuts):
            both = sp.coo_array(by_candidate[block] @ speakers)
            place, a = both.row, speaking[both.col]
            b = candidates[block][place]
            similar = _similarity(both.data.astype(np.float32), norms[a], norms[b], shrinkage) * (a != b)
            best = keep_best(sp.csr_matrix((similar, (place, a)), shape=(len(block), catalogue)), NEAREST)
            near_from[candidates[block]] = best.cutoff
            parts.append((best.successor.astype(np.int32), candidates[block][best.row].astype(np.int32), best.count))
    a, b, similar = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    heard = sp.csr_matrix((similar, (a, b)), shape=(catalogue, catalogue))
    heard.eliminate_zeros()
    heard.sort_indices()
    heard_from = np.zeros(catalogue, np.float32)
    for row in np.flatnonzero(np.diff(heard.indptr) > HEARD):
        cells = heard.data[heard.indptr[row] : heard.indptr[row + 1]]
        left_out = np.argsort(-cells, kind="stable")[HEARD:]
        heard_from[row] = cells[left_out[0]]
        cells[left_out] = 0
    heard.eliminate_zeros()
    # A similarity tells its count, so that the pairs of a large log need not be held twice.
    a = np.repeat(np.arange(catalogue), np.diff(heard.indptr))
    heard.data *= np.sqrt(norms[a] * norms[heard.indices]) + np.float32(shrinkage)
    return Pairs(heard, norms, heard_from, near_from)


class Cosines(nn.Module):
    """Pairs as fixed buffers, and one learned scale for each way of reading a history."""

    starts: Tensor  # [I + 1] int64: where the candidates of each a begin in
    items: Tensor  # [n] int32 candidates b, ascending for each a
    counts: Tensor  # [n] float32 C[a, b]
    similar: Tensor  # [n] float32 similarity
    norms: Tensor  # [I] float32
    heard_from: Tensor  # [I] float32
    near_from: Tensor  # [I] float32
    unit: Tensor  # [] float32: what a best neighbour says on average

    def __init__(self, catalogue: int, shrinkage: float) -> None:
        super().__init__()
        self.shrinkage = shrinkage
        self.log_scale = nn.Parameter(torch.zeros(2))
        self.load(no_pairs(catalogue))

    def load(self, pairs: Pairs) -> None:
        """Take other pairs, over as many items."""
        counts = pairs.counts
        source = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        norms = pairs.norms
        similar = _similarity(counts.data, norms[source], norms[counts.indices], self.shrinkage)
        best = np.zeros(counts.shape[0], np.float32)
        np.maximum.at(best, source, similar)
        arrays = {
            "starts": counts.indptr.astype(np.int64),
            "items": counts.indices.astype(np.int32),
            "counts": counts.data.astype(np.float32),
            "similar": similar.astype(np.float32),
            "norms": norms,
            "heard_from": pairs.heard_from,
            "near_from": pairs.near_from,
            "unit": np.array(best[best > 0].mean() if len(similar) else 1, np.float32),
        }
        for name, value in arrays.items():
            self.register_buffer(name, torch.from_numpy(value).to(self.log_scale.device), persistent=False)

    def grow(self, count: int) -> None:
        """Add `count` items that nothing speaks for."""
        self.starts = torch.cat([self.starts, self.starts[-1:].expand(count)])
        self.norms, self.heard_from = F.pad(self.norms, (0, count)), F.pad(self.heard_from, (0, count))
        self.near_from = F.pad(self.near_from, (0, count))

    def scale(self) -> Tensor:
        """[2] what a similarity counts for in the short and the long reading."""
        return torch.exp(self.log_scale) / self.unit

    def forward(
        self,
        onto: Tensor,
        items: Tensor,
        moments: Tensor,
        reading: Tensor,
        owned: tuple[Tensor, Tensor] | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """Add to scores `onto` [P, I], or [P, N] of `columns` [N], at P moments; in place.

        items: [B, L] histories; moments: [P, 2], ascending; reading: [P, L] what each event counts for, 0 after the
        moment; owned: the owners' rows of X as distinct (items [B, K], -1 = none, weights [B, K]), to be taken out.
        """
        row, at = moments.unbind(1)
        width, length = onto.shape[1], items.shape[1]
        # An event counts at the moments of its history that it does not come after: from `first` on, before `last`.
        key, event = row * length + at, torch.arange(items.numel(), device=items.device)
        first = torch.searchsorted(key, event)
        last = torch.searchsorted(key, (event // length + 1) * length)
        event = event[first < last]
        slot, entry = _expand(self.starts, items.flatten()[event])
        event, to = event[slot], self.items[entry].long()
        if columns is not None:
            column_of = torch.full((len(self.norms),), width, device=items.device)
            column_of[columns] = torch.arange(width, device=items.device)
            to = column_of[to]
            asked = (to < width).nonzero()[:, 0]
            event, entry, to = event[asked], entry[asked], to[asked]
        value = self.similar[entry] if owned is None else self._without_own(items, event, entry, *owned)
        times = (last - first)[event]
        if int(times.sum()) > SPARSE * items.numel() * width:
            said = value.new_zeros(items.numel() * width)
            said[event * width + to] = value
            each, place = by_history(reading, row, len(items))
            onto += (each @ said.view(len(items), length, width))[row, place]
            return
        pair = torch.repeat_interleave(times)
        since = torch.arange(len(pair), device=items.device) - (times.cumsum(0) - times)[pair]
        moment = first[event[pair]] + since
        spoken = reading[moment, event[pair] % length] * value[pair]
        onto.view(-1).index_add_(0, moment * width + to[pair], spoken)

    @torch.no_grad()
    def _without_own(self, items: Tensor, event: Tensor, entry: Tensor, owned: Tensor, weights: Tensor) -> Tensor:
        """[n] what the pairs `entry` [n] of events [n] of items.flatten() say without their owner's part in them."""
        catalogue = len(self.norms)
        there = (owned >= 0) & ((owned >= 0).sum(1, keepdim=True) <= MOST)
        owner = torch.arange(len(owned), device=owned.device)[:, None]
        keys, order = (owner * catalogue + owned)[there].sort()
        weight = F.pad(weights[there][order], (0, 1))  # the last one is of what is not theirs

        def taken(of: Tensor, item: Tensor) -> Tensor:
            key = of * catalogue + item
            place = torch.searchsorted(keys, key)
            found = F.pad(keys, (0, 1), value=-1)[place] == key
            return weight[torch.where(found, place, len(keys))]

        history = event // items.shape[1]
        own = taken(history, self.items[entry].long())
        mine = (own > 0).nonzero()[:, 0]
        a, b, own = items.flatten()[event[mine]], self.items[entry[mine]].long(), own[mine]
        count = self.counts[entry[mine]]
        left = count - taken(history[mine], a) * own
        left = left * (left > 1e-5 * count)  # what is left of rounding is no pair
        norm = (self.norms[b] - own**2).clamp(min=0)
        without = left / ((self.norms[a] * norm).sqrt() + self.shrinkage)
        # What was left out of the list of b has the smaller norm of b as well: at most that many times nearer.
        beaten = self.near_from[b] * (self.norms[b] / norm.clamp(min=1e-12)).sqrt()
        value = self.similar[entry]
        value[mine] = without * (without > torch.maximum(self.heard_from[a], beaten))
        return value

    def heard(self, items: Tensor) -> Tensor:
        """The catalogue rows that events of `items` [L] speak for, with repeats."""
        return self.items[_expand(self.starts, items)[1]].long()

    def by_event(self, items: Tensor, columns: Tensor) -> Tensor:
        """[L, N] what each of `items` [L] says for each of `columns` [N]."""
        slot, entry = _expand(self.starts, items)
        column_of = torch.full((len(self.norms),), len(columns), device=items.device)
        column_of[columns] = torch.arange(len(columns), device=items.device)
        said = self.similar.new_zeros(len(items), len(columns) + 1)
        said[slot, column_of[self.items[entry].long()]] = self.similar[entry]
        return said[:, :-1]


def by_history(reading: Tensor, row: Tensor, histories: int) -> tuple[Tensor, Tensor]:
    """What events count for, by history, for a matrix product to add up: ([B, S, L], places among the S [P]).

    reading: [P, L] at moments of the histories `row` [P], ascending; S is the most moments of one history.
    """
    first = torch.searchsorted(row.contiguous(), row.contiguous())  # of the moments of the same history
    place = torch.arange(len(row), device=row.device) - first
    shape = histories, int(place.max()) + 1, reading.shape[1]
    return reading.new_zeros(shape).index_put((row, place), reading), place


def _expand(starts: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of CSR rows `items` [n], one after the other: (place in `items`, place among all entries)."""
    lengths = starts[items + 1] - starts[items]
    slot = torch.repeat_interleave(lengths)
    begin = F.pad(lengths.cumsum(0), (1, 0))[:-1]
    entry = torch.arange(len(slot), device=items.device) - begin[slot] + starts[items][slot]
    return slot, entry


def _similarity(counts: np.ndarray, of: np.ndarray, candidate: np.ndarray, shrinkage: float) -> np.ndarray:
    return counts / (np.sqrt(of * candidate) + np.float32(shrinkage))
