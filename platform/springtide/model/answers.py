"""What a Recommender answers and takes: plain arrays with names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch


@dataclass(frozen=True)
class Scores:
    """What the model thinks of the whole catalogue for B requests."""

    logits: np.ndarray  # [B, I] float32, -inf = can never be recommended
    gate_short: np.ndarray  # [B] float32, mean weight of the short branch, NaN for an empty history


@dataclass(frozen=True)
class Interests:
    """What one history of n events says of its owner."""

    attention_long: np.ndarray  # [n] weights of the events in the long branch, sum 1
    attention_short: np.ndarray  # [n] in the short branch
    gate_short: float
    items_long: np.ndarray  # [10] catalogue rows nearest the long branch's interest, best first; none without a branch
    items_short: np.ndarray  # [10] nearest the short branch's
    channels: dict[str, float]  # weight of each counting channel, in the order of Channels.names


@dataclass(frozen=True)
class Reasons:
    """Why N items have their scores after a history of n events."""

    shares: dict[str, np.ndarray]  # of each name in explain.SHARES: [N] float32; they sum to the score
    through: np.ndarray  # [n, N] float32: how much of memory + text came through each event


@dataclass(frozen=True)
class NewItem:
    """An item to be added, or an item of the catalogue with another title, other categories or another text."""

    item_id: str
    title: str
    categories: list[str]
    text_vector: np.ndarray  # [D] float32, of the encoder, normalised; zero = no text
    features: np.ndarray  # [width] float32, see text.features.TextFeatures


@dataclass(frozen=True)
class Observed:
    """New events, E in all, and the transition counts with them."""

    items: np.ndarray  # [E]
    actions: np.ndarray  # [E]
    timestamps: np.ndarray  # [E] ms
    transitions: sp.csr_matrix | None  # [I, I]
    tables: dict[str, torch.Tensor] | None  # see TransitionMemory.arrange


@dataclass(frozen=True)
class Judgement:
    """What the heads say of given items; None where the model has no such head."""

    ratings: np.ndarray | None  # [B, N] float32, in the log's units
    clicks: np.ndarray | None  # [B, N] float32 probability of taking the item rather than another at random
