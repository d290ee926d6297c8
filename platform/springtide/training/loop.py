"""The training loop: the same for one process and for DDP. Knows torch.distributed, but neither Ray nor files.

Gradients are those of the mean loss over all positions of all workers' batches, however unequal the workers' shares:
each scales its summed loss by the global count, and one that has run out of data joins with an empty batch. All
randomness is drawn anew from (seed, epoch, rank), so a run resumed at an epoch equals one that never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from springtide.config import TrainConfig
from springtide.errors import SpringtideError
from springtide.model.batch import Batch, History
from springtide.model.fusion import FusionModel
from springtide.ranks import gains, places
from springtide.training.listing import catalogue_scores

LEAST_GAIN = 0.005  # share by which validation must rise to be waited for: less is mostly chance, epoch after epoch
ADVICE = "lower train.learning_rate or look for extreme ratings in the log (the last checkpoint is kept)"
JUDGED = ("ndcg", "ndcg@10", "hr@10")  # what `validate` finds out
STEPS = "steps"  # how many steps are in the average, beside the weights in it
FAST = ("log_temperature", "channels.text_scale", "channels.weigh.bias")


class Diverged(SpringtideError):
    """The loss is not finite. Raised by all workers at the same step, in the same words."""


class Feed(Protocol):
    """One worker's share of the data."""

    def epoch(self, epoch: int) -> Iterator[Batch]: ...

    def cases(self) -> list[tuple[History, int]]: ...

    def asked_at(self) -> int | None: ...


@dataclass
class Progress:
    """Where a run stands between two epochs; with the model's and the optimizer's tensors, all that a resume needs."""

    epoch: int = 0  # epochs done
    best: float = -1.0  # best validation score: NDCG without a cut-off, as every rank tells and not the first ten alone
    best_epoch: int = -1
    epochs: list[dict[str, float]] = field(default_factory=list)  # one record each
    best_state: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)  # moving average of the weights, if it is kept

    @property
    def best_ndcg(self) -> float:
        """Validation NDCG@10 of the best epoch; -1 before there is one."""
        return self.epochs[self.best_epoch]["ndcg@10"] if self.epochs else -1.0

    def finished(self, config: TrainConfig) -> bool:
        """Are all epochs done, or has patience run out since validation last rose by more than chance would?"""
        reached, at = 0.0, self.epoch - 1
        for epoch, record in enumerate(self.epochs):
            if record["ndcg"] > reached * (1 + LEAST_GAIN):
                reached, at = record["ndcg"], epoch
        return self.epoch >= config.epochs or (self.epoch > 0 and self.epoch - 1 - at >= config.patience)


def told(record: dict[str, float]) -> dict[str, float]:
    """An epoch's record for others to read: without the figures of a validation for which nobody was there."""
    return {name: value for name, value in record.items() if record["users"] or name not in JUDGED}


