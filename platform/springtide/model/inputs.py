"""What the branches read: item vectors, event inputs and what is known of each moment."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from springtide.config import ModelConfig

TIME_BUCKETS = 40  # log2 of milliseconds: bucket 31 is about 25 days, 39 about 17 years
SESSION_MS = 30 * 60 * 1000  # a longer pause starts a new session
CONTEXT = 4  # log gap to the event before, log history length, log session length, log gap to the request
BEHAVIOUR = 16  # width of the embeddings that a linear event input joins


def time_bucket(gap_ms: Tensor) -> Tensor:
    """log2 bucket of a non-negative gap in milliseconds, int64 in [0, TIME_BUCKETS)."""
    return torch.log2(gap_ms.clamp(min=0).double() + 1).long().clamp(max=TIME_BUCKETS - 1)


class ItemVectors(nn.Module):
    """v = ID embedding + projection of the frozen, whitened text vector.

    An item that training never saw (`known` False) has no trained ID row, so its vector is its text alone; ID dropout
    shows the model such items in training: items drawn as `cold` lose their row for one step.
    """

    text: Tensor  # [I, text_dim] float32 whitened
    known: Tensor  # [I] bool

    def __init__(self, config: ModelConfig, text: Tensor, known: Tensor) -> None:
        super().__init__()
        self.id_dropout = config.id_dropout if text.shape[1] else 0.0
        self.register_buffer("text", text)
        self.register_buffer("known", known)
        self.ids = nn.Embedding(len(known), config.dim) if config.id_embeddings else None
        self.project = nn.Linear(text.shape[1], config.dim, bias=False) if text.shape[1] else None
        if self.ids is not None:
            nn.init.normal_(self.ids.weight, std=config.dim**-0.5)
        if self.project is not None:
            nn.init.normal_(self.project.weight, std=0.5 * config.dim**-0.5)

    @torch.no_grad()
    def begin_with(self, factors: Tensor) -> None:
        """Start the ID rows from `factors` [I, dim]; those that are zero there stay as they were drawn."""
        if self.ids is not None:
            self.ids.weight.copy_(torch.where(factors.any(1, keepdim=True), factors, self.ids.weight))

    def draw_cold(self) -> Tensor | None:
        """[I] bool: the items that one training step treats as new; None if there are none to be."""
        if not (self.training and self.id_dropout):
            return None
        return torch.rand(len(self.known), device=self.known.device) < self.id_dropout

    @torch.no_grad()
    def grow(self, text: Tensor) -> None:
        """Take new items, which training never saw: whitened text [I, text_dim] of the old and the new."""
        count = len(text) - len(self.known)
        self.text, self.known = text, F.pad(self.known, (0, count))
        if self.ids is not None:
            self.ids.weight = nn.Parameter(F.pad(self.ids.weight, (0, 0, 0, count)))

    def forward(self, cold: Tensor | None = None) -> Tensor:
        """All item vectors [I, dim]."""
        vectors = torch.zeros((), device=self.known.device)
        if self.ids is not None:
            shown = self.known.float()
            if cold is not None:
                shown = shown * ~cold
            vectors = vectors + self.ids.weight * shown[:, None]
        if self.project is not None:
            vectors = vectors + self.project(self.text)
        return vectors


class EventInput(nn.Module):
    """An event = its item's vector + action + rating + log-bucketed gap to the event before."""

    def __init__(self, config: ModelConfig, actions: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.action = nn.Embedding(actions, config.dim)
        self.rating = nn.Linear(2, config.dim, bias=False) if config.use_rating else None  # (rating, was one given?)
        self.gap = nn.Embedding(TIME_BUCKETS, config.dim) if config.use_time else None
        self.norm = nn.LayerNorm(config.dim)
        for part in (self.action, self.gap):
            if part is not None:
                nn.init.normal_(part.weight, std=0.02)

    def forward(self, vectors: Tensor, actions: Tensor, ratings: Tensor, gap: Tensor) -> Tensor:
        """vectors [B, L, dim], actions [B, L], ratings [B, L] standardised with NaN = none, gap [B, L] buckets."""
        event = vectors + self.action(actions)
        if self.rating is not None:
            given = ~ratings.isnan()
            event = event + self.rating(torch.stack([ratings.nan_to_num(0.0), given.float()], -1))
        if self.gap is not None:
            event = event + self.gap(gap)
        return F.dropout(self.norm(event), self.dropout, self.training)


class LinearInput(nn.Module):
    """An event = W1 F + W2 B + b: F the item's vector, B its action, time gap and rating side by side."""

    def __init__(self, config: ModelConfig, actions: int) -> None:
        super().__init__()
        self.dropout, self.use_rating = config.dropout, config.use_rating
        self.action = nn.Embedding(actions, BEHAVIOUR)
        self.gap = nn.Embedding(TIME_BUCKETS, BEHAVIOUR) if config.use_time else None
        width = BEHAVIOUR * (1 + config.use_time) + 2 * config.use_rating
        self.content = nn.Linear(config.dim, config.dim, bias=False)  # W1
        self.behaviour = nn.Linear(width, config.dim)  # W2 and b
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, vectors: Tensor, actions: Tensor, ratings: Tensor, gap: Tensor) -> Tensor:
        """As EventInput."""
        parts = [self.action(actions)]
        if self.gap is not None:
            parts.append(self.gap(gap))
        if self.use_rating:
            parts.append(torch.stack([ratings.nan_to_num(0.0), (~ratings.isnan()).float()], -1))
        event = self.content(vectors) + self.behaviour(torch.cat(parts, -1))
        return F.dropout(self.norm(event), self.dropout, self.training)


def make_event_input(config: ModelConfig, actions: int) -> nn.Module:
    """The event input that `model.event_input` names."""
    return LinearInput(config, actions) if config.event_input == "linear" else EventInput(config, actions)


def context_features(timestamps: Tensor, now: Tensor, offset: Tensor, request_time: bool) -> Tensor:
    """What the gate knows of the moment: [B, L, CONTEXT], each scaled to about [0, 1].

    timestamps, now [B, L] ms; offset [B] events before the window.
    """
    gap = (timestamps - F.pad(timestamps, (1, 0))[:, :-1]).clamp(min=0)
    gap[:, 0] = 0
    place = torch.arange(timestamps.shape[1], device=timestamps.device).expand_as(timestamps)
    start = torch.where(gap > SESSION_MS, place, 0).cummax(1).values  # where the session of each event began
    asked = (now - timestamps).clamp(min=0) if request_time else torch.zeros_like(now)
    length = place + 1 + offset[:, None]
    return torch.stack(
        [
            torch.log1p(gap.float()) / 25,
            torch.log1p(length.float()) / 7,
            torch.log1p((place - start).float()) / 5,
            torch.log1p(asked.float()) / 25,
        ],
        -1,
    )
