"""The training loop: many processes equal one, a resumed run equals one that never stopped, and when it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from springtide.config import ModelConfig, TrainConfig
from springtide.errors import SpringtideError
from springtide.model.batch import Batch, History
from springtide.model.fusion import FusionModel
from springtide.model.recommender import Recommender
from springtide.schemas import SEQUENCES, TRAIN, VALID
from springtide.training import listing, loop
from springtide.training.loop import Progress, averaged, fit, make_optimizer, seed_of, validate
from springtide.training.sampling import Sampling
from springtide.training.sequences import (
    Sequences,
    epoch_batches,
    from_table,
    training_batch,
    training_windows,
    validation_cases,
)
from springtide.training.statistics import collect
from springtide.training.tabulate import HalfLives, tabulate
from springtide.training.worker import ShardFeed, load_checkpoint, save_checkpoint
from toy import ITEMS_IN_TOY, toy_log, toy_settings

torch.set_num_threads(1)
CPU = torch.device("cpu")
USERS = 24


def table(users: int = USERS) -> pa.Table:
    """The toy log's users; the last event of each is for validation."""
    rows: dict[str, dict[str, Any]] = {}
    for event in toy_log(users):
        row = rows.setdefault(
            event["user_id"], {"user_id": event["user_id"], "items": [], "ratings": [], "timestamps": []}
        )
        row["items"].append(int(event["item_id"][1:]))
        row["ratings"].append(event["rating"])
        row["timestamps"].append(event["timestamp"])
    for row in rows.values():
        count = len(row["items"])
        row |= {"actions": [1] * count, "targets": [True] * count, "parts": [TRAIN] * (count - 1) + [VALID]}
    return pa.Table.from_pylist(list(rows.values()), SEQUENCES)


def build(sequences: Sequences, **values: Any) -> FusionModel:
    config = toy_settings(Path("none"), **{f"model__{name}": value for name, value in values.items()}).model
    statistics = collect(sequences, ITEMS_IN_TOY, config)
    torch.manual_seed(11)
    popularity = torch.from_numpy(statistics.popularity)
    text = torch.randn(ITEMS_IN_TOY, config.text_dim)
    model = FusionModel(config, 3, text, popularity > 0, popularity, statistics.rating_stats)
    tabulate(statistics, config, HalfLives(), text.numpy()).fill(model)
    return model


@dataclass
class Script:
    """A feed whose every step is written down: the rows of `windows` of each step."""

    sequences: Sequences
    steps: list[list[int]]
    users: list[int]

    def epoch(self, epoch: int) -> Iterator[Batch]:
        windows = training_windows(self.sequences, 20)
        for rows in self.steps:
            yield training_batch(self.sequences, windows[rows])

    def cases(self) -> list[tuple[History, int]]:
        cases = validation_cases(self.sequences, 1000)
        return [cases[user] for user in self.users]

    def asked_at(self) -> int | None:
        return None


@dataclass
class Shuffled:
    """A feed like the workers' own: another order every epoch."""

    sequences: Sequences

    def epoch(self, epoch: int) -> Iterator[Batch]:
        yield from epoch_batches(self.sequences, Sampling(20, 8, 10**6), (1, epoch))

    def cases(self) -> list[tuple[History, int]]:
        return validation_cases(self.sequences, 1000)

    def asked_at(self) -> int | None:
        return None


def no_report(progress: Progress) -> None:
    pass


# ---------------------------------------------------------------- two processes and one
ALL = list(range(USERS))
SPLITS: dict[str, list[list[list[int]]]] = {  # per rank, per step: rows
    "even": [[ALL[::2]], [ALL[1::2]]],
    "uneven": [[ALL[:3], ALL[3:9], ALL[9:20]], [ALL[20:]]],
    "one has nothing": [[ALL], []],
}
NOTHING_COUNTED: dict[str, Any] = dict.fromkeys(
    ("memory", "neighbours", "borrowing", "text_neighbours", "popularity", "recent_popularity"), False
)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "bare": NOTHING_COUNTED | {"text_dim": 0, "gate": "mean"},
}
EXACT = {"dropout": 0.0, "id_dropout": 0.0}
TWO_EPOCHS = TrainConfig(epochs=2, patience=5, learning_rate=1e-3)


def run_split(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    sequences: Sequences,
    steps: list[list[int]],
    users: list[int],
) -> Progress:
    return fit(model, optimizer, Script(sequences, steps, users), TWO_EPOCHS, True, Progress(), no_report)


