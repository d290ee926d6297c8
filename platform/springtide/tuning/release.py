"""Giving back what a stopped trial's Ray Train run had reserved.

A trial that the scheduler stops dies as an actor, and the controller of its Ray Train run with it; but Ray removes a
placement group only when its creator and the whole job are gone, so the reserved CPUs would stay taken and the next
trials would wait for ever. Ray Train's own cleaner needs a dashboard and a single cluster on the machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

from springtide.training.worker import PLACEMENT_GROUP


class ReleaseWorkers(Callback):
    """Removes the placement group that a trial's workers left their id of, whichever way the trial ended."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        release(trial_folder(trial.config["runs"], trial.trial_id))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        release(trial_folder(trial.config["runs"], trial.trial_id))


def trial_folder(runs: str, trial_id: str) -> Path:
    """Where the Ray Train run of a trial lives. The name holds no time, so a restarted trial resumes."""
    return Path(runs) / f"trial-{trial_id}"


def release(folder: Path) -> None:
    """Remove the placement group named in a run's folder, if there is one; removing it twice does no harm."""
    path = folder / PLACEMENT_GROUP
    if path.exists():
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(path.read_text(encoding="utf-8")))))
        path.unlink()
