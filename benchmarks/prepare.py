"""How fast is the `prepare` job, and what does Ray cost? Beside the same tables by polars alone, in the same run.

    python benchmarks/prepare.py [--sizes 1000000 5000000] [--formats parquet csv] [--rounds 3] [--keep DIR]

Both run as subprocesses, in turn, on the same files; the first round of each size also checks that they wrote the
same histories. Seconds are fitted as start + events / rate through the two sizes (the best of the rounds, since other
work on the machine only ever adds). Memory and CPU time are measured in a run of its own: sampling costs time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import polars as pl

from harness import REPO, describe, job, machine, run_measured, scratch, table, write_experiment, write_result
from synthetic import write_log

TARGET = 0.25  # of the marginal rate of polars
SYSTEMS = ("springtide", "polars")


def commands(root: Path, log: Path, format: str) -> tuple[dict[str, list[str]], dict[str, Path]]:
    """Command and output folder of each system for one log."""
    out = {name: root / "out" / name for name in SYSTEMS}
    config = write_experiment(root / "experiment.yaml", out["springtide"], log, format)
    polars = [sys.executable, str(REPO / "benchmarks" / "prepare_polars.py"), str(log / "events"), str(out["polars"])]
    return {"springtide": job("prepare", config), "polars": polars}, out


def check_equal(out: dict[str, Path]) -> dict[str, int]:
    """Raise SystemExit unless both systems wrote the same histories. Returns their counts."""

    def histories(sequences: Path, items: Path) -> pl.DataFrame:
        catalogue = pl.read_parquet(items).select("item", "item_id")
        rows = pl.read_parquet(sequences).select("user_id", "items", "timestamps", "ratings", "parts")
        rows = rows.explode("items", "timestamps", "ratings", "parts", empty_as_null=True)
        rows = rows.join(catalogue, left_on="items", right_on="item", how="left", maintain_order="left").drop("items")
        return rows.sort("user_id", maintain_order=True).with_columns(pl.col("ratings").fill_nan(None))

    prepared = out["springtide"] / "prepared"
    ours = histories(prepared / "sequences" / "*.parquet", prepared / "items" / "*.parquet")
    theirs = histories(out["polars"] / "sequences.parquet", out["polars"] / "items.parquet")
    if not ours.equals(theirs):
        raise SystemExit(f"the two results differ: springtide has {len(ours)} events, polars {len(theirs)}")
    return {"events": len(ours), "users": ours["user_id"].n_unique(), "items": ours["item_id"].n_unique()}


def measure(root: Path, log: Path, format: str, rounds: int) -> dict[str, Any]:
    """Seconds of every round, CPU seconds, peak memory and the checked counts for one log."""
    command, out = commands(root, log, format)
    seconds: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    memory: dict[str, int] = {}
    cpu: dict[str, float] = {}
    counts: dict[str, int] = {}
    for round_ in range(rounds + 1):
        for name in SYSTEMS:
            shutil.rmtree(out[name], ignore_errors=True)
            sample = round_ == rounds
            done = run_measured(command[name], root / "logs" / f"{name}-{round_}.log", sample=sample)
            if sample:
                memory[name] = done.peak_pss if name == "springtide" else done.max_rss
                cpu[name] = round(done.cpu_seconds, 2)
            else:
                seconds[name].append(round(done.seconds, 3))
                print(f"  {format} {log.name} round {round_ + 1} {name}: {done.seconds:.1f} s", flush=True)
        if not counts:
            counts = check_equal(out)
    shutil.rmtree(root / "out", ignore_errors=True)
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": memory, "written": counts}


def fit(sizes: list[int], seconds: list[float]) -> tuple[float, float]:
    """(start-up seconds, events per second) of t = start + n / rate through the smallest and the largest size."""
    rate = (sizes[-1] - sizes[0]) / max(1e-9, seconds[-1] - seconds[0])
    return seconds[0] - sizes[0] / rate, rate


def summarise(sizes: list[int], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Start-up, marginal rate and peak memory of each system, and the ratio of the rates."""
    summary: dict[str, Any] = {}
    for name in SYSTEMS:
        start, rate = fit(sizes, [min(m["seconds"][name]) for m in measured])
        summary[name] = {
            "startup_seconds": round(start, 2),
            "marginal_events_per_second": round(rate),
            "marginal_events_per_cpu_second": round(fit(sizes, [m["cpu_seconds"][name] for m in measured])[1]),
            "peak_bytes": [m["peak_bytes"][name] for m in measured],
        }
    ours, theirs = (summary[name] for name in SYSTEMS)
    for ratio, key in (("ratio", "marginal_events_per_second"), ("cpu_ratio", "marginal_events_per_cpu_second")):
        summary[ratio] = round(ours[key] / theirs[key], 3)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs=2, default=[1_000_000, 5_000_000], metavar="EVENTS")
    parser.add_argument("--formats", nargs="+", choices=["parquet", "csv"], default=["parquet", "csv"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="folder for logs and data, kept afterwards")
    args = parser.parse_args()
    sizes = sorted(args.sizes)
    if sizes[0] == sizes[1] or args.rounds < 1:
        parser.error("give two different sizes and at least one round")
    facts = machine()
    results: dict[str, Any] = {"machine": facts, "sizes": sizes, "formats": {}}
    rows = []
    with scratch(args.keep) as root:
        for format in args.formats:
            measured = []
            for size in sizes:
                log = root / f"{format}-{size}"
                if not (log / "events").exists():
                    write_log(log, size, size // 20, min(50_000, size // 50), shards=args.shards, format=format)
                measured.append(measure(root / "runs" / log.name, log, format, args.rounds))
                if args.keep is None:
                    shutil.rmtree(log)
            summary = summarise(sizes, measured)
            results["formats"][format] = {**summary, "runs": dict(zip(map(str, sizes), measured, strict=True))}
            for name in SYSTEMS:
                own = summary[name]
                rows.append(
                    [f"{format} {name}", *(f"{min(m['seconds'][name]):.1f}" for m in measured),
                     f"{own['startup_seconds']:.1f}", f"{own['marginal_events_per_second']:,}",
                     f"{own['marginal_events_per_cpu_second']:,}",
                     *(f"{size / 2**20:,.0f}" for size in own["peak_bytes"])]
                )  # fmt: skip
    millions = [f"{size / 1e6:g}M" for size in sizes]
    print(f"\n{describe(facts)}")
    print(table(["", *(f"{m} s" for m in millions), "start-up s", "marginal events/s", "events/CPU s",
                 *(f"{m} peak MiB" for m in millions)], rows))  # fmt: skip
    for format, summary in results["formats"].items():
        verdict = "met" if summary["ratio"] >= TARGET else "MISSED"
        print(f"{format}: marginal rate {summary['ratio']:.2f} of polars' (target {TARGET}: {verdict}), "
              f"per CPU second {summary['cpu_ratio']:.2f}")  # fmt: skip
    print("springtide's memory is the proportional set size of all its processes, polars' the largest resident size.")
    print(f"written to {write_result('prepare', results).relative_to(REPO)}")


if __name__ == "__main__":
    main()
