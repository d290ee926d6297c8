"""Next-item losses: softmax over the whole catalogue, or over a sample of it with the sampling corrected for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BARRED = -1e4  # logit of what is no candidate


@dataclass(frozen=True)
class Sample:
    """Items that stand for the catalogue in one step: those drawn, and the step's targets."""

    items: Tensor  # [N] int64 ascending
    log_inclusion: Tensor  # [N] log of each item's chance to be drawn
    drawn: Tensor  # [N] bool; False: here only as a target


def full_softmax(logits: Tensor, targets: Tensor, barred: Tensor, smoothing: float) -> Tensor:
    """Summed cross-entropy of targets [P] among logits [P, I], where barred [P, I] items are no candidates.

    smoothing: share of the target's weight that is spread over all candidates.
    """
    logits = logits.masked_fill(barred, BARRED)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    if smoothing:
        log_p = logits.log_softmax(-1).masked_fill(barred, 0).sum(1) / (~barred).sum(1)
        loss = (1 - smoothing) * loss - smoothing * log_p.sum()
    return loss


def draw_negatives(log_popularity: Tensor, known: Tensor, targets: Tensor, count: int) -> Sample:
    """`count` draws with replacement from `known` [I] items, half evenly and half by popularity; plus the targets [P].

    Half and half, because even draws alone hardly meet the popular items that a model must learn to rank, and draws by
    popularity alone never meet the rest.
    """
    even = known.float() / known.sum()
    popular = torch.exp(log_popularity - log_popularity.max()) * known
    chance = 0.5 * even + 0.5 * popular / popular.sum()
    drawn = torch.zeros_like(known)
    drawn[torch.multinomial(chance, count, replacement=True)] = True
    taking_part = drawn.clone()
    taking_part[targets] = True
    items = taking_part.nonzero()[:, 0]
    log_inclusion = torch.log(-torch.expm1(count * torch.log1p(-chance[items].double()))).float()
    return Sample(items, log_inclusion, drawn[items])


def sampled_softmax(logits: Tensor, sample: Sample, targets: Tensor, barred: Tensor, smoothing: float) -> Tensor:
    """As `full_softmax`, with the sum over the catalogue estimated from a sample: logits, barred [P, N] of its items.

    Each item drawn counts for as many as its chance was small (logQ correction, Yi et al. 2019,
    doi:10.1145/3298689.3346996), so the estimated sum is unbiased; the target always counts once.
    """
    place = torch.searchsorted(sample.items, targets)[:, None]  # [P, 1]
    corrected = (logits - sample.log_inclusion).masked_fill(barred | ~sample.drawn, BARRED)
    corrected = corrected.scatter(1, place, logits.gather(1, place))
    log_p = corrected.log_softmax(-1)
    loss = -log_p.gather(1, place).sum()
    if smoothing:
        # The mean over all candidates, estimated alike: each item drawn for as many as its chance was small.
        weight = torch.exp(-sample.log_inclusion) * ~(barred | ~sample.drawn)
        total = torch.logsumexp(corrected, 1, keepdim=True)
        mean = ((logits - total) * weight).sum(1) / weight.sum(1).clamp(min=1)
        loss = (1 - smoothing) * loss - smoothing * mean.sum()
    return loss
