"""The parts of the fusion model that have parameters of their own: item vectors, event inputs, branches and gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from springtide.config import ModelConfig

TIME_BUCKETS = 40  # log2 of milliseconds: bucket 31 is about 25 days, 39 about 17 years
SESSION_MS = 30 * 60 * 1000  # a longer pause starts a new session


def time_bucket(gap_ms: Tensor) -> Tensor:
    """log2 bucket of a non-negative gap in milliseconds, int64 in [0, TIME_BUCKETS)."""
    return torch.log2(gap_ms.clamp(min=0).double() + 1).long().clamp(max=TIME_BUCKETS - 1)


class ItemVectors(nn.Module):
    """v = ID embedding + projection of the frozen, whitened text vector.

    An item that training never saw (`known` False) has no trained ID row, so its vector is its text alone; ID dropout
    shows the model such items in training.
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

    def forward(self) -> Tensor:
        """All item vectors [I, dim]."""
        vectors = torch.zeros((), device=self.known.device)
        if self.ids is not None:
            shown = self.known.float()
            if self.training and self.id_dropout:
                shown = shown * (torch.rand_like(shown) >= self.id_dropout)
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


class LongBranch(nn.Module):
    """A recurrent net over the history, then at every moment an attention pooling over all states so far."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        net = {"gru": nn.GRU, "lstm": nn.LSTM}[config.long_branch]
        between = config.dropout if config.long_layers > 1 else 0.0
        self.rnn = net(config.dim, config.dim, config.long_layers, batch_first=True, dropout=between)
        self.query = nn.Linear(config.dim, config.dim, bias=False)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, events: Tensor) -> tuple[Tensor, Tensor]:
        """events [B, L, dim] -> (interest [B, L, dim], attention [B, L, L]: row t weighs events 0..t)."""
        states, _ = self.rnn(events)
        length = states.shape[1]
        score = self.query(states) @ states.transpose(1, 2) / states.shape[2] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool, device=events.device).triu(1)
        attention = score.masked_fill(future, -torch.inf).softmax(-1)
        return self.norm(states + attention @ states), attention


class ShortBranch(nn.Module):
    """Attention of the latest event over the last `short_window` ones, biased by how recent each is."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.window, self.heads, self.dropout = config.short_window, config.short_heads, config.dropout
        self.query = nn.Linear(config.dim, config.dim, bias=False)
        self.key_value = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.order_bias = nn.Parameter(
            -0.2 * torch.arange(config.short_window - 1, -1, -1.0).repeat(config.short_heads, 1)
        )
        self.gap_bias = nn.Embedding(TIME_BUCKETS, config.short_heads)
        nn.init.zeros_(self.gap_bias.weight)
        self.mix = nn.Sequential(
            nn.Linear(config.dim, 2 * config.dim), nn.GELU(), nn.Linear(2 * config.dim, config.dim)
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, events: Tensor, timestamps: Tensor) -> tuple[Tensor, Tensor]:
        """events [B, L, dim], timestamps [B, L] ms -> (interest [B, L, dim], attention [B, L, window] oldest first)."""
        batch, length, dim = events.shape
        window, heads = self.window, self.heads
        query = self.query(events).view(batch, length, heads, dim // heads)
        keys, values = (
            F.pad(part, (0, 0, window - 1, 0)).unfold(1, window, 1).reshape(batch, length, heads, dim // heads, window)
            for part in self.key_value(events).chunk(2, -1)
        )
        then = F.pad(timestamps, (window - 1, 0)).unfold(1, window, 1)  # [B, L, window]
        score = torch.einsum("blhd,blhdw->blhw", query, keys) / (dim // heads) ** 0.5 + self.order_bias
        score = score + self.gap_bias(time_bucket(timestamps[..., None] - then)).transpose(2, 3)
        place = torch.arange(length, device=events.device)[:, None] + torch.arange(window, device=events.device)
        attention = score.masked_fill((place < window - 1)[None, :, None], -torch.inf).softmax(
            -1
        )  # [B, L, heads, window]
        pooled = torch.einsum("blhw,blhdw->blhd", attention, values).reshape(batch, length, dim)
        hidden = events + F.dropout(pooled, self.dropout, self.training)
        return self.norm(hidden + F.dropout(self.mix(hidden), self.dropout, self.training)), attention.mean(2)


class Gate(nn.Module):
    """g = sigmoid(W [long; short; context]): the weight of the short branch, per channel or in all."""

    CONTEXT = 4  # log gap to the event before, log history length, log session length, log gap to the request

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = 2 * config.dim + self.CONTEXT
        out = {"channel": config.dim, "scalar": 1, "mean": 0}[config.gate]
        self.hidden = (
            nn.Sequential(nn.Linear(width, config.gate_hidden), nn.GELU()) if config.gate_hidden and out else None
        )
        self.out = nn.Linear(config.gate_hidden or width, out) if out else None
        self.request_time = config.request_time

    def forward(self, long: Tensor, short: Tensor, context: Tensor) -> Tensor:
        """long, short [B, L, dim], context [B, L, CONTEXT] -> [B, L, dim] in (0, 1)."""
        if self.out is None:
            return torch.full_like(short, 0.5)
        features = torch.cat([long, short, context], -1)
        return torch.sigmoid(self.out(features if self.hidden is None else self.hidden(features))).expand_as(short)


def context_features(timestamps: Tensor, now: Tensor, offset: Tensor, request_time: bool) -> Tensor:
    """What the gate knows of the moment: [B, L, Gate.CONTEXT], each scaled to about [0, 1].

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
