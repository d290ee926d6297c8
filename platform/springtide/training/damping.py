"""How much popularity is damped: lists that reach more of the catalogue, for little in accuracy.

Subtracting d * log popularity from every score spreads recommendations over more items; those that nobody took yet
have none, and are left where they are. Up to a point that costs no accuracy, because a softmax learns to favour what is
popular more than a list of ten needs; validation shows the point. Counts of transitions reach much of a catalogue by
themselves, so that is how far a list is asked to reach, and no further.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from springtide.model.batch import History, scoring_batch
from springtide.model.fusion import FusionModel
from springtide.ranks import block_size, gains, hide, places, top_k

TRIED = tuple(step / 20 for step in range(17))  # at 0.8 each of three logs lost 3 to 6 %
BATCH, LIST = 64, 10  # cases scored at once, fewer of a large catalogue


def choose_damping(
    model: FusionModel, cases: list[tuple[History, int]], asked_at: int | None, exclude_seen: bool, cost: float
) -> float:
    """The weakest damping of TRIED with which lists reach as many items as transition counts alone would.

    Where none does that costs at most a share `cost` of the validation NDCG, or the model has no transitions, it is the
    strongest that costs no more. That is the NDCG without a cut-off, which every rank tells and not the first ten
    alone. NDCG@10 has a say as well, but so few cases are in a list of ten that its difference is mostly chance (on a
    log of 900 users a standard error of 2 to 6 %): it must cost no more than the same share and two standard errors.

    Only items that training knows count here: those that nobody took yet rise with every damping of the others, which
    would hide what it costs. cases: (history, item that came next); asked_at: ms at which all of them are asked,
    None = with their last event. Returns 0 without cases, and where no case is in its list of ten.
    """
    known = model.item_vectors.known.numpy()
    cases = [(history, target) for history, target in cases if known[target]]
    if not cases or not cost:
        return 0.0
    model.eval()
    step = block_size(BATCH, len(known))
    blocks = [_try(model, cases[begin : begin + step], asked_at, exclude_seen) for begin in range(0, len(cases), step)]
    gained = np.concatenate([block.gains for block in blocks], 2)  # [TRIED, 2, C]
    lost = gained[0] - gained
    loss, error = lost.mean(2), lost.std(2) / len(cases) ** 0.5
    chance = 2 * error * [1, 0]
    base = gained[0].mean(1)
    if not base[0] > 0:
        return 0.0
    strongest = int(np.flatnonzero((loss - chance <= cost * base).all(1)).max())
    reach = (np.any([block.shown for block in blocks], 0) & known).sum(1)  # [TRIED] items
    wanted = (np.any([block.counted for block in blocks], 0) & known).sum() or len(known)
    enough = np.flatnonzero(reach >= wanted)
    return TRIED[min([strongest, *enough])]


@dataclass(frozen=True)
class _Tried:
    """What every damping makes of C cases."""

    gains: np.ndarray  # [TRIED, 2, C]: NDCG@10 and NDCG without a cut-off
    shown: np.ndarray  # [TRIED, I] bool: is in a list of ten
    counted: np.ndarray  # [I] bool: is in a list of ten by transition counts alone; all False without a memory


@torch.inference_mode()
def _try(model: FusionModel, cases: list[tuple[History, int]], asked_at: int | None, exclude_seen: bool) -> _Tried:
    histories = [history for history, _ in cases]
    now = None if asked_at is None else np.full(len(cases), asked_at, np.int64)
    batch = scoring_batch(histories, model.config.long_window, now)
    vectors = model.item_vectors()
    moments = torch.stack([torch.arange(len(cases)), batch.mask.sum(1) - 1], 1)
    interest = model.interest(batch, vectors)
    logits = model.logits_at(batch, interest, vectors, moments).numpy()
    transitions = model.channels.counted(batch, interest.weights, moments).get("transitions")
    items = model.item_vectors  # what was neither trained nor described is no candidate for a Recommender either
    logits[:, ~(items.known | items.text.any(1)).numpy()] = -np.inf
    if exclude_seen:
        hide(logits, [history.items for history in histories])
    targets, excess = np.array([target for _, target in cases]), model.channels.excess.numpy()
    shown, place = np.zeros((len(TRIED), len(excess)), bool), np.zeros((len(TRIED), len(cases)), np.int64)
    for number, damping in enumerate(TRIED):
        damped = logits - np.float32(damping) * excess
        place[number], shown[number] = places(damped, targets), _listed(damped)
    counted = np.zeros(len(excess), bool)
    if transitions is not None:
        followed = transitions.numpy()
        counted = _listed(np.where((followed > 0) & (logits > -np.inf), followed, -np.inf))
    gain = gains(place)
    return _Tried(np.stack([gain * (place <= LIST), gain], 1), shown, counted)


def _listed(scores: np.ndarray) -> np.ndarray:
    """[I] bool: is among the LIST best of any row of scores [B, I]."""
    rows = top_k(scores, LIST)
    out = np.zeros(scores.shape[1], bool)
    out[rows[rows >= 0]] = True
    return out
