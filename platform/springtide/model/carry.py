"""Weights for another catalogue: those of a trained model, in the rows that its items and actions have in a new log."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from springtide.model.fusion import FusionModel

OF_ITEMS = ("item_vectors.ids.weight", "rating_head.level.weight", "click_head.level.weight")
OF_ACTIONS = ("event_input.action.weight",)


def rows_in(old: list[str], new: list[str]) -> np.ndarray:
    """[len(new)] int64: the place of each name in `old`, -1 = not there."""
    places = {name: place for place, name in enumerate(old)}
    return np.array([places.get(name, -1) for name in new], np.int64)


@torch.no_grad()
def carry_over(model: FusionModel, trained: Mapping[str, Tensor], items: np.ndarray, actions: np.ndarray) -> None:
    """Give `model`, fresh and of the new log, the parameters of a trained one; its buffers are of its own counts.

    trained: state of a model of the same settings; items: [I] its row of each item, -1 = none; actions: the same of
    [A] actions. A new item, or one that was never taken, starts as a model sees one whose ID is hidden: with its text
    alone. A new action keeps what was drawn for it. Raises ValueError if the models differ in more than rows.
    """
    known = trained["item_vectors.known"].cpu().numpy()
    items = np.where((items >= 0) & known[items], items, -1)
    for name, weight in model.named_parameters():
        if name not in trained:
            raise ValueError(f"the trained model has no {name}")
        old = trained[name]
        by_row = name in OF_ITEMS or name in OF_ACTIONS
        if old.shape[by_row:] != weight.shape[by_row:]:
            raise ValueError(f"{name} is {list(old.shape)} in the trained model and {list(weight.shape)} in this one")
        if by_row:
            rows = torch.from_numpy(items if name in OF_ITEMS else actions)
            fresh = torch.zeros_like(weight) if name in OF_ITEMS else weight
            old = torch.where((rows >= 0)[:, None], old[rows.clamp(min=0)], fresh)
        weight.copy_(old)
