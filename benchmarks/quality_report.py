"""What benchmarks/quality.py says of its runs: figures over the seeds, ratios to the peers, tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import table

PEERS = Path(__file__).with_name("peers.json")
GIVEN = "the lists given"  # the name of a peer that is not one of peers.json
Run = Mapping[str, Any]  # the body of a run.json, see figures_of
BEST = (
    "Ratio to the best peer: our NDCG@10 by the peer's; in brackets our own 95 % bootstrap interval over users, by the "
    "same figure, as only the peer's mean is kept. Marked *: paired, because the peer is the one of the next columns."
)
PAIRED = "Ratio to the paired peer: 95 % interval of a paired bootstrap over the same users."
OWN = "Ratio to our own best baseline (of evaluate's report): 95 % interval of a paired bootstrap over the same users."
SEEDS = "With several seeds every figure is their mean, bounds of intervals included; ± is the standard deviation."


def load_peers(path: Path = PEERS) -> dict[str, Any]:
    """Log -> its split, number of users judged, catalogue size, sha256 of the parts and peers, best first."""
    logs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["logs"]
    for entry in logs.values():
        entry["peers"].sort(key=lambda peer: -peer["ndcg@10"])
    return logs


# ---------------------------------------------------------------- one run
def figures_of(metrics: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, Any]:
    """What a run.json keeps of a workspace's metrics.json and results/train.json."""
    best, model = metrics["best_baseline"], metrics["model"]
    return {
        **{key: model[key] for key in ("ndcg@10", "hr@10", "coverage@10")},
        "users": metrics["users"],
        "catalogue": metrics["catalogue"],
        "own_best": {
            "name": best,
            "ndcg@10": metrics["baselines"][best]["ndcg@10"],
            "ratio": metrics["paired"][best]["ndcg@10"]["ratio"],
        },
        "live_to_frozen": live_to_frozen(metrics),
        **training_figures(train),
    }


def training_figures(train: Mapping[str, Any]) -> dict[str, Any]:
    """What a run.json keeps of results/train.json. `validation` has (NDCG, NDCG@10) of every epoch."""
    return {
        "valid_ndcg@10": train["validation"]["ndcg@10"],
        "validation": [[epoch["ndcg"], epoch["ndcg@10"]] for epoch in train["epochs"]],
        "train_cpu_seconds": cpu_seconds(train),
        "epochs": len(train["epochs"]),
        "train_seconds": train["seconds"],
    }


def shortened(run: Run, epochs: int | None) -> Run:
    """A run as it would have been with so many epochs at most: training keeps the epoch of the best NDCG."""
    return {**run, "valid_ndcg@10": max(run["validation"][:epochs])[1]}


def cpu_seconds(train: Mapping[str, Any]) -> float:
    """CPU seconds of the workers over all epochs, those of a refit included."""
    epochs = [*train["epochs"], *(train.get("refit_epochs") or [])]
    return float(sum(epoch["cpu_seconds"] for epoch in epochs))


def live_to_frozen(metrics: Mapping[str, Any]) -> dict[str, float] | None:
    """NDCG@10 of the replay in which the model learns as it goes, by that in which nothing is revealed."""
    replay = (metrics.get("prequential") or {}).get("all") or {}
    ratio: dict[str, float] | None = (replay.get("ratios") or {}).get("live/frozen")
    return ratio


# ---------------------------------------------------------------- one log
def mean_estimate(estimates: Iterable[Mapping[str, float] | None]) -> dict[str, float] | None:
    """The mean of estimates {"value", "lo", "hi"}, bound by bound; None if one is missing."""
    found = list(estimates)
    if not found or any(estimate is None for estimate in found):
        return None
    return {key: statistics.fmean(e[key] for e in found if e is not None) for key in ("value", "lo", "hi")}


def summarise(runs: Sequence[Run], peers: Mapping[str, Any]) -> dict[str, Any]:
    """The runs of a log, one a seed, against its entry in peers.json.

    A run of another split, catalogue or number of users than the peers' is not compared with them ("peer" is None).
    """
    values = [run["ndcg@10"]["value"] for run in runs]
    ours = mean_estimate(run["ndcg@10"] for run in runs)
    assert ours is not None
    same = all(run["split"] == peers["sha256"] and run["catalogue"] == peers["catalogue"]
               and run["users"] == peers["users"] for run in runs)  # fmt: skip
    peer = peers["peers"][0]
    ratio: dict[str, Any] = {**{key: value / peer["ndcg@10"] for key, value in ours.items()}, "paired": False}
    pairs = [run["paired_peer"] for run in runs if run.get("paired_peer")]
    paired = None
    if len(pairs) == len(runs):
        paired = {**pairs[0], "ratio": mean_estimate(pair["ratio"] for pair in pairs)}
        if paired["name"] == peer["name"] and paired["ratio"]:
            ratio = {**paired["ratio"], "paired": True}
    return {
        "seeds": [run["seed"] for run in runs],
        "ndcg@10": {
            **ours,
            "spread": statistics.stdev(values) if len(values) > 1 else None,
            "of_seeds": values,
            "chance": runs[0].get("chance_between_seeds"),
        },
        **{key: statistics.fmean(run[key]["value"] for run in runs) for key in ("hr@10", "coverage@10")},
        "peer": peer if same else None,
        "ratio_to_peer": ratio if same else None,
        "paired_peer": paired if same else None,
        "own_best": {
            "name": runs[0]["own_best"]["name"],
            "ndcg@10": statistics.fmean(run["own_best"]["ndcg@10"]["value"] for run in runs),
            "ratio": mean_estimate(run["own_best"]["ratio"] for run in runs),
        },
        "live_to_frozen": mean_estimate(run["live_to_frozen"] for run in runs),
        "train_cpu_seconds": statistics.fmean(run["train_cpu_seconds"] for run in runs),
        "train_seconds": statistics.fmean(run["train_seconds"] for run in runs),
    }


