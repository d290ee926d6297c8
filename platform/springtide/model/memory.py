"""Transition memory: smoothed counts of which item follows which, asked about a user's most recent events.

With C[a, b] = sum over distances d of decay^(d-1) * (times b came d events after a), and additive smoothing of total
mass tau spread evenly over the I items, log P(b | a) is log(1 + C[a, b] * I / tau) up to a constant of a. The memory
scores b by the weighted sum of that over the recent events, read twice: with most weight on the very last ones (short),
and almost evenly (long). How much each reading counts is up to the user and the moment; tau is learned.

In training an example's own transition is inside the counts it is scored with and is taken out again, without which the
memory would be trusted for knowing the answers. It is there once for every distance at which the item stood before the
target. What its owner took after the target leaves as well, as far as it followed events before the target, or it would
stand among the wrong answers with counts that no request ever meets. Only the most frequent successors of an item are
kept, so an example must also forget a place in that list which it owes to itself: if the rest would not have beaten the
best successor left out, it counts as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from springtide.model.successors import count_successors

SHORT_DECAY, LONG_DECAY = 0.7, 0.9  # weight of the event k steps back in the two readings: decay^k
DENSE = 16  # times as many columns as successors are kept: up to so many, whole rows are read faster
FEW = 2**18  # successors that are added up at once in any case: a request's are all


def count_transitions(
    sequences: Iterable[tuple[np.ndarray, np.ndarray]], items: int, distances: int, decay: float
) -> sp.csr_matrix:
    """Count successors at distances 1..`distances`.

    sequences: pairs (items [n] int, is_target [n] bool) in time order; what is no target is nobody's successor.
    Returns [items, items] float32 CSR, C[a, b].
    """
    pieces: list[tuple[np.ndarray, np.ndarray]] = list(sequences)
    if not pieces:
        return sp.csr_matrix((items, items), dtype=np.float32)
    flat = np.concatenate([row for row, _ in pieces])
    wanted = np.concatenate([target for _, target in pieces]).astype(bool)
    user = np.repeat(np.arange(len(pieces)), [len(row) for row, _ in pieces])
    return count_successors(flat, user, wanted, items, [decay**step for step in range(distances)])


@dataclass(frozen=True)
class Kept:
    """The n most frequent successors kept of R items, by item and successor."""

    row: np.ndarray  # [n] int64, of R, ascending
    successor: np.ndarray  # [n] int32, ascending within a row
    count: np.ndarray  # [n] float32
    rank: np.ndarray  # [n] int64, 0 = the best of the row
    cutoff: np.ndarray  # [R] float32, the largest count left out, 0 = none was
    runner_up: np.ndarray  # [R] int64, the successor of that count, -1 = none


def keep_best(counts: sp.csr_matrix, most: int) -> Kept:
    """The `most` largest counts of each row of [R, I]; of equal ones the first."""
    counts = counts.tocsr()
    counts.sort_indices()
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    order = np.lexsort((counts.indices, -counts.data, row))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - counts.indptr[row[order]]
    cutoff, runner_up = np.zeros(counts.shape[0], np.float32), np.full(counts.shape[0], -1, np.int64)
    next_best, kept = rank == most, rank < most
    cutoff[row[next_best]], runner_up[row[next_best]] = counts.data[next_best], counts.indices[next_best]
    return Kept(row[kept], counts.indices[kept], counts.data[kept], rank[kept], cutoff, runner_up)


class TransitionMemory(nn.Module):
    """The counts as fixed buffers, and the few learned numbers that turn them into scores."""

    keys: Tensor  # [nnz] int64, a * I + b of every kept transition, ascending
    counts: Tensor  # [nnz + 1] float32, the last one 0 for empty slots
    successors: Tensor  # [I, N] int32, the N most frequent successors of each item
    slots: Tensor  # [I, N] int32, their positions in `counts`
    cutoff: Tensor  # [I] float32, the largest count left out of a list that was cut, 0 of a whole one
    runner_up: Tensor  # [I] int64, the item of that count, -1 of a whole list
    kernels: Tensor  # [2, J] what the event k steps back counts for in the short and in the long reading

    def __init__(self, items: int, distances: int, decay: float, recent: int, neighbours: int) -> None:
        super().__init__()
        self.items, self.distances, self.decay = items, distances, decay
        self.smoothed_over = items  # those that tau was learned with
        self.recent, self.neighbours = recent, neighbours
        kernels = torch.tensor([SHORT_DECAY, LONG_DECAY])[:, None] ** torch.arange(recent)  # [2, J]
        self.register_buffer("kernels", kernels / kernels.sum(1, keepdim=True), persistent=False)
        self.log_scale = nn.Parameter(torch.full((2,), 0.7))
        self.log_tau = nn.Parameter(torch.tensor(3.0))
        self.load_counts(sp.csr_matrix((items, items), dtype=np.float32))

    def load_counts(self, counts: sp.csr_matrix) -> None:
        """Take new counts [I, I], keeping the `neighbours` largest of each row (ties by item)."""
        self.load(self.arrange(counts))

    def load(self, tables: dict[str, Tensor]) -> None:
        """Take what `arrange` made."""
        for name, value in tables.items():
            self.register_buffer(name, value, persistent=False)

    def arrange(self, counts: sp.csr_matrix) -> dict[str, Tensor]:
        """The buffers for counts [I, I], made without changing the memory: others may score meanwhile."""
        kept = keep_best(counts, self.neighbours)
        number = len(kept.row)
        width = int(kept.rank.max(initial=0)) + 1
        successors = np.zeros((self.items, width), np.int32)  # the two tables of a large catalogue are gigabytes
        slots = np.full((self.items, width), number, np.int32)
        successors[kept.row, kept.rank] = kept.successor
        slots[kept.row, kept.rank] = np.arange(number)
        keys = kept.row * self.items + kept.successor
        return self._tensors(keys, np.append(kept.count, np.float32(0)), successors, slots, kept.cutoff, kept.runner_up)

    def rearrange(self, counts: sp.csr_matrix, rows: np.ndarray) -> dict[str, Tensor]:
        """What `arrange` gives for counts [I, I] that are those held but for `rows` [R] (ascending), which have grown.

        The cost of ranking is that of the rows, so that a few events do not cost as much as a whole log.
        """
        kept = keep_best(counts[rows], self.neighbours)
        held = {name: buffer.cpu().numpy() for name, buffer in self.named_buffers()}
        lengths = np.bincount(held["keys"] // self.items, minlength=self.items)
        changed = np.zeros(self.items, bool)
        changed[rows] = True
        stays, before = np.repeat(~changed, lengths), lengths.cumsum()
        lengths[rows] = np.bincount(kept.row, minlength=len(rows))
        new, number = np.repeat(changed, lengths), int(lengths.sum())
        keys, counted = np.empty(number, np.int64), np.zeros(number + 1, np.float32)
        keys[~new], keys[new] = held["keys"][stays], rows[kept.row] * self.items + kept.successor
        counted[:-1][~new], counted[:-1][new] = held["counts"][:-1][stays], kept.count
        wider = (0, 0), (0, max(0, int(kept.rank.max(initial=0)) + 1 - held["slots"].shape[1]))
        shift = (lengths.cumsum() - before).astype(np.int32)  # of a row's end; only rows that stay keep their length
        slots = np.where(held["slots"] == len(stays), np.int32(number), held["slots"] + shift[:, None])
        slots, successors = np.pad(slots, wider, constant_values=number), np.pad(held["successors"], wider)
        slots[rows], successors[rows] = number, 0
        slots[rows[kept.row], kept.rank], successors[rows[kept.row], kept.rank] = np.flatnonzero(new), kept.successor
        cutoff, runner_up = held["cutoff"].copy(), held["runner_up"].copy()
        cutoff[rows], runner_up[rows] = kept.cutoff, kept.runner_up
        return self._tensors(keys, counted, successors, slots, cutoff, runner_up)

    def _tensors(self, *arrays: np.ndarray) -> dict[str, Tensor]:
        names = ("keys", "counts", "successors", "slots", "cutoff", "runner_up")
        return {n: torch.from_numpy(array).to(self.log_tau.device) for n, array in zip(names, arrays, strict=True)}

    def grow(self, count: int) -> None:
        """Add `count` items that nothing was ever followed by, and that were followed by nothing."""
        source, successor = self.keys // self.items, self.keys % self.items
        self.items += count
        self.keys = source * self.items + successor
        self.successors = F.pad(self.successors, (0, 0, 0, count))
        self.slots = F.pad(self.slots, (0, 0, 0, count), value=len(self.counts) - 1)
        self.cutoff, self.runner_up = F.pad(self.cutoff, (0, count)), F.pad(self.runner_up, (0, count), value=-1)

    def forward(
        self,
        recent: Tensor,
        valid: Tensor,
        weights: Tensor,
        later: Tensor | None = None,
        columns: Tensor | None = None,
        own: Tensor | None = None,
    ) -> Tensor:
        """Score all items, or `columns` [N] of them, ascending and with the targets among them.

        recent: [P, J] int64, the last J items before each of P moments, newest first; valid: [P, J] bool. The first
        `recent` of them are asked about; own transitions are looked for in the first `distances`.
        weights: [P, 2] of the short and the long reading.
        later: [P, F] int64, what really came next (the target, never -1), after that, and so on; -1 = nobody's
        successor. What a moment's owner did after it is then taken out of the counts.
        own: [P, J] what the target's part in that is, where not NaN; else it follows from the distances.
        Returns [P, I] or [P, N] float32, zero where no recent event was ever followed by the item.
        """
        scale = self.smoothed_over * torch.exp(-self.log_tau)
        leaving = None if later is None else self._own_counts(recent, valid, later)
        if leaving is not None and own is not None:
            leaving = torch.cat([torch.where(own.isnan(), leaving[:, 0], own)[:, None], leaving[:, 1:]], 1)
        recent, valid = recent[:, : self.recent], valid[:, : self.recent]
        weights = weights * torch.exp(self.log_scale)
        reading = (weights @ self.kernels[:, : recent.shape[1]]) * valid  # [P, J]
        width = self.items if columns is None else len(columns)
        column_of = None
        if columns is not None:
            column_of = torch.full((self.items,), width, device=columns.device)  # one more for what is not asked for
            column_of[columns] = torch.arange(width, device=columns.device)
        if recent.numel() <= self.items or width > DENSE * self.slots.shape[1]:
            score = self._scattered(recent, reading, scale, column_of, width)
        else:
            score = self._dense(recent, valid, weights, scale, column_of, width)
        if later is None or leaving is None:
            return score
        without = self._without_own(recent, reading, leaving, later.clamp(min=0), scale)  # [P, F]
        column = later.clamp(min=0) if column_of is None else column_of[later.clamp(min=0)]
        # What is not asked for, nobody's successor or there before stands for the target once more, without a gradient.
        again = (later[:, :, None] == later[:, None]).tril(-1).any(2)
        no = (later < 0) | (column >= width) | again
        without = torch.where(no, without[:, :1].detach(), without)
        # Not in place: where the score is part of a wider one, that would cost the backward pass more than a copy.
        return score.scatter(1, torch.where(no, column[:, :1], column), without)

    def _scattered(
        self, recent: Tensor, reading: Tensor, scale: Tensor, column_of: Tensor | None, width: int
    ) -> Tensor:
        """[P, width] scores by adding up the successors of each recent event."""
        # A few moments take the logarithms of what they ask about; a batch of training takes those of all items once.
        table = torch.log1p(self.counts * scale)[self.slots] if recent.numel() > self.items else None  # [I, N]
        score = reading.new_zeros(len(recent), width + (column_of is not None))
        for first in range(0, recent.shape[1], step := self._at_once(len(recent), width, score.is_cuda)):
            few = slice(first, first + step)
            of = recent[:, few]
            value = torch.log1p(self.counts[self.slots[of]] * scale) if table is None else table[of]  # [P, S, N]
            to = self.successors[of].long() if column_of is None else column_of[self.successors[of]]
            score.scatter_add_(1, to.flatten(1), (reading[:, few, None] * value).flatten(1))
        return score if column_of is None else score[:, :-1]

    def _at_once(self, moments: int, width: int, on_gpu: bool) -> int:
        """Recent events whose successors are added up at once: what is held for it stays about as small as the score.

        On a GPU one, whose successors are all different: sums of several would differ from run to run.
        """
        return 1 if on_gpu else max(1, max(FEW, moments * width // 4) // (moments * self.slots.shape[1] or 1))

    def _dense(
        self, recent: Tensor, valid: Tensor, weights: Tensor, scale: Tensor, column_of: Tensor | None, width: int
    ) -> Tensor:
        """The same from one table of the recent items' successors: whole rows are read faster than scattered places.

        What is learned, weights and tau, stands outside the readings, which therefore need no gradient of their own.
        """
        asked, place = recent.unique(return_inverse=True)
        to = self.successors[asked].long() if column_of is None else column_of[self.successors[asked]]
        counts = weights.new_zeros(len(asked), width + (column_of is not None))
        counts.scatter_add_(1, to, self.counts[self.slots[asked]])  # empty slots add 0
        scaled = counts[:, :width] * scale.detach()
        table, kernels = torch.log1p(scaled), self.kernels[:, : recent.shape[1]]

        def read(table: Tensor, reading: Tensor) -> Tensor:
            return F.embedding_bag(place, table, per_sample_weights=reading * valid, mode="sum")

        if not torch.is_grad_enabled():
            return read(table, weights @ kernels)
        score = weights[:, :1] * read(table, kernels[:1]) + weights[:, 1:] * read(table, kernels[1:])
        # Worth nothing, but its gradient is tau's: through the table it would cost as much as all the rest.
        slope = read(-scaled / (1 + scaled), (weights @ kernels).detach())
        return score + (self.log_tau - self.log_tau.detach()).expand(len(recent), 1) * slope

    def _own_counts(self, recent: Tensor, valid: Tensor, later: Tensor) -> Tensor:
        """[P, F, J]: what events up to each moment P gave the count from each recent item to what came f-th after it.

        Of what comes more than once after the moment, all of that. What follows a recent item that is itself taken once
        more after the moment is not in it; targets, for which that would be their label, have it by `own`.
        """
        ahead = later.shape[1]
        near, there = recent[:, : self.distances], valid[:, : self.distances]
        step = torch.arange(near.shape[1], device=recent.device)
        distance = step + torch.arange(ahead, device=recent.device)[:, None] + 1  # [F, N]
        share = (self.decay ** (distance - 1).double()).float() * (distance <= self.distances)
        same = (recent[:, : self.recent, None] == near[:, None]) & there[:, None]  # an item may stand at many distances
        taken = share @ same.float().transpose(1, 2)
        alike = (later[:, :, None] == later[:, None]) & (later >= 0)[:, None]
        return alike.float() @ taken

    def _without_own(self, recent: Tensor, reading: Tensor, own: Tensor, items: Tensor, scale: Tensor) -> Tensor:
        """[P, F]: the scores of `items` [P, F] when their own transitions [P, F, J] have left the counts."""
        if len(self.keys) == 0:
            return (0 * reading).sum(1, keepdim=True).expand(items.shape)
        recent = recent[:, None]
        key = recent * self.items + items[:, :, None]  # [P, F, J]
        place = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
        found = self.keys[place] == key
        count = self.counts[place] * found
        left = count - own * found
        left = left * (left > 1e-5 * count)  # what is left of rounding is no transition
        ahead = left - self.cutoff[recent]
        tied = ahead.abs() <= 1e-5 * count
        left = left * torch.where(tied, items[:, :, None] < self.runner_up[recent], ahead > 0)
        return (reading[:, None] * torch.log1p(left * scale)).sum(2)
