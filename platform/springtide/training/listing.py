"""What a trained model would list for users of the log: scores of what may be recommended, in blocks of users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from springtide.model.batch import Batch, History, scoring_batch
from springtide.model.fusion import FusionModel
from springtide.ranks import block_size, hide

BATCH, LIST = 128, 10  # histories scored at once, fewer of a large catalogue; items of a list


@torch.no_grad()  # not inference mode: the model may go on training
def catalogue_scores(
    model: FusionModel, histories: Sequence[History], asked_at: int | None, exclude_seen: bool
) -> Iterator[tuple[np.ndarray, Batch, torch.Tensor]]:
    """Scores [C, I] of blocks of the histories, -inf for what is no candidate; with their batch and its moments [C, 2].

    asked_at: ms at which all of them are asked, None = with their last event. The model is left in evaluation mode.
    """
    model.eval()
    vectors = model.item_vectors()
    device = vectors.device
    step = block_size(BATCH, len(vectors))
    for begin in range(0, len(histories), step):
        block = histories[begin : begin + step]
        now = None if asked_at is None else np.full(len(block), asked_at, np.int64)
        batch = scoring_batch(block, model.config.long_window, now).to(device)
        last = batch.mask.sum(1) - 1
        moments = torch.stack([torch.arange(len(block), device=device), last], 1)
        scores = model.logits_at(batch, model.interest(batch, vectors, last), vectors, moments).cpu().numpy()
        exclude(scores, model, block, exclude_seen)
        yield scores, batch, moments


def exclude(scores: np.ndarray, model: FusionModel, histories: Sequence[History], exclude_seen: bool) -> None:
    """Set -inf, in place, for what was neither trained nor described, as a Recommender does, and for what was seen."""
    items = model.item_vectors
    scores[:, ~(items.known | items.text.any(1)).cpu().numpy()] = -np.inf
    if exclude_seen:
        hide(scores, [history.items for history in histories])
