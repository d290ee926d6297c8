"""The tables of the report as plain values: headings, columns and cells. The template only lays them out.

A section is {"heading", "lead" (sentences), "columns", "groups": [{"label", "rows"}]}; a row is {"label", "key" (the
scorer it is about, or ""), "cells"}; a cell is {"value", "interval"} and may be marked "best".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from springtide.evaluation.figures import (
    Cell,
    column_of,
    figure_of,
    metric_cell,
    ratio_cell,
    ratio_of,
    share_of,
    span_of,
    text_cell,
    whole_of,
)
from springtide.evaluation.series import css_of, label_of

Metrics = Mapping[str, Any]
Section = dict[str, Any]

_COLUMNS = ("hr@10", "ndcg@10", "mrr@20", "recall@20", "precision@10", "recall_all@20", "ndcg_all@10", "coverage@10",
            "novelty@10", "diversity@10")  # fmt: skip
MODES = {"frozen": "Frozen at the cut", "history": "Own events revealed", "live": "Everybody's events counted"}


def comparison_sections(metrics: Metrics, scorers: Metrics) -> list[Section]:
    """What comes before the plots: the model and the baselines, and their paired comparison."""
    return [_main(metrics, scorers), _paired(metrics, scorers)]


def deeper_sections(metrics: Metrics, scorers: Metrics) -> list[Section]:
    """What comes after the plots, as far as there is something to tell."""
    found = [_replay(metrics), _slices(metrics, scorers), _cold(metrics, scorers), _ties(metrics)]
    return [section for section in found if section]


def checks(metrics: Metrics) -> list[str]:
    """The leakage checks as sentences; a violated one would have ended the job."""
    found = metrics.get("leakage") or {}
    if not found:
        return []
    told = [
        f"None of the {whole_of(found['test_events'])} test events is in the {found['learned_from']} part.",
        "No history goes back in time or to an earlier part.",
    ]
    if "cuts" in found:
        when = " and ".join(f"the first {part} event ({_moment(at)})" for part, at in found["cuts"].items())
        told.append(f"Every training event of every user is before {when}.")
    if found.get("log_is_the_bundles"):
        told.append("The bundle was trained on this very log: the content hashes are equal.")
    if found["same_moment_in_training"]:
        told.append(
            f"{whole_of(found['same_moment_in_training'])} test events share user, item and time with a training event "
            "of another action or rating: the log records both."
        )
    return told


def _main(metrics: Metrics, scorers: Metrics) -> Section:
    # Where there is room for it only: with one target, precision@10 is a tenth of HR@10.
    left_out = {"precision@10"} if "recall_all@20" in metrics["model"] else set()
    columns = [c for c in _COLUMNS if c in metrics["model"] and c not in left_out]
    headline = "warm users" if metrics["headline"] == "warm" and metrics["split"] == "temporal" else "users"
    return _section(
        "Model and baselines",
        f"{whole_of(metrics['users'])} {headline} judged, one target each. Below a figure: its 95 % bootstrap interval "
        "over users.",
        ["Scorer", *(column_of(c) for c in columns)],
        [_row(label_of(name), [metric_cell(c, values.get(c)) for c in columns], name)
         for name, values in scorers.items()],
    )  # fmt: skip


def _paired(metrics: Metrics, scorers: Metrics) -> Section:
    rows = []
    for name in scorers:
        if name == "model":
            continue
        paired = metrics["paired"][name]["ndcg@10"]
        ratio, difference = paired["ratio"], paired["difference"]
        span = f"{ratio_of(ratio['lo'])} to {ratio_of(ratio['hi'])}" if ratio else "–"
        rows.append(_row(label_of(name), [
            text_cell(ratio_of(ratio["value"]) if ratio else "–"), text_cell(span),
            text_cell(f"{difference['value']:+.4f}"), text_cell(f"{difference['lo']:+.4f} to {difference['hi']:+.4f}"),
        ], name))  # fmt: skip
    return _section(
        "Paired comparison",
        "NDCG@10 of the model against each baseline, resampled over the same users.",
        ["Against", "Ratio", "95 % interval", "Difference", "95 % interval"],
        rows,
    )


def _replay(metrics: Metrics) -> Section | None:
    replay = metrics.get("prequential")
    if not replay:
        return None
    modes, against = replay["all"]["modes"], replay["against_baseline"]
    label = label_of(against["name"])
    rows = []
    for mode in modes:
        ratio = replay["all"]["ratios"].get(f"{mode}/frozen")
        cells = [metric_cell("ndcg@10", modes[mode]["ndcg@10"]), metric_cell("hr@10", modes[mode]["hr@10"])]
        cells.append(ratio_cell(ratio) if ratio else text_cell("–" if mode != "frozen" else "1"))
        for subset in ("session_start", "within_session"):
            part = replay.get(subset)
            cells.append(metric_cell("ndcg@10", part["modes"][mode]["ndcg@10"] if part else None))
        other = against["modes"].get(mode)
        cells.append(metric_cell("ndcg@10", other["modes"]["baseline"]["ndcg@10"] if other else None))
        cells.append(ratio_cell(other["ratios"]["model/baseline"] if other else None))
        rows.append(_row(MODES.get(mode, mode), cells))
    drawn = "" if replay["events"] == replay["eligible_events"] else (
        f" of {whole_of(replay['users'])} users drawn at random (of {whole_of(replay['eligible_events'])} in all)"
    )  # fmt: skip
    starts, inside = ((replay.get(s) or {}).get("events", 0) for s in ("session_start", "within_session"))
    return _section(
        "Replayed in time order",
        f"{whole_of(replay['events'])} events after the cut{drawn}, each asked for before it is revealed; "
        f"{whole_of(starts)} begin a session, {whole_of(inside)} are within one (a pause above "
        f"{replay['session_gap_minutes']} minutes ends it). {_gain(replay)}",
        ["What the model knows", "NDCG@10", "HR@10", "To frozen", "Session start", "Within session", label,
         f"Model to {label}"],
        rows,
    )  # fmt: skip


def _gain(replay: Metrics) -> str:
    """What revealing is worth, in a sentence."""
    last = list(replay["all"]["modes"])[-1]
    ratio = replay["all"]["ratios"].get(f"{last}/frozen")
    if ratio is None:
        return "Frozen at the cut, the model finds too few of them to compare with."
    percent = (ratio["value"] - 1) * 100
    span = f"ratio {ratio_of(ratio['lo'])} to {ratio_of(ratio['hi'])}"
    if ratio["lo"] > 1:
        return f"Knowing what happened since the cut makes the model's NDCG@10 {percent:.0f} % higher ({span})."
    if ratio["hi"] < 1:
        return f"Knowing what happened since the cut makes the model's NDCG@10 {-percent:.0f} % lower ({span})."
    return f"Whether knowing what happened since the cut helps the model may be chance ({span})."


def _slices(metrics: Metrics, scorers: Metrics) -> Section | None:
    titles = {"by_history_length": "Events in the history", "by_target_popularity": "Training events of the target",
              "by_disagreement": "Disagreement of the branches"}  # fmt: skip
    groups = []
    for key, title in titles.items():
        rows = [
            _row(span_of(g), [text_cell(whole_of(g["users"])), *_marked([g["ndcg@10"][name] for name in scorers])])
            for g in metrics.get(key) or []
        ]
        if len(rows) > 1:
            groups.append({"label": title, "rows": rows})
    if not groups:
        return None
    section = _section(
        "Where the model wins, and where not",
        "NDCG@10 of groups of users, in quartiles; the best of a row is bold. Disagreement is 1 − cosine of the long "
        "and the short branch's interest.",
        ["Group", "Users", *map(label_of, scorers)],
        [],
    )
    return section | {"groups": groups}


def _cold(metrics: Metrics, scorers: Metrics) -> Section | None:
    """Users and items without an event that was learned from. The latter come under every split."""
    parts, new = metrics.get("slices") or {}, metrics.get("new_items")
    groups: list[dict[str, Any]] = []
    if parts:
        rows = []
        for name, part in parts.items():
            figures = {"model": part["model"], **part["baselines"]}
            values = _marked([figures[scorer]["ndcg@10"]["value"] for scorer in scorers])
            rows.append(_row(name.replace("_", " "), [text_cell(whole_of(part["users"])), *values]))
        groups.append({"label": "NDCG@10 over the whole catalogue", "rows": rows})
    lead = (
        "Counting cannot rank what it never counted: among new items its order is the catalogue's. A model can read an "
        "item's text."
    )
    if new:
        users = text_cell(whole_of(new["targets"]))
        for kind, title in (
            ("catalogue", "Targets without an event that was learned from, in the whole catalogue"),
            ("new_only", f"The same, ranked among the {whole_of(new['candidates'])} items without one"),
        ):
            rows = [
                _row(column_of(key), [users, *(metric_cell(key, new["scorers"][name][kind][key]) for name in scorers)])
                for key in ("ndcg@10", "hr@10")
            ]
            groups.append({"label": title, "rows": rows})
        if new["candidates"] > 10:
            lead += f" Among new items only, a random order reaches HR@10 {figure_of(new['chance_hr@10'])}."
        else:
            lead += f" With {new['candidates']} new items, HR@10 among them says nothing."
    if not groups:
        return None
    heading = "Cold users and cold items" if metrics["split"] == "temporal" else "Cold items"
    return _section(heading, lead, ["Slice", "Users", *map(label_of, scorers)], []) | {"groups": groups}


def _ties(metrics: Metrics) -> Section | None:
    ties = metrics.get("ties") or {}
    if not ties.get("events_tied"):
        return None
    lead = (
        f"{whole_of(ties['events_tied'])} of {whole_of(ties['events'])} events "
        f"({share_of(ties['events_tied'], ties['events'])}) have the same time as a neighbour, and so do "
        f"{whole_of(ties['targets_with_either'])} of {whole_of(ties['targets'])} targets "
        f"({whole_of(ties['targets_with_history'])} as the last event shown). Their order is an accident of the log."
    )
    if not ties.get("scorers"):
        return _section("Events with equal times", lead, [], [])
    lead += (
        f" In another order of them, {share_of(ties['changed_targets'], 1)} of the users have another target. NDCG@10 "
        "without training again:"
    )
    rows = [
        _row(label_of(name), [text_cell(figure_of(found["log"])), text_cell(figure_of(found["mean"])),
                              text_cell(f"{figure_of(found['min'])} to {figure_of(found['max'])}"),
                              text_cell(figure_of(found["by_item"]))], name)
        for name, found in ties["scorers"].items()
    ]  # fmt: skip
    orders = f"{ties['orders']} random orders" if ties["orders"] > 1 else "a random order"
    return _section(
        "Events with equal times", lead,
        ["Scorer", "Order of the log", f"Mean of {orders}", "Lowest to highest", "Sorted by item id"], rows,
    )  # fmt: skip


def _section(heading: str, lead: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> Section:
    groups = [{"label": "", "rows": list(rows)}] if rows else []
    unbroken = [column.replace("-", "\N{NON-BREAKING HYPHEN}") for column in columns]
    return {"heading": heading, "lead": lead, "columns": unbroken, "groups": groups}


def _row(label: str, cells: Sequence[Cell], name: str = "") -> dict[str, Any]:
    return {"label": label, "key": css_of(name) if name else "", "model": name == "model", "cells": list(cells)}


def _marked(values: Sequence[float]) -> list[dict[str, Any]]:
    """Cells, the highest of them marked unless all are nothing."""
    best = max(values)
    return [{**text_cell(figure_of(v)), "best": v == best and best > 0} for v in values]


def _moment(milliseconds: int) -> str:
    try:
        return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):  # outside the calendar
        return f"{milliseconds} ms"
