"""The evaluate job: the model and the counting baselines, judged on the same users, as metrics.json and report.html."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from springtide.bundle import Bundle, load_bundle
from springtide.config import EvaluateConfig, Settings
from springtide.data.prepared import Prepared, load_prepared
from springtide.errors import SpringtideError
from springtide.evaluation import leakage, prequential, report, slices, ties
from springtide.evaluation import metrics as measure
from springtide.evaluation.baselines import Fitted, fit_baselines
from springtide.evaluation.comparison import Catalogue, beyond_accuracy, category_table, compare, gate_histogram
from springtide.evaluation.notes import notes_on
from springtide.evaluation.ranking import (
    Cases,
    FlatSequences,
    Ranking,
    Score,
    ask_model,
    build_cases,
    flatten,
    headline_mask,
    rank_cases,
)
from springtide.evaluation.series import from_best, label_of
from springtide.files import write_json, write_text
from springtide.model.batch import History
from springtide.model.recommender import Recommender
from springtide.schemas import PARTS, TRAIN, VALID

log = logging.getLogger(__name__)


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
    prepared = load_prepared(workspace, settings.data)
    bundle = load_bundle(workspace / "bundle")
    _check(settings, prepared, bundle)
    metrics = evaluate(settings, prepared, bundle)
    metrics["seconds"]["total"] = round(time.perf_counter() - started, 2)
    page = report.render(metrics, prepared.report)
    write_json(workspace / "metrics.json", metrics)
    write_text(workspace / "report.html", page)
    verdict = report.verdict(metrics)
    if metrics["exclude_seen"] and metrics["repeated_targets"]:
        log.warning("%d targets had been taken before, so data.exclude_seen lets every scorer miss them",
                    metrics["repeated_targets"])  # fmt: skip
    print(f"{table(metrics)}\n\n{verdict['sentence']} {verdict['detail']}", flush=True)
    return {
        "part": metrics["part"],
        "users": metrics["users"],
        "ndcg@10": {name: values["ndcg@10"]["value"] for name, values in from_best(metrics).items()},
        "best_baseline": metrics["best_baseline"],
        "ratio_to_best": metrics["ratio_to_best"],
        "verdict": verdict["sentence"],
        "metrics": str(workspace / "metrics.json"),
        "report": str(workspace / "report.html"),
        "timings": metrics["seconds"],
    }


def evaluate(settings: Settings, prepared: Prepared, bundle: Bundle) -> dict[str, Any]:
    """The body of metrics.json. Writes nothing."""
    config, split, hide = settings.evaluate, settings.data.split, settings.data.exclude_seen
    events = flatten(prepared.sequences(), prepared.items.num_rows)
    refit = bool(bundle.metrics.get("refit"))
    if refit and config.part == "valid":
        raise SpringtideError(
            "the bundle was fitted on the validation events too, so it cannot be judged by them; evaluate the test "
            "part, or train with train.refit=false"
        )
    seconds: dict[str, float] = {}
    with _timed(seconds, "leakage"):
        found = leakage.check(events, split, VALID if refit else TRAIN)
    cases = _cases_of(events, config.part, split, VALID if refit else TRAIN)
    with _timed(seconds, "fit_baselines"):
        fitted = fit_baselines(events, build_cases(events, VALID, split), hide, refit)

    recommender = bundle.recommender
    scorers: dict[str, Score] = {
        "model": lambda histories: ask_model(recommender, histories, split).logits,
        **{name: fit.baseline.score for name, fit in fitted.items()},
    }
    gates: list[np.ndarray] = []
    rankings = _rankings(settings, cases, scorers | {"model": _keeping_gates(recommender, split, gates)}, seconds)
    gate = gate_histogram(np.concatenate(gates)[headline_mask(cases)[0]])

    body = compare(cases, rankings, _ks(config), config.bootstrap, split)
    catalogue = Catalogue(
        events.fitted(TRAIN),
        category_table(prepared.items["categories"].to_pylist()),
        getattr(recommender, "item_vectors", None),
    )
    for name, figures in from_best(body).items():
        figures.update(beyond_accuracy(rankings[name].lists, catalogue))
    for name, fit in fitted.items():
        body["baseline_settings"][name] = {"settings": fit.settings, "validation_ndcg@10": fit.validation}
    best = body["best_baseline"]
    with _timed(seconds, "slices"):
        body |= _slices(settings, cases, rankings, scorers, recommender)
    with _timed(seconds, "ties"):
        body["ties"] = _ties(settings, cases, {name: scorers[name] for name in ("model", best)}, prepared, recommender)
    with _timed(seconds, "prequential"):
        body["prequential"] = _prequential(settings, events, recommender, best, fitted[best])
    body |= {
        "name": settings.name,
        "bundle": bundle.version,
        "part": config.part,
        "split": split,
        "exclude_seen": hide,
        "refit": refit,
        "catalogue": events.catalogue,
        "gate": gate,
        "diversity_of": "vectors" if catalogue.categories is None else "categories",
        "leakage": {**found, "log_is_the_bundles": True},
        "epochs": bundle.metrics.get("epochs") or [],
        "seconds": seconds,
    }
    body["notes"] = notes_on(body)
    return body


def _cases_of(events: FlatSequences, part: str, split: str, fitted: int) -> Cases:
    """What the part asks. Raises SpringtideError if that is nothing."""
    cases = build_cases(events, PARTS[part], split, fitted)
    if not len(cases):
        raise SpringtideError(
            f"the {part} part holds no event to predict; take a longer log or another data.split, then run prepare and "
            "train again"
        )
    return cases


def _ks(config: EvaluateConfig) -> list[int]:
    """List lengths that are judged: 10, of the headline figure, always is."""
    return sorted({*config.ks, 10})


def _keeping_gates(recommender: Recommender, split: str, gates: list[np.ndarray]) -> Score:
    """The model's scores, what its gate gave the short branch [B] left in `gates`, batch by batch."""

    def score(histories: Sequence[History]) -> np.ndarray:
        scores = ask_model(recommender, histories, split)
        gates.append(scores.gate_short)
        return np.asarray(scores.logits)

    return score


