"""Named systems as settings over the model's shared parts: `model.preset` chooses one, and any setting beside it wins.

A preset is only a set of other defaults for the section `model`. `gated_fusion` is the project's own model and changes
nothing; the others are systems from the literature on long-term and short-term interest, rebuilt from these parts.
"""

from __future__ import annotations

import difflib
from typing import Any

# The network alone: no counting model beside it.
_ALONE: dict[str, Any] = dict.fromkeys(
    ("memory", "neighbours", "borrowing", "text_neighbours", "popularity", "recent_popularity"), False
)
# Two recurrent layers of 50 over what users did; `lstm` and `gru` differ in nothing but the cell.
_RECURRENT: dict[str, Any] = _ALONE | {
    "dim": 50, "text_dim": 0, "dropout": 0.2, "long_hidden": 50, "long_layers": 2, "long_pool": "last",
    "short_branch": "none",
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "gated_fusion": {},
    # Convolution -> two LSTM layers of 128 -> attention over time, beside collaborative filtering (memory, neighbours).
    "cnn_lstm_attention": {
        "long_branch": "cnn_lstm", "long_hidden": 128, "long_layers": 2, "long_pool": "attention",
        "short_branch": "none",
    },
    # Standardised running features of the behaviour -> 64 -> 64; every event updates the vector at once.
    "dynamic_mlp": _ALONE | {"long_branch": "mlp", "long_hidden": 64, "long_layers": 2, "short_branch": "none"},
    "lstm": _RECURRENT | {"long_branch": "lstm"},
    "gru": _RECURRENT | {"long_branch": "gru"},
    # Items are their text alone; `model.fusion` may also be attention or model.
    "bert_lstm": _ALONE | {
        "id_embeddings": False, "text_dim": 128, "use_rating": False, "dropout": 0.1, "long_branch": "lstm",
        "long_hidden": 128, "long_layers": 2, "long_pool": "last", "fusion": "time_decay",
    },
    # Text, behaviour and ratings fused as W1 F + W2 B + b -> LSTM -> attention over time.
    "multimodal_attention": _ALONE | {
        "event_input": "linear", "long_branch": "lstm", "long_hidden": 128, "long_pool": "attention",
        "short_branch": "none",
    },
}  # fmt: skip


def check_preset(name: str) -> str:
    """`name`, if there is such a preset. Raises ValueError with the nearest one otherwise."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no preset {name!r}; did you mean {near}?")
    return name
