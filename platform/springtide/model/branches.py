"""The branches that read a history: what a user is after in the long run, and what they are after right now.

Every branch is causal: its vector at moment t depends on the events up to t alone, so all moments train in one pass.
A request asks of one moment of each history, `at`, and what only the others would need is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from springtide.config import ModelConfig
from springtide.model.inputs import CONTEXT, TIME_BUCKETS, time_bucket

FILTERS, KERNEL, POOL = 64, 3, 2  # of the convolution
DECAYS = (1.0, 0.9, 0.5)  # weights of an event k steps back in the running means: decay^k


def only(told: Tensor, at: Tensor) -> Tensor:
    """[B, L, ...] -> [B, 1, ...]: that of moment `at` [B] of each row."""
    return told[torch.arange(len(at), device=at.device), at][:, None]


# ---------------------------------------------------------------- encoders: [B, L, dim] -> states [B, L, width]
class Recurrent(nn.Module):
    """GRU or LSTM."""

    def __init__(self, kind: str, width_in: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        net = {"gru": nn.GRU, "lstm": nn.LSTM}[kind]
        self.width = width
        self.rnn = net(width_in, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)

    def forward(self, events: Tensor, timestamps: Tensor) -> Tensor:
        states, _ = self.rnn(events)
        return states


class Convolution(nn.Module):
    """Conv1d + ReLU + max-pooling, both over the past only and with stride 1, so that every moment keeps a state."""

    width = FILTERS

    def __init__(self, width_in: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width_in, FILTERS, KERNEL)

    def forward(self, events: Tensor, timestamps: Tensor) -> Tensor:
        found = F.relu(self.conv(F.pad(events.transpose(1, 2), (KERNEL - 1, 0))))  # [B, FILTERS, L]
        return F.max_pool1d(F.pad(found, (POOL - 1, 0)), POOL, stride=1).transpose(1, 2)


class ConvolutionLstm(nn.Module):
    """Convolution, then LSTM layers. Where no time has passed yet there is no order in time for an LSTM to follow, so
    those moments take the convolution's path alone."""

    def __init__(self, width_in: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.convolution = Convolution(width_in)
        self.recurrent = Recurrent("lstm", FILTERS, width, layers, dropout)
        self.alone = nn.Linear(FILTERS, width)

    def forward(self, events: Tensor, timestamps: Tensor) -> Tensor:
        found = self.convolution(events, timestamps)  # [B, L, FILTERS]
        timed = (timestamps > timestamps[:, :1]).cummax(1).values  # [B, L] has time passed since the first event?
        return torch.where(timed[..., None], self.recurrent(found, timestamps), self.alone(found))


class Transformer(nn.Module):
    """Causal self-attention blocks, with a learned bias for how many events ago each event was."""

    def __init__(self, width_in: int, width: int, layers: int, heads: int, longest: int, dropout: float) -> None:
        super().__init__()
        self.width, self.longest = width, longest
        self.widen = nn.Linear(width_in, width) if width != width_in else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.bias = nn.Parameter(torch.zeros(heads, longest))

    def forward(self, events: Tensor, timestamps: Tensor) -> Tensor:
        place = torch.arange(events.shape[1], device=events.device)
        ago = place[:, None] - place  # [L, L]
        bias = self.bias[:, ago.clamp(0, self.longest - 1)].masked_fill(ago < 0, -torch.inf)  # [heads, L, L]
        states = self.widen(events)
        for block in self.blocks:
            states = block(states, bias)
        return states


class Block(nn.Module):
    """Attention and a small net, each normalised before and added to what was."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before_attention, self.before_mix = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        """states [B, L, width], bias [heads, L, L] with -inf for the future."""
        batch, length, width = states.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)  # [B, heads, L, width / heads]
            for part in self.query_key_value(self.before_attention(states)).chunk(3, -1)
        )
        told = F.scaled_dot_product_attention(query, key, value, bias)
        told = self.out(told.transpose(1, 2).reshape(batch, length, width))
        states = states + F.dropout(told, self.dropout, self.training)
        return states + F.dropout(self.mix(self.before_mix(states)), self.dropout, self.training)


Encoder = Recurrent | Convolution | ConvolutionLstm | Transformer


def make_encoder(config: ModelConfig) -> Encoder:
    """The encoder that `model.long_branch` names. Without time, `cnn_lstm` is its convolution alone."""
    width, layers, dropout = config.long_hidden or config.dim, config.long_layers, config.dropout
    match config.long_branch:
        case "cnn_lstm" if config.use_time:
            return ConvolutionLstm(config.dim, width, layers, dropout)
        case "cnn" | "cnn_lstm":
            return Convolution(config.dim)
        case "transformer":
            return Transformer(config.dim, width, layers, config.short_heads, config.long_window, dropout)
        case kind:
            return Recurrent(kind, config.dim, width, layers, dropout)


# ---------------------------------------------------------------- long branches
class LongBranch(nn.Module):
    """An encoder over the history, then at every moment an attention pooling over all states so far, or the last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = make_encoder(config)
        width = self.encoder.width
        self.query = nn.Linear(width, width, bias=False) if config.long_pool == "attention" else None
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.dim) if width != config.dim else nn.Identity()

    def forward(
        self, events: Tensor, timestamps: Tensor, context: Tensor, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """events [B, L, dim], timestamps [B, L] ms, at [B] the one moment asked of each, None = all: M = 1 or L

        context [B, M, CONTEXT] -> (interest [B, M, dim], attention [B, M, L]: that of moment t weighs events 0..t).
        """
        states = self.encoder(events, timestamps)
        length, width = states.shape[1:]
        place = torch.arange(length, device=events.device)
        asked, own = place[:, None], states
        if at is not None:
            asked, own = at[:, None, None], only(states, at)
        if self.query is None:
            attention = (place == asked).to(states.dtype).expand(len(events), -1, -1)
            return self.project(self.norm(own)), attention
        score = self.query(own) @ states.transpose(1, 2) / width**0.5
        attention = score.masked_fill(place > asked, -torch.inf).softmax(-1)
        return self.project(self.norm(own + attention @ states)), attention


class RunningMlp(nn.Module):
    """Running features of the behaviour so far, standardised, through a plain net: one cheap update for every event.

    The features are means of the events with three memories, from the whole history to the last few events, and how
    much of it there is.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.use_time = config.use_time
        hidden = config.long_hidden or config.dim
        width = len(DECAYS) * config.dim + (CONTEXT if config.use_time else 1)
        self.standardise = nn.LayerNorm(width)
        layers: list[nn.Module] = []
        for _ in range(config.long_layers):
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        self.net = nn.Sequential(*layers, nn.Linear(width, config.dim))
        self.norm = nn.LayerNorm(config.dim)

    def forward(
        self, events: Tensor, timestamps: Tensor, context: Tensor, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As LongBranch; the attention is the mean of the three memories' weights."""
        place = torch.arange(events.shape[1], device=events.device)
        ago = ((place[:, None] if at is None else at[:, None, None]) - place).float()  # [L, L] or [B, 1, L]
        weight = torch.stack([decay ** ago.clamp(min=0) * (ago >= 0) for decay in DECAYS])
        weight = weight / weight.sum(-1, keepdim=True)  # [3, L, L] or [3, B, 1, L]
        means = [each @ events for each in weight]
        told = context if self.use_time else context[..., 1:2]  # the history's length alone
        interest = self.norm(self.net(self.standardise(torch.cat([*means, told], -1))))
        return interest, weight.mean(0).expand(len(events), -1, -1)


class NoLong(nn.Module):
    """Stands for a long branch that is not there: zero interest, zero attention."""

    def forward(
        self, events: Tensor, timestamps: Tensor, context: Tensor, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        length = events.shape[1]
        asked = events if at is None else events[:, :1]
        return torch.zeros_like(asked), events.new_zeros(*asked.shape[:2], length)


def make_long_branch(config: ModelConfig) -> nn.Module:
    """The branch that `model.long_branch` names."""
    if config.long_branch == "none":
        return NoLong()
    return RunningMlp(config) if config.long_branch == "mlp" else LongBranch(config)


# ---------------------------------------------------------------- short branches
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

    def forward(self, events: Tensor, timestamps: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """events [B, L, dim], timestamps [B, L] ms, at [B] the one moment asked of each, None = all: M = 1 or L

        -> (interest [B, M, dim], attention [B, M, window] oldest first).
        """
        window, heads = self.window, self.heads
        place = torch.arange(events.shape[1], device=events.device)[None] if at is None else at[:, None]  # [1 or B, M]
        if at is None:
            own, now = events, timestamps
            then = F.pad(timestamps, (window - 1, 0)).unfold(1, window, 1)  # [B, M, window]
            parts = F.pad(self.key_value(events), (0, 0, window - 1, 0)).unfold(1, window, 1)
        else:
            own, now = only(events, at), only(timestamps, at)
            before = (place - torch.arange(window - 1, -1, -1, device=events.device)).clamp(min=0)  # [B, window]
            row = torch.arange(len(events), device=events.device)[:, None]
            then = timestamps[row, before][:, None]
            parts = self.key_value(events[row, before]).transpose(1, 2)[:, None]
        batch, moments, dim = own.shape
        keys, values = (  # [B, M, heads, dim / heads, window]
            part.reshape(batch, moments, heads, dim // heads, window) for part in parts.chunk(2, 2)
        )
        query = self.query(own).view(batch, moments, heads, dim // heads)
        # Products and sums, not einsum: that would be one tiny matrix product for every event, at twice the time.
        score = (query[..., None] * keys).sum(-2) / (dim // heads) ** 0.5 + self.order_bias  # [B, M, heads, window]
        score = score + self.gap_bias(time_bucket(now[..., None] - then)).transpose(2, 3)
        missing = place[..., None] + torch.arange(window, device=events.device) < window - 1  # before the first event
        attention = score.masked_fill(missing[:, :, None], -torch.inf).softmax(-1)
        pooled = (attention[..., None, :] * values).sum(-1).reshape(batch, moments, dim)
        hidden = own + F.dropout(pooled, self.dropout, self.training)
        return self.norm(hidden + F.dropout(self.mix(hidden), self.dropout, self.training)), attention.mean(2)


class NoShort(nn.Module):
    """Stands for a short branch that is not there: zero interest, zero attention."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, events: Tensor, timestamps: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        asked = events if at is None else events[:, :1]
        return torch.zeros_like(asked), events.new_zeros(*asked.shape[:2], self.window)


def make_short_branch(config: ModelConfig) -> nn.Module:
    """The branch that `model.short_branch` names."""
    return NoShort(config.short_window) if config.short_branch == "none" else ShortBranch(config)
