"""How good are the recommendations? The whole way, raw log to metrics, on real logs, beside what other models reached.

    python benchmarks/quality.py DATA [--logs ml-100k ...] [--all] [--seeds 0,1,2] [--set train.epochs=5 ...]
        [--ablate model.memory=false ...] [--ablation-epochs N] [--work DIR] [--fresh] [--peer-ranks FOLDER]

DATA holds ml-100k/, ml-latest-small/, amazon-sports/ and online-retail/, raw; ml-100k is fetched if it is not there.
Each log is prepared and embedded once, then trained and evaluated with each seed, by the jobs as a user runs them, on a
Ray cluster of its own, with one worker: on one core. quality.yaml describes the logs; model and training take the
project's defaults on all of them. An ablation is trained on the first seed up to its validation, without the refit, and
compared by validation NDCG@10, so that nobody chooses parts by the test; --ablate parts takes away each part in turn.
What is finished is not run again, so an interrupted benchmark goes on when the same command is given again. The status
is 0 only if every run that was asked for is there. The table is also written to WORK as quality.json and quality.md.

Our lists are compared user by user with those of the log's best counting peer, made again (quality_peers.py), or with
LOG.parquet (user, items) of another one in the folder --peer-ranks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from harness import REPO, describe, job, machine, run_measured, tail
from quality_logs import (
    LOGS,
    Log,
    MissingLog,
    load_logs,
    locate,
    read_events,
    source_files,
    split_hashes,
)
from quality_peers import COUNTING, chance_between, counting_peer, judged, of_lists, ratio
from quality_report import (
    GIVEN,
    count,
    figures_of,
    load_peers,
    mean_ratio,
    render,
    shortened,
    summarise,
    training_figures,
)
from springtide.config import load_settings
from springtide.data.prepared import load_prepared
from springtide.errors import SpringtideError
from springtide.files import publish_directory, write_json, write_text
from springtide.local_cluster import local_cluster
from springtide.quickstart import fetch_movielens

DEFAULT_LOGS = ["ml-100k", "ml-latest-small", "amazon-sports", "online-retail"]
OURS = ("name", "workspace", "train.seed", "train.workers")  # settings that this script gives
# What --ablate parts takes away, one at a time; the last one all counting channels at once. Without the memory item
# vectors begin at random as well: they begin from its counts.
PARTS = (
    "model.memory=false",
    "model.neighbours=false",
    "model.borrowing=false",
    "model.text_neighbours=false",
    "model.recent_popularity=false",
    "model.popularity=false",
    "model.long_branch=none",
    "model.short_branch=none",
    "model.gate=mean",
    "model.text_dim=0",
    "model.id_start=random",
    "model.id_dropout=0",
    "train.average=0",
    "model.memory=false model.neighbours=false model.text_neighbours=false model.recent_popularity=false "
    "model.popularity=false",
)
DEFAULTS = "defaults"


@dataclass(frozen=True)
class Variant:
    """Settings that differ from the defaults, and the seed."""

    overrides: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """Of its folder: readable, and different for different settings."""
        said = sorted(self.overrides)
        if not said:
            return f"{DEFAULTS}-seed-{self.seed}"
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(said))[:60].strip("-")
        return f"{readable}-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:8]}-seed-{self.seed}"


@dataclass
class Bench:
    """What the command line said, and where a log's files go."""

    work: Path
    overrides: tuple[str, ...]
    ablations: list[tuple[str, ...]]
    seeds: list[int]
    ablation_epochs: int | None = None  # most epochs of an ablation, and of what it is compared with; None: all
    fresh: bool = False
    peer_ranks: Path | None = None
    failures: list[str] = field(default_factory=list)

    def fail(self, what: str, why: object) -> None:
        """Say why something was not measured, and keep the last line of it."""
        print(f"  {what}: {why}", flush=True)
        self.failures.append(f"{what}: {str(why).splitlines()[-1]}")

    def folder(self, log: Log) -> Path:
        return self.work / log.name

    def config(self, log: Log) -> Path:
        return self.folder(log) / "experiment.yaml"

    def workspace(self, log: Log) -> Path:
        return self.folder(log) / "workspace"

    def run_folder(self, log: Log, variant: Variant) -> Path:
        return self.folder(log) / "runs" / variant.name

    def ablates(self, variant: Variant) -> bool:
        """Is this one of the ablations?"""
        return variant.overrides != self.overrides

    def most_epochs(self, variant: Variant) -> int | None:
        """Epochs that a variant is cut to; None: as many as it takes."""
        return self.ablation_epochs if self.ablates(variant) else None

    def variants(self) -> list[Variant]:
        """All that is to be run on a log: every seed, then the ablations on the first seed."""
        seeds = [Variant(self.overrides, seed) for seed in self.seeds]
        return [*seeds, *(Variant((*self.overrides, *extra), self.seeds[0]) for extra in self.ablations)]


