"""What each Ray Train worker runs: its shard from Ray Data, the model under DDP, a checkpoint after every epoch."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from springtide.config import ModelConfig, Settings, TrainConfig
from springtide.model.batch import Batch, History
from springtide.model.fusion import FusionModel
from springtide.model.tables import Tables, from_arrays
from springtide.schemas import SEQUENCES, check_schema
from springtide.text.features import TextFeatures
from springtide.text.features import from_arrays as features_from_arrays
from springtide.training.loop import (
    JUDGED,
    Diverged,
    Feed,
    Progress,
    bare,
    fit,
    make_optimizer,
    rank,
    seed_of,
    world_size,
)
from springtide.training.sampling import Since, sampling_of
from springtide.training.sequences import (
    Sequences,
    concatenate,
    epoch_batches,
    from_table,
    validation_cases,
    with_own_counts,
)

log = logging.getLogger(__name__)
FEATURES = "features."  # before the names of arrays,
START = "start."  # and of the weights to start from
PLACEMENT_GROUP = "placement_group"  # file in the run's folder
STOPPED = "stopped"  # file in the run's folder: why training cannot go on, in a sentence


# ---------------------------------------------------------------- inputs that the driver leaves for the workers
def write_inputs(
    path: Path,
    tables: Tables,
    text: np.ndarray,
    features: TextFeatures,
    factors: np.ndarray | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Save the counts, the text features [I, width] and how they were made where every worker can read them.

    factors: [I, dim] where the item vectors begin; None = at random. start: every weight to start from; None = fresh.
    """
    arrays = tables.arrays() | {"text": np.ascontiguousarray(text, np.float32)}
    arrays |= {FEATURES + name: array for name, array in features.arrays().items()}
    arrays |= {} if factors is None else {"factors": factors}
    arrays |= {START + name: weight.detach().cpu().numpy() for name, weight in (start or {}).items()}
    save_arrays(arrays, path)


def load_features(inputs: Path) -> TextFeatures:
    """How the text features of the inputs were made."""
    arrays = load_arrays(inputs)
    return features_from_arrays({n.removeprefix(FEATURES): a for n, a in arrays.items() if n.startswith(FEATURES)})


def build_model(settings: Settings, actions: int, inputs: Path) -> tuple[FusionModel, Tables]:
    """A model with its counts filled in, weights drawn from train.seed or those to start from; and those counts."""
    arrays = load_arrays(inputs)
    tables = from_arrays(arrays)
    torch.manual_seed(seed_of(settings.train.seed))
    model = FusionModel(
        settings.model,
        actions,
        torch.from_numpy(arrays["text"]),
        torch.from_numpy(tables.popularity > 0),
        torch.from_numpy(tables.popularity),
        tables.rating_stats,
        settings.train.heads,
    )
    tables.fill(model)
    if "factors" in arrays:
        model.item_vectors.begin_with(torch.from_numpy(arrays["factors"]))
    if any(name.startswith(START) for name in arrays):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(torch.from_numpy(arrays[START + name]))
    return model, tables


