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
from springtide.ranks import block_size, gains, hide, places, top_k

TRIED = tuple(step / 20 for step in range(17))  # at 0.8 each of three logs lost 3 to 6 %
ENOUGH = 1.5  # times as many items as the neighbours' own lists hold, which are narrow: they favour what is popular too
FREE = 0.25  # share of the price that is paid for lists that reach enough of the catalogue already
BATCH, LIST = 64, 10  # cases scored at once, fewer of a large catalogue


def choose_damping(
    model: FusionModel, cases: list[tuple[History, int]], asked_at: int | None, exclude_seen: bool, cost: float
) -> float:
    """How much of TRIED is taken off: as little as lets lists reach ENOUGH times what those of its neighbours alone do.

    That may cost a share `cost` of the validation NDCG, and is left at the strongest damping that does if it is not
    reached. What costs a quarter of it is taken in any case, and all of it by a model without that channel.

    The NDCG is that without a cut-off, which every rank tells and not the first ten alone. NDCG@10 has a say as well,
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
    parts = [_judge(model, cases[begin : begin + step], asked_at, exclude_seen) for begin in range(0, len(cases), step)]
    gained = np.concatenate([gains for gains, _ in parts], 2)  # [TRIED, 2, C]
    reached = np.any([listed for _, listed in parts], 0).sum(1)  # [TRIED + 1] items
    lost = gained[0] - gained
    loss, error = lost.mean(2), lost.std(2) / len(cases) ** 0.5
    chance = 2 * error * [1, 0]
    base = gained[0].mean(1)
    if not base[0] > 0:
        return 0.0

    def strongest(share: float) -> int:
        return int(np.flatnonzero((loss - chance <= share * base).all(1)).max())

    enough = np.flatnonzero(reached[:-1] >= ENOUGH * reached[-1]).min(initial=len(TRIED))
    return TRIED[max(strongest(FREE * cost), min(strongest(cost), enough))]


@torch.inference_mode()
def _judge(
    model: FusionModel, cases: list[tuple[History, int]], asked_at: int | None, exclude_seen: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Of C cases: NDCG@10 and NDCG without a cut-off at every damping [len(TRIED), 2, C]; and which items their lists
    hold then, and last those of the neighbours of the last events alone [len(TRIED) + 1, I].

    The last are all items where there is no such channel.
    """
    histories = [history for history, _ in cases]
    now = None if asked_at is None else np.full(len(cases), asked_at, np.int64)
    batch = scoring_batch(histories, model.config.long_window, now)
    vectors = model.item_vectors()
    moments = torch.stack([torch.arange(len(cases)), batch.mask.sum(1) - 1], 1)
    logits = model.logits_at(batch, model.interest(batch, vectors), vectors, moments).numpy()
    items = model.item_vectors  # what was neither trained nor described is no candidate for a Recommender either
    never = ~(items.known | items.text.any(1)).numpy()

    def candidates(scores: np.ndarray) -> np.ndarray:
        scores[:, never] = -np.inf
        if exclude_seen:
            hide(scores, [history.items for history in histories])
        return scores

    logits = candidates(logits)
    targets, excess = np.array([target for _, target in cases]), model.channels.excess.numpy()
    place, listed = np.empty((len(TRIED), len(cases)), np.int64), np.ones((len(TRIED) + 1, len(never)), bool)
    for number, damping in enumerate(TRIED):
        damped = logits - np.float32(damping) * excess
        place[number], listed[number] = places(damped, targets), _listed(damped)
    if model.channels.neighbours is not None and len(model.channels.neighbours.items):
        short = torch.tensor([1.0, 0.0]).expand(len(cases), 2)
        alone = model.channels.neighbours(batch.items, moments, short)
        listed[-1] = _listed(candidates(alone.numpy()))
    gain = gains(place)
    return np.stack([gain * (place <= LIST), gain], 1), listed


def _listed(scores: np.ndarray) -> np.ndarray:
    """[I] bool: the items that are among the ten best of a row of scores [C, I]."""
    listed = np.zeros(scores.shape[1], bool)
    best = top_k(scores, LIST)
    listed[best[best >= 0]] = True
    return listed