def ratios_to_best(summaries: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """The ratio to the best peer, of every log that was compared with it."""
    return [found["ratio_to_peer"]["value"] for found in summaries.values() if found["ratio_to_peer"]]


def mean_ratio(summaries: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean of those ratios; None if there is none."""
    ratios = ratios_to_best(summaries)
    return statistics.fmean(ratios) if ratios else None


# ---------------------------------------------------------------- tables
def ratio_text(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio['value']:.2f} [{ratio['lo']:.2f}, {ratio['hi']:.2f}]{'*' if ratio.get('paired') else ''}"


def own_text(figure: Mapping[str, Any]) -> str:
    spread = "" if figure["spread"] is None else f" ± {figure['spread']:.4f}"
    return f"{figure['value']:.4f}{spread}"


HEADER = ["log", "NDCG@10", "seeds", "best peer", "ratio [95 %]", "paired peer", "ratio [95 %]",
          "own best baseline", "ratio [95 %]",
          "coverage@10", "peer's", "train CPU s", "train wall s"]  # fmt: skip


def rows_of(summaries: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> list[list[str]]:
    """A row for each log, under HEADER."""
    rows = []
    for name, found in summaries.items():
        peer, own, pair = found["peer"], found["own_best"], found["paired_peer"]
        rows.append([
            titles[name], own_text(found["ndcg@10"]), str(len(found["seeds"])),
            f"{peer['name']} {peer['ndcg@10']:.4f}" if peer else "– (another log or split)",
            ratio_text(found["ratio_to_peer"]),
            f"{pair['name']} {pair['ndcg@10']:.4f}" if pair else "–", ratio_text(pair["ratio"] if pair else None),
            f"{own['name'].replace('_', ' ')} {own['ndcg@10']:.4f}", ratio_text(own["ratio"]),
            f"{found['coverage@10']:.2f}", f"{peer['coverage@10']:.2f}" if peer else "–",
            f"{found['train_cpu_seconds']:,.0f}", f"{found['train_seconds']:,.0f}",
        ])  # fmt: skip
    return rows


def notes_on(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What has to be said below the table."""
    ratios = [found["ratio_to_peer"] for found in summaries.values() if found["ratio_to_peer"]]
    best = ratios_to_best(summaries)
    notes = (
        [f"Mean ratio to the best peer over {count(len(best), 'log')}: {statistics.fmean(best):.3f}."] if best else []
    )
    for name, found in summaries.items():
        if found["live_to_frozen"]:
            notes.append(f"{name}, replayed event by event after the cut: a model that learns as it goes has "
                         f"{ratio_text(found['live_to_frozen'])} of the NDCG@10 of a frozen one.")  # fmt: skip
        if (chance := found["ndcg@10"]["chance"]) is not None:
            spread = found["ndcg@10"]["spread"] / found["ndcg@10"]["value"]
            notes.append(f"{name}, seeds: standard deviation {spread:.1%} of the mean; two equally good models would "
                         f"differ by {chance:.1%} (standard error, paired by user).")  # fmt: skip
    notes += [BEST] * bool(ratios) + [PAIRED] * any(found["paired_peer"] for found in summaries.values())
    notes.append(OWN)
    if any(len(found["seeds"]) > 1 for found in summaries.values()):
        notes.append(SEEDS)
    return notes


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


ABLATION_HEADER = ["variant", "validation NDCG@10", "difference"]


def ablation_rows(variants: Mapping[str, Run]) -> list[list[str]]:
    """A row for each variant on one log and seed, under ABLATION_HEADER; the first variant is the one compared with."""
    base = next(iter(variants.values()))["valid_ndcg@10"]
    values = {name: run["valid_ndcg@10"] for name, run in variants.items()}
    return [
        [name, f"{value:.4f}", f"{value - base:+.4f} ({value / base - 1:+.1%})" if row else ""]
        for row, (name, value) in enumerate(values.items())
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a table of Markdown."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def render(
    summaries: Mapping[str, Mapping[str, Any]],
    ablations: Mapping[str, Mapping[str, Run]],
    titles: Mapping[str, str],
    warnings: Sequence[str] = (),
    as_markdown: bool = False,
) -> str:
    """Everything measured, as text for a terminal or as Markdown."""
    make = markdown if as_markdown else table
    parts = []
    if summaries:
        notes = [*warnings, *notes_on(summaries)]
        parts += [make(HEADER, rows_of(summaries, titles)), ("\n\n" if as_markdown else "\n").join(notes)]
    for name, variants in ablations.items():
        seed = next(iter(variants.values()))["seed"]
        parts += [f"Ablations on {titles[name]}, seed {seed}:", make(ABLATION_HEADER, ablation_rows(variants))]
    return "\n\n".join(parts)
