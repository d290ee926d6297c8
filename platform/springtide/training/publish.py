"""What a finished run leaves: its weights as a bundle, popularity damped and items lifted, and its figures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from springtide.bundle import write_bundle
from springtide.config import Settings
from springtide.data.prepared import Prepared
from springtide.text.embed import load_vectors
from springtide.training.cases import holdout_share, latest_histories, some_cases
from springtide.training.damping import choose_damping
from springtide.training.loop import Progress, told
from springtide.training.newness import choose_newness
from springtide.training.reach import choose_reach, lift_until, users_read
from springtide.training.worker import build_model, load_features

log = logging.getLogger(__name__)
UNCHANGED = {"newness": 0.0, "damping": 0.0, "reach": 0.0, "lifted": 0.0}  # see choose_scores
JUDGED_USERS = 3000  # validation users that newness and the damping of popularity are judged by
DAMPED_FOR = 0.25  # share of the price of a wider reach that damping may take, and lifting the rest
ASKED_USERS = 1000  # users whose histories the index of a large catalogue is measured by


def publish(
    settings: Settings,
    prepared: Prepared,
    inputs: Path,
    state: dict[str, Tensor],
    metrics: dict[str, Any],
    bundle: Path,
) -> dict[str, Any]:
    """Write the bundle of trained weights. metrics: the run's and choose_scores'. Returns them completed."""
    model, tables = build_model(settings, len(prepared.actions), inputs)
    model.load_state_dict(state)
    model.channels.newness.fill_(metrics["newness"])
    model.channels.damping.fill_(metrics["damping"])
    if metrics["lifted"]:
        cuts, hide = prepared.report["split"]["cuts_ms"], settings.data.exclude_seen
        histories = latest_histories(settings, prepared, users_read(len(prepared.items)))
        log.info("reading the lists of %d users, so that they hold more of the catalogue", len(histories))
        if histories:
            share, lifted = metrics["reach"], metrics["lifted"]
            lift_until(model, histories, cuts[-1] if cuts else None, hide, share, lifted)
    metrics = metrics | {"parameters": sum(p.numel() for p in model.parameters())}
    vectors, made = load_vectors(settings, prepared.items), load_features(inputs)
    asked = [history for history, _ in some_cases(prepared, holdout_share(settings, prepared), ASKED_USERS)]
    log_hash = prepared.content_hash
    write_bundle(
        bundle, model, settings, prepared.items, prepared.actions, tables, vectors, metrics, log_hash, made, asked
    )
    return metrics


def choose_scores(settings: Settings, prepared: Prepared, run_folder: Path, progress: Progress) -> dict[str, float]:
    """What is added to a trained model's scores: `newness`, what items get that nobody took yet; `damping`, how much of
    the popularity is taken off; `reach`, the share of the catalogue that lists shall hold; and `lifted`, the items per
    user that were lifted for it.

    All are judged by the model that has not seen the validation events.
    """
    model, _ = build_model(settings, len(prepared.actions), run_folder / "inputs.safetensors")
    model.load_state_dict(progress.best_state)
    cuts, hide = prepared.report["split"]["cuts_ms"], settings.data.exclude_seen
    asked_at, cost = cuts[0] if cuts else None, settings.train.coverage_cost
    share = holdout_share(settings, prepared)
    judged = some_cases(prepared, share, JUDGED_USERS)
    newness = choose_newness(model, judged, asked_at, hide)
    model.channels.newness.fill_(newness)
    if not cost:
        return UNCHANGED | {"newness": newness}
    damping = choose_damping(model, judged, asked_at, hide, DAMPED_FOR * cost)
    model.channels.damping.fill_(damping)
    cases = some_cases(prepared, share, users_read(len(prepared.items)))
    reach, lifted = choose_reach(model, cases, asked_at, hide, (1 - DAMPED_FOR) * cost)
    return {"newness": newness, "damping": damping, "reach": reach, "lifted": lifted}


def summarise(progress: Progress) -> dict[str, Any]:
    """The run in numbers: accuracy, and how fast. The first epoch counts as start-up where there are more."""
    running = progress.epochs[1:] or progress.epochs
    loop = sum(e["seconds"] + e["report_seconds"] for e in running)
    around = sum(e["wait_seconds"] + e["report_seconds"] for e in running)
    return {
        # None: there was nobody to validate on, and the last epoch stands.
        "validation": {
            "ndcg@10": progress.best_ndcg if any(e["users"] for e in progress.epochs) else None,
            "epoch": progress.best_epoch + 1,
        },
        "epochs": [told(record) for record in progress.epochs],
        "positions_per_cpu_second": sum(e["positions"] for e in running)
        / max(1e-9, sum(e["cpu_seconds"] for e in running)),
        "seconds_to_first_step": progress.epochs[0]["first_step_seconds"],
        "epoch_seconds": loop / len(running),
        "ray_share": around / max(1e-9, loop),
    }
