"""Two optional heads beside the next-item loss: what a user would rate an item, and whether they would take it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEGATIVES = 4  # drawn for every moment of the click head


class PairHead(nn.Module):
    """One number for a user and an item: the item's own level plus a small net over [user; item; user * item]."""

    def __init__(self, dim: int, items: int, dropout: float) -> None:
        super().__init__()
        self.level = nn.Embedding(items, 1)
        nn.init.zeros_(self.level.weight)
        self.net = nn.Sequential(nn.Linear(3 * dim, dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim, 1))

    @torch.no_grad()
    def grow(self, items: int) -> None:
        """Add items of the mean level, until there are so many."""
        self.level.weight = nn.Parameter(F.pad(self.level.weight, (0, 0, 0, items - len(self.level.weight))))

    def forward(self, user: Tensor, items: Tensor, vectors: Tensor) -> Tensor:
        """user [..., dim], items [...] catalogue rows, vectors [I, dim] -> [...]."""
        item = vectors[items]
        return (self.net(torch.cat([user, item, user * item], -1)) + self.level(items))[..., 0]


def rating_loss(head: PairHead, user: Tensor, items: Tensor, ratings: Tensor, vectors: Tensor) -> Tensor:
    """Summed squared error. user [P, dim], items [P], ratings [P] standardised; NaN = none given, which counts 0."""
    given = ~ratings.isnan()
    return ((head(user[given], items[given], vectors) - ratings[given]) ** 2).sum()


def click_loss(
    head: PairHead, user: Tensor, items: Tensor, vectors: Tensor, known: Tensor, seen: Tensor, row: Tensor
) -> Tensor:
    """Summed cross-entropy of the item taken against NEGATIVES random others, each side weighing one half.

    user [P, dim], items [P], vectors [I, dim], known [I] bool: may be drawn, seen [B, L]: the items of the
    histories, -1 = pad, row [P]: which history. A draw that hits a seen item, or the item itself, counts nothing.
    """
    pool = known.nonzero()[:, 0]
    drawn = pool[torch.randint(len(pool), (len(items), NEGATIVES), device=items.device)]  # [P, NEGATIVES]
    fair = ~(seen[row][:, None] == drawn[:, :, None]).any(2) & (drawn != items[:, None])
    taken = F.softplus(-head(user, items, vectors))
    refused = F.softplus(head(user[:, None].expand(-1, NEGATIVES, -1), drawn, vectors)) * fair
    return (taken + refused.sum(1) / fair.sum(1).clamp(min=1)).sum() / 2
