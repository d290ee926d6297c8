"""Whose next events a training run is judged by, and whose histories its choices are made with."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow.parquet as pq

from springtide.config import Settings
from springtide.data.prepared import Prepared
from springtide.model.batch import History
from springtide.training.sampling import Sampling
from springtide.training.sequences import epoch_batches, from_table, validated_users, validation_cases
from springtide.training.tabulate import JUDGED_USERS

log = logging.getLogger(__name__)
MANY_REPEATS = 0.05  # share of the validation targets that a user had taken before, above which it is told


def holdout_share(settings: Settings, prepared: Prepared) -> float:
    """The share of users to hold out, if the split's own validation part asks nobody with a history."""
    asked = prepared.report["split"]["valid"] and some_cases(prepared, 0.0, limit=1)
    return 0.0 if asked else settings.train.validation_share


def some_cases(prepared: Prepared, share: float, limit: int = JUDGED_USERS) -> list[tuple[History, int]]:
    """Validation cases enough to choose a setting by, from the first files on."""
    cases: list[tuple[History, int]] = []
    for file in prepared.sequence_files:
        if len(cases) < limit:
            cases += validation_cases(from_table(pq.read_table(file), share), limit - len(cases))
    return cases


def latest_histories(settings: Settings, prepared: Prepared, limit: int) -> list[History]:
    """What users that a model of this log is validated on have done by now, validation events included."""
    share = holdout_share(settings, prepared)
    histories: list[History] = []
    for file in prepared.sequence_files:
        if len(histories) == limit:
            break
        table = pq.read_table(file)
        validated, now = from_table(table, share), from_table(table, share, refit=True)
        users = validated_users(validated, limit - len(histories))
        histories += [now.history(user, int(now.train_end[user])) for user in users]
    return histories


def can_train(prepared: Prepared, share: float) -> bool:
    """Whether anybody has an item to predict after another training event."""
    for file in prepared.sequence_files:
        batches = epoch_batches(from_table(pq.read_table(file), share), Sampling(200, 256, 50_000), (0,))
        if any(bool((batch.targets >= 0).any()) for batch in batches):
            return True
    return False


def warn_of_repeats(cases: list[tuple[History, int]]) -> None:
    """Tell where leaving out what was seen leaves out what is asked for, as where a purchase follows a view."""
    repeated = sum(bool(np.isin(target, history.items)) for history, target in cases)
    if repeated > MANY_REPEATS * len(cases):
        log.warning(
            "%d of %d validation targets are items that their user had taken before, which data.exclude_seen leaves "
            "out, so they can only be missed; set data.exclude_seen to false where items are taken again, or "
            "data.target_actions to what is worth predicting",
            repeated, len(cases),
        )  # fmt: skip
