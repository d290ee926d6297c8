"""The plots of the report as inline SVG, drawn by matplotlib and coloured by the page, dark mode included."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from springtide.evaluation.figures import figure_of, span_of
from springtide.evaluation.series import SERIES, css_of, label_of, leading, short_of, style_of

# Drawn in colours that nothing else has, then swapped for CSS variables of the page.
_INK, _GRID, _OTHER = "#010203", "#010204", "#010205"
_COLOURS = {name: f"#0103{place:02x}" for place, name in enumerate(SERIES)}
_CSS = {_INK: "var(--soft)", _GRID: "var(--grid)", _OTHER: "var(--other)",
        **{colour: f"var({css_of(name)})" for name, colour in _COLOURS.items()}}  # fmt: skip
_WIDTH, _HEIGHT = 4.4, 3.0  # inches: about the width of a phone, so that text keeps its size there
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": _INK, "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "grid.color": _GRID, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True, "xtick.major.size": 0,
    "ytick.major.size": 0, "lines.dash_capstyle": "round",
}  # fmt: skip


def plots_of(metrics: Mapping[str, Any], scorers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every plot that the metrics have something for: {"heading", "caption", "svg"}. scorers: the model first."""
    plots = [_bars(scorers), _curves(metrics, scorers)]
    for heading, key, axis, caption in _SLICES:
        groups = metrics.get(key) or []
        if len(groups) > 1:
            plots.append(_by_group(groups, scorers, heading, axis, caption))
    if metrics.get("gate"):
        plots.append(_gate(metrics["gate"]))
    epochs = [e for e in metrics.get("epochs") or [] if {"loss", "ndcg@10"} <= set(e)]
    if epochs:
        plots.append(_training(epochs))
    return plots


_SLICES = (
    ("By history length", "by_history_length", "events in the history", "Users in quartiles of history length."),
    ("By popularity of the target", "by_target_popularity", "training events of the target",
     "Targets that training never saw, if any, then quartiles of the others by training events."),
    ("By disagreement of the branches", "by_disagreement", "1 − cosine of the branches' interests",
     "Users in quartiles of the distance between long-term and short-term interest."),
)  # fmt: skip


def _bars(scorers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    names = list(scorers)[::-1]
    figure, axes = _axes(max(_HEIGHT, 0.9 + 0.36 * len(names)))
    estimates = [scorers[name]["ndcg@10"] for name in names]
    values = np.array([e["value"] for e in estimates])
    low, high = (np.array([e.get(end, e["value"]) for e in estimates]) for end in ("lo", "hi"))
    colours = [_colour(n) for n in names]
    axes.barh(range(len(names)), values, color=colours, height=0.62, alpha=0.3)
    axes.hlines(range(len(names)), low, high, color=colours, linewidth=2.4)
    axes.scatter(values, range(len(names)), color=colours, s=30, zorder=3)
    axes.set_yticks(range(len(names)), [short_of(n) for n in names])
    for place, (value, end) in enumerate(zip(values, np.maximum(high, values), strict=True)):
        axes.annotate(
            figure_of(value), (end, place), xytext=(6, 0), textcoords="offset points", va="center", color=_INK
        )
    axes.set_xlim(0, max(float(high.max()), 1e-3) * 1.22)
    axes.grid(axis="x")
    axes.set_xlabel("NDCG@10")
    told = "; ".join(f"{label_of(n)} {figure_of(v)}" for n, v in zip(names[::-1], values[::-1], strict=True))
    caption = "Bars and dots: NDCG@10. Lines: 95 % intervals."
    return _plot(figure, "Ranking quality", f"NDCG@10 of each scorer: {told}.", caption)


def _curves(metrics: Mapping[str, Any], scorers: Mapping[str, Any]) -> dict[str, Any]:
    figure, axes = _axes()
    for name in leading(scorers)[::-1]:
        curve = metrics["curves"][name]
        _line(axes, name, range(1, len(curve) + 1), curve)
    longest = len(metrics["curves"]["model"])
    axes.set_xlim(1, longest)
    axes.set_xticks(sorted({1, *range(5, longest + 1, max(5, longest // 4 // 5 * 5))}))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.set_xlabel("K")
    axes.set_ylabel("HR@K")
    _legend(axes)
    ends = "; ".join(f"{label_of(n)} {figure_of(metrics['curves'][n][-1])}" for n in scorers)
    return _plot(figure, "Hit rate by list length", f"HR@K for K from 1 to {longest}. At {longest}: {ends}.",
                 "Share of users whose next item is among the first K." + _shown(scorers))  # fmt: skip


def _by_group(
    groups: Sequence[Mapping[str, Any]], scorers: Mapping[str, Any], heading: str, axis: str, caption: str
) -> dict[str, Any]:
    figure, axes = _axes()
    for name in leading(scorers)[::-1]:
        _line(axes, name, range(len(groups)), [g["ndcg@10"][name] for g in groups], marker="o", markersize=5)
    axes.set_xticks(range(len(groups)), [span_of(g) for g in groups])
    axes.set_xlim(-0.4, len(groups) - 0.6)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.set_xlabel(axis)
    axes.set_ylabel("NDCG@10")
    _legend(axes)
    told = "; ".join(f"{span_of(g)}: model {figure_of(g['ndcg@10']['model'])} ({g['users']} users)" for g in groups)
    return _plot(figure, heading, f"NDCG@10, {axis}. {told}.", caption + _shown(scorers))


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
    steps = range(1, len(epochs) + 1)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, key, name, words in ((upper, "ndcg@10", "model", "NDCG@10"), (lower, "loss", "popularity", "loss")):
        axes.plot(steps, [e[key] for e in epochs], color=_colour(name), marker="o", markersize=3.5, linewidth=2)
        axes.set_ylabel(words)
        axes.grid(axis="y")
    lower.set_xlabel("epoch")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    best, step = max((epoch["ndcg@10"], -step) for epoch, step in zip(epochs, steps, strict=True))
    told = f"{len(epochs)} epochs. Best validation NDCG@10 {figure_of(best)} in epoch {-step}."
    return _plot(figure, "Training", told, "Validation NDCG@10 and training loss after each epoch.")


def _axes(height: float = _HEIGHT) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        return figure, figure.add_subplot()


def _line(axes: Axes, name: str, x: Sequence[int], y: Sequence[float], **marks: Any) -> None:
    axes.plot(x, y, color=_colour(name), linestyle=style_of(name).dash, linewidth=2.4 if name == "model" else 1.7,
              label=short_of(name), **marks)  # fmt: skip


def _shown(scorers: Mapping[str, Any]) -> str:
    """What a plot of lines leaves out."""
    left = len(scorers) - len(leading(scorers))
    return f" The best {len(leading(scorers)) - 1} baselines are shown." if left else ""


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, frameon=False,
                labelcolor=_INK, labelspacing=0.2, borderpad=0.1)  # fmt: skip


def _colour(name: str) -> str:
    return _COLOURS.get(name, _OTHER)


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
