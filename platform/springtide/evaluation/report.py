"""The HTML report: one self-contained page made from metrics.json and prepare's report.json, with no network access.

Plots are matplotlib SVG. Their colours are rewritten to the page's CSS variables, so that they follow dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LABELS = {
    "model": "Springtide model",
    "popularity": "Popularity",
    "item_knn": "Item-KNN (recency)",
    "transitions": "Transition counts",
}
_SHORT = {"model": "Model", "popularity": "Popularity", "item_knn": "Item-KNN", "transitions": "Transitions"}
# Drawn in colours that nothing else has, then swapped for CSS variables of the page.
_INK, _GRID = "#010203", "#010204"
_SERIES = {"model": "#010205", "transitions": "#010206", "item_knn": "#010207", "popularity": "#010208"}
_CSS = {_INK: "var(--soft)", _GRID: "var(--grid)", **{c: f"var(--{n.replace('_', '-')})" for n, c in _SERIES.items()}}
_DASHES = {"model": "-", "transitions": "--", "item_knn": "-.", "popularity": ":"}
_SIZE = (4.4, 3.0)  # inches: about the width of a phone, so that text keeps its size there
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": _INK, "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "grid.color": _GRID, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True, "xtick.major.size": 0,
    "ytick.major.size": 0, 
}  # fmt: skip


def render(metrics: Mapping[str, Any], prepared: Mapping[str, Any]) -> str:
    """The page as text. metrics: what evaluate writes to metrics.json; prepared: prepare's report.json."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    columns = [c for c in ("hr@10", "ndcg@10", "mrr@20", "recall@20", "precision@10", "coverage@10", "recall_all@20",
                           "ndcg_all@10") if c in metrics["model"]]  # fmt: skip
    scorers = _scorers(metrics)
    return environment.get_template("report.html.j2").render(
        name=metrics["name"],
        part=metrics["part"],
        users=_whole(metrics["users"]),
        headline="warm users" if metrics["headline"] == "warm" and metrics["split"] == "temporal" else "users",
        facts=_facts(metrics, prepared),
        verdict=verdict(metrics),
        columns=[_column(c) for c in columns],
        rows=[
            {"key": name.replace("_", "-"), "label": _label(name), "cells": [_cell(values.get(c)) for c in columns]}
            for name, values in scorers.items()
        ],
        pairs=[_pair(name, paired["ndcg@10"]) for name, paired in metrics["paired"].items()],
        plots=_plots(metrics, scorers),
        slice_columns=[_label(name) for name in scorers],
        slices=[
            {"label": name.replace("_", " "), "users": _whole(part["users"]),
             "cells": [_figure(_scorers(part)[s]["ndcg@10"]["value"]) for s in scorers]}
            for name, part in metrics.get("slices", {}).items()
        ],
        notes=metrics["notes"],
    )  # fmt: skip


