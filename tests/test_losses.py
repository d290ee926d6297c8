"""The softmax over a sample stands for the one over the whole catalogue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from springtide.config import TrainConfig
from springtide.model.batch import scoring_batch
from springtide.model.fusion import FusionModel
from springtide.model.losses import Sample, draw_negatives, full_softmax, sampled_softmax
from springtide.model.memory import TransitionMemory, count_transitions
from springtide.training import loop
from springtide.training.sequences import training_batch, training_windows
from toy import sequences_of, tables_of, toy_settings

torch.set_num_threads(1)
ITEMS, POSITIONS = 40, 6


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [P, I], targets [P], barred [P, I], log popularity [I], known [I]."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, ITEMS - 3, (POSITIONS,), generator=generator)
    barred = torch.rand(POSITIONS, ITEMS, generator=generator) < 0.2
    barred[:, ITEMS - 3 :] = True  # never seen in training
    barred = barred.scatter(1, targets[:, None], False)
    popularity = torch.randn(ITEMS, generator=generator) * 2
    return torch.randn(POSITIONS, ITEMS, generator=generator), targets, barred, popularity, torch.arange(ITEMS) < 37


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_when_every_item_is_drawn_it_is_the_full_softmax(smoothing: float) -> None:
    logits, targets, barred, popularity, known = case()
    torch.manual_seed(0)
    sample = draw_negatives(popularity.clamp(min=-2), known, targets, 200_000)
    assert sample.items.tolist() == known.nonzero()[:, 0].tolist() and sample.drawn.all()
    part = sampled_softmax(logits[:, sample.items], sample, targets, barred[:, sample.items], smoothing)
    torch.testing.assert_close(part, full_softmax(logits, targets, barred, smoothing), rtol=1e-4, atol=1e-4)


def test_the_estimated_sum_over_the_catalogue_is_unbiased() -> None:
    """exp(loss + logit of the target) of one position is the sum that was estimated."""
    logits, targets, barred, popularity, known = case(1)
    torch.manual_seed(1)
    sums = []
    for _ in range(2000):
        sample = draw_negatives(popularity, known, targets, 12)
        assert 3 < int(sample.drawn.sum()) <= 12
        part, hidden = logits[:, sample.items].split(1), barred[:, sample.items].split(1)
        losses = [
            sampled_softmax(one, sample, target, away, 0)
            for one, target, away in zip(part, targets.split(1), hidden, strict=True)
        ]
        sums.append(torch.exp(torch.stack(losses) + logits.gather(1, targets[:, None])[:, 0]).double())
    found = torch.stack(sums)
    expected = logits.exp().masked_fill(barred, 0).sum(1).double()
    error = found.std(0) / len(sums) ** 0.5
    assert ((found.mean(0) - expected).abs() < 4 * error).all()
    assert (error < 0.05 * expected).all()  # or the test says nothing
    # Without the correction, or with targets that count twice, it would have been seen.
    assert (found.mean(0) < expected * 1.2).all() and (found.mean(0) > expected * 0.8).all()


def test_smoothing_favours_nobody_where_all_score_alike() -> None:
    """Popular items are drawn more often; the pull towards all of them must not be stronger for it."""
    _, targets, _, popularity, known = case(3)
    free = torch.zeros(POSITIONS, ITEMS, dtype=torch.bool)
    pull = torch.zeros(ITEMS)
    torch.manual_seed(3)
    for _ in range(400):
        sample = draw_negatives(popularity, known, targets, 12)
        logits = torch.zeros(POSITIONS, len(sample.items), requires_grad=True)
        sampled_softmax(logits, sample, targets, free[:, sample.items], 1.0).backward()
        assert logits.grad is not None
        grad = logits.grad.scatter(1, torch.searchsorted(sample.items, targets)[:, None], 0.0)
        pull.index_add_(0, sample.items, grad.sum(0) / (400 * POSITIONS))
    assert pull.abs().max() < 0.01


def test_targets_that_nobody_drew_are_there_for_their_own_position_only() -> None:
    logits = torch.zeros(2, 3)
    targets, barred = torch.tensor([4, 9]), torch.zeros(2, 3, dtype=torch.bool)
    sample = Sample(
        torch.tensor([4, 7, 9]), torch.log(torch.tensor([0.1, 0.5, 0.1])), torch.tensor([False, True, False])
    )
    # One draw that stands for two items, and the target once.
    assert sampled_softmax(logits, sample, targets, barred, 0).item() == pytest.approx(2 * np.log(3))
    drawn = replace(sample, drawn=torch.ones(3, dtype=torch.bool))
    # The other one's target stands for ten; the own one still counts once.
    assert sampled_softmax(logits, drawn, targets, barred, 0).item() == pytest.approx(2 * np.log(1 + 2 + 10))


def test_what_training_never_saw_is_never_drawn() -> None:
    _, targets, _, popularity, known = case(2)
    torch.manual_seed(0)
    sample = draw_negatives(popularity, known, targets, 10_000)
    assert known[sample.items].all() and set(targets.tolist()) <= set(sample.items.tolist())
    assert (sample.log_inclusion <= 0).all() and sample.log_inclusion.isfinite().all()


# ---------------------------------------------------------------- the model under it
def build(rows: list[list[int]], **values: object) -> FusionModel:
    config = toy_settings(Path("none"), **{f"model__{name}": value for name, value in values.items()}).model
    log = sequences_of(rows)
    tables = tables_of(log, ITEMS, config)
    torch.manual_seed(0)
    popularity = torch.from_numpy(tables.popularity)
    model = FusionModel(config, 2, torch.randn(ITEMS, config.text_dim), popularity > 0, popularity)
    tables.fill(model)
    return model


def ring(users: int = 40, length: int = 9) -> list[list[int]]:
    """Item i is followed by i + 1."""
    return [[(3 * user + step) % ITEMS for step in range(length)] for user in range(users)]


@pytest.mark.parametrize("neighbours", [3, 256])
def test_transitions_of_some_columns_are_those_of_all(neighbours: int) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 12, 15) for _ in range(10)]
    memory = TransitionMemory(ITEMS, 4, 0.8, 5, neighbours)
    memory.load_counts(count_transitions([(row, np.ones(15, bool)) for row in rows], ITEMS, 4, 0.8))
    for count in (1, 20):
        recent = torch.from_numpy(np.stack([rows[n % 10][9:4:-1] for n in range(count)]))
        targets = torch.from_numpy(np.array([rows[n % 10][10] for n in range(count)]))
        columns = torch.unique(torch.cat([targets, torch.tensor([0, 5, 30])]))
        valid, weights = torch.ones_like(recent, dtype=torch.bool), torch.rand(count, 2)
        for later in (None, torch.stack([targets, targets.roll(1), torch.full_like(targets, -1)], 1)):
            whole, part = memory(recent, valid, weights, later), memory(recent, valid, weights, later, columns)
            torch.testing.assert_close(part, whole[:, columns])
        assert not torch.equal(whole, memory(recent, valid, weights))  # something was left out


def test_logits_of_some_columns_are_those_of_all() -> None:
    model = build(ring(), neighbour_items=25).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    log = sequences_of(ring())
    batch = training_batch(log, training_windows(log, 20)[:7])
    vectors, moments = model.item_vectors(), batch.mask.nonzero()
    interest = model.interest(batch, vectors)
    columns = torch.unique(torch.cat([batch.targets[batch.targets >= 0], torch.tensor([1, 38])]))
    cold = torch.rand(ITEMS, generator=torch.Generator().manual_seed(0)) < 0.3
    for more in ({}, {"held_out": True}, {"held_out": True, "cold": cold}):
        whole = model.logits_at(batch, interest, vectors, moments, **more)  # type: ignore[arg-type]
        part = model.logits_at(batch, interest, vectors, moments, **more, columns=columns)  # type: ignore[arg-type]
        torch.testing.assert_close(part, whole[:, columns], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_with_every_item_drawn_a_model_has_the_loss_of_the_full_softmax(exclude_seen: bool) -> None:
    model = build(ring()).eval()
    log = sequences_of(ring())
    batch = training_batch(log, training_windows(log, 20))
    torch.manual_seed(0)
    whole, count = model(batch, exclude_seen, 0.1)
    part, again = model(batch, exclude_seen, 0.1, 100_000)
    assert count == again and part.item() == pytest.approx(whole.item(), rel=1e-4)


def test_a_model_trained_on_samples_learns_the_pattern() -> None:
    nothing = dict.fromkeys(
        ("memory", "neighbours", "borrowing", "text_neighbours", "popularity", "recent_popularity"), False
    )
    model = build(ring(), **nothing, dropout=0.0, id_dropout=0.0, text_dim=0)
    config = TrainConfig(learning_rate=0.01, full_softmax_items=10, negatives=8)
    optimizer = loop.make_optimizer(model, config)
    log = sequences_of(ring())
    batch = training_batch(log, training_windows(log, 20))
    torch.manual_seed(0)
    widths: list[int] = []
    logits_at = model.logits_at
    model.logits_at = lambda *a, **k: widths.append(len(k["columns"])) or logits_at(*a, **k)  # type: ignore
    record = loop.train_epoch(model, optimizer, iter([batch] * 150), config, False, 0, torch.device("cpu"), {})
    assert record["steps"] == 150 and max(widths) <= ITEMS and len(widths) == 150
    model.logits_at = logits_at  # type: ignore[method-assign]
    asked = scoring_batch([log.history(user, int(log.start[user]) + 5) for user in range(40)], 20)
    vectors = model.eval().item_vectors()
    last = torch.stack([torch.arange(40), torch.full((40,), 4)], 1)
    best = model.logits_at(asked, model.interest(asked, vectors), vectors, last).argmax(1)
    assert (best == (asked.items[:, 4] + 1) % ITEMS).float().mean() > 0.9


def test_only_a_large_catalogue_is_sampled() -> None:
    model, given = build(ring()), list[int]()
    forward = model.forward
    model.forward = lambda *a: given.append(a[3]) or forward(*a)  # type: ignore
    log = sequences_of(ring())
    batch = training_batch(log, training_windows(log, 20))
    for full, negatives in ((ITEMS, 8), (ITEMS - 1, 8), (1, ITEMS), (1, ITEMS - 1)):
        config = TrainConfig(full_softmax_items=full, negatives=negatives)
        optimizer = loop.make_optimizer(model, config)
        loop.train_epoch(model, optimizer, iter([batch]), config, False, 0, torch.device("cpu"), {})
    assert given == [0, 8, 0, ITEMS - 1]
