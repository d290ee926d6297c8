"""Long-term neighbours: EASE (Steck 2019, arXiv 1905.03375), a linear item-item model in closed form.

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

from springtide.model.running import running_sum

SHORT_DECAY = 0.8  # weight of an event k steps back: SHORT_DECAY^k


class Neighbours(nn.Module):
    """P as a fixed buffer over the M most popular items, and one learned scale for each way of reading a history."""

    inverse: Tensor  # [M + 1, M] float32; the last row is zero, for items that are not among the M
    items: Tensor  # [M] int64 catalogue rows
    place: Tensor  # [I] int64: where an item is among the M, or M
    whole: bool  # the M are the catalogue, in its order
    end: Tensor  # [] int64 ms: time of the last event in X
    unit: Tensor  # [] float32: what a best neighbour says on average
    half_life: Tensor  # [] float32 ms after which an event weighs half in X; inf = all alike

    def __init__(self, catalogue: int) -> None:
        super().__init__()
        self.catalogue = catalogue
        self.log_scale = nn.Parameter(torch.zeros(2))
        self.load(np.zeros((0, 0), np.float32), np.zeros(0, np.int64), 0, float("inf"))

    def load(self, inverse: np.ndarray, items: np.ndarray, end: int, half_life: float) -> None:
        """Take P [M, M] over catalogue rows `items` [M]."""
        count = len(items)
        place = np.full(self.catalogue, count, np.int64)
        place[items] = np.arange(count)
        self.whole = count == self.catalogue
        strength = -inverse / np.maximum(np.diag(inverse), 1e-12) if count else inverse
        best = np.where(np.eye(count, dtype=bool), 0, strength).max(1).mean() if count > 1 else 1.0
        arrays = {
            "inverse": np.concatenate([inverse, np.zeros((1, count), np.float32)]).astype(np.float32),
            "items": items.astype(np.int64),
            "place": place,
            "end": np.array(end, np.int64),
            "half_life": np.array(half_life, np.float32),
            "unit": np.array(max(best, 1e-3), np.float32),  # what a best neighbour says, so that scales start near 1
        }
        for name, value in arrays.items():
            self.register_buffer(name, torch.from_numpy(value).to(self.log_scale.device), persistent=False)

    def grow(self, count: int) -> None:
        """Add `count` items that are not among the M."""
        self.place = F.pad(self.place, (0, count), value=len(self.items))
        self.catalogue += count
        self.whole = self.whole and not count

    def forward(
        self,
        items: Tensor,
        moments: Tensor,
        weights: Tensor,
        owned: tuple[Tensor, Tensor] | None = None,
        repeats: bool = True,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Score the catalogue at P moments.

        items: [B, L] the histories; moments: [P, 2]; weights: [P, 2] of the short and the long reading; owned: the
        owners' rows of X as distinct (items [B, K], -1 = none, times [B, K] ms), which are then left out; repeats:
        whether items already in the history must be scored right too; columns: [N] catalogue rows to score, absent:
        all. Returns [P, I] or [P, N], zero for items that are not among the M.
        """
        asked, spread = self._asked(columns)  # which of the M are wanted, and where they go
        total = self.among(items, moments, weights, owned, repeats, asked)
        if spread is None:
            return total
        width = self.catalogue if columns is None else len(columns)
        return torch.zeros(len(moments), width, device=items.device).index_copy(1, spread, total)

    def among(
        self,
        items: Tensor,
        moments: Tensor,
        weights: Tensor,
        owned: tuple[Tensor, Tensor] | None = None,
        repeats: bool = True,
        asked: Tensor | None = None,
    ) -> Tensor:
        """The scores of the M items, or of the places `asked` among them, in their order; the rest as in `forward`."""
        row, at = moments.unbind(1)
        places = self.place[items]  # [B, L]
        scale = torch.exp(self.log_scale) / self.unit
        length = (at + 1).float() ** -0.5  # a long history says more than a short one, but not as many times more
        weight_of = {SHORT_DECAY: weights[:, 0] * scale[0], 1.0: weights[:, 1] * scale[1] * length}
        inverse, diagonal = self.inverse, self.inverse.diagonal()[None]
        if asked is not None:
            inverse, diagonal = inverse[:, asked], diagonal[:, asked]
        read = self._read(inverse, places, row, at)
        total = sum((weight[:, None] * read[decay] for decay, weight in weight_of.items()), start=torch.zeros(()))
        if owned is not None:
            p, left = self._removed(*owned)
            own = F.pad(p, (0, 1)).gather(1, places)  # [B, L]: p of each event's item
            said = sum(weight * running_sum(own, decay)[row, at] for decay, weight in weight_of.items())
            p = p if asked is None else p[:, asked]
            total = torch.addcmul(total, (said / left[row])[:, None], p[row])
            diagonal = (diagonal + p**2 / left[:, None])[row]
        total = total / -diagonal
        if repeats:  # no item is its own neighbour
            for decay, weight in weight_of.items():
                own_weight = self._own_weight(places, row, at, decay)
                total = total + weight[:, None] * (own_weight if asked is None else own_weight[:, asked])
        return total

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
    def _read(self, inverse: Tensor, places: Tensor, row: Tensor, at: Tensor) -> dict[float, Tensor]:
        """Sums of rows of `inverse` [M + 1, N] over the history at each moment, weighed by decay^age: [P, N] each."""
        batch, length = places.shape
        decays = (SHORT_DECAY, 1.0)
        if len(row) > batch * length // 8:  # most moments are wanted: one pass over each history
            rows = inverse[places]
            return {decay: running_sum(rows, decay)[row, at] for decay in decays}
        age = at[:, None] - torch.arange(length, device=places.device)  # [P, L]
        weights = {decay: decay ** age.clamp(min=0).float() * (age >= 0) for decay in decays}
        bags = places[row]
        return {
            decay: F.embedding_bag(bags, inverse, per_sample_weights=weight, mode="sum")
            for decay, weight in weights.items()
        }

    @torch.no_grad()
    def by_event(self, items: Tensor, weights: Tensor, columns: Tensor) -> Tensor:
        """What each event of one history adds to the scores of `columns` [N] after its last one: [L, N].

        items: [L]; weights: [2] of the short and the long reading. The sum over the events is what `forward` gives.
        """
        places, asked = self.place[items], self.place[columns]
        age = torch.arange(len(items) - 1, -1, -1, device=items.device).float()
        scale = torch.exp(self.log_scale) / self.unit * weights
        weight = scale[0] * SHORT_DECAY**age + scale[1] * len(items) ** -0.5  # [L]
        there = asked < len(self.items)
        asked = asked.clamp(max=len(self.items) - 1)
        strength = self.inverse[places[:, None], asked] / -self.inverse.diagonal()[asked]  # [L, N]
        strength = (strength + (places[:, None] == asked)) * there  # no item is its own neighbour
        return weight[:, None] * strength

    def _own_weight(self, places: Tensor, row: Tensor, at: Tensor, decay: float) -> Tensor:
        age = at[:, None] - torch.arange(places.shape[1], device=places.device)
        weight = decay ** age.clamp(min=0).float() * (age >= 0)
        out = torch.zeros(len(row), len(self.items) + 1, device=places.device)
        return out.scatter_add_(1, places[row], weight)[:, :-1]