def verdict(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Whether the model beats the best counting baseline: {"kind": better|even|worse, "sentence", "detail"}."""
    best = _label(metrics["best_baseline"]).lower().replace("knn", "KNN")
    ratio = metrics["ratio_to_best"]["ndcg@10"]
    model, base = (m["ndcg@10"]["value"] for m in (metrics["model"], metrics["baselines"][metrics["best_baseline"]]))
    figures = f"NDCG@10 {_figure(model)} against {_figure(base)}."
    if ratio is None:
        kind = "better" if model > 0 else "even"
        hits = "the model does" if model > 0 else "neither does the model"
        return {"kind": kind, "sentence": f"No counting baseline finds a single target in its first ten; {hits}.",
                "detail": figures}  # fmt: skip
    percent = abs(ratio["value"] - 1) * 100
    span = f"{_ratio(ratio['lo'])} to {_ratio(ratio['hi'])}"
    detail = f"{figures} The ratio's 95 % interval, paired over {_whole(metrics['users'])} users, is {span}."
    if ratio["lo"] > 1:
        sentence = f"The model beats the best counting baseline, {best}, by {percent:.1f} %."
        return {"kind": "better", "sentence": sentence, "detail": detail}
    if ratio["hi"] < 1:
        sentence = f"The model loses to the best counting baseline, {best}, by {percent:.1f} %: deploy that instead."
        return {"kind": "worse", "sentence": sentence, "detail": detail}
    side = "ahead of" if ratio["value"] > 1 else "behind" if ratio["value"] < 1 else "level with"
    distance = f"{percent:.1f} % " if ratio["value"] != 1 else ""
    sentence = f"The model is {distance}{side} the best counting baseline, {best}, a difference that may be chance."
    return {"kind": "even", "sentence": sentence, "detail": detail}


# ---------------------------------------------------------------- numbers as text
def _scorers(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Model first, then the baselines from best to worst."""
    order = sorted(metrics["baselines"], key=lambda name: -metrics["baselines"][name]["ndcg@10"]["value"])
    return {"model": metrics["model"], **{name: metrics["baselines"][name] for name in order}}


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def _column(name: str) -> str:
    head, _, k = name.partition("@")
    words = {"hr": "HR", "ndcg": "NDCG", "mrr": "MRR", "recall": "Recall", "precision": "Precision",
             "coverage": "Coverage", "recall_all": "Recall, all targets", "ndcg_all": "NDCG, all targets"}  # fmt: skip
    return f"{words.get(head, head)}@{k}"


def _figure(value: float) -> str:
    return f"{value:.4f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 100 else "over 100"


def _whole(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cell(estimate: Mapping[str, float] | None) -> dict[str, str]:
    if estimate is None:
        return {"value": "–", "interval": ""}
    interval = f"{estimate['lo']:.3f}–{estimate['hi']:.3f}" if "lo" in estimate else ""
    return {"value": _figure(estimate["value"]), "interval": interval}


def _pair(name: str, paired: Mapping[str, Any]) -> dict[str, str]:
    ratio, difference = paired["ratio"], paired["difference"]
    return {
        "label": _label(name),
        "ratio": _ratio(ratio["value"]) if ratio else "–",
        "ratio_interval": f"{_ratio(ratio['lo'])} to {_ratio(ratio['hi'])}" if ratio else "–",
        "difference": f"{difference['value']:+.4f}",
        "difference_interval": f"{difference['lo']:+.4f} to {difference['hi']:+.4f}",
    }


def _facts(metrics: Mapping[str, Any], prepared: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the reader should know of the log; a count that prepare did not give is left out."""
    totals, ties = prepared.get("totals", {}), prepared.get("ties", {})
    counts = {"Events": totals.get("kept"), "Users": prepared.get("users"), "Items": prepared.get("items"),
              "Quarantined rows": totals.get("quarantined"), "Duplicate rows": totals.get("deduplicated"),
              "Events tied in time": ties.get("events"),
              "Users ending on a tie": ties.get("users_whose_last_two_tie")}  # fmt: skip
    facts = [(label, _whole(value)) for label, value in counts.items() if value is not None]
    return [*facts, ("Split", str(metrics["split"]).replace("_", " ")), ("Bundle", str(metrics["bundle"]))]


# ---------------------------------------------------------------- plots
def _plots(metrics: Mapping[str, Any], scorers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    plots = [_bars(scorers), _curves(metrics, scorers)]
    if len(metrics.get("by_history_length", [])) > 1:
        plots.append(_by_length(metrics, scorers))
    if metrics.get("gate"):
        plots.append(_gate(metrics["gate"]))
    epochs = [e for e in metrics.get("epochs") or [] if {"epoch", "loss", "ndcg@10"} <= set(e)]
    if epochs:
        plots.append(_training(epochs))
    return plots


def _bars(scorers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    figure, axes = _axes()
    names = list(scorers)[::-1]
    estimates = [scorers[name]["ndcg@10"] for name in names]
    values = np.array([e["value"] for e in estimates])
    low, high = (np.array([e.get(end, e["value"]) for e in estimates]) for end in ("lo", "hi"))
    colours = [_colour(n) for n in names]
    axes.barh(range(len(names)), values, color=colours, height=0.62, alpha=0.3)
    axes.hlines(range(len(names)), low, high, color=colours, linewidth=2.4)
    axes.scatter(values, range(len(names)), color=colours, s=30, zorder=3)
    axes.set_yticks(range(len(names)), [_SHORT.get(n, n) for n in names])
    for place, (value, end) in enumerate(zip(values, np.maximum(high, values), strict=True)):
        axes.annotate(_figure(value), (end, place), xytext=(6, 0), textcoords="offset points", va="center", color=_INK)
    axes.set_xlim(0, max(float(high.max()), 1e-3) * 1.22)
    axes.grid(axis="x")
    axes.set_xlabel("NDCG@10")
    told = "; ".join(f"{_label(n)} {_figure(v)}" for n, v in zip(names[::-1], values[::-1], strict=True))
    caption = "Bars and dots: NDCG@10. Lines: 95 % intervals."
    return _plot(figure, "Ranking quality", f"NDCG@10 of each scorer: {told}.", caption)


def _curves(metrics: Mapping[str, Any], scorers: Mapping[str, Any]) -> dict[str, Any]:
    figure, axes = _axes()
    for name in list(scorers)[::-1]:
        curve = metrics["curves"][name]
        axes.plot(range(1, len(curve) + 1), curve, color=_colour(name), linestyle=_DASHES.get(name, "-"),
                  linewidth=2.4 if name == "model" else 1.7, label=_SHORT.get(name, name))  # fmt: skip
    longest = len(metrics["curves"]["model"])
    axes.set_xlim(1, longest)
    axes.set_xticks(sorted({1, *range(5, longest + 1, max(5, longest // 4 // 5 * 5))}))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.set_xlabel("K")
    axes.set_ylabel("HR@K")
    _legend(axes)
    ends = "; ".join(f"{_label(n)} {_figure(metrics['curves'][n][-1])}" for n in scorers)
    return _plot(figure, "Hit rate by list length", f"HR@K for K from 1 to {longest}. At {longest}: {ends}.",
                 "Share of users whose next item is among the first K.")  # fmt: skip


def _by_length(metrics: Mapping[str, Any], scorers: Mapping[str, Any]) -> dict[str, Any]:
    figure, axes = _axes()
    groups = metrics["by_history_length"]
    for name in list(scorers)[::-1]:
        axes.plot(range(len(groups)), [g["ndcg@10"][name] for g in groups], color=_colour(name), marker="o",
                  markersize=5, linestyle=_DASHES.get(name, "-"), linewidth=2.4 if name == "model" else 1.7,
                  label=_SHORT.get(name, name))  # fmt: skip
    axes.set_xticks(range(len(groups)), [_span(g) for g in groups])
    axes.set_xlim(-0.25, len(groups) - 0.75)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.set_xlabel("events in the history")
    axes.set_ylabel("NDCG@10")
    _legend(axes)
    told = "; ".join(f"{_span(g)} events: model {_figure(g['ndcg@10']['model'])} ({g['users']} users)" for g in groups)
    return _plot(figure, "By history length", f"NDCG@10 by quartile of history length. {told}.",
                 "Users in quartiles of history length.")  # fmt: skip


def _gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    figure, axes = _axes()
    edges, counts = np.array(gate["edges"]), np.array(gate["counts"])
    axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.9, align="edge", color=_colour("model"))
    axes.axvline(gate["mean"], color=_INK, linewidth=1.2, linestyle="--")
    side, gap = ("left", 5) if gate["mean"] < 0.7 else ("right", -5)
    axes.annotate(f"mean {gate['mean']:.2f}", (gate["mean"], 1), xycoords=("data", "axes fraction"), va="top", ha=side,
                  color=_INK, xytext=(gap, 0), textcoords="offset points")  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, max(int(counts.max()), 1) * 1.15)
    axes.grid(axis="y")
    axes.set_xlabel("0 = long-term only, 1 = short-term only")
    axes.set_ylabel("users")
    return _plot(figure, "Gate", f"Weight of the short branch over users: mean {gate['mean']:.2f}.",
                 "Mean weight that the gate gives the short branch, per user.")  # fmt: skip


def _training(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [e["epoch"] for e in epochs]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, key, name, words in ((upper, "ndcg@10", "model", "NDCG@10"), (lower, "loss", "popularity", "loss")):
        axes.plot(steps, [e[key] for e in epochs], color=_colour(name), marker="o", markersize=3.5, linewidth=2)
        axes.set_ylabel(words)
        axes.grid(axis="y")
    lower.set_xlabel("epoch")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    best = max(epochs, key=lambda e: e["ndcg@10"])
    told = f"{len(epochs)} epochs. Best validation NDCG@10 {_figure(best['ndcg@10'])} at epoch {best['epoch']}."
    return _plot(figure, "Training", told, "Validation NDCG@10 and training loss after each epoch.")


def _axes() -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        return figure, figure.add_subplot()


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, frameon=False,
                labelcolor=_INK, labelspacing=0.2, borderpad=0.1)  # fmt: skip


def _colour(name: str) -> str:
    return _SERIES.get(name, _INK)


def _span(group: Mapping[str, Any]) -> str:
    return f"{group['from']}" if group["from"] == group["to"] else f"{group['from']}–{group['to']}"


def _plot(figure: Figure, heading: str, description: str, caption: str) -> dict[str, Any]:
    return {"heading": heading, "caption": caption, "svg": _svg(figure, heading, description)}


def _svg(figure: Figure, title: str, description: str) -> Markup:
    """The figure as an inline <svg> with a title and description, theme colours, and ids of its own."""
    slug = re.sub(r"\W+", "-", title.lower())
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": slug}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{slug}-", text)
    for colour, variable in _CSS.items():
        text = text.replace(colour, variable)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    box = re.findall(r'viewBox="[^"]*"', text)[0]
    opening = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box} role="img" '
               f'aria-labelledby="{slug}-title {slug}-desc"><title id="{slug}-title">{escape(title)}</title>'
               f'<desc id="{slug}-desc">{escape(description)}</desc>')  # fmt: skip
    return Markup(opening + text[text.index(">") + 1 :])