def _rankings(
    settings: Settings, cases: Cases, scorers: Mapping[str, Score], seconds: dict[str, float]
) -> dict[str, Ranking]:
    """Each scorer's ranking of the whole catalogue, the time that it took noted in `seconds`."""
    config, rankings = settings.evaluate, dict[str, Ranking]()
    depth = max(*_ks(config), measure.MRR_AT)
    for name, score in scorers.items():
        with _timed(seconds, name):
            rankings[name] = rank_cases(
                cases, score, depth=depth, exclude_seen=settings.data.exclude_seen, batch_size=config.batch_size
            )
        log.info("%s: %d users ranked over %d items", name, len(cases), cases.events.catalogue)
    return rankings


def _slices(
    settings: Settings, cases: Cases, rankings: Mapping[str, Ranking], scorers: Mapping[str, Score], recommender: Any
) -> dict[str, Any]:
    config = settings.evaluate
    ndcg = {name: measure.user_metrics(ranking.ranks, [10])["ndcg@10"] for name, ranking in rankings.items()}
    return {
        "by_history_length": slices.by_history_length(cases, ndcg),
        "by_target_popularity": slices.by_target_popularity(cases, ndcg),
        # Only a model with two branches can disagree with itself.
        "by_disagreement": slices.by_disagreement(cases, ndcg, recommender, config.batch_size)
        if hasattr(recommender, "disagreement")
        else [],
        "new_items": slices.new_items(
            cases, scorers, exclude_seen=settings.data.exclude_seen, batch_size=config.batch_size,
            resamples=config.bootstrap,
        ),
    }  # fmt: skip


def _ties(
    settings: Settings, cases: Cases, scorers: Mapping[str, Score], prepared: Prepared, recommender: Any
) -> dict[str, Any]:
    config = settings.evaluate
    found: dict[str, Any] = ties.count(cases)
    if not config.tie_orders or not found["events_tied"]:
        return found
    # A model whose counts hold more than the training part was trained on the validation events too: then those must
    # not become the target of the test.
    counted = getattr(recommender, "popularity", None)
    swap = counted is None or int(counted.sum()) <= int((cases.events.parts == TRAIN).sum())
    item_order = np.asarray(pc.rank(prepared.items["item_id"], tiebreaker="first")).astype(np.int64)
    reordered = ties.effect(
        cases, PARTS[config.part], settings.data.split, scorers, item_order, orders=config.tie_orders, swap=swap,
        exclude_seen=settings.data.exclude_seen, batch_size=config.batch_size,
    )  # fmt: skip
    return {**found, **reordered, "swapped_with_validation": swap and settings.data.split == "leave_one_out"}


def _prequential(
    settings: Settings, events: FlatSequences, recommender: Any, best: str, baseline: Fitted
) -> dict[str, Any] | None:
    """The replay of a temporal split; None under another one, or if it is switched off."""
    config = settings.evaluate
    if settings.data.split != "temporal" or not config.prequential:
        return None
    plan = prequential.make_plan(events, PARTS[config.part], config.prequential_events, settings.data.exclude_seen)
    if plan is None:
        return None
    ask, counting = Answering(recommender).score, baseline.baseline.score
    modes = {
        "frozen": prequential.replay_frozen(plan, ask, config.batch_size),
        "history": prequential.replay_history(plan, ask, config.batch_size),
    }
    against = {
        "frozen": prequential.replay_frozen(plan, counting, config.batch_size),
        "history": prequential.replay_history(plan, counting, config.batch_size),
    }
    if hasattr(recommender, "observe"):
        # It learns as it goes, and nobody else should be answered by what it has become.
        modes["live"] = prequential.replay_live(plan, Answering(copy.deepcopy(recommender)))
    out = {**prequential.describe(plan), **prequential.summarise(plan, modes, config.bootstrap)}
    out["against_baseline"] = {
        "name": best,
        "modes": {
            mode: prequential.summarise(plan, {"baseline": ranks, "model": modes[mode]}, config.bootstrap)["all"]
            for mode, ranks in against.items()
        },
    }
    return out


@dataclass(frozen=True)
class Answering:
    """A Recommender as a replay asks it."""

    recommender: Any

    def score(self, histories: Sequence[History], now: np.ndarray) -> np.ndarray:
        return self.recommender.score(histories, now=now).logits

    def observe(self, histories: Sequence[History], events: Sequence[History]) -> None:
        self.recommender.observe(histories, events)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    clock = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - clock, 2)
    log.info("%s: %.1f s", name.replace("_", " "), seconds[name])


def table(metrics: Mapping[str, Any]) -> str:
    """The comparison as aligned text for a terminal, best baseline first."""
    columns = [c for c in ("hr@10", "ndcg@10", "mrr@20", "recall@20", "precision@10", "coverage@10")
               if c in metrics["model"]]  # fmt: skip
    head = ["", *(c.upper() if not c.startswith(("rec", "pre", "cov")) else c for c in columns), "NDCG@10 95 %"]
    rows = [head]
    for name, values in from_best(metrics).items():
        span = values["ndcg@10"]
        rows.append([label_of(name), *(f"{values[c]['value']:.4f}" for c in columns),
                     f"{span['lo']:.4f}-{span['hi']:.4f}"])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths,
             strict=True))).rstrip() for row in rows]  # fmt: skip
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


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