# ---------------------------------------------------------------- what is there already
def finished(bench: Bench, log: Log, variant: Variant, source: str) -> dict[str, Any] | None:
    """The run.json of a variant that was measured on these files, as long; None if it has to be run."""
    try:
        run: dict[str, Any] = json.loads((bench.run_folder(log, variant) / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    asked = (source, bench.most_epochs(variant))
    return run if (run.get("source"), run.get("most_epochs")) == asked else None


def code_version() -> str:
    """Ten hex digits of the package's code and the description of the logs."""
    digest = hashlib.sha256()
    for path in [*sorted((REPO / "platform" / "springtide").rglob("*.py")), LOGS]:
        digest.update(path.relative_to(REPO).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:10]


# ---------------------------------------------------------------- one log
def run_log(bench: Bench, log: Log, section: dict[str, Any]) -> dict[Variant, dict[str, Any]]:
    """Every variant of a log, run unless it is there already. What fails is noted and left out."""
    source = source_files(section)
    config = bench.config(log)
    config.parent.mkdir(parents=True, exist_ok=True)
    experiment = {"name": log.name, "workspace": str(bench.workspace(log)), "data": section}
    config.write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")
    variants = bench.variants()
    for variant in variants:
        load_settings(config, variant.overrides)  # what is misspelt is told before anything runs
    if bench.fresh:
        shutil.rmtree(bench.workspace(log), ignore_errors=True)
        for variant in variants:
            shutil.rmtree(bench.run_folder(log, variant), ignore_errors=True)
    runs = {variant: run for variant in variants if (run := finished(bench, log, variant, source))}
    for variant in runs:
        print(f"  {variant.name}: measured before", flush=True)
    waiting = [variant for variant in variants if variant not in runs]
    if waiting:
        try:
            with local_cluster() as cluster:
                split = prepare(bench, log, cluster.environment)
                for variant in waiting:
                    facts = {
                        "log": log.name, "source": source, "code": code_version(), "split": split,
                        "most_epochs": bench.most_epochs(variant),
                    }  # fmt: skip
                    forget_other_code(bench.workspace(log), facts["code"])
                    try:
                        runs[variant] = measure(bench, log, variant, facts, cluster.environment)
                    except (SystemExit, SpringtideError) as error:
                        bench.fail(f"{log.name}, {variant.name}", error)
        except (SystemExit, SpringtideError) as error:
            bench.fail(log.name, error)
    return {variant: runs[variant] for variant in variants if variant in runs}


def forget_other_code(workspace: Path, version: str) -> None:
    """Remove the checkpoints of interrupted runs that another version of the code has written."""
    marker = workspace / "code"
    if not marker.exists() or marker.read_text(encoding="utf-8") != version:
        shutil.rmtree(workspace / "runs", ignore_errors=True)
        write_text(marker, version)


def keep(run: Mapping[str, Any], folder: Path, *files: Path) -> None:
    """Write run.json, and copies of `files` beside it. Raises SpringtideError if the code has changed meanwhile."""
    if code_version() != run["code"]:
        raise SpringtideError(
            "the code was changed while this ran, so nobody could say what was measured; run it again"
        )
    with publish_directory(folder) as out:
        for file in files:
            shutil.copy(file, out)
        write_json(out / "run.json", run)


def prepare(bench: Bench, log: Log, env: Mapping[str, str]) -> dict[str, str]:
    """Prepare a log, and embed its items unless their vectors are there. Returns the sha256 of the parts."""
    from springtide.text.embed import load_vectors

    config, workspace, logs = bench.config(log), bench.workspace(log), bench.folder(log) / "logs"
    done = run_measured(job("prepare", config, *bench.overrides), logs / "prepare.log", env=env)
    print(f"  prepare: {done.seconds:.0f} s", flush=True)
    settings, prepared = load_settings(config, bench.overrides), load_prepared(workspace)
    try:
        vectors = load_vectors(settings, prepared.items)
    except SpringtideError:
        vectors = None
    if vectors is None and prepared.report["catalogue"]["with_text"]:
        done = run_measured(job("embed", config, *bench.overrides), logs / "embed.log", env=env)
        print(f"  embed: {done.seconds:.0f} s", flush=True)
    split = split_hashes(read_events(prepared.path))
    peers = load_peers()[log.name]
    if split == peers["sha256"] and len(prepared.items) == peers["catalogue"]:
        print("  the same split and catalogue as the peers', row by row", flush=True)
    else:
        print("  NOT the peers' split or catalogue: their figures are not compared with", flush=True)
    return split


def measure(
    bench: Bench, log: Log, variant: Variant, facts: Mapping[str, Any], env: Mapping[str, str]
) -> dict[str, Any]:
    """Train, evaluate and write the lists of one variant; keep what is to be kept in its folder. Returns run.json."""
    config, workspace, logs = bench.config(log), bench.workspace(log), bench.folder(log) / "logs"
    overrides = [*variant.overrides, f"train.seed={variant.seed}"]
    began = time.perf_counter()
    overrides.append("train.workers=1")
    if bench.ablates(variant):
        most = bench.most_epochs(variant)
        epochs = [] if most is None else [f"train.epochs={most}"]
        said = logs / f"{variant.name}-train.log"
        # Lists of thousands of users would be read to damp and lift, which nothing here compares.
        plain = ("train.coverage_cost=0", *overrides, "train.refit=false", *epochs)
        run_measured(job("train", config, *plain), said, env=env)
        train = json.loads((workspace / "results" / "train.json").read_text(encoding="utf-8"))
        run = {**facts, "seed": variant.seed, "overrides": list(variant.overrides), **training_figures(train)}
        keep(run, bench.run_folder(log, variant))
        shutil.rmtree(train["run"], ignore_errors=True)  # the checkpoints
        print(f"  {variant.name}: validation {run['valid_ndcg@10']:.4f}", flush=True)
        return run
    seconds = {}
    for stage in ("train", "evaluate"):
        done = run_measured(job(stage, config, *overrides), logs / f"{variant.name}-{stage}.log", env=env)
        seconds[stage] = round(done.seconds, 1)
    said, lists = logs / f"{variant.name}-lists.log", workspace / "ranks.parquet"
    run_measured([sys.executable, REPO / "benchmarks" / "quality_lists.py", config, lists, *overrides], said, env=env)
    metrics = json.loads((workspace / "metrics.json").read_text(encoding="utf-8"))
    train = json.loads((workspace / "results" / "train.json").read_text(encoding="utf-8"))
    run = {
        **facts, "seed": variant.seed, "overrides": list(variant.overrides), **figures_of(metrics, train),
        "seconds": seconds, "wall_seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    again, ndcg = json.loads(tail(said, 1))["ndcg@10"], run["ndcg@10"]["value"]
    if abs(again - ndcg) > 1e-4:
        raise SpringtideError(f"the lists have NDCG@10 {again:.5f}, but evaluate says {ndcg:.5f}")
    kept = ("metrics.json", "report.html", "ranks.parquet", "results/train.json")
    keep(run, bench.run_folder(log, variant), *(workspace / name for name in kept))
    shutil.rmtree(train["run"], ignore_errors=True)  # the checkpoints
    epochs = count(run["epochs"], "epoch")
    print(f"  {variant.name}: NDCG@10 {ndcg:.4f} (validation {run['valid_ndcg@10']:.4f}), {epochs} in "
          f"{run['train_cpu_seconds']:.0f} CPU s, {run['wall_seconds']:.0f} s in all", flush=True)  # fmt: skip
    return run


# ---------------------------------------------------------------- a paired comparison
def pair_with_peer(bench: Bench, log: Log, runs: Mapping[Variant, dict[str, Any]]) -> None:
    """Add "paired_peer" to each run: its name, its NDCG@10 and our ratio to it with a paired interval; and
    "chance_between_seeds"."""
    runs = {variant: run for variant, run in runs.items() if not bench.ablates(variant)}
    if not runs:
        return
    try:
        prepared = load_prepared(bench.workspace(log))
        if split_hashes(read_events(prepared.path)) != next(iter(runs.values()))["split"]:
            raise ValueError(f"{prepared.path} is another log by now; run it again with --fresh")
        cases, ids = judged(bench.config(log), bench.overrides), prepared.items["item_id"].to_pylist()
        if bench.peer_ranks is not None:
            name, theirs = GIVEN, of_lists(cases, bench.peer_ranks / f"{log.name}.parquet", ids)
        else:
            name = COUNTING[log.name][0]
            published = {peer["name"]: peer["ndcg@10"] for peer in load_peers()[log.name]["peers"]}[name]
            theirs = counting_peer(log.name, cases, published)
        ours = {v: of_lists(cases, bench.run_folder(log, v) / "ranks.parquet", ids) for v in runs}
        chance = chance_between(list(ours.values()))
        for variant, run in runs.items():
            found = ratio(theirs, ours[variant])
            run["paired_peer"] = {"name": name, "ndcg@10": float(theirs.mean()), "ratio": found}
            run["chance_between_seeds"] = chance
    except (OSError, ValueError, KeyError, SpringtideError, pl.exceptions.PolarsError) as error:
        print(f"  not paired with a peer: {error}", flush=True)


# ---------------------------------------------------------------- the command
def find(bench: Bench, log: Log, data: Path) -> dict[str, Any] | None:
    """A log's section `data`, MovieLens-100K fetched if need be; None, and a sentence said, if the log is missing."""
    made = bench.folder(log) / "made"
    try:
        if log.name == "ml-100k" and not (data / log.folder).exists():
            data = bench.work / "fetched"
            fetch_movielens(data / log.folder)
        return locate(log, data, made)
    except (MissingLog, SpringtideError) as error:
        bench.fail(f"{log.name} skipped", error)
        return None


def run_all(bench: Bench, logs: Sequence[Log], data: Path) -> str:
    """Run every log and write quality.json and quality.md below the work folder. Returns the report as text."""
    peers, titles = load_peers(), {log.name: log.title for log in logs}
    facts = machine()
    summaries: dict[str, Any] = {}
    ablations: dict[str, dict[str, Any]] = {}
    measured: dict[str, list[dict[str, Any]]] = {}
    for log in logs:
        print(f"\n== {log.title}", flush=True)
        section = find(bench, log, data)
        runs = {} if section is None else run_log(bench, log, section)
        pair_with_peer(bench, log, runs)
        seeds = {variant: run for variant, run in runs.items() if not bench.ablates(variant)}
        measured[log.name] = list(runs.values())
        if seeds:
            summaries[log.name] = summarise(list(seeds.values()), peers[log.name])
            first = next(iter(seeds))
            others = {" ".join(v.overrides[len(bench.overrides) :]): run for v, run in runs.items() if v not in seeds}
            if others and first.seed == bench.seeds[0]:
                whole = shortened(seeds[first], bench.ablation_epochs)
                ablations[log.name] = {" ".join(bench.overrides) or DEFAULTS: whole, **others}
        body = {"machine": facts, "overrides": list(bench.overrides), "mean_ratio_to_best_peer": mean_ratio(summaries),
                "logs": summaries, "runs": measured, "failures": bench.failures}  # fmt: skip
        write_json(bench.work / "quality.json", body)
        page = render(summaries, ablations, titles, warnings(bench, measured), as_markdown=True)
        write_text(bench.work / "quality.md", f"{page}\n\n{describe(facts)}\n")
    text = render(summaries, ablations, titles, warnings(bench, measured)) or "Nothing was measured."
    return f"{describe(facts)}\n\n{text}"


def warnings(bench: Bench, measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What must be known before a figure is believed."""
    found = []
    if bench.overrides:
        found.append(f"NOT with the default settings but with {' '.join(bench.overrides)}.")
    version = code_version()
    if old := [name for name, runs in measured.items() if any(run["code"] != version for run in runs)]:
        found.append(
            f"Measured, at least in part, by ANOTHER VERSION OF THE CODE: {', '.join(old)} (--fresh runs again)."
        )
    return found


def seeds_of(text: str) -> list[int]:
    """`0,1,2` as numbers, each once."""
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def check_overrides(overrides: Sequence[str], ablations: Sequence[Sequence[str]]) -> None:
    """Raise SpringtideError for a setting that would undo what the benchmark is about."""
    for override in [*overrides, *(one for ablation in ablations for one in ablation)]:
        key = override.partition("=")[0].strip()
        if key in OURS:
            raise SpringtideError(f"{override}: the benchmark sets {key} itself")
    for one in (one for ablation in ablations for one in ablation):
        if one.partition(".")[0] in ("data", "text"):
            raise SpringtideError(f"--ablate {one}: the variants share what prepare and embed wrote; use --set")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    logs = load_logs()
    parser = argparse.ArgumentParser(prog="benchmarks/quality.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with the raw logs")
    parser.add_argument("--logs", nargs="+", choices=list(logs), default=DEFAULT_LOGS, metavar="LOG",
                        help=f"of {', '.join(logs)}; default: the first four")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="every log")
    parser.add_argument("--seeds", type=seeds_of, default=[0, 1, 2], metavar="0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a setting")
    parser.add_argument("--ablate", action="append", default=[], metavar="section.key=value",
                        help="also train this, on the first seed; a space joins settings to one variant; "
                        "`parts`: without each of the model's parts in turn")  # fmt: skip
    parser.add_argument("--ablation-epochs", type=int, metavar="N", help="compare the best of the first N epochs")
    parser.add_argument("--work", type=Path, default=REPO / "workspace" / "quality", help="what is written goes here")
    parser.add_argument("--fresh", action="store_true", help="run again what is finished")
    parser.add_argument("--peer-ranks", type=Path, help="folder with LOG.parquet (user, items) of a peer")
    args = parser.parse_args(arguments)
    if args.all:
        args.logs = list(logs)
    if not args.data.is_dir():
        parser.error(f"there is no folder {args.data}; DATA is the folder that holds ml-100k/, ml-latest-small/, ...")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    logs = load_logs()
    wanted = [part for one in args.ablate for part in (PARTS if one == "parts" else (one,))]
    ablations = [tuple(one.split()) for one in wanted]
    bench = Bench(
        args.work.absolute(), tuple(args.set), ablations, args.seeds, args.ablation_epochs, args.fresh,
        peer_ranks=args.peer_ranks,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the cluster would outlive this process
    try:
        check_overrides(args.set, ablations)
        text = run_all(bench, [logs[name] for name in dict.fromkeys(args.logs)], args.data.absolute())
    except SpringtideError as error:
        sys.exit(f"quality: {error}")
    except KeyboardInterrupt:
        sys.exit("quality: interrupted; the same command goes on from here")
    print(f"\n{text}\n\nwritten to {bench.work / 'quality.json'} and quality.md")
    if bench.failures:
        sys.exit(f"quality: {len(bench.failures)} not measured: {'; '.join(bench.failures)}")


if __name__ == "__main__":
    main()
