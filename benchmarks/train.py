"""What does Ray cost in training? The train job beside a plain PyTorch loop over the same model and batches.

    python benchmarks/train.py [--events 300000] [--workers 1 2] [--epochs 4] [--rounds 2] [--keep DIR]

Target positions per CPU second of the workers, and per second of wall time, from the second epoch on, validation
included on both sides; Ray's share of the running time (waiting for data, reporting, checkpoints); seconds from
starting the job to its first step. The two run in turn, and the best round of each stands.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from harness import REPO, describe, job, machine, run_measured, scratch, table, tail, write_experiment, write_result
from synthetic import write_log

TARGET_SHARE = 0.15


def ray_run(config: Path, workspace: Path, log: Path) -> dict[str, Any]:
    """One run of the train job from the start."""
    shutil.rmtree(workspace / "runs", ignore_errors=True)
    run_measured(job("train", config), log)
    result = json.loads((workspace / "results" / "train.json").read_text())
    running = result["epochs"][1:] or result["epochs"]
    seconds = result["epoch_seconds"] * len(running)
    return {
        **{key: result[key] for key in ("positions_per_cpu_second", "epoch_seconds", "ray_share", "run")},
        "positions_per_second": sum(epoch["positions"] for epoch in running) / seconds,
        "seconds_to_first_step": result["seconds_to_first_step"],
        "validation": result["validation"],
    }


def bare_run(config: Path, run: str, workers: int, epochs: int, log: Path) -> dict[str, Any]:
    """One run of the plain loop on the counts that the job left in its run folder."""
    inputs = Path(run) / "inputs.safetensors"
    command = [sys.executable, REPO / "benchmarks" / "train_bare.py", config, inputs, str(workers), str(epochs)]
    run_measured([str(part) for part in command], log)
    return json.loads(tail(log, 1))


def compare(root: Path, log: Path, workers: int, epochs: int, rounds: int) -> dict[str, Any]:
    """The rounds of both systems, with `workers` processes each, and their best."""
    workspace = root / "workspace"
    train = {"workers": workers, "epochs": epochs, "patience": epochs, "refit": False}
    config = write_experiment(
        root / f"train-{workers}.yaml", workspace, log, "parquet", model={"text_dim": 0}, train=train
    )
    ray, bare = [], []
    for round_ in range(rounds):
        ray.append(ray_run(config, workspace, root / "logs" / f"ray-{workers}-{round_}.log"))
        bare.append(bare_run(config, ray[-1]["run"], workers, epochs, root / "logs" / f"bare-{workers}-{round_}.log"))
        print(f"  {workers} workers, round {round_ + 1}: Ray {ray[-1]['positions_per_cpu_second']:.0f}, "
              f"bare {bare[-1]['positions_per_cpu_second']:.0f} positions per CPU second", flush=True)  # fmt: skip

    def best(runs: list[dict[str, Any]], key: str) -> float:
        return max(run[key] for run in runs)

    summary = {
        key: {"ray": round(best(ray, key), 1), "bare": round(best(bare, key), 1),
              "ratio": round(best(ray, key) / best(bare, key), 3)}
        for key in ("positions_per_cpu_second", "positions_per_second")
    }  # fmt: skip
    return {
        **summary,
        "ray_share": round(min(run["ray_share"] for run in ray), 4),
        "seconds_to_first_step": round(min(run["seconds_to_first_step"] for run in ray), 1),
        "rounds": {"ray": ray, "bare": bare},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=300_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for logs and data, kept afterwards")
    args = parser.parse_args()
    if args.epochs < 2 or args.rounds < 1:
        parser.error("give at least two epochs (the first one warms up) and one round")
    facts = machine()
    results: dict[str, Any] = {"machine": facts, "events": args.events, "workers": {}}
    with scratch(args.keep) as root:
        log = root / "log"
        if not log.exists():
            write_log(log, args.events, max(1, args.events // 20), max(100, args.events // 50))
        config = write_experiment(root / "prepare.yaml", root / "workspace", log, "parquet")
        run_measured(job("prepare", config), root / "logs" / "prepare.log")
        for workers in args.workers:
            results["workers"][workers] = compare(root, log, workers, args.epochs, args.rounds)
    rows = []
    for workers, found in results["workers"].items():
        cpu, wall = found["positions_per_cpu_second"], found["positions_per_second"]
        rows.append([f"{workers} worker{'s' if workers > 1 else ''}", f"{cpu['ray']:,.0f}", f"{cpu['bare']:,.0f}",
                     f"{cpu['ratio']:.2f}", f"{wall['ray']:,.0f}", f"{wall['bare']:,.0f}", f"{wall['ratio']:.2f}",
                     f"{found['ray_share']:.1%}", f"{found['seconds_to_first_step']:.1f}"])  # fmt: skip
    print(f"\n{describe(facts)}")
    print(table(["target positions", "per CPU s, Ray", "bare", "ratio", "per s, Ray", "bare", "ratio", "Ray's share",
                 "s to first step"], rows))  # fmt: skip
    worst = max(found["ray_share"] for found in results["workers"].values())
    verdict = "met" if worst <= TARGET_SHARE else "MISSED"
    print(f"Ray's share of the time once running: {worst:.1%} at most (target {TARGET_SHARE:.0%}: {verdict})")
    print(f"written to {write_result('train', results).relative_to(REPO)}")


if __name__ == "__main__":
    main()
