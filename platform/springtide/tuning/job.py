"""The `tune` stage: Ray Tune over any setting of model and train, with random search and ASHA early stopping."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from springtide.cluster import connect
from springtide.config import Settings, as_given, parse_settings, with_values
from springtide.data.prepared import Prepared, load_prepared
from springtide.errors import SpringtideError
from springtide.files import write_json, write_text
from springtide.training.job import fingerprint, sized, train, write_trained
from springtide.training.worker import STOPPED, read_progress
from springtide.tuning.space import check_space, concurrent_trials, param_space

log = logging.getLogger(__name__)
METRIC = "ndcg"  # over all ranks, by which training keeps its best epoch; the tables show that epoch's NDCG@10
SHOWN = "ndcg@10"
DRIVER_CPUS = 0.1  # a trial's own actor only waits for its workers


def run(settings: Settings) -> dict[str, Any]:
    """Search `tune.space` and write `<workspace>/tune/`: the best bundle, best.yaml, trials.json and trials.csv.

    An interrupted search with the same data and settings goes on where it stopped. Returns the body of
    results/tune.json. Raises SpringtideError for a wrong space, a cluster too small, or if every trial failed.
    """
    check_space(settings)
    prepared = load_prepared(settings.workspace, settings.data)
    connect()
    import ray

    resources = ray.cluster_resources()
    concurrency = concurrent_trials(resources.get("CPU", 0), resources.get("GPU", 0), settings, DRIVER_CPUS)
    base = base_of(settings)
    search = hashlib.sha256((settings.tune.model_dump_json() + fingerprint(base, prepared)).encode()).hexdigest()[:10]
    folder = Path(settings.workspace) / "tune"
    experiment, runs = folder / f"search-{search}", folder / "runs" / search
    if (experiment / "finished").exists():
        log.info("this search was done before; doing it again from the start")
        shutil.rmtree(experiment)
        shutil.rmtree(runs, ignore_errors=True)
    log.info("%d trials, %d at a time", settings.tune.trials, concurrency)
    results = _tuner(settings, base, experiment, runs, concurrency).fit()
    found = sorted(((_row(result, settings, runs), result) for result in results), key=_best_first)
    rows = [row for row, _ in found]
    if rows[0][METRIC] is None:
        (experiment / "finished").touch()  # there is nothing to go on with: what failed is tried again from the start
        first = next((row["error"] for row in rows if row["error"]), "no trial reported anything")
        raise SpringtideError(f"every trial failed, the first with: {first}")
    metrics = publish(settings, prepared, rows, Path(found[0][1].metrics["checkpoint_path"]))
    (experiment / "finished").touch()
    print(_table(rows), flush=True)
    return {
        "best": {name: rows[0][name] for name in ("settings", SHOWN, "trial")},
        "best_config": str(folder / "best.yaml"),
        "bundle": str(folder / "bundle"),
        "trials": str(folder / "trials.csv"),
        "concurrent_trials": concurrency,
        "epochs_run": sum(row["epochs"] for row in rows),
        "validation": metrics["validation"],
    }


def base_of(settings: Settings) -> Settings:
    """What all trials have in common. What a trial draws, and then the size of the log, comes on top."""
    common = {
        "train.workers": settings.tune.workers_per_trial,
        "train.epochs": settings.tune.epochs,
        # Tune retries a trial, which resumes from its checkpoint; its Ray Train run must not retry by itself, or one
        # that is stopped would start its workers once more.
        "train.max_failures": 0,
    }
    return with_values(settings, common)


def _tuner(settings: Settings, base: Settings, experiment: Path, runs: Path, concurrency: int) -> Any:
    """A new search, or the interrupted one in the folder `experiment`."""
    from ray import tune

    from springtide.tuning.release import ReleaseWorkers

    trial = tune.with_resources(run_trial, {"CPU": DRIVER_CPUS})
    if tune.Tuner.can_restore(str(experiment)):
        log.info("going on with the interrupted search %s", experiment.name)
        return tune.Tuner.restore(str(experiment), trainable=trial, resume_unfinished=True, resume_errored=True)
    return tune.Tuner(
        trial,
        param_space={**param_space(settings.tune.space), "base": as_given(base), "runs": str(runs)},
        tune_config=tune_config(settings, concurrency),
        run_config=tune.RunConfig(
            name=experiment.name,
            storage_path=str(experiment.parent),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=settings.train.max_failures),
            callbacks=[ReleaseWorkers()],
        ),
    )


def publish(settings: Settings, prepared: Prepared, rows: list[dict[str, Any]], checkpoint: Path) -> dict[str, Any]:
    """Write the bundle of the first row's trial, which ended in `checkpoint`, and then what tells of it.

    The bundle takes long: an interruption leaves what an earlier search wrote, with the bundle that it tells of.
    Returns the bundle's metrics.
    """
    folder = Path(settings.workspace) / "tune"
    chosen = sized(with_values(settings, rows[0]["settings"]), prepared)
    metrics = write_trained(chosen, prepared, checkpoint.parent, read_progress(checkpoint), folder / "bundle")
    write_text(folder / "best.yaml", yaml.safe_dump(as_given(chosen), sort_keys=False, allow_unicode=True))
    write_json(folder / "trials.json", rows)
    write_text(folder / "trials.csv", _csv(rows))
    return metrics


def tune_config(settings: Settings, concurrency: int) -> Any:
    """Random search with ASHA, at most `concurrency` trials at a time."""
    from ray import tune

    return tune.TuneConfig(
        metric=METRIC,
        mode="max",
        num_samples=settings.tune.trials,
        # Not as max_concurrent_trials: beside this search_alg Ray ignores it, and every trial would start at once.
        search_alg=tune.search.BasicVariantGenerator(max_concurrent=concurrency, random_state=settings.tune.seed),
        scheduler=tune.schedulers.ASHAScheduler(
            max_t=settings.tune.epochs,
            grace_period=min(settings.tune.grace_epochs, settings.tune.epochs),
            reduction_factor=settings.tune.reduction,
        ),
    )


def run_trial(config: dict[str, Any]) -> None:
    """One trial: a whole Ray Train run whose reports Tune sees. Its folder is named by the trial, so it resumes."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from springtide.tuning.release import trial_folder

    varied = {key: value for key, value in config.items() if "." in key}
    folder = trial_folder(config["runs"], tune.get_context().get_trial_id())
    try:
        settings = with_values(parse_settings(config["base"]), varied)
        prepared = load_prepared(settings.workspace)
        train(sized(settings, prepared), prepared, folder, time.time(), [TuneReportCallback()])
    except SpringtideError as error:
        log.error("%s", error)  # raised, it would be tried again with the same settings, in vain
        write_text(folder / STOPPED, _last_line(error))


