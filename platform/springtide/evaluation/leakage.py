"""Checks that nothing of the future is in the training part. Exact, over every event; pure arrays, no files, no Ray."""

from __future__ import annotations

from typing import Any

import numpy as np

from springtide.errors import SpringtideError
from springtide.evaluation.ranking import FlatSequences
from springtide.schemas import TEST, TRAIN, VALID

_NAMES = {TRAIN: "training", VALID: "validation", TEST: "test"}


def check(events: FlatSequences, split: str, fitted: int = TRAIN) -> dict[str, Any]:
    """What was checked and found. Raises SpringtideError, naming a user, if the split leaks.

    fitted: the last part that the model has learned from.

    - No test event is also in what was learned from: same user, item, time, action and rating. An event that differs in
      action or rating only is another event of the same moment, which a log may hold; under `temporal` it cannot be.
    - No history goes back in time, and none comes back to an earlier part.
    - Under `temporal`, every training event is before every validation and test event, whoever's they are.
    """
    _check_order(events)
    copies, same_moment = _copies(events, fitted)
    learned = "training" if fitted == TRAIN else "training or validation"
    if copies.size:
        raise SpringtideError(
            f"the test event of user {_user(events, int(copies[0]))} on catalogue row {events.items[copies[0]]} is in "
            f"the {learned} part too ({copies.size} such events), so the split leaks; run prepare and train again"
        )
    found: dict[str, Any] = {
        "test_events": int((events.parts == TEST).sum()),
        "learned_from": learned,
        "test_events_in_training": 0,
        "same_moment_in_training": same_moment,
        "histories_out_of_order": 0,
    }
    if split == "temporal":
        found |= {"training_events_after_the_cut": 0, "cuts": _check_cuts(events)}
    return found


def _check_order(events: FlatSequences) -> None:
    same = np.diff(events.users) == 0
    wrong = np.flatnonzero(same & ((np.diff(events.timestamps) < 0) | (np.diff(events.parts) < 0)))
    if wrong.size:
        raise SpringtideError(
            f"the history of user {_user(events, int(wrong[0]))} goes back in time or to an earlier part at event "
            f"{wrong[0] + 2 - events.offsets[events.users[wrong[0]]]}, so the split leaks; run prepare and train again"
        )


def _copies(events: FlatSequences, fitted: int) -> tuple[np.ndarray, int]:
    """Test events that are in the parts up to `fitted` too; how many more share user, item and time with one there."""
    people = events.user_ids.dictionary_encode().indices.to_numpy()[events.users].astype(np.int64)  # ids, not rows
    pairs = people * events.catalogue + events.items
    tested, trained = np.flatnonzero(events.parts == TEST), np.flatnonzero(events.parts <= fitted)
    trained = trained[np.isin(pairs[trained], pairs[tested])]
    tested = tested[np.isin(pairs[tested], pairs[trained])]  # now few: the same user took the same item before
    rows = np.concatenate([trained, tested])
    ratings = np.where(np.isnan(events.ratings), np.float32(np.nan), events.ratings).view(np.int32)  # one kind of NaN
    moment = [pairs[rows], events.timestamps[rows]]

    def twice(columns: list[np.ndarray]) -> np.ndarray:
        _, code = np.unique(np.column_stack(columns), axis=0, return_inverse=True)
        code = code.ravel()
        return tested[np.isin(code[len(trained) :], code[: len(trained)])]

    copies = twice([*moment, events.actions[rows], ratings[rows]])
    return copies, len(twice(moment)) - len(copies)


def _check_cuts(events: FlatSequences) -> dict[str, int]:
    """The first millisecond of each later part."""
    cuts: dict[str, int] = {}
    for part in (VALID, TEST):
        times = events.timestamps[events.parts == part]
        if not times.size:
            continue
        cuts[_NAMES[part]] = int(times.min())
        late = np.flatnonzero((events.parts < part) & (events.timestamps >= times.min()))
        if late.size:
            raise SpringtideError(
                f"a {_NAMES[int(events.parts[late[0]])]} event of user {_user(events, int(late[0]))} is not before the "
                f"first {_NAMES[part]} event, so the temporal split leaks; run prepare and train again"
            )
    return cuts


def _user(events: FlatSequences, row: int) -> str:
    return str(events.user_ids[int(events.users[row])])