def one_of_two(number: int, folder: str) -> None:
    """What each of the two processes does, for every case in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    sequences = from_table(table(), 0)
    for variant, values in VARIANTS.items():
        for split, shares in SPLITS.items():
            model = build(sequences, **EXACT, **values)
            optimizer = make_optimizer(model, TWO_EPOCHS)
            wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
            users = sorted(user for step in shares[number] for user in step)
            progress = run_split(wrapped, optimizer, sequences, shares[number], users)
            torch.save({"state": model.state_dict(), "epochs": progress.epochs}, f"{folder}/{variant}-{split}-{number}")
            del wrapped  # it holds the process group, which must not outlive its end below
    sequences.ratings[sequences.start[USERS - 1]] = np.inf
    model = build(from_table(table(), 0), **EXACT)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    with pytest.raises(loop.Diverged) as caught:
        run_split(wrapped, make_optimizer(model, TWO_EPOCHS), sequences, [[[0, 1]], [[USERS - 1]]][number], [])
    Path(folder, f"words-{number}").write_text(str(caught.value))
    del wrapped
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # all is written; ending the usual way, gloo's threads now and then abort the process


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Also where one has little data or none: gradients are those of the mean over all positions."""
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    words = [(tmp_path / f"words-{number}").read_text() for number in range(2)]
    assert words[0] == words[1] and "worker 1: loss nan over 1 sequences" in words[0]  # both name the batch it was
    sequences = from_table(table(), 0)
    for variant, values in VARIANTS.items():
        for split, shares in SPLITS.items():
            model = build(sequences, **EXACT, **values)
            steps = [sum((share[n] for share in shares if n < len(share)), []) for n in range(max(map(len, shares)))]
            alone = run_split(model, make_optimizer(model, TWO_EPOCHS), sequences, steps, ALL)
            for number in range(2):
                other = torch.load(tmp_path / f"{variant}-{split}-{number}", weights_only=True)
                for name, value in model.state_dict().items():
                    torch.testing.assert_close(
                        other["state"][name], value, rtol=1e-5, atol=1e-5, msg=f"{variant}, {split}: {name}"
                    )
                for one, two in zip(alone.epochs, other["epochs"], strict=True):
                    assert two["positions"] == one["positions"] and two["steps"] == one["steps"] == len(steps)
                    assert two["users"] == one["users"] == USERS
                    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
                    for figure in ("ndcg@10", "hr@10", "ndcg"):
                        assert two[figure] == pytest.approx(one[figure], abs=1e-6)


# ---------------------------------------------------------------- resume
def same_tensors(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("values", "average"), [({}, 0.0), ({"memory": False}, 0.0), ({}, 0.8)], ids=["default", "no memory", "average"]
)
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, values: dict[str, Any], average: float) -> None:
    sequences = from_table(table(), 0)
    config = TrainConfig(epochs=4, patience=4, learning_rate=2e-3, average=average)
    model = build(sequences, **values)
    optimizer = make_optimizer(model, config)
    whole = fit(model, optimizer, Shuffled(sequences), config, True, Progress(), no_report)
    losses = [record["loss"] for record in whole.epochs]
    assert losses[0] == max(losses) and min(losses) < losses[0] - 0.3

    class Stop(Exception):
        pass

    first = build(sequences, **values)
    stopped = make_optimizer(first, config)

    def after(progress: Progress) -> None:
        if progress.epoch == 2:
            save_checkpoint(tmp_path, first, stopped, progress)
            raise Stop

    with pytest.raises(Stop):
        fit(first, stopped, Shuffled(sequences), config, True, Progress(), after)
    second = build(sequences, **values)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)  # whatever was there before is replaced
    torch.rand(17)  # the random state of a new process is another one
    resumed = make_optimizer(second, config)
    progress = load_checkpoint(tmp_path, second, resumed)
    assert progress.epoch == 2 and len(progress.epochs) == 2
    done = fit(second, resumed, Shuffled(sequences), config, True, progress, no_report)

    assert same_tensors(model.state_dict(), second.state_dict())
    assert same_tensors(whole.best_state, done.best_state) and same_tensors(whole.average, done.average)
    assert bool(whole.average) is (average > 0)
    for index, state in optimizer.state_dict()["state"].items():
        assert same_tensors(state, resumed.state_dict()["state"][index])
    assert (done.best, done.best_epoch, done.epoch) == (whole.best, whole.best_epoch, whole.epoch)
    for one, other in zip(whole.epochs, done.epochs, strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}