def make_optimizer(model: FusionModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; the few numbers that shape the channels' scores move faster and are not decayed."""
    fast = [
        p
        for n, p in model.named_parameters()
        if n in FAST or n.startswith(("channels.memory", "channels.neighbours", "channels.borrowing"))
    ]
    fast_ids = {id(p) for p in fast}
    slow = [p for p in model.parameters() if id(p) not in fast_ids]
    return torch.optim.AdamW(
        [
            {"params": slow, "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": fast, "lr": config.memory_learning_rate, "weight_decay": 0.0},
        ]
    )


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    feed: Feed,
    config: TrainConfig,
    exclude_seen: bool,
    progress: Progress,
    after_epoch: Callable[[Progress], None],
    device: torch.device | None = None,
) -> Progress:
    """Train until early stopping. `model` is a FusionModel or DDP around one; `after_epoch` saves and reports.

    Raises Diverged if the loss stops being finite.
    """
    device = device or torch.device("cpu")
    inner = bare(model)
    while not progress.finished(config):
        started, cpu = time.perf_counter(), time.process_time()
        torch.manual_seed(seed_of(config.seed, progress.epoch, rank()))
        batches = feed.epoch(progress.epoch)
        record = train_epoch(model, optimizer, batches, config, exclude_seen, progress.epoch, device, progress.average)
        trained = time.perf_counter()
        with averaged(inner, progress.average):
            record |= validate(inner, feed.cases(), exclude_seen, feed.asked_at())
            state = {name: value.detach().cpu().clone() for name, value in inner.state_dict().items()}
        record["validate_seconds"] = time.perf_counter() - trained
        record["seconds"] = time.perf_counter() - started
        record["cpu_seconds"] = float(all_sum(torch.tensor(time.process_time() - cpu, dtype=torch.float64)))
        record["epoch"] = progress.epoch + 1
        if record["ndcg"] > progress.best or not record["users"]:  # nobody to validate on: the last epoch stands
            progress.best, progress.best_epoch = record["ndcg"], progress.epoch
            progress.best_state = state
        progress.epochs.append(record)
        progress.epoch += 1
        after_epoch(progress)
    return progress


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    config: TrainConfig,
    exclude_seen: bool,
    epoch: int,
    device: torch.device,
    average: dict[str, Tensor],
) -> dict[str, float]:
    """One pass over all workers' batches. Returns loss per position, positions, steps and seconds spent waiting.

    average: the moving average of the weights, updated in place after every step.
    """
    model.train()
    inner = bare(model)
    catalogue = len(inner.item_vectors.known)
    negatives = config.negatives if catalogue > max(config.full_softmax_items, config.negatives) else 0
    loss_sum, positions, steps, waited = 0.0, 0, 0, 0.0
    last: Batch | None = None
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        count = int(all_sum(torch.tensor(0 if batch is None else int((batch.targets >= 0).sum()))))
        going = int(all_sum(torch.tensor(0 if batch is None else 1)))
        if not going:
            break
        if batch is None:
            batch = _nothing_to_learn(last)
        last = batch
        if not count:
            continue
        loss, _ = model(batch.to(device), exclude_seen, config.label_smoothing, negatives)
        optimizer.zero_grad(set_to_none=True)
        (loss * (world_size() / count)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        if not torch.isfinite(norm):
            told = all_told(describe(batch, loss))
            broken = [words for words, finite in told if not finite]  # of the workers whose batch it was
            what, where = ("loss", broken) if broken else ("gradient", [words for words, _ in told])
            raise Diverged(f"the {what} is not finite in epoch {epoch + 1}, step {steps + 1} ({where[0]}); {ADVICE}")
        optimizer.step()
        if config.average:
            update_average(average, inner, config.average)
        loss_sum += loss.item()
        positions += count
        steps += 1
    if not all(bool(torch.isfinite(weight).all()) for weight in inner.parameters()):  # alike in all workers
        raise Diverged(f"the weights are not finite after step {steps}, the last one of epoch {epoch + 1}; {ADVICE}")
    total = float(all_sum(torch.tensor(loss_sum, dtype=torch.float64)))
    return {"loss": total / max(1, positions), "positions": positions, "steps": steps, "wait_seconds": waited}


def describe(batch: Batch, loss: Tensor) -> tuple[str, bool]:
    """A batch in words, to find it in the log by, and whether its loss is finite."""
    real = batch.mask
    if not real.any():
        return "an empty batch", True
    ratings = batch.ratings[real]
    given = ratings[~ratings.isnan()]
    rated = f", ratings {float(given.min()):g} to {float(given.max()):g}" if len(given) else ""
    items, times = batch.items[real], batch.timestamps[real]
    words = (
        f"worker {rank()}: loss {float(loss.detach()):g} over {len(real)} sequences of up to {real.shape[1]} events, "
        f"items {int(items.min())} to {int(items.max())}, times {int(times.min())} to {int(times.max())} ms{rated}"
    )
    return words, bool(torch.isfinite(loss))


def update_average(average: dict[str, Tensor], model: FusionModel, decay: float) -> None:
    """Move the average towards the weights; faster in the first steps, or it would remember where they began."""
    steps = average.setdefault(STEPS, torch.zeros((), dtype=torch.int64))
    decay = min(decay, (1 + int(steps)) / (10 + int(steps)))
    steps += 1
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in average:
                average[name].lerp_(weight, 1 - decay)
            else:
                average[name] = weight.detach().clone()


@contextmanager
def averaged(model: FusionModel, average: dict[str, Tensor]) -> Iterator[None]:
    """The model with its averaged weights, where there are any, for as long as the block lasts."""
    current = {name: weight.detach().clone() for name, weight in model.named_parameters() if name in average}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in average:
                weight.copy_(average[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in current:
                    weight.copy_(current[name])


def _nothing_to_learn(last: Batch | None) -> Batch:
    """A batch without targets, for a worker whose share has run out while others still train."""
    if last is None:  # it never had any
        one = torch.zeros(1, 1, dtype=torch.int64)
        return Batch(
            one, one, torch.full((1, 1), torch.nan), one, one == 0, torch.zeros(1, dtype=torch.int64), one, one - 1
        )
    return replace(last, targets=torch.full_like(last.targets, -1))


@torch.no_grad()
def validate(
    model: FusionModel,
    cases: list[tuple[History, int]],
    exclude_seen: bool,
    asked_at: int | None = None,
) -> dict[str, float]:
    """NDCG without a cut-off, NDCG@10 and HR@10 over the whole catalogue, of all workers' cases together.

    asked_at: ms when all of them are asked; None = with the last event of each.
    """
    sums = torch.zeros(4, dtype=torch.float64)  # NDCG@10, hits, cases, NDCG
    cases = sorted(cases, key=lambda case: len(case[0]))  # like lengths together: padding costs as much as events do
    histories, targets = [history for history, _ in cases], np.array([target for _, target in cases])
    done = 0
    for scores, _, _ in catalogue_scores(model, histories, asked_at, exclude_seen):
        place = places(scores, targets[done : done + len(scores)])
        gain, hit = gains(place), (place > 0) & (place <= 10)
        sums += torch.tensor([gain[hit].sum(), hit.sum(), len(scores), gain.sum()], dtype=torch.float64)
        done += len(scores)
    all_sum(sums)
    count = max(1.0, float(sums[2]))
    means = {"ndcg@10": float(sums[0]), "hr@10": float(sums[1]), "ndcg": float(sums[3])}
    return {**{name: total / count for name, total in means.items()}, "users": float(sums[2])}


# ---------------------------------------------------------------- processes
def bare(model: nn.Module) -> FusionModel:
    """The model inside DDP, or itself."""
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    assert isinstance(inner, FusionModel)
    return inner


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(value: Tensor) -> Tensor:
    """The sum over all workers, in place."""
    if world_size() > 1:
        if dist.get_backend() == "nccl":
            moved = value.cuda()
            dist.all_reduce(moved)
            value.copy_(moved)
        else:
            dist.all_reduce(value)
    return value


def all_told(words: tuple[str, bool]) -> list[tuple[str, bool]]:
    """What each worker has to say, in the order of their ranks."""
    told: list[Any] = [words] * world_size()
    if world_size() > 1:
        dist.all_gather_object(told, words)
    return told


def seed_of(*parts: int) -> int:
    """One 63-bit seed out of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
