"""The fusion model: long and short branch, a gate between them, and counting channels beside them.

    event input = item vector + action + rating + time gap           [B, L, dim]
    long, short = long branch(events), short branch(events)          [B, L, dim]
    g           = sigmoid(W [long; short; context])                  [B, L, dim]
    u           = g * short + (1 - g) * long
    w           = weights of the counting channels from [u; context] [B, L, C]
    logit       = u . v / T + sum of w_c * score_c

Nothing about the candidate enters u or w, so one matrix product scores the whole catalogue. All positions of a sequence
are trained in one pass; prefixes are never materialised. After SDM (arXiv 1909.00385) for the gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from springtide.config import ModelConfig
from springtide.model.batch import Batch
from springtide.model.branches import make_long_branch, make_short_branch, only
from springtide.model.channels import Channels
from springtide.model.fuse import make_fusion
from springtide.model.heads import PairHead, click_loss, rating_loss
from springtide.model.inputs import ItemVectors, context_features, make_event_input, time_bucket
from springtide.model.losses import draw_negatives, full_softmax, sampled_softmax

DEFAULT_DIM, DEFAULT_LAYERS = 64, 1  # where nothing has chosen a size
LOGIT_BLOCK = 24_000_000  # most logits held at once; above it, blocks are recomputed in the backward pass


@dataclass(frozen=True)
class Interest:
    """What the model makes of M moments of each history: of all, M = L, or of the one that is asked, M = 1."""

    user: Tensor  # [B, M, dim]
    long: Tensor  # [B, M, dim], 0 without a long branch
    short: Tensor  # [B, M, dim], 0 without a short branch
    gate: Tensor  # [B, M, dim] weight of the short branch, 0.5 where the fusion has none
    weights: Tensor  # [B, M, C] of the counting channels, in the order of Channels.names
    attention_long: Tensor  # [B, M, L]
    attention_short: Tensor  # [B, M, window]
    of_all: bool  # M = L

    def index(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Where `moments` [P, 2], rows and places, are in these tensors."""
        row, place = moments.unbind(1)
        return row, place if self.of_all else torch.zeros_like(place)


