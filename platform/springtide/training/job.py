"""The `train` stage: Ray Train over 1 to N workers, fed by Ray Data, ending in a bundle. Rerun it to resume."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from springtide.bundle import FORMAT
from springtide.cluster import READ_CPUS, connect
from springtide.config import SIZES, ModelConfig, Settings, TrainConfig, with_values
from springtide.data.prepared import Prepared, load_prepared
from springtide.errors import SpringtideError
from springtide.files import write_json
from springtide.model.fusion import DEFAULT_DIM
from springtide.training.cases import can_train, holdout_share, some_cases, warn_of_repeats
from springtide.training.factors import item_factors
from springtide.training.loop import Progress, told
from springtide.training.publish import UNCHANGED, choose_scores, publish, summarise
from springtide.training.sampling import Since
from springtide.training.statistics import Statistics, collect_file, merge
from springtide.training.tabulate import HalfLives, choose_half_lives, tabulate
from springtide.training.texts import choose_text, feature_rows, fit_texts
from springtide.training.worker import STOPPED, read_progress, train_worker, write_inputs

log = logging.getLogger(__name__)
# A training worker keeps large arrays for its next step. To give them back to the system and have them cleared again is
# up to a quarter of a step's CPU time. glibc reads these when a process starts; other C libraries ignore them.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_ARENA_MAX": "1"}
# Settings of the section train that change no weight.
OF_THE_BUNDLE = ("coverage_cost", "ann_items", "ann_recall")  # but what is recommended
HARMLESS = ("max_failures", "keep_checkpoints", "collective_timeout_s", "update_epochs", *OF_THE_BUNDLE)
CHOICES = "choices.json"  # what was chosen on validation before training, in the run's folder,
CHOICES_FORMAT = 4  # which a run of another version does not go on from


@dataclass(frozen=True)
class Warm:
    """Where training starts, if not from fresh weights."""

    inputs: Path  # as of write_inputs, with the weights to start from
    since: Since  # only windows with an event that is new since then are learned from


def run(settings: Settings) -> dict[str, Any]:
    """Train on the workspace's prepared log and write `<workspace>/bundle`. Returns the body of results/train.json.

    An interrupted run with the same data and settings goes on from its last checkpoint. Raises SpringtideError if
    there is nothing to train on.
    """
    submitted = time.time()
    prepared = load_prepared(settings.workspace, settings.data)
    settings = sized(settings, prepared)
    run_folder = Path(settings.workspace) / "runs" / f"train-{fingerprint(settings, prepared)}"
    if (run_folder / "finished").exists():
        log.info("these settings were trained before; training them again from the start")
        shutil.rmtree(run_folder)
    progress = train(settings, prepared, run_folder, submitted)
    metrics = write_trained(settings, prepared, run_folder, progress, Path(settings.workspace) / "bundle")
    (run_folder / "finished").touch()
    where = (progress.best_ndcg, progress.best_epoch + 1, progress.epoch)
    if metrics["validation"]["ndcg@10"] is None:
        log.warning("no user has a validation event, so all %d epochs were trained and nothing was judged", where[2])
    else:
        log.info("validation NDCG@10 %.4f in epoch %d, the best of %d", *where)
    return {"bundle": str(Path(settings.workspace) / "bundle"), "run": str(run_folder), **metrics}


def sized(settings: Settings, prepared: Prepared) -> Settings:
    """`model.dim` and `model.long_layers` by the size of the log, where they were not given (not 0).

    A small log must not be learned by heart, and a large one has more to say than a small model can hold.
    """
    events = prepared.report["totals"]["kept"]
    _, *size = next(row for row in SIZES if events < row[0])
    given = settings.model.model_dump()
    sizes = zip(("dim", "long_layers"), size, strict=True)
    chosen = {f"model.{name}": value for name, value in sizes if not given[name]}
    return with_values(settings, chosen) if chosen else settings


def fingerprint(settings: Settings, prepared: Prepared) -> str:
    """Ten hex digits that change with the data and with every setting that the trained weights depend on."""
    said = settings.model_dump(mode="json", include={"model", "train"}) | {"exclude_seen": settings.data.exclude_seen}
    for harmless in HARMLESS:
        del said["train"][harmless]
    vectors = Path(settings.workspace) / "vectors" / "manifest.json"
    said |= {
        "format": [FORMAT, CHOICES_FORMAT],
        "log": prepared.content_hash,
        "vectors": vectors.read_text() if vectors.exists() else "",
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:10]


def train(
    settings: Settings,
    prepared: Prepared,
    run_folder: Path,
    submitted: float,
    callbacks: list[Any] | None = None,
    refit: bool = False,
    warm: Warm | None = None,
) -> Progress:
    """Run Ray Train in `run_folder` and return the final progress, best weights included.

    refit: learn from validation events too, and validate on nothing; warm: where to start, absent: from fresh weights.
    Raises SpringtideError if the loss stops being finite.
    """
    connect()
    config = settings.train
    files = prepared.sequence_files
    if config.workers > len(files):
        raise SpringtideError(
            f"train.workers is {config.workers}, but the log has {len(files)} partitions; lower it or raise "
            "data.partitions"
        )
    _check_resources(settings)
    inputs = write_statistics(settings, prepared, run_folder, refit) if warm is None else warm.inputs
    cuts = prepared.report["split"]["cuts_ms"]
    job = {
        "settings": settings.model_dump(mode="json"),
        "actions": len(prepared.actions),
        "inputs": str(inputs),
        "holdout_share": holdout_share(settings, prepared),
        "refit": refit,
        "since": None if warm is None else asdict(warm.since),
        "asked_at": cuts[0] if cuts else None,
        "submitted": submitted,
    }
    inputs.with_name(STOPPED).unlink(missing_ok=True)
    result = _trainer(config, job, files, run_folder, callbacks).fit()
    if inputs.with_name(STOPPED).exists():
        raise SpringtideError(inputs.with_name(STOPPED).read_text(encoding="utf-8"))
    if result.checkpoint is None:
        raise SpringtideError("training ended without a checkpoint; see the messages of the workers above")
    with result.checkpoint.as_directory() as folder:
        return read_progress(Path(folder))


def _trainer(
    config: TrainConfig, job: dict[str, Any], files: list[Path], run_folder: Path, callbacks: list[Any] | None
) -> Any:
    """Ray's trainer of one run. job: what train_worker is given."""
    import ray
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    shards = {
        # Each worker has its own files, so the share of a worker is the same in every run and no row is dropped.
        f"train-{worker}": ray.data.read_parquet(
            [str(file) for file in files[worker :: config.workers]], num_cpus=READ_CPUS
        )
        for worker in range(config.workers)
    }
    return TorchTrainer(
        train_worker,
        train_loop_config=job,
        torch_config=TorchConfig(timeout_s=config.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=run_folder.name,
            storage_path=str(run_folder.parent),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            callbacks=callbacks,
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": KEEP_MEMORY},
        ),
        datasets=shards,
        dataset_config=DataConfig(datasets_to_split=[]),
    )