def _best_first(found: tuple[dict[str, Any], Any]) -> tuple[bool, float]:
    """By what to sort rows of the trial table, each with its result."""
    return found[0][METRIC] is None, -(found[0][METRIC] or 0)


def _row(result: Any, settings: Settings, runs: Path) -> dict[str, Any]:
    """One line of the trial table."""
    metrics, frame = result.metrics or {}, result.metrics_dataframe
    history = [] if frame is None or METRIC not in frame else frame[METRIC].tolist()
    done = bool(history) and "checkpoint_path" in metrics
    return {
        "trial": metrics.get("trial_id"),
        "settings": {key: value for key, value in (result.config or {}).items() if key in settings.tune.space},
        METRIC: max(history) if done else None,
        SHOWN: metrics["best"] if done else None,
        "epochs": len(history),
        "seconds": metrics.get("time_total_s"),
        "error": _stopped(runs, metrics.get("trial_id")) if result.error is None else _last_line(result.error),
    }


def _stopped(runs: Path, trial: str | None) -> str | None:
    """Why a trial could not go on, or any of them where `trial` is None; None where all was well."""
    from springtide.tuning.release import trial_folder

    pattern = "*" if trial is None else trial_folder(str(runs), trial).name
    said = [path.read_text(encoding="utf-8") for path in sorted(runs.glob(f"{pattern}/{STOPPED}"))]
    return said[0] if said else None


def _last_line(error: Exception) -> str:
    """The end of a remote traceback, which is where the reason stands."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _csv(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["settings"])
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", SHOWN, METRIC, "epochs", "seconds", *names, "error"])
    for row in rows:
        values = [json.dumps(row["settings"].get(name)) for name in names]
        figures = [row[name] for name in ("trial", SHOWN, METRIC, "epochs", "seconds")]
        writer.writerow([*figures, *values, row["error"] or ""])
    return text.getvalue()


def _table(rows: list[dict[str, Any]]) -> str:
    """The trials, best first, for a terminal."""
    lines = [f"{'validation NDCG@10':>18}  epochs  settings"]
    for row in rows:
        said = "  ".join(f"{key.split('.')[-1]}={_short(value)}" for key, value in row["settings"].items())
        score = "failed" if row[SHOWN] is None else f"{row[SHOWN]:.4f}"
        lines.append(f"{score:>18}  {row['epochs']:>6}  {said}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
