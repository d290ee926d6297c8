"""Long-term neighbours: EASE (Steck 2019, arXiv 1905.03375), a linear item-item model in closed form.

It holds the most popular items; pairs with one of the others are told by their cosine (cosines.py).

With X [users, items] what each user took, weighed by how long ago, and P = (X'X + l2)^-1, item a speaks for item b by
-P[a, b] / P[b, b]. A history is read twice: with most weight on its last events (short), and evenly (long).

In training a user's own row is inside X, and would give the answer away. Taking one row x out of X changes P by a
matrix of rank one (Sherman and Morrison): with p = P x, P' = P + p p' / (1 - x'p). So every user is scored exactly
as if X had been fitted without them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from springtide.model.cosines import Cosines, Pairs, by_history

SHORT_DECAY = 0.8  # weight of an event k steps back: SHORT_DECAY^k


class Neighbours(nn.Module):
    """P as a fixed buffer over the M most popular items, and one learned scale for each way of reading a history."""

    inverse: Tensor  # [M + 1, M] float32; the last row is zero, for items that are not among the M
    diagonal: Tensor  # [M] of it, side by side: in the matrix every entry lies in a page of its own
    items: Tensor  # [M] int64 catalogue rows
    place: Tensor  # [I] int64: where an item is among the M, or M
    whole: bool  # the M are the catalogue, in its order
    end: Tensor  # [] int64 ms: time of the last event in X
    unit: Tensor  # [] float32: what a best neighbour says on average
    half_life: Tensor  # [] float32 ms after which an event weighs half in X; inf = all alike

    def __init__(self, catalogue: int, shrinkage: float) -> None:
        """shrinkage: of the cosines."""
        super().__init__()
        self.catalogue = catalogue
        self.log_scale = nn.Parameter(torch.zeros(2))
        self.cosines = Cosines(catalogue, shrinkage)
        self.load(np.zeros((0, 0), np.float32), np.zeros(0, np.int64), 0, float("inf"))

    def load(
        self, inverse: np.ndarray, items: np.ndarray, end: int, half_life: float, pairs: Pairs | None = None
    ) -> None:
        """Take P [M, M] over catalogue rows `items` [M], and the pairs that are not among them."""
        count = len(items)
        place = np.full(self.catalogue, count, np.int64)
        place[items] = np.arange(count)
        self.whole = count == self.catalogue
        strength = -inverse / np.maximum(np.diag(inverse), 1e-12) if count else inverse
        best = np.where(np.eye(count, dtype=bool), 0, strength).max(1).mean() if count > 1 else 1.0
        arrays = {
            "inverse": np.concatenate([inverse, np.zeros((1, count), np.float32)]).astype(np.float32),
            "diagonal": np.diag(inverse).astype(np.float32),
            "items": items.astype(np.int64),
            "place": place,
            "end": np.array(end, np.int64),
            "half_life": np.array(half_life, np.float32),
            "unit": np.array(max(best, 1e-3), np.float32),  # what a best neighbour says, so that scales start near 1
        }
        for name, value in arrays.items():
            self.register_buffer(name, torch.from_numpy(value).to(self.log_scale.device), persistent=False)
        if pairs is not None:
            self.cosines.load(pairs)

    def grow(self, count: int) -> None:
        """Add `count` items that are not among the M."""
        self.cosines.grow(count)
        self.place = F.pad(self.place, (0, count), value=len(self.items))
        self.catalogue += count
        self.whole = self.whole and not count

    def forward(
        self,
        items: Tensor,
        moments: Tensor,
        weights: Tensor,
        owned: tuple[Tensor, Tensor] | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Score the catalogue at P moments.

        items: [B, L] the histories; moments: [P, 2], ascending; weights: [P, 2] of the short and the long reading;
        owned: the owners' rows of X as distinct (items [B, K], -1 = none, times [B, K] ms), which are then left out;
        columns: [N] catalogue rows to score, absent: all. Returns [P, I] or [P, N].
        """
        asked, spread = self._asked(columns)  # which of the M are wanted, and where they go
        total = self.among(items, moments, weights, owned, asked)
        if not len(self.cosines.items) and torch.is_grad_enabled():  # nothing to learn, but DDP waits for a gradient
            total = total + 0 * self.cosines.log_scale.sum()
        if spread is not None:
            width = self.catalogue if columns is None else len(columns)
            total = torch.zeros(len(moments), width, device=items.device).index_copy(1, spread, total)
        if len(self.cosines.items):
            self.add_beyond(total, items, moments, weights, owned, columns)
        return total

    def add_beyond(
        self,
        onto: Tensor,
        items: Tensor,
        moments: Tensor,
        weights: Tensor,
        owned: tuple[Tensor, Tensor] | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """Add to scores `onto` of `forward`, in place, what the pairs say of which one is not among the M."""
        reading = self._reading(moments[:, 1], weights, items.shape[1], self.cosines.scale())
        left_out = None if owned is None else (owned[0], self.weight(owned[1]))
        self.cosines(onto, items, moments, reading, left_out, columns)

    def among(
        self,
        items: Tensor,
        moments: Tensor,
        weights: Tensor,
        owned: tuple[Tensor, Tensor] | None = None,
        asked: Tensor | None = None,
    ) -> Tensor:
        """What P says of the M items, or of the places `asked` among them, in their order; the rest as in `forward`."""
        row, at = moments.unbind(1)
        places = self.place[items]  # [B, L]
        reading = self._reading(at, weights, items.shape[1], torch.exp(self.log_scale) / self.unit)
        if len(row) and (owned is not None or len(row) > len(items)):
            # Many moments share a history, so what each of its events says is made once.
            each, place = by_history(reading, row, len(items))
            return (each @ self._strength(places, owned, asked))[row, place]
        return self._read(places[row], reading, asked)

    def _reading(self, at: Tensor, weights: Tensor, length: int, scale: Tensor) -> Tensor:
        """[P, L]: what every event of a history counts for at moments that are its events `at` [P]; scale: [2]."""
        age = at[:, None] - torch.arange(length, device=at.device)
        # A long history says more than a short one, but not as many times more.
        long = weights[:, 1:] * scale[1] * (at + 1).float()[:, None] ** -0.5
        return (weights[:, :1] * scale[0] * SHORT_DECAY ** age.clamp(min=0).float() + long) * (age >= 0)

    @torch.no_grad()
    def _strength(self, places: Tensor, owned: tuple[Tensor, Tensor] | None, asked: Tensor | None) -> Tensor:
        """[B, L, N]: what each event says for each of the M, or for those at places `asked` [N]."""
        said = self.inverse.index_select(0, places.flatten())
        diagonal = self.diagonal[None]
        if asked is not None:
            said, diagonal = said.index_select(1, asked), diagonal[:, asked]
        said = said.view(*places.shape, -1)
        if owned is not None:
            p, left = self._removed(*owned)
            own = F.pad(p, (0, 1)).gather(1, places)  # [B, L]: p of each event's item
            p = p if asked is None else p[:, asked]
            said.addcmul_((own / left[:, None])[..., None], p[:, None])
            diagonal = diagonal + p**2 / left[:, None]
        said.div_(-diagonal[:, None])
        column = places  # of each event's own item
        if asked is not None:
            column = torch.full((len(self.items) + 1,), len(asked), device=asked.device)
            column[asked] = torch.arange(len(asked), device=asked.device)
            column = column[places]
        batch, event = (column < said.shape[-1]).nonzero().unbind(1)
        said[batch, event, column[batch, event]] = 0  # no item is its own neighbour
        return said

    def _read(self, places: Tensor, reading: Tensor, asked: Tensor | None) -> Tensor:
        """Scores [P, N] of moments that each have a history of their own: places, reading [P, L]."""
        inverse = self.inverse if asked is None else self.inverse[:, asked]
        total = F.embedding_bag(places, inverse, per_sample_weights=reading, mode="sum")
        diagonal = self.diagonal if asked is None else self.diagonal[asked]
        itself = reading.new_zeros(len(places), len(self.items) + 1).scatter_add(1, places, reading)[:, :-1]
        return total / -diagonal + (itself if asked is None else itself[:, asked])

    def _asked(self, columns: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(places among the M, columns they go to); None = all of them, and none = they are the catalogue already."""
        if columns is None:
            return None, None if self.whole else self.items
        places = self.place[columns]
        spread = (places < len(self.items)).nonzero()[:, 0]
        return places[spread], spread

    @torch.no_grad()
    def _removed(self, items: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """p = P x [B, M] and 1 - x'p [B] of each owner's row x."""
        places = torch.where(items >= 0, self.place[items.clamp(min=0)], len(self.items))
        weight = self.weight(times)
        p = F.embedding_bag(places, self.inverse, per_sample_weights=weight, mode="sum")
        own = F.pad(p, (0, 1)).gather(1, places)  # the pad column is 0, so what is not among the M adds nothing
        return p, (1 - (weight * own).sum(1)).clamp(min=1e-3)

    def weight(self, times: Tensor) -> Tensor:
        """What an event of the log at `times` ms weighs in X: float32 in (0, 1]."""
        return 0.5 ** ((self.end - times).clamp(min=0).float() / self.half_life)

    @torch.no_grad()
    def by_event(self, items: Tensor, weights: Tensor, columns: Tensor) -> Tensor:
        """What each event of one history adds to the scores of `columns` [N] after its last one: [L, N].

        items: [L]; weights: [2] of the short and the long reading. The sum over the events is what `forward` gives.
        """
        places, asked = self.place[items], self.place[columns]
        last = torch.tensor([len(items) - 1], device=items.device)
        weight = self._reading(last, weights[None], len(items), torch.exp(self.log_scale) / self.unit)[0]  # [L]
        beyond = self._reading(last, weights[None], len(items), self.cosines.scale())[0]
        there = asked < len(self.items)
        asked = asked.clamp(max=len(self.items) - 1)
        strength = self.inverse[places[:, None], asked] / -self.diagonal[asked]  # [L, N]
        strength = (strength + (places[:, None] == asked)) * there  # no item is its own neighbour
        return weight[:, None] * strength + beyond[:, None] * self.cosines.by_event(items, columns)