class FusionModel(nn.Module):
    """See the module docstring. Sizes come from `config`; `text`, `known` and `popularity` from the catalogue.

    text: [I, text_dim] float32 whitened text vectors (zero width without text); known: [I] bool, seen in training;
    popularity: [I] training events; rating_stats: mean and standard deviation of the training ratings; heads: weights
    of the rating and the click loss beside the next-item loss, 0 = no such head.
    """

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
        size = {"dim": config.dim or DEFAULT_DIM, "long_layers": config.long_layers or DEFAULT_LAYERS}
        config = config.model_copy(update=size)
        self.config = config
        self.item_vectors = ItemVectors(config, text, known)
        self.event_input = make_event_input(config, actions)
        self.long = make_long_branch(config)
        self.short = make_short_branch(config)
        self.fuse = make_fusion(config)
        self.log_temperature = nn.Parameter(torch.tensor(0.0))
        self.channels = Channels(config, text, popularity)
        self.register_buffer("rating_stats", torch.tensor(rating_stats, dtype=torch.float32))
        self.head_weights = heads
        self.rating_head, self.click_head = (
            PairHead(config.dim, len(known), config.dropout) if weight else None for weight in heads
        )

    def grow(self, text: Tensor, popularity: np.ndarray, changed: np.ndarray) -> None:
        """Take new items, which training never saw: text features [I, D] and events [I] of the old and the new.

        changed: rows whose text is another one, those of the new items among them.
        """
        self.item_vectors.grow(text)
        for head in (self.rating_head, self.click_head):
            if head is not None:
                head.grow(len(text))
        self.channels.grow(text, popularity, changed)

    def interest(self, batch: Batch, vectors: Tensor, at: Tensor | None = None) -> Interest:
        """Read the histories. vectors: [I, dim] from `item_vectors()`; at: [B] the one moment asked of each, or all."""
        gap = time_bucket(batch.timestamps - F.pad(batch.timestamps, (1, 0))[:, :-1])
        gap = torch.cat([torch.zeros_like(gap[:, :1]), gap[:, 1:]], 1)
        ratings = (batch.ratings - self.rating_stats[0]) / self.rating_stats[1]
        items = vectors[batch.items]
        if batch.shown is not None:
            items = vectors[batch.shown.clamp(min=0)] * (batch.shown >= 0)[..., None]
        events = self.event_input(items, batch.actions, ratings, gap)
        context = context_features(batch.timestamps, batch.now, batch.offset, bool(self.config.request_time))
        context = context if at is None else only(context, at)
        long, attention_long = self.long(events, batch.timestamps, context, at)
        short, attention_short = self.short(events, batch.timestamps, at)
        user, gate = self.fuse(long, short, context, batch, at)
        weights = self.channels.weights(user, context)
        return Interest(user, long, short, gate, weights, attention_long, attention_short, of_all=at is None)

    def scores_at(self, batch: Batch, interest: Interest, vectors: Tensor, moments: Tensor) -> dict[str, Tensor]:
        """What the network and each channel add to the logits [P, I] at `moments` [P, 2]; their sum is the logits."""
        scores = self.channels.counted(batch, interest.weights[interest.index(moments)], moments)
        if self.channels.borrowing is not None:
            scores = {name: self.channels.borrowing(score, None, None, None) for name, score in scores.items()}
        for name, (query, keys) in self.products(batch, interest, vectors, moments, None).items():
            scores[name] = query @ keys.T
        return scores

    def products(
        self, batch: Batch, interest: Interest, vectors: Tensor, moments: Tensor, cold: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The parts of the logits at `moments` [P, 2] that are a product of a query [P, K] and keys [I, K]."""
        place = interest.index(moments)
        user = F.dropout(interest.user[place], self.config.dropout, self.training)
        network = {"network": (user * (torch.exp(self.log_temperature) * self.config.dim**-0.5), vectors)}
        return network | self.channels.products(batch, interest.weights[place], moments, cold)

    def logits_at(
        self,
        batch: Batch,
        interest: Interest,
        vectors: Tensor,
        moments: Tensor,
        *,
        held_out: bool = False,
        cold: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Logits [P, N] at `moments` [P, 2] of histories that have been read, of the catalogue or `columns` [N] of it.

        held_out: see Channels; training must hold out what the moments themselves added to the counts.
        cold: [I] bool, items to be scored as if never counted.
        """
        products = self.products(batch, interest, vectors, moments, cold)
        query, key = products.pop("network")
        logits = query @ (key if columns is None else key[columns]).T
        if products:  # one more matrix product for the keys that nothing is learned of: they need no gradient
            keys = torch.cat([key if columns is None else key[columns] for _, key in products.values()], 1)
            logits.addmm_(torch.cat([query for query, _ in products.values()], 1), keys.T)
        return logits + self._counted(batch, interest, moments, held_out, cold, columns)

    def _counted(
        self,
        batch: Batch,
        interest: Interest,
        moments: Tensor,
        held_out: bool,
        cold: Tensor | None,
        columns: Tensor | None,
    ) -> Tensor:
        """What the channels that are looked up add to the logits: [P, N], borrowed scores included; see logits_at."""
        borrowing = self.channels.borrowing
        wider = columns if columns is None or borrowing is None else borrowing.needed(columns, cold)
        weights = interest.weights[interest.index(moments)]
        parts = self.channels.counted(batch, weights, moments, held_out=held_out, columns=wider).values()
        total = sum(parts, start=torch.zeros((), device=moments.device))
        if not parts:
            return total
        if borrowing is not None:
            later = _taken_later(batch, moments, wider) if held_out else None
            return borrowing(total, wider, columns, cold, later)
        return total if cold is None else total * ~(cold if columns is None else cold[columns])

    def forward(
        self, batch: Batch, exclude_seen: bool, label_smoothing: float = 0.0, negatives: int = 0
    ) -> tuple[Tensor, int]:
        """Summed softmax cross-entropy over every position that has a target, and how many there are.

        The softmax is over the whole catalogue, or over `negatives` items drawn from it (0 = all); see losses.py.
        The losses of the heads, summed over the same positions, are added with their weights.
        Items that training never saw are left out of the softmax: as eternal negatives they would be pushed below
        everything, and their text could never bring them back. With `exclude_seen`, so are the items that the row
        already holds, because they will not be candidates when the model is used either.
        """
        cold = self.item_vectors.draw_cold()
        vectors = self.item_vectors(cold)
        interest = self.interest(batch, vectors)
        moments = (batch.targets >= 0).nonzero()
        known = self.item_vectors.known
        sample = None
        if negatives and len(moments):
            sample = draw_negatives(self.channels.log_popularity, known, batch.targets[batch.targets >= 0], negatives)
        columns = None if sample is None else sample.items
        barred_from = _barred_from(batch, known, exclude_seen, columns)

        def part(some: Tensor) -> Tensor:
            targets = batch.targets[some[:, 0], some[:, 1]]
            own = targets if columns is None else torch.searchsorted(columns, targets)
            barred = barred_from[some[:, 0]] <= some[:, 1:]
            # A target that the row already holds is a candidate all the same.
            barred = barred.scatter(1, own[:, None], False)
            logits = self.logits_at(batch, interest, vectors, some, held_out=True, cold=cold, columns=columns)
            if sample is not None:
                return sampled_softmax(logits, sample, targets, barred, label_smoothing)
            return full_softmax(logits, targets, barred, label_smoothing)

        width = len(vectors) if columns is None else len(columns)
        blocks = moments.split(max(1, LOGIT_BLOCK // width))
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
            seen, known = batch.items.masked_fill(~batch.mask, -1), self.item_vectors.known
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


def _barred_from(batch: Batch, known: Tensor, exclude_seen: bool, columns: Tensor | None) -> Tensor:
    """[B, N] int32: the place in each row from which an item, of the catalogue or `columns`, is no candidate any more.

    That is where the row first holds it, with `exclude_seen`; -1 for an item that training never saw.
    """
    known = known if columns is None else known[columns]
    if not exclude_seen:
        return torch.where(known, batch.items.shape[1], -1).to(torch.int32).expand(len(batch.items), -1)
    return _first_place(batch, columns, len(known)).masked_fill(~known, -1)


def _taken_later(batch: Batch, moments: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """(moments [n], columns [n]): items, of the catalogue or `columns`, that a moment's owner takes after it.

    The counts of what follows a moment's history hold that owner's own future. A target has its own part taken out, but
    an item that lends to it would still tell that it was near.
    """
    if batch.owned is None or batch.owned_place is None:
        return None
    items, there = batch.owned.clamp(min=0), batch.owned >= 0  # [B, K]
    if columns is not None:
        place = torch.searchsorted(columns, items).clamp(max=len(columns) - 1)
        items, there = place, there & (columns[place] == items)
    taken = batch.owned_place.masked_fill(~there, -1)
    asked = (taken >= 0).any(0)  # a heavy user has taken far more than the columns hold
    taken, items = taken[:, asked], items[:, asked]
    row, at = moments.unbind(1)
    moment, owned = (taken[row] > at[:, None]).nonzero().unbind(1)
    return moment, items[row[moment], owned]


def _first_place(batch: Batch, columns: Tensor | None, width: int) -> Tensor:
    """[B, N] int32 position at which each row first holds each item; the row's length where it never does."""
    rows, length = batch.items.shape
    items = batch.items
    if columns is not None:
        found = torch.searchsorted(columns, items).clamp(max=width - 1)
        items = torch.where(columns[found] == items, found, width)  # one column more, for what is not asked for
    place = torch.arange(length, device=items.device, dtype=torch.int32).expand(rows, length)
    first = torch.full((rows, width + (columns is not None)), length, device=items.device, dtype=torch.int32)
    first = first.scatter_reduce(1, items, place.masked_fill(~batch.mask, length), "amin")
    return first[:, :width]
