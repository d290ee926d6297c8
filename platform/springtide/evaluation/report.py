"""The HTML report: one self-contained page made from metrics.json and prepare's report.json, with no network access."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from springtide.evaluation.figures import figure_of, ratio_of, whole_of
from springtide.evaluation.plots import plots_of
from springtide.evaluation.sections import checks, comparison_sections, deeper_sections
from springtide.evaluation.series import OTHER, SERIES, css_of, from_best, label_of


def render(metrics: Mapping[str, Any], prepared: Mapping[str, Any]) -> str:
    """The page as text. metrics: what evaluate writes to metrics.json; prepared: prepare's report.json."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    scorers = from_best(metrics)
    styles = {css_of(name): style for name, style in SERIES.items()} | {"--other": OTHER}
    return environment.get_template("report.html.j2").render(
        name=metrics["name"],
        part=metrics["part"],
        light={name: style.light for name, style in styles.items()},
        dark={name: style.dark for name, style in styles.items()},
        facts=_facts(metrics, prepared),
        verdict=verdict(metrics),
        first=comparison_sections(metrics, scorers),
        plots=plots_of(metrics, scorers),
        second=deeper_sections(metrics, scorers),
        checks=checks(metrics),
        notes=metrics["notes"],
    )


def verdict(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Whether the model beats the best counting baseline: {"kind": better|even|worse, "sentence", "detail"}."""
    best = _in_sentence(metrics["best_baseline"])
    ratio = metrics["ratio_to_best"]["ndcg@10"]
    model, base = (m["ndcg@10"]["value"] for m in (metrics["model"], metrics["baselines"][metrics["best_baseline"]]))
    figures = f"NDCG@10 {figure_of(model)} against {figure_of(base)}."
    if ratio is None and base > 0:
        sentence = f"The best counting baseline, {best}, finds too few targets in its first ten to be compared with."
        return {"kind": "even", "sentence": sentence, "detail": figures}
    if ratio is None:
        kind = "better" if model > 0 else "even"
        hits = "the model does" if model > 0 else "neither does the model"
        return {"kind": kind, "sentence": f"No counting baseline finds a single target in its first ten; {hits}.",
                "detail": figures}  # fmt: skip
    percent = abs(ratio["value"] - 1) * 100
    span = f"{ratio_of(ratio['lo'])} to {ratio_of(ratio['hi'])}"
    detail = f"{figures} The ratio's 95 % interval, paired over {whole_of(metrics['users'])} users, is {span}."
    if ratio["lo"] > 1:
        sentence = f"The model beats the best counting baseline, {best}, by {percent:.1f} %."
        return {"kind": "better", "sentence": sentence, "detail": detail}
    if ratio["hi"] < 1:
        sentence = f"The model loses to the best counting baseline, {best}, by {percent:.1f} %."
        return {"kind": "worse", "sentence": sentence, "detail": detail}
    side = "ahead of" if ratio["value"] > 1 else "behind" if ratio["value"] < 1 else "level with"
    distance = f"{percent:.1f} % " if ratio["value"] != 1 else ""
    sentence = f"The model is {distance}{side} the best counting baseline, {best}, a difference that may be chance."
    return {"kind": "even", "sentence": sentence, "detail": detail}


def _in_sentence(name: str) -> str:
    return label_of(name).lower().replace("knn", "KNN").replace("ease", "EASE").replace(",", " with")


def _facts(metrics: Mapping[str, Any], prepared: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the reader should know of the log; a count that prepare did not give is left out."""
    totals, ties = prepared.get("totals", {}), prepared.get("ties", {})
    counts = {"Events": totals.get("kept"), "Users": prepared.get("users"), "Items": prepared.get("items"),
              "Quarantined rows": totals.get("quarantined"), "Duplicate rows": totals.get("deduplicated"),
              "Events tied in time": ties.get("events"),
              "Users ending on a tie": ties.get("users_whose_last_two_tie")}  # fmt: skip
    facts = [(label, whole_of(value)) for label, value in counts.items() if value is not None]
    return [*facts, ("Split", str(metrics["split"]).replace("_", " ")), ("Bundle", str(metrics["bundle"]))]
