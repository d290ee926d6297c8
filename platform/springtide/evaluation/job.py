"""The evaluate job: the model and the counting baselines, judged on the same users, as metrics.json and report.html."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from springtide.bundle import Bundle, load_bundle
from springtide.config import Settings
from springtide.data.prepared import Prepared, load_prepared
from springtide.errors import SpringtideError
from springtide.evaluation import metrics as measure
from springtide.evaluation import report
from springtide.evaluation.baselines import fit_baselines
from springtide.evaluation.ranking import (
    COLD_ITEM,
    COLD_USER,
    WARM,
    Cases,
    Ranking,
    build_cases,
    flatten,
    rank_cases,
    repeated_targets,
)
from springtide.files import write_json, write_text
from springtide.model.recommender import History
from springtide.schemas import PARTS, VALID

log = logging.getLogger(__name__)

_RATIOS = ("ndcg@10", "hr@10", "mrr@20")


def run(settings: Settings) -> dict[str, Any]:
    """Judge `<workspace>/bundle` on the part `evaluate.part` and write `metrics.json` and `report.html`.

    Returns the figures for results/evaluate.json. Raises SpringtideError for a split without that part, or a bundle
    trained on another log, split or catalogue.
    """
    started = time.perf_counter()
    if settings.data.split == "none":
        raise SpringtideError(
            "split: none has nothing to test on; set data.split to leave_one_out or temporal, then run prepare and "
            "train again"
        )
    workspace = Path(settings.workspace)
    prepared = load_prepared(workspace)
    bundle = load_bundle(workspace / "bundle")
    _check(settings, prepared, bundle)
    metrics = evaluate(settings, prepared, bundle)
    metrics["seconds"]["total"] = round(time.perf_counter() - started, 2)
    page = report.render(metrics, prepared.report)
    write_json(workspace / "metrics.json", metrics)
    write_text(workspace / "report.html", page)
    verdict = report.verdict(metrics)
    print(f"{table(metrics)}\n\n{verdict['sentence']} {verdict['detail']}", flush=True)
    return {
        "part": metrics["part"],
        "users": metrics["users"],
        "ndcg@10": {name: values["ndcg@10"]["value"] for name, values in _all(metrics).items()},
        "best_baseline": metrics["best_baseline"],
        "ratio_to_best": metrics["ratio_to_best"],
        "verdict": verdict["sentence"],
        "metrics": str(workspace / "metrics.json"),
        "report": str(workspace / "report.html"),
        "timings": metrics["seconds"],
    }


def evaluate(settings: Settings, prepared: Prepared, bundle: Bundle) -> dict[str, Any]:
    """The body of metrics.json. Writes nothing."""
    part, split, hide = settings.evaluate.part, settings.data.split, settings.data.exclude_seen
    events = flatten(prepared.sequences(), prepared.items.num_rows)
    cases = build_cases(events, PARTS[part], split)
    if not len(cases):
        raise SpringtideError(
            f"the {part} part holds no event to predict; take a longer log or another data.split, then run prepare and "
            "train again"
        )
    ks = sorted({*settings.evaluate.ks, 10})
    depth = max(*ks, measure.MRR_AT)
    seconds: dict[str, float] = {}

    clock = time.perf_counter()
    fitted = fit_baselines(events, build_cases(events, VALID, split), hide)
    seconds["fit_baselines"] = round(time.perf_counter() - clock, 2)
    log.info("baselines fitted and tuned in %.1f s", seconds["fit_baselines"])

    gates: list[np.ndarray] = []

    def model(histories: Sequence[History]) -> np.ndarray:
        scores = bundle.recommender.score(histories)
        gates.append(scores.gate_short)
        return scores.logits

    rankings: dict[str, Ranking] = {}
    for name, score in {"model": model, **{name: fit.baseline.score for name, fit in fitted.items()}}.items():
        clock = time.perf_counter()
        rankings[name] = rank_cases(
            cases, score, depth=depth, exclude_seen=hide, batch_size=settings.evaluate.batch_size
        )
        seconds[name] = round(time.perf_counter() - clock, 2)
        log.info("%s: %d users ranked over %d items in %.1f s", name, len(cases), events.catalogue, seconds[name])

    body = compare(cases, rankings, ks, settings.evaluate.bootstrap, split)
    for name, fit in fitted.items():
        body["baseline_settings"][name] = {"settings": fit.settings, "validation_ndcg@10": fit.validation}
    body |= {
        "name": settings.name,
        "bundle": bundle.version,
        "part": part,
        "split": split,
        "exclude_seen": hide,
        "catalogue": events.catalogue,
        "gate": gate_histogram(np.concatenate(gates)[headline_mask(cases)[0]]),
        "epochs": bundle.metrics.get("epochs") or [],
        "seconds": seconds,
    }
    body["notes"] = _notes(body)
    return body


def compare(
    cases: Cases, rankings: Mapping[str, Ranking], ks: Sequence[int], resamples: int, split: str
) -> dict[str, Any]:
    """Metrics of "model" and of every other ranking over the same cases, with paired bootstrap intervals.

    Intervals and comparisons are over the headline users: the warm ones under `temporal` (all, if none is warm).
    Coverage counts the lists of every user.
    """
    chosen, headline = headline_mask(cases)
    names = list(rankings)
    per_user = {name: _per_user(cases, rankings[name], ks, split) for name in names}
    keys = list(per_user["model"])
    values = np.column_stack([per_user[name][key][chosen] for name in names for key in keys])
    samples = measure.resampled_means(values, resamples)
    estimates = iter(measure.mean_estimates(values, samples))
    figures: dict[str, dict[str, Any]] = {name: {key: _json(next(estimates)) for key in keys} for name in names}
    for name in names:
        for k in ks:
            value = measure.coverage(rankings[name].lists, cases.events.catalogue, k)
            figures[name][f"coverage@{k}"] = {"value": value}

    def column(name: str, key: str) -> int:
        return names.index(name) * len(keys) + keys.index(key)

    baselines = [name for name in names if name != "model"]
    paired: dict[str, Any] = {}
    for name in baselines:
        paired[name] = {}
        for key in _RATIOS:
            a, b = column(name, key), column("model", key)
            pair = (values[:, a], values[:, b], samples[:, a], samples[:, b])
            ratio = measure.paired_ratio(*pair)
            difference = _json(measure.paired_difference(*pair))
            paired[name][key] = {"ratio": _json(ratio) if ratio else None, "difference": difference}
    best = max(baselines, key=lambda name: figures[name]["ndcg@10"]["value"])
    slices = {}
    for name in (WARM, COLD_USER, COLD_ITEM) if split == "temporal" else ():
        mask = cases.slices == name
        if mask.any() and name != headline:
            means = {n: {key: {"value": float(per_user[n][key][mask].mean())} for key in keys} for n in names}
            slices[name] = {"users": int(mask.sum()), "model": means.pop("model"), "baselines": means}
    longest = max(20, *ks)
    return {
        "model": figures["model"],
        "baselines": {name: figures[name] for name in baselines},
        "best_baseline": best,
        "ratio_to_best": {key: paired[best][key]["ratio"] for key in _RATIOS},
        "paired": paired,
        "users": int(chosen.sum()),
        "headline": headline,
        "slices": slices,
        "repeated_targets": repeated_targets(cases),
        "new_item_targets": int(cases.new_items.sum()),
        "bootstrap": resamples,
        "baseline_settings": {},
        "curves": {n: measure.hit_curve(rankings[n].ranks[chosen], longest).tolist() for n in names},
        "by_history_length": _by_length(
            cases.lengths[chosen], {name: per_user[name]["ndcg@10"][chosen] for name in names}
        ),
    }


def headline_mask(cases: Cases) -> tuple[np.ndarray, str]:
    """Which cases [C] the headline figures are about, and their name: `warm`, or `all` if no user is warm."""
    warm = cases.slices == WARM
    return (warm, WARM) if warm.any() else (np.ones(len(cases), dtype=bool), "all")


def gate_histogram(gate_short: np.ndarray) -> dict[str, Any] | None:
    """Twenty bins over 0..1 of the short branch's weight per user; None if no user has a history."""
    known = gate_short[np.isfinite(gate_short)]
    if not known.size:
        return None
    counts, edges = np.histogram(np.clip(known, 0, 1), bins=20, range=(0, 1))
    return {"mean": float(known.mean()), "edges": [round(float(e), 4) for e in edges], "counts": counts.tolist()}


