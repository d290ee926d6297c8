"""How much popularity is damped: lists that reach more of the catalogue, for little in accuracy.

Subtracting d * log popularity from every score spreads recommendations over more items; those that nobody took yet
have none, and are left where they are. Up to a point that costs no accuracy, because a softmax learns to favour what is
popular more than a list of ten needs; validation shows the point.
"""

from __future__ import annotations

import numpy as np
import torch

from springtide.model.batch import History, scoring_batch
from springtide.model.fusion import FusionModel
from springtide.ranks import block_size, gains, hide, places

TRIED = tuple(step / 20 for step in range(17))  # at 0.8 each of three logs lost 3 to 6 %
BATCH, LIST = 64, 10  # cases scored at once, fewer of a large catalogue


def choose_damping(
    model: FusionModel, cases: list[tuple[History, int]], asked_at: int | None, exclude_seen: bool, cost: float
) -> float:
    """The strongest damping of TRIED that costs at most a share `cost` of the validation NDCG.

    That is the NDCG without a cut-off, which every rank tells and not the first ten alone. NDCG@10 has a say as well,
    but so few cases are in a list of ten that its difference is mostly chance (on a log of 900 users a standard error
    of 2 to 6 %): it must cost no more than the same share and two standard errors.

    Only items that training knows count here: those that nobody took yet rise with every damping of the others, which
    would hide what it costs. cases: (history, item that came next); asked_at: ms at which all of them are asked,
    None = with their last event. Returns 0 without cases, and where no case is in its list of ten.
    """
    known = model.item_vectors.known.tolist()
    cases = [(history, target) for history, target in cases if known[target]]
    if not cases or not cost:
        return 0.0
    model.eval()
    step = block_size(BATCH, len(known))
    parts = [_gains(model, cases[begin : begin + step], asked_at, exclude_seen) for begin in range(0, len(cases), step)]
    gained = np.concatenate(parts, 2)  # [TRIED, 2, C]
    lost = gained[0] - gained
    loss, error = lost.mean(2), lost.std(2) / len(cases) ** 0.5
    chance = 2 * error * [1, 0]
    base = gained[0].mean(1)
    within = np.flatnonzero((loss - chance <= cost * base).all(1))
    return TRIED[within.max()] if base[0] > 0 else 0.0


@torch.inference_mode()
def _gains(
    model: FusionModel, cases: list[tuple[History, int]], asked_at: int | None, exclude_seen: bool
) -> np.ndarray:
    """[len(TRIED), 2, C]: NDCG@10 and NDCG without a cut-off of C cases."""
    histories = [history for history, _ in cases]
    now = None if asked_at is None else np.full(len(cases), asked_at, np.int64)
    batch = scoring_batch(histories, model.config.long_window, now)
    vectors = model.item_vectors()
    moments = torch.stack([torch.arange(len(cases)), batch.mask.sum(1) - 1], 1)
    logits = model.logits_at(batch, model.interest(batch, vectors), vectors, moments).numpy()
    items = model.item_vectors  # what was neither trained nor described is no candidate for a Recommender either
    logits[:, ~(items.known | items.text.any(1)).numpy()] = -np.inf
    if exclude_seen:
        hide(logits, [history.items for history in histories])
    targets, excess = np.array([target for _, target in cases]), model.channels.excess.numpy()
    place = np.stack([places(logits - np.float32(damping) * excess, targets) for damping in TRIED])
    gain = gains(place)
    return np.stack([gain * (place <= LIST), gain], 1)
