"""The `update` stage: a bundle goes on learning from a log that has grown, without a full retrain.

Run `prepare` and `embed` on the grown log first. All that is counted is counted again, which takes seconds; the network
starts from the bundle's weights and passes a few times over the windows that hold new events. How the items' texts
become features stays as it was, and so do half-lives, the damping of popularity, what new items get more, and how much
of the catalogue lists are to hold. Rerun it to resume.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from springtide.bundle import Bundle, load_bundle
from springtide.cluster import connect
from springtide.config import Settings, with_values
from springtide.data.prepared import OF_THE_SPLIT, Prepared, load_prepared
from springtide.errors import SpringtideError
from springtide.model.carry import carry_over, rows_in
from springtide.model.cosines import no_pairs
from springtide.text.embed import load_vectors
from springtide.training.job import Warm, count_events, fingerprint, train
from springtide.training.popularity import USUAL, span_of
from springtide.training.publish import publish, summarise
from springtide.training.sampling import Since
from springtide.training.sequences import count_new
from springtide.training.statistics import Statistics
from springtide.training.tabulate import HalfLives, tabulate
from springtide.training.texts import feature_rows
from springtide.training.worker import build_model, write_inputs

log = logging.getLogger(__name__)
OF_THE_LOG = ("dim", "long_layers", "recent_half_life")  # settings that the log decides where they are not given


def run(settings: Settings) -> dict[str, Any]:
    """Replace `<workspace>/bundle` by one that knows the prepared log too. Returns the body of results/update.json.

    A log that the bundle knows already leaves it as it is. Raises SpringtideError if there is no bundle, or if the
    settings are of another model.
    """
    submitted = time.time()
    prepared, path = load_prepared(settings.workspace, settings.data), Path(settings.workspace) / "bundle"
    bundle = load_bundle(path)
    settings = of_bundle(settings, bundle)
    if bundle.log == prepared.content_hash:
        log.warning("the bundle %s knows this log already; run the prepare job with new events first", path)
        return {**bundle.metrics, "bundle": str(path), "new_events": 0}
    since = _since(prepared, bundle)
    run_folder = Path(settings.workspace) / "runs" / f"update-{fingerprint(settings, prepared)}-{bundle.version}"
    connect()
    import ray

    statistics = count_events(settings, prepared, refit=True)
    count = ray.remote(num_cpus=0.5)(count_new)
    new = sum(ray.get([count.remote(file, since) for file in prepared.sequence_files]))
    inputs = write_update(settings, prepared, bundle, statistics, run_folder)
    metrics: dict[str, Any] = {"epochs": [], "validation": {"ndcg@10": None, "epoch": None}}
    state = build_model(settings, len(prepared.actions), inputs)[0].state_dict()
    if new and settings.train.update_epochs:
        learning = with_values(settings, {"train.epochs": settings.train.update_epochs})
        progress = train(learning, prepared, run_folder, submitted, refit=True, warm=Warm(inputs, since))
        metrics, state = summarise(progress), progress.best_state
    metrics |= {
        "newness": float(bundle.recommender.model.channels.newness),
        "damping": float(bundle.recommender.model.channels.damping),
        "reach": bundle.metrics["reach"],
        "lifted": bundle.metrics["lifted"],
        "refit": True,  # it has learned from the validation events
        "refit_epochs": [],
        "updated_from": bundle.version,
        "new_events": new,
    }
    metrics = publish(settings, prepared, inputs, state, metrics, path)
    shutil.rmtree(run_folder)  # the next update is of another bundle
    log.info("%d new events learned from; the bundle knows %d items", new, len(prepared.items))
    return {"bundle": str(path), **metrics}


def of_bundle(settings: Settings, bundle: Bundle) -> Settings:
    """The settings, completed by the bundle's. Raises SpringtideError if they are of another model."""
    old = bundle.settings
    sizes = {f"model.{name}": getattr(old.model, name) for name in OF_THE_LOG if not getattr(settings.model, name)}
    settings = with_values(settings, sizes)
    theirs = _of_the_model(old)
    for name, value in _of_the_model(settings).items():
        if value != theirs[name]:
            raise SpringtideError(
                f"{name} is {value!r} in the settings and {theirs[name]!r} in the bundle, and an update keeps the "
                "model as it is; set it back, or run the train job"
            )
    return settings


