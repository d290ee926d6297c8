"""Fusion strategies: one user vector out of long-term and short-term interest, at every moment.

Each strategy takes (long, short [B, M, dim], context [B, M, CONTEXT], batch, at) and returns (user [B, M, dim], gate
[B, M, dim]): the gate is the weight of the short branch in [0, 1], for reporting, and 0.5 where neither has one
(`concat`, `sum`). at [B]: the one moment of each history that is asked, M = 1; None: all of them, M = L. No strategy
sees a candidate, so one matrix product still scores the whole catalogue.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from springtide.config import ModelConfig
from springtide.model.batch import Batch
from springtide.model.branches import only
from springtide.model.inputs import CONTEXT

DAY_MS = 86_400_000


class Gate(nn.Module):
    """g = sigmoid(W [long; short; context]): the weight of the short branch, per channel or in all."""

    CONTEXT = CONTEXT

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = 2 * config.dim + CONTEXT
        out = {"channel": config.dim, "scalar": 1, "mean": 0}[config.gate]
        self.hidden = (
            nn.Sequential(nn.Linear(width, config.gate_hidden), nn.GELU()) if config.gate_hidden and out else None
        )
        self.out = nn.Linear(config.gate_hidden or width, out) if out else None

    def forward(
        self, long: Tensor, short: Tensor, context: Tensor, batch: Batch, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.out is None:
            gate = torch.full_like(short, 0.5)
        else:
            features = torch.cat([long, short, context], -1)
            gate = torch.sigmoid(self.out(features if self.hidden is None else self.hidden(features))).expand_as(short)
        return gate * short + (1 - gate) * long, gate


class AttentionFusion(nn.Module):
    """Softmax over the two interests, each scored against a learned query that the context shifts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.key = nn.Linear(config.dim, config.dim, bias=False)
        self.query = nn.Parameter(torch.randn(config.dim))
        self.context = nn.Linear(CONTEXT, config.dim, bias=False)

    def forward(
        self, long: Tensor, short: Tensor, context: Tensor, batch: Batch, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        both = torch.stack([long, short], 2)  # [B, M, 2, dim]
        query = self.query + self.context(context)  # [B, M, dim]
        weight = ((torch.tanh(self.key(both)) * query[:, :, None]).sum(-1) / long.shape[-1] ** 0.5).softmax(-1)
        return (weight[..., None] * both).sum(2), weight[..., 1:].expand_as(short)


class TimeDecay(nn.Module):
    """Every event weighs exp(-age / life); the short branch gets the share of that weight which lies in its window.

    Its weight then fades with the last gap, because what a user was after before a long pause is no longer "now", and
    is scaled per channel. Both lives and the scale are learned. Where all timestamps are equal, the share is that of
    the window in the number of events.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.window, self.request_time = config.short_window, bool(config.request_time)
        self.log_life = nn.Parameter(torch.tensor([math.log(7 * DAY_MS), math.log(DAY_MS)]))  # of an event, of "now"
        self.most = nn.Parameter(torch.ones(config.dim))

    def forward(
        self, long: Tensor, short: Tensor, context: Tensor, batch: Batch, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        event_life, now_life = torch.exp(self.log_life)
        times = batch.timestamps
        place = torch.arange(times.shape[1], device=times.device)
        gap = batch.now - times if self.request_time else torch.diff(times, prepend=times[:, :1])
        own, ago = times, place[:, None] - place  # [L, L]
        if at is not None:
            own, gap, ago = only(times, at), only(gap, at), at[:, None, None] - place  # [B, 1, L]
        age = (own[:, :, None] - times[:, None]).clamp(min=0).float()  # [B, M, L]
        weight = torch.exp(-age / event_life) * (ago >= 0)
        share = (weight * (ago < self.window)).sum(-1) / weight.sum(-1)  # [B, M]; an event's own weight is 1
        fresh = torch.exp(-gap.clamp(min=0).float() / now_life)
        gate = torch.sigmoid(self.most) * (share * fresh)[..., None]
        return gate * short + (1 - gate) * long, gate


class Concat(nn.Module):
    """W [long; short] + b."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.out = nn.Linear(2 * config.dim, config.dim)

    def forward(
        self, long: Tensor, short: Tensor, context: Tensor, batch: Batch, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.out(torch.cat([long, short], -1)), torch.full_like(short, 0.5)


class Sum(nn.Module):
    """long + short."""

    def forward(
        self, long: Tensor, short: Tensor, context: Tensor, batch: Batch, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return long + short, torch.full_like(short, 0.5)


class ModelFusion(nn.Module):
    """Two recommenders whose scores are mixed: each branch has an output layer of its own, and a weight per moment.

    As scores are products with the item vectors, mixing vectors mixes scores. The transition memory and popularity join
    with weights of their own, as always.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.long = nn.Linear(config.dim, config.dim, bias=False)
        self.short = nn.Linear(config.dim, config.dim, bias=False)
        for out in (self.long, self.short):
            nn.init.eye_(out.weight)
        self.weigh = nn.Linear(2 * config.dim + CONTEXT, 2)

    def forward(
        self, long: Tensor, short: Tensor, context: Tensor, batch: Batch, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        weight = self.weigh(torch.cat([long, short, context], -1)).softmax(-1)  # [B, M, 2]
        user = weight[..., :1] * self.long(long) + weight[..., 1:] * self.short(short)
        return user, weight[..., 1:].expand_as(short)


class Only(nn.Module):
    """One branch alone, as it is."""

    def __init__(self, short: bool) -> None:
        super().__init__()
        self.short = short

    def forward(
        self, long: Tensor, short: Tensor, context: Tensor, batch: Batch, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return (short, torch.ones_like(short)) if self.short else (long, torch.zeros_like(long))


def make_fusion(config: ModelConfig) -> nn.Module:
    """The strategy that `model.fusion` names; where there is one branch only, that one."""
    if "none" in (config.long_branch, config.short_branch):
        return Only(short=config.long_branch == "none")
    match config.fusion:
        case "gate":
            return Gate(config)
        case "attention":
            return AttentionFusion(config)
        case "time_decay":
            return TimeDecay(config)
        case "concat":
            return Concat(config)
        case "model":
            return ModelFusion(config)
    return Sum()


def split(fusion: nn.Module, long: Tensor, short: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """What the long and the short branch put into a user vector, each as long, short and gate [..., dim].

    Exact, because every strategy adds the branches once their weights are there. Their sum is the user vector, but for
    `concat`, where the bias belongs to neither.
    """
    match fusion:
        case Concat():
            of_long, of_short = fusion.out.weight.split(long.shape[-1], dim=1)
            return long @ of_long.T, short @ of_short.T
        case ModelFusion():
            return (1 - gate) * fusion.long(long), gate * fusion.short(short)
        case Sum():
            return long, short
    return (1 - gate) * long, gate * short
