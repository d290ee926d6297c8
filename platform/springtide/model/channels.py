"""The scores beside the neural one: transitions, neighbours, text, popularity and recent popularity.

Each is a counting model with a weight of its own for every user and moment, from one small layer that reads the user
vector and the context. So a log, a user or a moment for which counts say more than a network is served by counts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from springtide.config import ModelConfig
from springtide.model.batch import Batch
from springtide.model.borrowing import Borrowing
from springtide.model.decayed import DecayedCounts
from springtide.model.inputs import CONTEXT
from springtide.model.memory import TransitionMemory
from springtide.model.neighbours import SHORT_DECAY, Neighbours
from springtide.model.running import running_sum


class RecentPopularity(nn.Module):
    """log(1 + events before a moment, each weighing half after a half-life, as multiples of the mean item's)."""

    table: Tensor  # [T, I] float32
    edges: Tensor  # [T] int64 ms: row k counts the events before edges[k]

    def __init__(self, catalogue: int) -> None:
        super().__init__()
        self.load(np.zeros((1, catalogue)), np.zeros(1, np.int64), float("inf"))

    def load(self, counts: np.ndarray, edges: np.ndarray, half_life: float) -> None:
        """Take decayed counts [T, I] before `edges` [T] ms. half_life: ms."""
        self.latest = DecayedCounts(counts[-1].astype(np.float64), int(edges[-1]), half_life)
        self.register_buffer("table", torch.from_numpy(_in_means(counts)), persistent=False)
        self.register_buffer("edges", torch.from_numpy(edges.astype(np.int64)), persistent=False)

    def observe(self, items: np.ndarray, times: np.ndarray) -> None:
        """Add events of after the last edge: catalogue rows and ms."""
        self.latest = self.latest.after(items, times)
        self.table[-1] = torch.from_numpy(_in_means(self.latest.counts)).to(self.table.device)

    def grow(self, count: int) -> None:
        """Add `count` items without an event."""
        self.latest = self.latest.grown(count)
        self.table = F.pad(self.table, (0, count))

    def forward(self, now: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """now: [P] int64 ms -> ([P, I] or [P, N] of `columns`, [P] bool: is that time after an edge?)."""
        bucket, there = self.bucket(now)
        if columns is not None and len(now) < len(self.edges):  # a few moments: not a column is read that is not theirs
            return self.table[bucket[:, None], columns], there
        table = self.table if columns is None else self.table[:, columns]
        return table[bucket], there

    def bucket(self, now: Tensor) -> tuple[Tensor, Tensor]:
        """now: [P] int64 ms -> (rows of the table [P], is that time after an edge? [P] bool)."""
        row = torch.searchsorted(self.edges, now, right=True) - 1
        return row.clamp(min=0), row >= 0


def _in_means(counts: np.ndarray) -> np.ndarray:
    return np.log1p(counts / np.maximum(counts.mean(-1, keepdims=True), 1e-9)).astype(np.float32)


class Channels(nn.Module):
    """See the module docstring. text: [I, text_dim] whitened; popularity: [I] training events."""

    log_popularity: Tensor  # [I], centred
    damping: Tensor  # [] times this a trained model takes off every score:
    excess: Tensor  # [I] log popularity beyond the mean of the items that were taken at all, 0 of the others
    newness: Tensor  # [] what it adds to the scores of items that nobody had taken when it was trained:
    untaken: Tensor  # [I] 1 for those, else 0; it stays so once they are taken, as what validation users took was too
    lift: Tensor  # [I] what a trained model adds to the scores of items that would be in nobody's list,
    lift_from: Tensor  # [] for histories of so many events or more; 0 = for none
    text: Tensor  # [I, text_dim] unit rows

    def __init__(self, config: ModelConfig, text: Tensor, popularity: Tensor) -> None:
        super().__init__()
        catalogue = len(popularity)
        self.memory = (
            TransitionMemory(
                catalogue, config.memory_distances, config.memory_decay, config.memory_recent, config.memory_neighbours
            )
            if config.memory
            else None
        )
        self.neighbours = Neighbours(catalogue, config.neighbour_shrinkage) if config.neighbours else None
        self.recent = RecentPopularity(catalogue) if config.recent_popularity else None
        counting = config.memory or config.neighbours or config.recent_popularity
        self.borrowing = Borrowing(popularity) if config.borrowing and counting and text.shape[1] > 0 else None
        self.by_text = config.text_neighbours and text.shape[1] > 0
        self.by_popularity = config.popularity
        # What a weight of the layer below stands for; the popularities may count against an item, the others never do.
        self.names: list[str] = (
            ["transitions_short", "transitions_long"] * (self.memory is not None)
            + ["neighbours_short", "neighbours_long"] * (self.neighbours is not None)
            + ["text_short", "text_long"] * self.by_text
            + ["recent_popularity"] * (self.recent is not None)
            + ["popularity"] * self.by_popularity
        )
        self.weigh = nn.Linear(config.dim + CONTEXT, len(self.names)) if self.names else None
        if self.weigh is not None:
            nn.init.zeros_(self.weigh.weight)
            nn.init.zeros_(self.weigh.bias)
            with torch.no_grad():
                self.weigh.bias[[n for n, name in enumerate(self.names) if name.startswith("neighbours")]] = -1.0
        self.text_scale = nn.Parameter(torch.tensor(1.0)) if self.by_text else None
        self.register_buffer("text", F.normalize(text, dim=1) if self.by_text else text[:, :0], persistent=False)
        self.register_buffer("log_popularity", _centred_log(popularity))
        self.register_buffer("damping", torch.zeros(()))
        self.register_buffer("excess", _excess_log(popularity), persistent=False)
        self.register_buffer("newness", torch.zeros(()))
        self.register_buffer("untaken", (popularity == 0).float(), persistent=False)
        self.register_buffer("lift", torch.zeros(catalogue))
        self.register_buffer("lift_from", torch.zeros((), dtype=torch.int64))

    def observe_popularity(self, popularity: np.ndarray) -> None:
        """Take new counts [I]."""
        self.log_popularity.copy_(_centred_log(torch.from_numpy(popularity)))
        self.excess.copy_(_excess_log(torch.from_numpy(popularity)))
        if self.borrowing is not None:
            self.borrowing.events.copy_(torch.from_numpy(popularity))

    def grow(self, text: Tensor, popularity: np.ndarray, changed: np.ndarray) -> None:
        """Take new items: whitened text [I, D] and events [I] of the old and the new; changed: rows of new text."""
        count = len(text) - len(self.log_popularity)
        if self.memory is not None:
            self.memory.grow(count)
        if self.neighbours is not None:
            self.neighbours.grow(count)
        if self.recent is not None:
            self.recent.grow(count)
        if self.borrowing is not None:
            self.borrowing.grow(text, changed)
        if self.by_text:
            self.text = F.normalize(text, dim=1)
        self.log_popularity, self.excess = F.pad(self.log_popularity, (0, count)), F.pad(self.excess, (0, count))
        self.lift, self.untaken = F.pad(self.lift, (0, count)), F.pad(self.untaken, (0, count), value=1.0)
        self.observe_popularity(popularity)

    def weights(self, user: Tensor, context: Tensor) -> Tensor:
        """user [B, M, dim], context [B, M, CONTEXT] -> [B, M, C], in the order of `names`."""
        if self.weigh is None:
            return user.new_zeros(*user.shape[:2], 0)
        raw = self.weigh(torch.cat([user, context], -1))
        signed = 1 * self.by_popularity + (self.recent is not None)
        kept = raw.shape[-1] - signed
        return torch.cat([F.softplus(raw[..., :kept]), raw[..., kept:]], -1)

    def counted(
        self,
        batch: Batch,
        weights: Tensor,
        moments: Tensor,
        *,
        held_out: bool = False,
        columns: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted scores of the channels that are looked up: [P, N], of the catalogue or of `columns` [N] of it.

        weights: [P, C]; moments: [P, 2]; held_out: take what each moment and its owner added to the counts out of
        them, as training must.
        """
        row, at = moments.unbind(1)
        weight = dict(zip(self.names, weights.unbind(-1), strict=True))
        out: dict[str, Tensor] = {}
        if self.memory is not None:
            depth = max(self.memory.recent, self.memory.distances) if held_out else self.memory.recent
            back = at[:, None] - torch.arange(depth, device=at.device)  # [P, J]
            recent = batch.items[row[:, None], back.clamp(min=0)]
            later = later_items(batch, moments, self.memory.distances) if held_out else None
            own = batch.own[row, at] if held_out and batch.own is not None else None
            pair = torch.stack([weight["transitions_short"], weight["transitions_long"]], 1)
            out["transitions"] = self.memory(recent, back >= 0, pair, later, columns, own)
        if self.neighbours is not None and len(self.neighbours.items):
            pair = torch.stack([weight["neighbours_short"], weight["neighbours_long"]], 1)
            owned = None
            if held_out and batch.owned is not None and batch.owned_at is not None:
                owned = (batch.owned, batch.owned_at)
            out["neighbours"] = self.neighbours(batch.items, moments, pair, owned, columns)
        if self.recent is not None:
            score, there = self.recent(batch.now[row, at], columns)
            out["recent_popularity"] = (weight["recent_popularity"] * there)[:, None] * score
        return out

    def products(
        self, batch: Batch, weights: Tensor, moments: Tensor, cold: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The channels that are a product of a query [P, K] and keys [I, K], weights included.

        weights: [P, C]; cold: [I] bool, items to be scored as if never counted.
        """
        row, at = moments.unbind(1)
        weight = dict(zip(self.names, weights.unbind(-1), strict=True))
        out: dict[str, tuple[Tensor, Tensor]] = {}
        if self.by_text and self.text_scale is not None:
            pair = torch.stack([weight["text_short"], weight["text_long"]], 1)
            out["text"] = torch.exp(self.text_scale) * self._text_of(batch.items, moments, pair), self.text
        if self.by_popularity:
            level = self.log_popularity
            if cold is not None:
                level = torch.where(cold, level.min(), level)
            out["popularity"] = weight["popularity"][:, None], level[:, None]
        if self.damping and not self.training:
            out["damping"] = (-self.damping).expand(len(row), 1), self.excess[:, None]
        if self.newness and not self.training:
            out["newness"] = self.newness.expand(len(row), 1), self.untaken[:, None]
        if self.lift_from and not self.training:
            out["lift"] = (at + 1 >= self.lift_from).float()[:, None], self.lift[:, None]
        return out

    def _text_of(self, items: Tensor, moments: Tensor, pair: Tensor) -> Tensor:
        """[P, text_dim] means of the texts up to each moment, soon forgotten and not, times `pair` [P, 2]."""
        row, at = moments.unbind(1)
        length = (at + 1).float()[:, None]
        share = pair * torch.cat([(1 - SHORT_DECAY) / (1 - SHORT_DECAY**length), 1 / length], 1)  # of an event of now
        if len(row) > len(items):  # many moments share a history
            events = self.text[items]
            short, long = running_sum(events, SHORT_DECAY)[row, at], events.cumsum(1)[row, at]
            return share[:, :1] * short + share[:, 1:] * long
        age = at[:, None] - torch.arange(items.shape[1], device=items.device)
        reading = (share[:, :1] * SHORT_DECAY ** age.clamp(min=0).float() + share[:, 1:]) * (age >= 0)
        return F.embedding_bag(items[row], self.text, per_sample_weights=reading, mode="sum")


def later_items(batch: Batch, moments: Tensor, most: int) -> Tensor:
    """[P, F] the target of each moment [P, 2] and what its owner took after it; -1 = nobody's successor, F <= most."""
    row, at = moments.unbind(1)
    targets = batch.targets[row, at][:, None]
    if batch.after is None:
        return targets
    ahead = batch.after.shape[1] - batch.items.shape[1] + 1
    place = at[:, None] + torch.arange(1, min(ahead, most), device=at.device)
    return torch.cat([targets, batch.after[row[:, None], place]], 1)


def _centred_log(popularity: Tensor) -> Tensor:
    logs = torch.log1p(popularity.float())
    return logs - logs.mean()


def _excess_log(popularity: Tensor) -> Tensor:
    logs, taken = torch.log1p(popularity.float()), popularity > 0
    return torch.where(taken, logs - (logs[taken].mean() if taken.any() else 0.0), 0.0)
