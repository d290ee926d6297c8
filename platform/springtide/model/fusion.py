"""The fusion model: long branch, short branch, a gate between them, transition memory and popularity beside them.

    event input = item vector + action + rating + time gap           [B, L, dim]
    long, short = long branch(events), short branch(events)          [B, L, dim]
    g           = sigmoid(W [long; short; context])                  [B, L, dim]
    u           = g * short + (1 - g) * long
    logit       = u . v / T + beta(u) * memory + lambda * log popularity

That is the default; `branches` and `fuse` hold the others by name, and `presets` whole systems made of them. Two more
objectives, the ratings and the clicks of next events, can be trained beside the next item itself (`heads`).

Nothing about the candidate enters u, so one matrix product scores the whole catalogue. All positions of a sequence are
trained in one pass; prefixes are never materialised. After SDM (arXiv 1909.00385) for the gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from springtide.config import ModelConfig
from springtide.model.batch import Batch
from springtide.model.branches import make_long_branch, make_short_branch
from springtide.model.fuse import make_fusion
from springtide.model.heads import PairHead, click_loss, rating_loss
from springtide.model.inputs import CONTEXT, ItemVectors, context_features, make_event_input, time_bucket
from springtide.model.memory import TransitionMemory

LOGIT_BLOCK = 24_000_000  # most logits held at once; above it, blocks are recomputed in the backward pass


@dataclass(frozen=True)
class Interest:
    """What the model makes of each moment of each history."""

    user: Tensor  # [B, L, dim]
    long: Tensor  # [B, L, dim], 0 without a long branch
    short: Tensor  # [B, L, dim], 0 without a short branch
    gate: Tensor  # [B, L, dim] weight of the short branch, 0.5 where the fusion has none
    trust: Tensor  # [B, L] beta, the weight of the memory, 0 without one
    attention_long: Tensor  # [B, L, L]
    attention_short: Tensor  # [B, L, window]


class FusionModel(nn.Module):
    """See the module docstring. Sizes come from `config`; `text`, `known` and `popularity` from the catalogue.

    text: [I, text_dim] float32 whitened text vectors (zero width without text); known: [I] bool, seen in training;
    popularity: [I] training events; rating_stats: mean and standard deviation of the training ratings; heads: weights
    of the rating and the click loss beside the next-item loss, 0 = no such head.
    """

    log_popularity: Tensor  # [I], centred
    rating_stats: Tensor  # [2]

    def __init__(
        self,
        config: ModelConfig,
        actions: int,
        text: Tensor,
        known: Tensor,
        popularity: Tensor,
        rating_stats: tuple[float, float] = (0.0, 1.0),
        heads: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        self.config = config
        self.item_vectors = ItemVectors(config, text, known)
        self.event_input = make_event_input(config, actions)
        self.long = make_long_branch(config)
        self.short = make_short_branch(config)
        self.fuse = make_fusion(config)
        self.log_temperature = nn.Parameter(torch.tensor(0.0))
        self.memory = None
        if config.memory:
            self.memory = TransitionMemory(
                len(known), config.memory_distances, config.memory_decay, config.memory_recent, config.memory_neighbours
            )
        self.trust = nn.Linear(config.dim + CONTEXT, 1) if config.memory else None
        if self.trust is not None:
            nn.init.zeros_(self.trust.weight)
            nn.init.zeros_(self.trust.bias)
        self.popularity_weight = nn.Parameter(torch.tensor(0.0)) if config.popularity else None
        log_popularity = torch.log1p(popularity.float())
        self.register_buffer("log_popularity", log_popularity - log_popularity.mean())
        self.register_buffer("rating_stats", torch.tensor(rating_stats, dtype=torch.float32))
        self.head_weights = heads
        self.rating_head, self.click_head = (
            PairHead(config.dim, len(known), config.dropout) if weight else None for weight in heads
        )

    def interest(self, batch: Batch, vectors: Tensor) -> Interest:
        """Read the histories. vectors: [I, dim] from `item_vectors()`."""
        gap = time_bucket(batch.timestamps - F.pad(batch.timestamps, (1, 0))[:, :-1])
        gap = torch.cat([torch.zeros_like(gap[:, :1]), gap[:, 1:]], 1)
        ratings = (batch.ratings - self.rating_stats[0]) / self.rating_stats[1]
        events = self.event_input(vectors[batch.items], batch.actions, ratings, gap)
        context = context_features(batch.timestamps, batch.now, batch.offset, self.config.request_time)
        long, attention_long = self.long(events, batch.timestamps, context)
        short, attention_short = self.short(events, batch.timestamps)
        user, gate = self.fuse(long, short, context, batch)
        trust = torch.zeros_like(user[..., 0])
        if self.trust is not None:
            trust = F.softplus(self.trust(torch.cat([user, context], -1))[..., 0])
        return Interest(user, long, short, gate, trust, attention_long, attention_short)

    def logits_at(
        self, batch: Batch, interest: Interest, vectors: Tensor, moments: Tensor, leave_one_out: bool = False
    ) -> Tensor:
        """Catalogue logits [P, I] at `moments` [P, 2] of histories that have been read.

        leave_one_out: take the transition into `batch.targets` out of the memory's counts, as training must.
        """
        row, place = moments.unbind(1)
        user = F.dropout(interest.user[row, place], self.config.dropout, self.training)
        logits = user @ vectors.T * torch.exp(self.log_temperature) * self.config.dim**-0.5
        if self.memory is not None:
            depth = max(self.memory.recent, self.memory.distances) if leave_one_out else self.memory.recent
            back = place[:, None] - torch.arange(depth, device=place.device)  # [P, J]
            recent = batch.items[row[:, None], back.clamp(min=0)]
            targets = batch.targets[row, place] if leave_one_out else None
            logits = logits + interest.trust[row, place, None] * self.memory(recent, back >= 0, targets)
        if self.popularity_weight is not None:
            logits = logits + self.popularity_weight * self.log_popularity
        return logits

    def forward(self, batch: Batch, exclude_seen: bool, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
        """Summed full-softmax cross-entropy over every position that has a target, and how many there are.

        The losses of the heads, summed over the same positions, are added with their weights.
        Items that training never saw are left out of the softmax: as eternal negatives they would be pushed below
        everything, and their text could never bring them back. With `exclude_seen`, so are the items that the row
        already holds, because they will not be candidates when the model is used either.
        """
        vectors = self.item_vectors()
        interest = self.interest(batch, vectors)
        moments = (batch.targets >= 0).nonzero()
        unseen = ~self.item_vectors.known
        first = _first_place(batch, len(vectors)) if exclude_seen else None

        def part(some: Tensor) -> Tensor:
            targets = batch.targets[some[:, 0], some[:, 1]]
            barred = unseen.expand(len(some), -1)
            if first is not None:
                barred = barred | (first[some[:, 0]] <= some[:, 1:]).scatter(1, targets[:, None], False)
            logits = self.logits_at(batch, interest, vectors, some, leave_one_out=True).masked_fill(barred, -1e4)
            loss = F.cross_entropy(logits, targets, reduction="sum")
            if label_smoothing:  # spread over the items that take part
                log_p = logits.log_softmax(-1).masked_fill(barred, 0).sum(1) / (~barred).sum(1)
                loss = (1 - label_smoothing) * loss - label_smoothing * log_p.sum()
            return loss

        blocks = moments.split(max(1, LOGIT_BLOCK // len(vectors)))
        if len(blocks) == 1:
            total = part(moments)
        else:
            total = sum((checkpoint(part, some, use_reentrant=False) for some in blocks), vectors.sum() * 0)
        return total + self._head_losses(batch, interest, vectors, moments), len(moments)

    # ---------------------------------------------------------------- heads
    def _head_losses(self, batch: Batch, interest: Interest, vectors: Tensor, moments: Tensor) -> Tensor:
        """The weighted losses of the heads at `moments` [P, 2], summed."""
        row, place = moments.unbind(1)
        user, targets = interest.user[row, place], batch.targets[row, place]
        total = vectors.new_zeros(())
        if self.rating_head is not None:
            ratings = torch.full_like(user[:, 0], torch.nan)
            if batch.target_ratings is not None:
                ratings = (batch.target_ratings[row, place] - self.rating_stats[0]) / self.rating_stats[1]
            total = total + self.head_weights[0] * rating_loss(self.rating_head, user, targets, ratings, vectors)
        if self.click_head is not None:
            seen = _first_place(batch, len(vectors)) < batch.items.shape[1]
            known = self.item_vectors.known
            clicks = click_loss(self.click_head, user, targets, vectors, known, seen, row)
            total = total + self.head_weights[1] * clicks
        return total

    def rate(self, user: Tensor, items: Tensor, vectors: Tensor | None = None) -> Tensor:
        """The rating that each of P users [P, dim] would give an item [P], in the log's units: [P].

        vectors: `item_vectors()`, if there already. Raises ValueError without a rating head.
        """
        if self.rating_head is None:
            raise ValueError("this model has no rating head; train it with train.rating_weight above 0")
        standardised = self.rating_head(user, items, self.item_vectors() if vectors is None else vectors)
        return standardised * self.rating_stats[1] + self.rating_stats[0]

    def click_probability(self, user: Tensor, items: Tensor, vectors: Tensor | None = None) -> Tensor:
        """How likely each of P users [P, dim] takes an item [P] rather than another at random: [P] in (0, 1).

        vectors: `item_vectors()`, if there already. Raises ValueError without a click head.
        """
        if self.click_head is None:
            raise ValueError("this model has no click head; train it with train.click_weight above 0")
        return torch.sigmoid(self.click_head(user, items, self.item_vectors() if vectors is None else vectors))


def _first_place(batch: Batch, items: int) -> Tensor:
    """[B, I] position at which each row first holds each item; the row's length where it never does."""
    rows, length = batch.items.shape
    place = torch.arange(length, device=batch.items.device).expand(rows, length)
    first = torch.full((rows, items), length, device=batch.items.device)
    return first.scatter_reduce(1, batch.items, place.masked_fill(~batch.mask, length), "amin")