# ---------------------------------------------------------------- data
class ShardFeed:
    """This worker's share of the sequences, streamed by Ray Data.

    It stays in memory after the first pass if it fits into train.cache_mb; else every epoch streams it again, block by
    block, and shuffles within each block. A resumed run then equals an uninterrupted one only where Ray Data cuts the
    same blocks, that is on a cluster of the same shape.
    """

    def __init__(
        self,
        shard: Any,
        model: ModelConfig,
        config: TrainConfig,
        holdout_share: float,
        refit: bool,
        asked_at: int | None,
        since: Since | None = None,
    ) -> None:
        self._shard, self._config, self._holdout, self._refit = shard, config, holdout_share, refit
        self._asked_at, self._model = asked_at, model
        self._sampling = sampling_of(model, config, world_size(), since)
        self._cached: Sequences | None = None
        self._cases: list[tuple[History, int]] | None = None

    def _stream(self) -> Iterator[Sequences]:
        for table in self._shard.iter_batches(batch_size=None, batch_format="pyarrow"):
            if isinstance(table, pa.Table) and len(table):
                rows = check_schema(table.cast(SEQUENCES), SEQUENCES, "sequences")
                yield with_own_counts(from_table(rows, self._holdout, self._refit), self._model)

    def _blocks(self) -> Iterator[Sequences]:
        if self._cached is not None:
            yield self._cached
            return
        limit, held, kept = self._config.cache_mb << 20, 0, list[Sequences]()
        quota = -(-self._config.validation_users // world_size())
        cases: list[tuple[History, int]] = []
        stream = self._stream()
        for block in stream:
            held += block.nbytes
            if self._cases is None and len(cases) < quota:
                cases += validation_cases(block, quota - len(cases))
            kept.append(block)
            if held > limit:
                break
        else:
            self._cached = concatenate(kept) if kept else from_table(SEQUENCES.empty_table(), 0)
            self._cases = cases if self._cases is None else self._cases
            yield self._cached
            return
        yield from kept
        for block in stream:
            if self._cases is None and len(cases) < quota:
                cases += validation_cases(block, quota - len(cases))
            yield block
        self._cases = cases if self._cases is None else self._cases

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Every training window of the shard once, in an order that depends on seed, epoch and rank only."""
        for number, block in enumerate(self._blocks()):
            yield from epoch_batches(block, self._sampling, (self._config.seed, epoch, rank(), number))

    def cases(self) -> list[tuple[History, int]]:
        """This worker's validation users; known after the first epoch has run."""
        if self._cases is None:
            for _ in self._blocks():
                pass
        return self._cases or []

    def asked_at(self) -> int | None:
        """When validation users are asked, if all at once."""
        return self._asked_at


@dataclass
class Timed:
    """A feed that notes when the first batch is there; everything before it is start-up."""

    feed: Feed
    submitted: float  # in seconds since 1970
    first_step: float = 0.0  # in seconds since then; 0: not yet

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for batch in self.feed.epoch(epoch):
            self.first_step = self.first_step or time.time() - self.submitted
            yield batch

    def cases(self) -> list[tuple[History, int]]:
        return self.feed.cases()

    def asked_at(self) -> int | None:
        return self.feed.asked_at()


# ---------------------------------------------------------------- checkpoints
def save_checkpoint(folder: Path, model: FusionModel, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Model, optimizer, best weights so far and the record of the epochs. Tensors and JSON only."""
    save_tensors(_owned(model.state_dict()), folder / "model.safetensors")
    save_tensors(_owned(progress.best_state), folder / "best.safetensors")
    save_tensors(_owned(progress.average), folder / "average.safetensors")
    moments = {
        f"{index}.{name}": torch.as_tensor(value).clone().contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_tensors(moments, folder / "optimizer.safetensors")
    record = {name: value for name, value in vars(progress).items() if name not in ("best_state", "average")}
    (folder / "progress.json").write_text(json.dumps(record), encoding="utf-8")


def _owned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def load_checkpoint(folder: Path, model: FusionModel, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint back into model and optimizer. Returns the progress it was taken at."""
    model.load_state_dict(load_tensors(folder / "model.safetensors"))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_tensors(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    progress, weights = read_progress(folder), dict(model.named_parameters())
    progress.average = {n: v.to(weights[n].device) if n in weights else v for n, v in progress.average.items()}
    return progress


def read_progress(folder: Path) -> Progress:
    """The record of a checkpoint with its best weights."""
    record = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    states = {name: load_tensors(folder / f"{name}.safetensors") for name in ("best", "average")}
    return Progress(**record, best_state=states["best"], average=states["average"])


# ---------------------------------------------------------------- the worker
def train_worker(job: dict[str, Any]) -> None:
    """The loop that Ray Train starts on every worker. `job` holds plain values only; see training.job."""
    import ray.train
    import ray.train.torch
    import ray.util

    for chatty in ("ray.data", "ray.train"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # its successor is not in every torch we support
    settings = Settings.model_validate(job["settings"])
    config = settings.train
    torch.set_num_threads(config.threads_per_worker)
    device = ray.train.torch.get_device() if config.use_gpu else torch.device("cpu")
    model, _ = build_model(settings, job["actions"], Path(job["inputs"]))
    optimizer = make_optimizer(model.to(device), config)
    progress = _resumed(model, optimizer)
    wrapped = ray.train.torch.prepare_model(
        model, move_to_device=False, parallel_strategy_kwargs={"broadcast_buffers": False} if world_size() > 1 else None
    )
    if rank() == 0 and (group := ray.util.get_current_placement_group()) is not None:
        # Where a search finds the group to remove, if it stops this run from outside.
        Path(job["inputs"]).with_name(PLACEMENT_GROUP).write_text(group.id.hex(), encoding="utf-8")
    shard = ray.train.get_dataset_shard(f"train-{ray.train.get_context().get_world_rank()}")
    since = None if job["since"] is None else Since(**job["since"])
    feed = Timed(
        ShardFeed(shard, settings.model, config, job["holdout_share"], job["refit"], job["asked_at"], since),
        job["submitted"],
    )
    report_seconds = 0.0

    def after_epoch(progress: Progress) -> None:
        nonlocal report_seconds
        started = time.perf_counter()
        record = progress.epochs[-1]
        record["first_step_seconds"] = feed.first_step
        record["report_seconds"] = report_seconds  # of the epoch before: this one's report is still to come
        metrics = {key: record[key] for key in ("loss", *JUDGED, "epoch")}
        metrics |= {"best": progress.best_ndcg}
        with tempfile.TemporaryDirectory() as folder:
            if rank() == 0:
                save_checkpoint(Path(folder), bare(wrapped), optimizer, progress)
                print(_line(progress, config), flush=True)
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
            else:
                ray.train.report(metrics, checkpoint=None)
        report_seconds = time.perf_counter() - started

    try:
        fit(wrapped, optimizer, feed, config, settings.data.exclude_seen, progress, after_epoch, device)
    except Diverged as error:
        # All workers stop here. Raised, it would count as a worker's death, after which Ray tries again in vain.
        if rank() == 0:
            Path(job["inputs"]).with_name(STOPPED).write_text(str(error), encoding="utf-8")
    except RuntimeError as error:
        where = f"worker {rank()} of {world_size()} failed in epoch {progress.epoch + 1}"
        raise RuntimeError(f"{where}: {error}") from error


def _resumed(model: FusionModel, optimizer: torch.optim.Optimizer) -> Progress:
    """Where the run's last checkpoint stands, its weights put into the model; the very start if there is none."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress()
    with checkpoint.as_directory() as folder:
        progress = load_checkpoint(Path(folder), model, optimizer)
    if rank() == 0:
        print(f"resumed after epoch {progress.epoch}", flush=True)
    return progress


def _line(progress: Progress, config: TrainConfig) -> str:
    record = progress.epochs[-1]
    judged = "  nobody to validate on"
    if record["users"]:
        best = progress.best_epoch == progress.epoch - 1
        better = " *" if best else f" (best {progress.best_ndcg:.4f} in epoch {progress.best_epoch + 1})"
        judged = f"  validation NDCG@10 {record['ndcg@10']:.4f}{better}"
    return f"epoch {progress.epoch}/{config.epochs}  loss {record['loss']:.4f}{judged}  {record['seconds']:.1f} s"