def write_statistics(settings: Settings, prepared: Prepared, run_folder: Path, refit: bool = False) -> Path:
    """Count the training events, a Ray task per file, and leave the result with the text vectors for the workers.

    Raises SpringtideError if there is no training target with an event before it, or if text is asked for and `embed`
    has not run.
    """
    share = holdout_share(settings, prepared)
    statistics = count_events(settings, prepared, refit)
    users = prepared.report["users"]
    if not statistics.transitions.nnz and not can_train(prepared, share):
        raise SpringtideError(
            f"no user among {users} has an item to predict after another training event, so there is no sequence to "
            "learn from; use a longer log, or widen data.target_actions"
        )
    run_folder.mkdir(parents=True, exist_ok=True)
    chosen = run_folder.parent / CHOICES if refit else run_folder / CHOICES
    if not refit:
        hide, cases = settings.data.exclude_seen, some_cases(prepared, share)
        if hide:
            warn_of_repeats(cases)
        cuts = prepared.report["split"]["cuts_ms"]
        decays = choose_half_lives(statistics, settings.model, cases, hide, cuts[0] if cuts else None)
        kind = choose_text(settings, prepared, cases)
        write_json(chosen, {"half_lives": asdict(decays), "text_features": kind})
        told = ", ".join(f"{name} {'none' if value is None else value}" for name, value in asdict(decays).items())
        log.info("half-lives, as shares of the log's span: %s", told)
    choices = json.loads(chosen.read_text(encoding="utf-8"))
    path = run_folder / "inputs.safetensors"
    features = fit_texts(settings, prepared, choices["text_features"])
    text = feature_rows(settings, prepared, features)
    tables = tabulate(statistics, settings.model, HalfLives(**choices["half_lives"]), text)
    write_inputs(path, tables, text, features, _factors(settings.model, statistics))
    return path


