"""A sample of scores that travels in the bundle: whoever loads the model must score the same, or not serve it.

Checksums say that the files are the ones written; the sample says that this code, on this machine and device, still
makes the same of them. Its histories are drawn from the catalogue at random, so it holds nothing of any user.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from springtide.errors import SpringtideError
from springtide.model.batch import History
from springtide.model.recommender import Recommender

Json = dict[str, Any]
CASES = 32
TOP = 20  # items of each case whose scores are kept
LONGEST = 40  # events
QUERY_EVERY = 4  # each fourth case also asks in words: with the text vector of an item in place of an encoder's
TOLERANCE = 1e-3  # of the greatest score of the case
_DAY_MS = 86_400_000
_EPOCH_MS = 1_600_000_000_000  # where a log's end is not known


def sample(recommender: Recommender, end: int | None = None, seed: int = 0) -> Json:
    """Random histories as {"cases": [{events, now, query_item?, items, scores}]} with their best items and scores.

    end: ms, when the log ended, as the times of the events matter to recent popularity. The same catalogue and seed
    give the same histories.
    """
    rng = np.random.default_rng(seed)
    drawn = _draw(recommender, rng, end if end and end > _DAY_MS * 365 else _EPOCH_MS)
    cases = []
    for number, case in enumerate(drawn):
        if recommender.text_vectors is not None and number % QUERY_EVERY == 0:
            case["query_item"] = recommender.item_ids[int(rng.integers(len(recommender.item_ids)))]
        logits = _score(recommender, case)
        rows, values = recommender.top_k(logits[None], TOP)
        keep = np.isfinite(values[0])
        case["items"] = [recommender.item_ids[row] for row in rows[0][keep].tolist()]
        case["scores"] = values[0][keep].tolist()
        cases.append(case)
    return {"cases": cases}


def check(recommender: Recommender, kept: Json, where: str) -> float:
    """Score the sample again and return the greatest deviation, relative to the greatest score of its case.

    Raises SpringtideError if it exceeds TOLERANCE or the sample names what the catalogue does not have.
    """
    worst = 0.0
    try:
        for number, case in enumerate(kept["cases"]):
            logits = _score(recommender, case)[[recommender.index[item_id] for item_id in case["items"]]]
            scores = np.asarray(case["scores"], np.float64)
            apart = float(np.max(np.abs(logits - scores), initial=0.0) / max(1.0, np.abs(scores).max(initial=0.0)))
            if not apart <= TOLERANCE:  # a NaN must not pass
                raise SpringtideError(
                    f"{where} scores otherwise than when it was written: sample {number} is off by {apart:.2g} of its "
                    f"greatest score, {TOLERANCE:g} is allowed; load it with the version that wrote it, or train again"
                )
            worst = max(worst, apart)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SpringtideError(f"{where}: parity.json cannot be read ({error!r}); write the bundle again") from None
    return worst


def _draw(recommender: Recommender, rng: np.random.Generator, end: int) -> Iterator[Json]:
    """Histories of every length up to LONGEST over items by their popularity, with gaps from seconds to weeks."""
    lengths = np.linspace(1, LONGEST, CASES).astype(int)
    weights = recommender.popularity + 1.0
    rows = rng.choice(len(weights), int(lengths.sum()), p=weights / weights.sum())
    for part, length in zip(np.split(rows, lengths.cumsum()[:-1]), lengths.tolist(), strict=True):
        gaps = np.exp(rng.uniform(np.log(1e3), np.log(7 * _DAY_MS), length + 1)).astype(np.int64)
        times = end - gaps[::-1].cumsum()[::-1]
        events: list[Json] = []
        for row, time in zip(part.tolist(), times[:-1].tolist(), strict=True):
            event = {"item_id": recommender.item_ids[row], "timestamp": time}
            if len(recommender.actions) > 1:
                event["action"] = recommender.actions[int(rng.integers(1, len(recommender.actions)))]
            if rng.random() < 0.5:
                event["rating"] = float(rng.integers(1, 6))
            events.append(event)
        yield {"events": events, "now": end}


def _score(recommender: Recommender, case: Json) -> np.ndarray:
    """[I] float32 logits of one case."""
    history: History = recommender.history(case["events"])[0]
    queries = None
    if "query_item" in case and recommender.text_vectors is not None:
        queries = recommender.text_vectors[recommender.index[case["query_item"]]][None]
    return recommender.score([history], queries, np.array([case["now"]], np.int64)).logits[0]
