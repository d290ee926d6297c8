"""Why an item has its score: exact shares by source, and how much of it came through each past event.

The score is a sum, so nothing here is an approximation: the user vector is the sum of what the branches put into it
(`fuse.split`), and the counting channels are sums over the events of the history.
"""

from __future__ import annotations

import torch
from torch import Tensor

from springtide.model.batch import Batch
from springtide.model.channels import Channels
from springtide.model.fuse import split
from springtide.model.fusion import FusionModel, Interest
from springtide.model.neighbours import SHORT_DECAY

# long, short: the branches' parts of the user vector times the item vector. An item vector is ID row + projected text,
# and both halves of that product are the network's.
# joint: what a fusion adds of neither branch (the bias of `concat`); 0 for all other fusions.
# memory: transitions and neighbours, borrowed ones included. text: nearness of the item's text to those of the history.
# popularity: popularity and recent popularity less their damping, what is added where nobody took an item yet, and the
# lift of what nobody's list held; or what newcomers are offered, where nothing is known of the user.
# query: nearness of the item's text to the request's free text.
SHARES = ("long", "short", "joint", "memory", "text", "popularity", "query")
_SHARE_OF_CHANNEL = {
    "transitions": "memory",
    "neighbours": "memory",
    "text": "text",
    "popularity": "popularity",
    "recent_popularity": "popularity",
    "damping": "popularity",
    "newness": "popularity",
    "lift": "popularity",
}


def shares(
    model: FusionModel, batch: Batch, interest: Interest, vectors: Tensor, moments: Tensor, columns: Tensor
) -> dict[str, Tensor]:
    """The logits of distinct catalogue rows `columns` [N] at `moments` [P, 2], by share: [P, N] each.

    Their sum is `model.logits_at`. The share `query` is not there: the model does not read it.
    """
    place = interest.index(moments)
    user, gate, weights = interest.user[place], interest.gate[place], interest.weights[place]
    long, short = split(model.fuse, interest.long[place], interest.short[place], gate)
    scale = torch.exp(model.log_temperature) * model.config.dim**-0.5
    keys = vectors[columns]
    out = {"long": long, "short": short, "joint": user - long - short}
    out = {name: part @ keys.T * scale for name, part in out.items()}
    borrowing = model.channels.borrowing
    wider = columns if borrowing is None else borrowing.needed(columns, None)
    counted = model.channels.counted(batch, weights, moments, columns=wider)
    if borrowing is not None:  # linear, so each channel's part may borrow on its own
        counted = {name: borrowing(score, wider, columns, None) for name, score in counted.items()}
    for name, (query, of_item) in model.channels.products(batch, weights, moments).items():
        counted[name] = query @ of_item[columns].T
    for name, score in counted.items():
        share = _SHARE_OF_CHANNEL[name]
        out[share] = out[share] + score if share in out else score
    return out


def by_event(channels: Channels, items: Tensor, weights: Tensor, columns: Tensor) -> Tensor:
    """How much of the shares memory and text of `columns` [N] came through each event of one history: [L, N].

    items: [L] oldest first, as the model reads them; weights: [C] of the channels after the last event, in the order
    of their names. Summed over the events this is memory + text.
    """
    weight = dict(zip(channels.names, weights.unbind(), strict=True))
    asked, borrowing = columns, channels.borrowing
    columns = columns if borrowing is None else borrowing.needed(columns, None)
    total = torch.zeros(len(items), len(columns), device=items.device)
    if channels.memory is not None:
        depth = min(len(items), channels.memory.recent)
        recent = items.flip(0)[:depth]
        one_each = torch.eye(depth, dtype=torch.bool, device=items.device)
        pair = torch.stack([weight["transitions_short"], weight["transitions_long"]]).expand(depth, 2)
        said = channels.memory(recent.expand(depth, depth), one_each, pair, columns=columns)  # newest first
        total[len(items) - depth :] += said.flip(0)
    if channels.neighbours is not None and len(channels.neighbours.items):
        pair = torch.stack([weight["neighbours_short"], weight["neighbours_long"]])
        total += channels.neighbours.by_event(items, pair, columns)
    columns, total = asked, total if borrowing is None else borrowing(total, columns, asked, None)
    if channels.by_text and channels.text_scale is not None:
        age = torch.arange(len(items) - 1, -1, -1, device=items.device).float()
        short = SHORT_DECAY**age * (1 - SHORT_DECAY) / (1 - SHORT_DECAY ** len(items))
        reading = weight["text_short"] * short + weight["text_long"] / len(items)  # [L]
        near = channels.text[items] @ channels.text[columns].T
        total += torch.exp(channels.text_scale) * reading[:, None] * near
    return total
