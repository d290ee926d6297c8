"""Items that were counted seldom or never borrow the counted scores of the items whose texts are nearest to theirs.

An item of n training events borrows with weight kappa / (n + kappa), so a new one in full and a popular one hardly;
each lender counts by exp((cosine - 1) / tau), as a share where together they say more than one perfect lender would.
kappa, tau and the scale of the whole are learned; ID dropout, which hides the counts of random items for a step, shows
the model in training what it will be asked about new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LENDERS = 8  # most items that one borrows from
CANDIDATES = 20_000  # lenders are among so many of the most popular items: a million items still take only minutes
BORROWERS_BELOW = 10  # training events; an item with more speaks for itself
BLOCK = 2048  # rows of cosines held at once


def nearest_by_text(
    text: np.ndarray, popularity: np.ndarray, asking: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The items that each could borrow from: (catalogue rows [I, M] int64, cosines [I, M] float32, best first).

    text: [I, D] whitened vectors, zero row = no text; popularity: [I] training events; asking: catalogue rows that are
    to be answered for, in their place of [I]. No item is its own lender, and cosine -1 marks a place that is empty.
    M <= LENDERS.
    """
    unit = torch.from_numpy(text / np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-12)).float()
    described = np.abs(text).sum(1) > 0
    ranked = np.argsort(-popularity, kind="stable")[:CANDIDATES]
    lenders = torch.from_numpy(ranked[(popularity[ranked] > 0) & described[ranked]])
    count = min(LENDERS, len(lenders))
    asking = np.arange(len(text)) if asking is None else asking
    rows, cosines = np.zeros((len(asking), count), np.int64), np.full((len(asking), count), -1, np.float32)
    for places in torch.from_numpy(np.flatnonzero(described[asking])).split(BLOCK) if count else ():
        some = torch.from_numpy(asking)[places]
        cosine = unit[some] @ unit[lenders].T
        cosine[some[:, None] == lenders[None]] = -1
        best, place = cosine.topk(count, dim=1)
        rows[places], cosines[places] = lenders[place].numpy(), best.numpy()
    return rows, cosines


@dataclass(frozen=True)
class Lending:
    """What every item of the catalogue borrows, as one sparse matrix over those that lend."""

    rows: np.ndarray  # [U] int64 catalogue rows of the lenders
    weights: sp.csr_matrix  # [I, U] float32

    def lent(self, counted: np.ndarray) -> np.ndarray:
        """What is added to the counted scores [P, I]: [P, I] float32."""
        lent: np.ndarray = (self.weights @ counted[:, self.rows].T).T
        return lent


