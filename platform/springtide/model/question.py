"""What one request asks of the catalogue, taken apart so that any of its rows can be scored without the others.

The same scores as FusionModel.logits_at gives the whole catalogue: products of a query and the keys of the rows, what
the counting channels say, what the rows borrow of that, and how near their texts are to a free-text query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from springtide.model.batch import Batch
from springtide.model.fusion import FusionModel, Interest

NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Question:
    """One request to a catalogue of I items. Made by `ask` or, without a history, by itself."""

    products: dict[str, tuple[Tensor, Tensor]]  # part -> (query [K], keys [I, K]); see FusionModel.products
    counted: Tensor | None = None  # [I] of transitions and neighbours, 0 of most; None: of all
    touched: np.ndarray = field(default_factory=lambda: NOTHING)  # [n] rows that those may speak for, ascending
    recent: float = 0.0  # weight of recent popularity,
    level: Tensor | None = None  # and that popularity at the time of the request, [I]
    text: np.ndarray | None = None  # [D] a free-text query times its weight
    damping: float = 0.0  # times log(1 + events) that the policies take off every score


def ask(model: FusionModel, batch: Batch, interest: Interest, vectors: Tensor, moments: Tensor) -> list[Question]:
    """The questions of P moments [P, 2] of histories that have been read; vectors: [I, dim] of `item_vectors()`."""
    channels = model.channels
    row, at = moments.unbind(1)
    weight = dict(zip(channels.names, interest.weights[interest.index(moments)].unbind(-1), strict=True))
    products = model.products(batch, interest, vectors, moments)
    counted, touched = _counted(model, batch, weight, moments)
    recent, levels = torch.zeros(len(row)), None
    if channels.recent is not None:
        bucket, there = channels.recent.bucket(batch.now[row, at])
        recent, levels = weight["recent_popularity"] * there, [channels.recent.table[place] for place in bucket]
    return [
        Question(
            {name: (query[place], keys) for name, (query, keys) in products.items()},
            None if counted is None else counted[place],
            touched[place],
            float(recent[place]),
            None if levels is None else levels[place],
        )
        for place in range(len(row))
    ]


def _counted(
    model: FusionModel, batch: Batch, weight: dict[str, Tensor], moments: Tensor
) -> tuple[Tensor | None, list[np.ndarray]]:
    """What transitions and neighbours say of the catalogue [P, I], and of which rows they may say something."""
    memory, neighbours = model.channels.memory, model.channels.neighbours
    row, at = moments.unbind(1)
    total, touched = None, [[NOTHING] for _ in range(len(row))]
    if memory is not None:
        back = at[:, None] - torch.arange(memory.recent)  # [P, J]
        recent = batch.items[row[:, None], back.clamp(min=0)]
        pair = torch.stack([weight["transitions_short"], weight["transitions_long"]], 1)
        total = memory(recent, back >= 0, pair)
        for place in range(len(row)):
            followed = recent[place, back[place] >= 0]
            held = memory.slots[followed] < len(memory.counts) - 1
            touched[place].append(memory.successors[followed][held].numpy())
    if neighbours is not None and len(neighbours.items):
        pair = torch.stack([weight["neighbours_short"], weight["neighbours_long"]], 1)
        said = neighbours.among(batch.items, moments, pair)
        if total is None:
            total = said.new_zeros(len(row), neighbours.catalogue)
        total.index_add_(1, neighbours.items, said)
        if len(neighbours.cosines.items):
            neighbours.add_beyond(total, batch.items, moments, pair)
        for place, rows in enumerate(touched):
            rows.append(neighbours.items.numpy())
            rows.append(neighbours.cosines.heard(batch.items[row[place], : at[place] + 1]).numpy())
    return total, [_distinct(rows, model.channels.log_popularity.shape[0]) for rows in touched]


def _distinct(rows: list[np.ndarray], catalogue: int) -> np.ndarray:
    """Each of these catalogue rows once, ascending; by marks, as a long history names hundreds of thousands."""
    there = np.zeros(catalogue, bool)
    for some in rows:
        there[some] = True
    return np.flatnonzero(there)


@torch.inference_mode()
def score_rows(
    question: Question, rows: np.ndarray, model: FusionModel, texts: np.ndarray | None, popularity: np.ndarray
) -> np.ndarray:
    """Scores [N] float32 of distinct catalogue rows [N] int64.

    texts: [I, D] the encoder's; popularity: [I] events.
    """
    columns = torch.from_numpy(rows)
    total = torch.zeros(len(rows))
    for query, keys in question.products.values():
        total += torch.mv(keys.index_select(0, columns), query)
    total += _of_counts(question, columns)
    borrowing = model.channels.borrowing
    if borrowing is not None and (question.counted is not None or question.recent):
        place, lenders, shares = borrowing.shares(columns)
        total.index_add_(0, place, (shares * _of_counts(question, lenders)).sum(1))
    scores: np.ndarray = total.numpy()
    if question.text is not None and texts is not None:
        scores += texts[rows] @ question.text
    if question.damping:
        scores -= np.float32(question.damping) * np.log1p(popularity[rows]).astype(np.float32)
    return scores


def _of_counts(question: Question, rows: Tensor) -> Tensor:
    """What the counting channels that can be lent say of rows of any shape."""
    total = torch.zeros(rows.shape)
    if question.counted is not None:
        total += question.counted.take(rows)
    if question.level is not None and question.recent:
        total += question.recent * question.level.take(rows)
    return total


def part_names(model: FusionModel) -> tuple[str, ...]:
    """The parts of the scores that are a product with something fixed of the item, in the order of `key_parts`."""
    channels = model.channels
    wanted = {
        "network": True,
        "text": channels.by_text,
        "popularity": True,  # policies may damp it in a model that has no such channel
        "damping": bool(channels.damping),
        "newness": bool(channels.newness),
        "lift": bool(channels.lift_from),
        "recent": channels.recent is not None,
    }
    return tuple(name for name, there in wanted.items() if there)


def key_parts(model: FusionModel, vectors: Tensor) -> list[np.ndarray]:
    """The keys [I, K] float32 of each of `part_names`.

    Recent popularity is that of now, with what is borrowed of it. The other counts depend on the history.
    """
    channels = model.channels
    found = {
        "network": vectors,
        "text": channels.text,
        "popularity": channels.log_popularity[:, None],
        "damping": channels.excess[:, None],
        "newness": channels.untaken[:, None],
        "lift": channels.lift[:, None],
    }
    if channels.recent is not None:
        level = channels.recent.table[-1]
        lending = None if channels.borrowing is None else channels.borrowing.lending()
        lent = 0 if lending is None else torch.from_numpy(lending.lent(level[None].numpy())[0])
        found["recent"] = (level + lent)[:, None]
    return [found[name].detach().numpy() for name in part_names(model)]


def query_parts(question: Question, parts: Sequence[str], widths: Sequence[int]) -> list[np.ndarray]:
    """The question in the terms of `key_parts`: [K] float32 for each of `parts` of these widths."""
    found = {name: query.numpy() for name, (query, _) in question.products.items()}
    found["recent"] = np.array([question.recent], np.float32)
    found["popularity"] = found.get("popularity", np.zeros(1, np.float32)) - np.float32(question.damping)
    return [found.get(name, np.zeros(width, np.float32)) for name, width in zip(parts, widths, strict=True)]