# ---------------------------------------------------------------- the average of the weights
def test_the_average_is_what_is_validated_and_kept_and_training_goes_on_from_the_weights() -> None:
    sequences = from_table(table(), 0)
    plain, kept = build(sequences), build(sequences)
    steps: list[dict[str, torch.Tensor]] = []
    config = TrainConfig(epochs=2, patience=5, learning_rate=5e-3, average=0)
    optimizer = make_optimizer(plain, config)
    optimizer.register_step_post_hook(lambda *_: steps.append({n: p.detach().clone() for n, p in named(plain)}))
    fit(plain, optimizer, Shuffled(sequences), config, True, Progress(), no_report)
    config = config.model_copy(update={"average": 0.8})
    progress = fit(kept, make_optimizer(kept, config), Shuffled(sequences), config, True, Progress(), no_report)
    assert same_tensors(plain.state_dict(), kept.state_dict())  # the weights themselves know nothing of the average
    expected = steps[0]
    for number, step in enumerate(steps[1 : (progress.best_epoch + 1) * len(steps) // 2], start=1):
        kept_share = min(0.8, (1 + number) / (10 + number))  # it forgets faster at first
        expected = {name: kept_share * value + (1 - kept_share) * step[name] for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(progress.best_state[name], value, rtol=1e-5, atol=1e-6)
    assert set(progress.average) == {*expected, loop.STEPS} and int(progress.average[loop.STEPS]) == len(steps)
    before = {name: value.clone() for name, value in kept.state_dict().items()}
    with pytest.raises(KeyError), averaged(kept, progress.average):
        assert all(torch.equal(value, progress.average[name]) for name, value in named(kept))
        assert not same_tensors(before, kept.state_dict())
        raise KeyError
    assert same_tensors(before, kept.state_dict())


def named(model: FusionModel) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters())


# ---------------------------------------------------------------- when it ends
def test_it_stops_when_validation_no_longer_improves() -> None:
    sequences = from_table(table(), 0)
    model = build(sequences, **EXACT)
    config = TrainConfig(epochs=50, patience=3, learning_rate=1e-30, memory_learning_rate=1e-30)
    seen: list[int] = []
    progress = fit(
        model,
        make_optimizer(model, config),
        Shuffled(sequences),
        config,
        True,
        Progress(),
        lambda p: seen.append(p.epoch),
    )
    assert progress.epoch == 4 and progress.best_epoch == 0 and seen == [1, 2, 3, 4]
    assert progress.finished(config) and not progress.finished(config.model_copy(update={"patience": 4}))


def test_the_best_epoch_is_kept_not_the_last() -> None:
    sequences = from_table(table(), 0)
    model = build(sequences)
    config = TrainConfig(epochs=12, patience=2, learning_rate=0.05, average=0)
    states: list[dict[str, torch.Tensor]] = []

    def after(progress: Progress) -> None:
        states.append({name: value.clone() for name, value in model.state_dict().items()})

    progress = fit(model, make_optimizer(model, config), Shuffled(sequences), config, True, Progress(), after)
    figures = [record["ndcg"] for record in progress.epochs]
    assert progress.best == max(figures) and progress.best_epoch == figures.index(max(figures))
    assert progress.best_ndcg == progress.epochs[progress.best_epoch]["ndcg@10"] and Progress().best_ndcg == -1
    assert same_tensors(progress.best_state, states[progress.best_epoch])


def test_gains_that_are_mostly_chance_are_not_waited_for() -> None:
    config = TrainConfig(epochs=30, patience=3)

    def stops_after(*scores: float) -> int:
        progress = Progress()
        for score in scores:
            progress.epochs.append({"ndcg": score})
            progress.epoch += 1
            if progress.finished(config):
                break
        return progress.epoch

    assert stops_after(0.1, 0.2, 0.2005, 0.2006, 0.2009, 0.3) == 5
    assert stops_after(0.1, 0.2, 0.2005, 0.2006, 0.2011, 0.3, 0.3, 0.3, 0.3, 0.3) == 9
    assert stops_after(*[0.1 * 1.006**n for n in range(40)]) == 30
    assert stops_after(*[0.0] * 40) == 30  # nobody to validate on


def test_without_validation_users_the_last_epoch_stands() -> None:
    sequences = from_table(table(6), 0)
    feed = Script(sequences, [[0, 1], [2]], [])
    model = build(sequences)
    config = TrainConfig(epochs=4, patience=1, average=0)
    progress = fit(model, make_optimizer(model, config), feed, config, True, Progress(), no_report)
    assert progress.epoch == 4 and progress.best_epoch == 3
    assert same_tensors(progress.best_state, model.state_dict())


def test_batches_without_targets_are_no_steps() -> None:
    sequences = from_table(table(6), 0)
    model = build(sequences)

    def batches() -> Iterator[Batch]:
        for batch in Script(sequences, [[0, 1], [2]], []).epoch(0):
            yield replace(batch, targets=torch.full_like(batch.targets, -1))
            yield batch

    record = loop.train_epoch(model, make_optimizer(model, TWO_EPOCHS), batches(), TWO_EPOCHS, True, 0, CPU, {})
    assert record["steps"] == 2 and record["positions"] == int((sequences.train_end - sequences.start - 1)[:3].sum())


NOT_FINITE = (
    r"loss is not finite in epoch 1, step 1 \(worker 0: loss nan over 4 sequences of up to \d+ events, items \d+ to "
    r"\d+, times \d+ to \d+ ms, ratings 1 to inf\); lower train.learning_rate"
)


def test_a_loss_that_is_not_finite_is_told_in_a_sentence() -> None:
    sequences = from_table(table(4), 0)
    sequences.ratings[3] = np.inf
    model = build(sequences)
    with pytest.raises(SpringtideError, match=NOT_FINITE):
        fit(model, make_optimizer(model, TWO_EPOCHS), Shuffled(sequences), TWO_EPOCHS, True, Progress(), no_report)


def test_what_was_saved_before_a_loss_was_not_finite_is_whole() -> None:
    """The second epoch fails: the first one's checkpoint is what was kept, and nothing is saved after it."""
    sequences = from_table(table(4), 0)
    model, saved = build(sequences), list[dict[str, torch.Tensor]]()

    class Failing(Shuffled):
        def epoch(self, epoch: int) -> Iterator[Batch]:
            for batch in super().epoch(epoch):
                yield batch if epoch == 0 else replace(batch, ratings=torch.full_like(batch.ratings, torch.inf))

    def save(progress: Progress) -> None:
        saved.append({name: value.clone() for name, value in progress.best_state.items()})

    with pytest.raises(SpringtideError, match="the loss is not finite in epoch 2"):
        fit(model, make_optimizer(model, TWO_EPOCHS), Failing(sequences), TWO_EPOCHS, True, Progress(), save)
    assert len(saved) == 1 and all(value.isfinite().all() for value in saved[0].values())


def test_a_last_step_that_overflows_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient comes after it that could tell, and the epoch would be kept."""
    sequences = from_table(table(4), 0)
    model = build(sequences)
    optimizer = make_optimizer(model, TWO_EPOCHS)
    step, taken = optimizer.step, list[int]()

    def overflow(*arguments: Any) -> Any:
        done = step(*arguments)
        taken.append(1)
        with torch.no_grad():
            model.log_temperature.fill_(torch.inf if len(taken) == batches else 0.0)
        return done

    batches = len(list(Shuffled(sequences).epoch(0)))
    monkeypatch.setattr(optimizer, "step", overflow)
    with pytest.raises(SpringtideError, match=f"weights are not finite after step {batches}, the last one of epoch 1"):
        fit(model, optimizer, Shuffled(sequences), TWO_EPOCHS, True, Progress(), no_report)


def test_scores_that_are_no_numbers_find_nothing() -> None:
    sequences = from_table(table(), 0)
    model = build(sequences)
    with torch.no_grad():
        model.log_temperature.fill_(torch.nan)
    found = validate(model, validation_cases(sequences, 100), True)
    assert found["ndcg"] == found["ndcg@10"] == found["hr@10"] == 0 and found["users"] > 0


# ---------------------------------------------------------------- validation
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_validation_ranks_like_the_recommender(exclude_seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "BATCH", 5)
    sequences = from_table(table(), 0)
    model = build(sequences, text_dim=0)
    known = model.item_vectors.known
    known[:3] = False  # neither trained nor described: never recommended
    popularity = collect(sequences, ITEMS_IN_TOY, model.config).popularity
    popularity[:3] = 0
    cases = validation_cases(sequences, 1000)
    cases.append((cases[0][0], int(cases[0][0].items[0])))  # a target that was seen before
    names = [""] * ITEMS_IN_TOY
    recommender = Recommender(model, names, names, [], [], popularity + np.where(known.numpy(), 1, 0), None)
    logits = recommender.score([history for history, _ in cases]).logits
    exclude = [history.items for history, _ in cases] if exclude_seen else None
    best, _ = recommender.top_k(logits, 10, exclude)
    gains = [
        1 / np.log2(list(row).index(target) + 2) if target in row else 0.0
        for row, (_, target) in zip(best, cases, strict=True)
    ]
    everything, _ = recommender.top_k(logits, ITEMS_IN_TOY, exclude)
    full = [
        1 / np.log2(list(row).index(target) + 2) if target in row else 0.0
        for row, (_, target) in zip(everything, cases, strict=True)
    ]
    measured = validate(model, cases, exclude_seen)
    assert measured["ndcg"] == pytest.approx(np.mean(full), abs=1e-9) and measured["ndcg"] > measured["ndcg@10"]
    assert measured["users"] == len(cases) == USERS + 1
    assert measured["ndcg@10"] == pytest.approx(np.mean(gains), abs=1e-9)
    assert measured["hr@10"] == pytest.approx(np.mean([gain > 0 for gain in gains]), abs=1e-9)
    assert 0 < measured["hr@10"] < 1


def test_ties_are_broken_by_catalogue_row() -> None:
    sequences = from_table(table(), 0)
    model = build(sequences, text_dim=0, **NOTHING_COUNTED)
    model.item_vectors.known[:] = True
    for parameter in model.item_vectors.parameters():
        torch.nn.init.zeros_(parameter)  # every item has the same score
    history = validation_cases(sequences, 1)[0][0]
    cases = [(history, target) for target in (0, 9, 10)]
    measured = validate(model, cases, False)
    assert measured["hr@10"] == pytest.approx(2 / 3)
    assert measured["ndcg@10"] == pytest.approx((1 + 1 / np.log2(11)) / 3)


# ---------------------------------------------------------------- a worker's feed
class Shard:
    """Stands for Ray Data's: blocks of the table, counting how often it is read."""

    def __init__(self, blocks: list[pa.Table]) -> None:
        self.blocks, self.passes = blocks, 0

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        self.passes += 1
        yield from self.blocks


def windows_of(batches: Iterator[Batch]) -> list[tuple[int, ...]]:
    """Every row of every batch as plain numbers, sorted."""
    return sorted(tuple(t[m].tolist()) for batch in batches for t, m in zip(batch.timestamps, batch.mask, strict=True))


@pytest.mark.parametrize(("cache_mb", "passes"), [(64, 1), (0, 3)])
def test_a_feed_gives_every_window_in_every_epoch(cache_mb: int, passes: int) -> None:
    whole = table()
    shard = Shard([whole.slice(0, 10), whole.slice(10, 0), whole.slice(10)])
    config = TrainConfig(batch_size=5, cache_mb=cache_mb, validation_users=13)
    feed = ShardFeed(shard, ModelConfig(long_window=20), config, 0.0, False, None)
    expected = windows_of(epoch_batches(from_table(whole, 0), Sampling(20, 5, 10**6), (0,)))
    for epoch in range(3):
        assert windows_of(feed.epoch(epoch)) == expected
    first, again, other = ([b.items.tolist() for b in feed.epoch(e)] for e in (0, 0, 1))
    assert first == again != other
    assert len(feed.cases()) == 13
    assert shard.passes == (passes if cache_mb else passes + 3)


def test_a_feed_that_refits_learns_from_validation_events_and_validates_on_nobody() -> None:
    feed = ShardFeed(Shard([table()]), ModelConfig(long_window=20), TrainConfig(), 0.3, True, 7)
    targets = sum(int((batch.targets >= 0).sum()) for batch in feed.epoch(0))
    assert targets == sum(len(row) - 1 for row in table()["items"].to_pylist())
    assert feed.cases() == [] and feed.asked_at() == 7


def test_validation_asks_at_the_time_it_is_told() -> None:
    sequences = from_table(table(), 0)
    model = build(sequences, request_time=True)
    asked: list[torch.Tensor] = []
    interest = model.interest
    model.interest = lambda batch, *more: asked.append(batch.now) or interest(batch, *more)  # type: ignore
    cases = validation_cases(sequences, 5)
    validate(model, cases, True, 10**15)
    validate(model, cases, True)
    assert (asked[0] == 10**15).all()
    shortest_first = sorted(cases, key=lambda case: len(case[0]))
    assert asked[1][:, 0].tolist() == [int(history.timestamps[-1]) for history, _ in shortest_first]


def test_a_feed_without_data() -> None:
    feed = ShardFeed(Shard([]), ModelConfig(long_window=20), TrainConfig(), 0.0, False, None)
    assert list(feed.epoch(0)) == [] and feed.cases() == []


def test_seeds_are_positive_and_differ() -> None:
    seeds = {seed_of(seed, epoch, rank) for seed in range(4) for epoch in range(4) for rank in range(4)}
    assert len(seeds) == 64 and all(0 <= seed < 2**63 for seed in seeds)