class Borrowing(nn.Module):
    """See the module docstring."""

    lenders: Tensor  # [I, M] int64 catalogue rows
    cosines: Tensor  # [I, M] float32
    events: Tensor  # [I] float32 training events

    def __init__(self, popularity: Tensor) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-1.0))
        self.log_kappa = nn.Parameter(torch.tensor(0.0))
        self.log_tau = nn.Parameter(torch.tensor(-1.5))
        self.register_buffer("events", popularity.float(), persistent=False)
        self.load(np.zeros((len(popularity), 0), np.int64), np.zeros((len(popularity), 0), np.float32))

    def load(self, lenders: np.ndarray, cosines: np.ndarray) -> None:
        """Take what `nearest_by_text` found."""
        self.register_buffer("lenders", torch.from_numpy(lenders).to(self.log_scale.device), persistent=False)
        self.register_buffer("cosines", torch.from_numpy(cosines).to(self.log_scale.device), persistent=False)

    def grow(self, text: Tensor, changed: np.ndarray) -> None:
        """Take new items, who may borrow but not lend: text [I, D] of all; changed: rows whose text is another one."""
        count = len(text) - len(self.events)
        self.events = F.pad(self.events, (0, count))
        found, near = nearest_by_text(text.cpu().numpy(), self.events.cpu().numpy(), changed)
        width = self.lenders.shape[1]  # fewer than the lenders found where more items were taken since
        found, near = found[:, :width], near[:, :width]
        short = width - found.shape[1]
        rows = torch.from_numpy(changed).to(self.lenders.device)
        lenders, cosines = F.pad(self.lenders, (0, 0, 0, count)), F.pad(self.cosines, (0, 0, 0, count), value=-1)
        lenders[rows] = F.pad(torch.from_numpy(found), (0, short)).to(lenders)
        cosines[rows] = F.pad(torch.from_numpy(near), (0, short), value=-1).to(cosines)
        self.lenders, self.cosines = lenders, cosines

    def needed(self, columns: Tensor, cold: Tensor | None) -> Tensor:
        """`columns` [N] of the catalogue with the lenders of those that borrow, ascending: [N'] int64."""
        borrower = columns[self._borrows(columns, cold)]
        return torch.cat([columns, self.lenders[borrower].flatten()]).unique()

    def forward(
        self,
        counted: Tensor,
        have: Tensor | None,
        want: Tensor | None,
        cold: Tensor | None,
        silent: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Scores with what is borrowed added, [P, N] of the catalogue rows `want` (ascending; None = all).

        counted: [P, N'] of the rows `have` (None = all), with every lender among them; cold: [I] bool, items to be
        scored as if never counted; silent: (rows [n], columns [n]) of `counted` that are not lent.
        """
        items = torch.arange(len(self.events), device=counted.device) if want is None else want
        own = counted if have is None or want is None else counted[:, torch.searchsorted(have, want)]
        if cold is not None:
            own = own * ~cold[items]
        place = self._borrows(items, cold).nonzero()[:, 0]
        if not len(place) or not self.lenders.shape[1]:  # no gradient, but one all the same: DDP waits for every one
            return own + 0 * (self.log_scale + self.log_kappa + self.log_tau)
        borrower = items[place]
        lenders = self.lenders[borrower]
        if have is not None:
            lenders = torch.searchsorted(have, lenders)
        events = self.events[borrower] if cold is None else self.events[borrower] * ~cold[borrower]
        weights = self._weights(borrower, events)
        lendable = counted if silent is None else counted.index_put(silent, counted.new_zeros(()))
        lent = F.embedding_bag(lenders, lendable.T.contiguous(), per_sample_weights=weights, mode="sum")
        return own.index_add(1, place, lent.T)

    @torch.no_grad()
    def shares(self, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Who of `items` [N] borrows [n] (places in them), from which catalogue rows [n, M], and what counts [n, M]."""
        place = self._borrows(items, None).nonzero()[:, 0]
        borrower = items[place]
        return place, self.lenders[borrower], self._weights(borrower, self.events[borrower])

    def _weights(self, borrower: Tensor, events: Tensor) -> Tensor:
        """[n, M]: what each lender's score counts for items `borrower` [n] of so many `events` [n]."""
        kappa = torch.exp(self.log_kappa)
        cosines = self.cosines[borrower]
        near = torch.exp((cosines - 1) * torch.exp(-self.log_tau)) * (cosines > -1)  # -1: an empty place
        share = torch.exp(self.log_scale) * kappa / (kappa + events) / near.sum(1).clamp(min=1)
        return near * share[:, None]

    @torch.no_grad()
    def lending(self) -> Lending | None:
        """All of `forward` that does not depend on the scores; None where nobody borrows."""
        place = self._borrows(torch.arange(len(self.events), device=self.events.device), None).nonzero()[:, 0]
        if not len(place) or not self.lenders.shape[1]:
            return None
        rows, column = np.unique(self.lenders[place].cpu().numpy(), return_inverse=True)
        weights = self._weights(place, self.events[place]).cpu().numpy()
        starts = np.zeros(len(self.events) + 1, np.int32)
        starts[place.cpu().numpy() + 1] = weights.shape[1]
        matrix = sp.csr_matrix(
            (weights.ravel(), column.ravel().astype(np.int32), np.cumsum(starts, dtype=np.int32)),
            shape=(len(self.events), len(rows)),
        )
        return Lending(rows, matrix)

    def _borrows(self, items: Tensor, cold: Tensor | None) -> Tensor:
        few = self.events[items] < BORROWERS_BELOW
        return few if cold is None else few | cold[items]