def count_events(settings: Settings, prepared: Prepared, refit: bool) -> Statistics:
    """The counts of the training events, a Ray task per file. refit: of the validation events too."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    items, share = len(prepared.items), holdout_share(settings, prepared)
    # Outside any placement group: a Tune trial's own holds its driver and nothing else.
    anywhere = PlacementGroupSchedulingStrategy(placement_group=None)
    collect = ray.remote(num_cpus=0.5, scheduling_strategy=anywhere)(collect_file)
    counted = [collect.remote(file, items, settings.model, share, refit) for file in prepared.sequence_files]
    return merge(ray.get(counted))


def _factors(config: ModelConfig, statistics: Statistics) -> np.ndarray | None:
    if config.id_start == "random" or not (config.memory and config.id_embeddings):
        return None
    return item_factors(statistics.transitions, config.dim or DEFAULT_DIM)


def write_trained(
    settings: Settings, prepared: Prepared, run_folder: Path, progress: Progress, bundle: Path
) -> dict[str, Any]:
    """Fit once more on training and validation events, if asked to, and write a bundle. Returns the run's metrics.

    The refit takes as many epochs as were best, from fresh weights: what is deployed must have seen everything, and
    what chose the number of epochs cannot also be what it is judged by.
    """
    final, folder = progress, run_folder
    validated = any(record["users"] for record in progress.epochs)
    if settings.train.refit and (validated or prepared.report["split"]["valid"]):
        folder = run_folder / "refit"
        again = with_values(settings, {"train.epochs": progress.best_epoch + 1})
        log.info("fitting again on training and validation events, %d epochs", progress.best_epoch + 1)
        final = train(again, prepared, folder, time.time(), refit=True)
    added = choose_scores(settings, prepared, run_folder, progress) if validated else UNCHANGED
    metrics = summarise(progress)
    metrics |= {
        **added,
        "chosen": json.loads((run_folder / CHOICES).read_text(encoding="utf-8")),
        "refit": final is not progress,
        "refit_epochs": [told(record) for record in final.epochs] if final is not progress else [],
    }
    return publish(settings, prepared, folder / "inputs.safetensors", final.best_state, metrics, bundle)


def _check_resources(settings: Settings) -> None:
    """Refuse what the cluster can never grant, instead of waiting for it."""
    import ray

    config = settings.train
    total = ray.cluster_resources()
    asked = config.workers * config.cpus_per_worker
    if asked >= total.get("CPU", 0):
        raise SpringtideError(
            f"{config.workers} workers with {config.cpus_per_worker:g} CPUs each leave nothing of the cluster's "
            f"{total.get('CPU', 0):g} CPUs for reading data; lower train.workers or train.cpus_per_worker"
        )
    if config.use_gpu and config.workers > total.get("GPU", 0):
        log.warning("waiting for %d GPUs; the cluster has %g now", config.workers, total.get("GPU", 0))
