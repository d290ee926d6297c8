"""The `compare` stage: every preset trained and judged on the same log, the same users and the same figures."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from springtide.bundle import Bundle, load_bundle
from springtide.config import Settings, with_values
from springtide.data.prepared import Prepared, load_prepared
from springtide.errors import SpringtideError
from springtide.evaluation import compare_metrics as beyond
from springtide.evaluation import metrics as measure
from springtide.evaluation.baselines import fit_baselines
from springtide.evaluation.comparison import Catalogue, beyond_accuracy
from springtide.evaluation.ranking import (
    Cases,
    Ranking,
    Score,
    ask_model,
    build_cases,
    flatten,
    headline_mask,
    rank_cases,
)
from springtide.files import write_json, write_text
from springtide.model.recommender import Recommender
from springtide.schemas import PARTS, TRAIN, VALID
from springtide.training.job import OF_THE_BUNDLE, fingerprint, sized, train, write_trained

log = logging.getLogger(__name__)

K = 10
HEAD_WEIGHT = 0.3  # of the rating and the click head, where the settings give them none
MEAN_RATING = "mean rating"
COLUMNS = {  # figure -> (heading, format)
    "accuracy": ("Accuracy", ".3f"), "precision": ("Precision", ".3f"), "recall": ("Recall", ".3f"),
    "f1": ("F1", ".3f"), "mae": ("MAE", ".3f"), "hr@10": ("HR@10", ".4f"), "ndcg@10": ("NDCG@10", ".4f"),
    "mrr@20": ("MRR@20", ".4f"), "coverage@10": ("Coverage@10", ".3f"), "diversity@10": ("Diversity@10", ".3f"),
    "novelty@10": ("Novelty@10", ".2f"), "cpu_seconds": ("CPU s", ".1f"), "wall_seconds": ("Wall s", ".1f"),
    "parameters": ("Parameters", ",d"), "epochs": ("Epochs", "d"),
}  # fmt: skip
Row = dict[str, Any]


def run(settings: Settings) -> dict[str, Any]:
    """Train and judge `compare.presets`; write `<workspace>/compare.json` and `compare.md`, bundles in `compare/`.

    A preset that was trained with the same data and settings is not trained again, and one that was interrupted goes
    on. Returns the body of results/compare.json. Raises SpringtideError for a log with nothing to test on, and for
    settings that one of the presets cannot take.
    """
    if settings.data.split == "none":
        raise SpringtideError(
            "split: none has nothing to test on; set data.split to leave_one_out or temporal, then run prepare again"
        )
    workspace = Path(settings.workspace)
    if settings.evaluate.part == "valid" and settings.train.refit:
        raise SpringtideError(
            "the presets are fitted on the validation events too, so they cannot be judged by them; set "
            "evaluate.part=test or train.refit=false"
        )
    prepared = load_prepared(workspace, settings.data)
    judge = Judge(settings, prepared)
    # All of them before the first is trained: what one cannot take must not come to light after hours.
    presets = {preset: settings_of(settings, preset, judge.rated) for preset in settings.compare.presets}
    rows: list[Row] = []
    for preset, chosen in presets.items():
        if not chosen.model.id_embeddings and not prepared.report["catalogue"]["with_text"]:
            rows.append({"name": preset, "note": "left out: it reads texts alone, and no item has one"})
            continue
        bundle = trained(chosen, prepared, workspace / "compare" / preset)
        rows.append({"name": preset, **judge.bundle(bundle)})
        log.info("%s: NDCG@10 %.4f", preset, rows[-1]["ndcg@10"])
    rows += judge.baselines()
    about = judge.about()
    write_json(workspace / "compare.json", {"name": settings.name, **about, "rows": rows})
    write_text(workspace / "compare.md", markdown(rows, about))
    print(table(rows), flush=True)
    return {
        "table": str(workspace / "compare.md"),
        "rows": str(workspace / "compare.json"),
        "ndcg@10": {row["name"]: row["ndcg@10"] for row in rows if "ndcg@10" in row},
    }


def settings_of(settings: Settings, preset: str, rated: bool = True) -> Settings:
    """One preset with its heads on, beside whatever else the settings give for all of them."""
    train = settings.train
    return with_values(
        settings,
        {
            "model.preset": preset,
            "train.epochs": settings.compare.epochs,
            "train.rating_weight": (train.rating_weight or HEAD_WEIGHT) if rated else 0.0,
            "train.click_weight": train.click_weight or HEAD_WEIGHT,
        },
        f"compare, preset {preset}",
    )


def trained(settings: Settings, prepared: Prepared, folder: Path) -> Bundle:
    """The bundle of these settings in `folder`, trained if it is not there yet."""
    settings = sized(settings, prepared)
    wanted, note = fingerprint(settings, prepared), folder / "trained.json"
    # Of these no weight depends, but what the bundle answers.
    written = {"fingerprint": wanted, **{name: getattr(settings.train, name) for name in OF_THE_BUNDLE}}
    there = note.exists() and (folder / "bundle" / "manifest.json").exists()
    if there and json.loads(note.read_text(encoding="utf-8")) == written:
        log.info("%s: trained before", settings.model.preset)
        return load_bundle(folder / "bundle")
    note.unlink(missing_ok=True)  # from here on the bundle may be another one than it says
    log.info("%s: training, at most %d epochs", settings.model.preset, settings.train.epochs)
    run_folder = folder / "runs" / f"train-{wanted}"
    progress = train(settings, prepared, run_folder, time.time())
    write_trained(settings, prepared, run_folder, progress, folder / "bundle")
    write_json(note, written)
    shutil.rmtree(folder / "runs", ignore_errors=True)  # the checkpoints have done their work
    return load_bundle(folder / "bundle")


class Judge:
    """The test that all presets sit: the same users, pairs and ratings."""

    def __init__(self, settings: Settings, prepared: Prepared) -> None:
        self.settings, self.part = settings, PARTS[settings.evaluate.part]
        self.events = flatten(prepared.sequences(), prepared.items.num_rows)
        self.cases: Cases = build_cases(self.events, self.part, settings.data.split)
        if not len(self.cases):
            raise SpringtideError(
                f"the {settings.evaluate.part} part holds no event to predict; take a longer log or another "
                "data.split, then run prepare again"
            )
        self.popularity = self.events.fitted(TRAIN)
        training_ratings = self.events.ratings[self.events.parts == TRAIN]
        self.rated = not np.isnan(training_ratings).all()
        self.mean_rating = float(np.nanmean(training_ratings)) if self.rated else float("nan")
        self.headline, _ = headline_mask(self.cases)
        negatives = beyond.draw_negatives(self.cases)
        self.asked = np.flatnonzero(self.headline & (negatives >= 0))
        self.pairs = np.stack([self.cases.targets, negatives], 1)[self.asked]  # [n, 2] taken, refused
        self.ratings = self.events.ratings[self.cases.rows[self.asked]]  # [n] of the targets, NaN = not rated
        self.text: np.ndarray | None = None  # what diversity is measured in, if the items have texts

    def bundle(self, bundle: Bundle) -> Row:
        """The row of one trained model."""
        recommender, split = bundle.recommender, self.settings.data.split
        if recommender.text_vectors is not None:
            self.text = recommender.text_vectors
        epochs = bundle.metrics["epochs"]
        run = [*epochs, *bundle.metrics["refit_epochs"]]
        return {
            **self._heads(recommender),
            **self._ranking(
                lambda histories: ask_model(recommender, histories, split).logits, recommender.item_vectors
            ),
            "cpu_seconds": sum(epoch["cpu_seconds"] for epoch in run),
            "wall_seconds": sum(epoch["seconds"] + epoch["report_seconds"] for epoch in run),
            "parameters": bundle.metrics["parameters"],
            "epochs": len(epochs),
        }

    def baselines(self) -> list[Row]:
        """What counting alone achieves, and what predicting the mean rating does."""
        hide = self.settings.data.exclude_seen
        valid = build_cases(self.events, VALID, self.settings.data.split)
        fitted = fit_baselines(self.events, valid, hide, self.settings.train.refit)
        rows = [{"name": name.replace("_", " "), **self._ranking(fit.baseline.score)} for name, fit in fitted.items()]
        mean = beyond.mean_absolute_error(np.full(len(self.asked), self.mean_rating), self.ratings)
        return [*rows, {"name": MEAN_RATING, "mae": mean}] if self.rated else rows

    def about(self) -> dict[str, Any]:
        """What the figures are of."""
        return {
            "part": self.settings.evaluate.part,
            "users": int(self.headline.sum()),
            "catalogue": self.events.catalogue,
            "click_pairs": len(self.asked),
            "ratings": int((~np.isnan(self.ratings)).sum()),
            "diversity_of": "item vectors" if self.text is None else "texts",
        }

    def _heads(self, recommender: Recommender) -> Row:
        step = self.settings.evaluate.batch_size
        ratings, clicks = [np.zeros(0)], [np.zeros((0, 2))]
        for start in range(0, len(self.asked), step):
            histories = [self.cases.history(int(case)) for case in self.asked[start : start + step]]
            said = recommender.judge(histories, self.pairs[start : start + step])
            if said.ratings is not None:
                ratings.append(said.ratings[:, 0])
            if said.clicks is not None:
                clicks.append(said.clicks)
        taken, refused = np.concatenate(clicks).T
        predicted = np.concatenate(ratings)
        mae = beyond.mean_absolute_error(predicted, self.ratings) if len(predicted) == len(self.ratings) else None
        return {**beyond.click_figures(taken, refused), "mae": mae}

    def _ranking(self, score: Score, item_vectors: np.ndarray | None = None) -> Row:
        settings = self.settings
        ranking: Ranking = rank_cases(
            self.cases, score, depth=measure.MRR_AT, exclude_seen=settings.data.exclude_seen,
            batch_size=settings.evaluate.batch_size,
        )  # fmt: skip
        users = measure.user_metrics(ranking.ranks[self.headline], [K])
        gains = users["ndcg@10"][:, None]
        low, high = measure.interval(measure.resampled_means(gains, settings.evaluate.bootstrap)[:, 0])
        vectors = self.text if self.text is not None else item_vectors
        lists = beyond_accuracy(ranking.lists, Catalogue(self.popularity, None, vectors))
        return {
            **{name: float(users[name].mean()) for name in ("hr@10", "ndcg@10", "mrr@20")},
            "ndcg@10_interval": [low, high],
            "coverage@10": measure.coverage(ranking.lists, self.events.catalogue, K),
            **{name: lists[name]["value"] if name in lists else None for name in ("diversity@10", "novelty@10")},
        }


# ---------------------------------------------------------------- the table
def cells(rows: list[Row]) -> list[list[str]]:
    """Headings, then a line for each row; an en dash where a figure does not apply."""
    out = [["", *(heading for heading, _ in COLUMNS.values())]]
    for row in rows:
        values = [(row.get(name), form) for name, (_, form) in COLUMNS.items()]
        out.append([row["name"], *("–" if value is None else format(value, form) for value, form in values)])
    return out


def table(rows: list[Row]) -> str:
    """The table as aligned text for a terminal."""
    lines = cells(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], *_notes(rows)])


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    """The table as a page, with what its figures mean."""
    head, *lines = cells(rows)
    marks = ["|" + "|".join([" --- ", *([" ---: "] * (len(head) - 1))]) + "|"]
    body = [f"| {' | '.join(line)} |" for line in [head]] + marks + [f"| {' | '.join(line)} |" for line in lines]
    told = [
        f"Ranking: the whole catalogue of {about['catalogue']:,} items for {about['users']:,} users of the part "
        f"{about['part']}, one target each.",
        f"Accuracy, precision, recall and F1: is the next item ({about['click_pairs']:,} of them), or one random item "
        "that the user never took, predicted as a click at threshold 0.5? The same pairs for every row.",
        f"MAE: of {about['ratings']:,} ratings of next items. Diversity: 1 - mean cosine of the "
        f"{about['diversity_of']} in a list. Novelty: mean bits of surprise, -log2(share of training events). Times "
        "are those of training with its validation, over all workers.",
    ]
    return "\n".join(["# Presets compared", "", *body, "", *_notes(rows), *told, ""])


def _notes(rows: list[Row]) -> list[str]:
    return [f"{row['name']} {row['note']}." for row in rows if "note" in row]