def _of_the_model(settings: Settings) -> dict[str, Any]:
    """The settings that a model's weights are good for, by their names."""
    named = {f"model.{name}": value for name, value in settings.model.model_dump().items()}
    named |= {f"train.{name}": getattr(settings.train, name) for name in ("rating_weight", "click_weight")}
    # Test events of other settings might have been learned from before.
    named |= {f"data.{name}": getattr(settings.data, name) for name in OF_THE_SPLIT}
    named["data.target_actions"] = sorted(settings.data.target_actions or []) or None
    return named | {"text.encoder": settings.text.encoder}


def write_update(
    settings: Settings, prepared: Prepared, bundle: Bundle, statistics: Statistics, run_folder: Path
) -> Path:
    """Leave the counts of the grown log and the bundle's weights in its rows for the workers, in `run_folder`.

    Raises SpringtideError if the items' texts were not embedded, or the bundle's model does not fit the log.
    """
    recommender, inputs = bundle.recommender, run_folder / "inputs.safetensors"
    run_folder.mkdir(parents=True, exist_ok=True)
    if bundle.features.arrays() and load_vectors(settings, prepared.items) is None:
        raise SpringtideError(
            f"the model of {bundle.path} reads items' texts, and this log has none, or embed has not run; put them "
            "back, or run the train job"
        )
    text = feature_rows(settings, prepared, bundle.features)
    tables = tabulate(statistics, settings.model, _half_lives(bundle, statistics), text)
    neighbours = recommender.model.channels.neighbours
    if neighbours is not None and not len(neighbours.cosines.items):  # a model of a catalogue that had no long tail
        tables = replace(tables, pairs=no_pairs(len(prepared.items)))  # has not learned how far to trust its neighbours
    write_inputs(inputs, tables, text, bundle.features)
    model, _ = build_model(settings, len(prepared.actions), inputs)
    items = rows_in(recommender.item_ids, prepared.items["item_id"].to_pylist())
    actions = rows_in(recommender.actions, prepared.actions)
    try:
        carry_over(model, recommender.model.state_dict(), items, actions)
    except ValueError as error:
        raise SpringtideError(f"the bundle does not fit this log: {error}; run the train job") from None
    start: dict[str, Tensor] = dict(model.named_parameters())
    write_inputs(inputs, tables, text, bundle.features, start=start)
    return inputs


def _since(prepared: Prepared, bundle: Bundle) -> Since:
    """What the bundle learned from. Raises SpringtideError if the test part is older than that.

    Leaving one out, what a user did last was held out then, and is new as soon as there is something later.
    """
    since, cuts = bundle.recommender.log_end or 0, prepared.report["split"]["cuts_ms"]
    if cuts and cuts[-1] <= since:  # the test part begins with the cut
        raise SpringtideError(
            f"the bundle {bundle.path} has learned from events of after the log's cut for testing, so nothing honest "
            "could be said of it; prepare a longer log, or run the train job"
        )
    return Since(since, int(bundle.settings.data.split == "leave_one_out"))


def _half_lives(bundle: Bundle, statistics: Statistics) -> HalfLives:
    """Those of the bundle, the same times as shares of this log's span."""
    channels, taken = bundle.recommender.model.channels, statistics.taken.data

    def share(half_life: float, span: int) -> float | None:
        return float(half_life / span) if span and np.isfinite(half_life) else None

    neighbours = recent = None
    span = span_of(statistics.wanted_at)
    if channels.neighbours is not None:
        neighbours = share(float(channels.neighbours.half_life), span_of(taken))
    if channels.recent is not None:
        recent = share(channels.recent.latest.half_life, span)
    return HalfLives(neighbours, recent or USUAL, share(bundle.recommender.popular.half_life, span))