def table(metrics: Mapping[str, Any]) -> str:
    """The comparison as aligned text for a terminal, best baseline first."""
    columns = [c for c in ("hr@10", "ndcg@10", "mrr@20", "recall@20", "precision@10", "coverage@10")
               if c in metrics["model"]]  # fmt: skip
    head = ["", *(c.upper() if not c.startswith(("rec", "pre", "cov")) else c for c in columns), "NDCG@10 95 %"]
    rows = [head]
    for name, values in _all(metrics).items():
        span = values["ndcg@10"]
        rows.append([report.LABELS.get(name, name), *(f"{values[c]['value']:.4f}" for c in columns),
                     f"{span['lo']:.4f}-{span['hi']:.4f}"])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths,
             strict=True))).rstrip() for row in rows]  # fmt: skip
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _all(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    order = sorted(metrics["baselines"], key=lambda name: -metrics["baselines"][name]["ndcg@10"]["value"])
    return {"model": metrics["model"], **{name: metrics["baselines"][name] for name in order}}


def _per_user(cases: Cases, ranking: Ranking, ks: Sequence[int], split: str) -> dict[str, np.ndarray]:
    values = measure.user_metrics(ranking.ranks, ks)
    if split == "temporal":
        values |= measure.user_metrics_all(ranking.lists, cases.all_targets, cases.all_offsets)
    return values


def _by_length(lengths: np.ndarray, ndcg: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Mean NDCG@10 of each scorer in quartiles of history length; equal lengths stay together."""
    bounds = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75], method="lower"))
    group = np.searchsorted(bounds, lengths, side="left")
    return [
        {"from": int(lengths[group == g].min()), "to": int(lengths[group == g].max()), "users": int((group == g).sum()),
         "ndcg@10": {name: float(values[group == g].mean()) for name, values in ndcg.items()}}
        for g in np.unique(group)
    ]  # fmt: skip


def _json(estimate: measure.Estimate) -> dict[str, float]:
    return {"value": estimate.value, "lo": estimate.low, "hi": estimate.high}


def _check(settings: Settings, prepared: Prepared, bundle: Bundle) -> None:
    if bundle.settings.data.split != settings.data.split:
        raise SpringtideError(
            f"the bundle was trained with data.split: {bundle.settings.data.split} but the settings say "
            f"{settings.data.split}, so it may have seen the test events; run prepare and train again"
        )
    if bundle.recommender.item_ids != prepared.items["item_id"].to_pylist():
        raise SpringtideError("the bundle was trained on another catalogue than the prepared one; run train again")
    if bundle.log != prepared.content_hash:
        raise SpringtideError(
            "the bundle was trained on another prepared log than this one, so it may have seen the test events; run "
            "train again"
        )


def _notes(body: Mapping[str, Any]) -> list[str]:
    """What a sceptical reader should know, as sentences."""
    part = body["part"]
    seen = "items already in the history are left out" if body["exclude_seen"] else "items already seen may come again"
    asked = "training and validation events" if part == "test" else "training events"
    notes = [
        f"Every scorer ranks the whole catalogue of {body['catalogue']:,} items, without sampling; {seen}; equal "
        "scores rank in catalogue order.",
        "The baselines are fitted on the training part alone, as the model is, and all scorers are asked with the same "
        f"histories: {asked}.",
        "Baseline settings are chosen on the validation part (NDCG@10). The best baseline is the one with the highest "
        f"NDCG@10 on the {part} part itself, which favours the baselines.",
        f"Intervals are percentile bootstraps over users with {body['bootstrap']:,} resamples; ratios and differences "
        "are paired, that is, resampled over the same users.",
        "With one target per user, recall@K equals HR@K and precision@K is HR@K / K.",
    ]
    if part == "valid":
        notes.append(
            "These are validation figures: the model's stopping point and the baselines' settings were chosen on them, "
            "so they flatter every scorer."
        )
    if body["split"] == "temporal":
        kind = "users and items with training events" if body["headline"] == WARM else "all users, as none is warm"
        notes.append(
            f"Headline figures are over {kind}; the target is a user's first event after the cut, and the figures for "
            "all targets count everything the user took after it. Coverage counts every user's list."
        )
    if body["repeated_targets"] and body["exclude_seen"]:
        notes.append(
            f"{body['repeated_targets']:,} targets are already in their user's history. As seen items are left out, "
            "they can only be missed; they stay in the figures, for every scorer alike."
        )
    if body["new_item_targets"]:
        notes.append(
            f"{body['new_item_targets']:,} targets have no training event, so no baseline can rank them by counting."
        )
    for name, fit in body["baseline_settings"].items():
        if fit["settings"]:
            told = ", ".join(f"{k} {'endless' if v is None else v}" for k, v in fit["settings"].items())
            notes.append(f"{report.LABELS[name]} settings: {told}.".replace("_", " "))
    return notes
