"""The fusion model: what may influence what, and that every variant trains every parameter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from springtide.model import fusion
from springtide.model.batch import Batch, History, pad_rows, scoring_batch
from springtide.model.fuse import Gate
from springtide.model.fusion import FusionModel
from springtide.model.inputs import TIME_BUCKETS, context_features, time_bucket
from toy import sequences_of, tables_of, toy_settings

torch.set_num_threads(1)
ITEMS, LENGTH = 30, 12
SECOND = 1000


def build(**values: Any) -> FusionModel:
    """A model with random weights everywhere, so that nothing is zero by initialisation."""
    config = toy_settings(Path("none"), **{f"model__{name}": value for name, value in values.items()}).model
    generator = torch.Generator().manual_seed(3)
    rng = np.random.default_rng(3)
    model = FusionModel(
        config,
        3,
        torch.randn(ITEMS, config.text_dim, generator=generator),
        torch.arange(ITEMS) != ITEMS - 1,
        torch.arange(ITEMS - 1, -1, -1),
        (3.0, 1.5),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    rows = [rng.integers(0, ITEMS - 1, 20).tolist() for _ in range(20)]
    tables_of(sequences_of(rows), ITEMS, config).fill(model)
    return model.eval()


def history(length: int, seed: int) -> History:
    rng = np.random.default_rng(seed)
    ratings = rng.integers(1, 6, length).astype(np.float32)
    ratings[rng.random(length) < 0.3] = np.nan
    times = np.cumsum(rng.integers(0, 10**8, length)) + 10**12
    return History(rng.integers(0, ITEMS - 1, length), rng.integers(0, 3, length), ratings, times)


def training(histories: list[History]) -> Batch:
    """Each history's events but the last, with the next one as target."""
    batch = scoring_batch([h.before(len(h) - 1) for h in histories], 1000)
    targets = pad_rows([h.items[1:] for h in histories], np.int64, -1)
    now = pad_rows([h.timestamps[1:] for h in histories], np.int64)
    return replace(batch, targets=torch.from_numpy(targets), now=torch.from_numpy(now))


def all_logits(model: FusionModel, batch: Batch, held_out: bool = False) -> torch.Tensor:
    vectors = model.item_vectors()
    moments = batch.mask.nonzero()
    return model.logits_at(batch, model.interest(batch, vectors), vectors, moments, held_out=held_out)


NOTHING_COUNTED: dict[str, Any] = dict.fromkeys(
    ("memory", "neighbours", "borrowing", "text_neighbours", "popularity", "recent_popularity"), False
)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "scalar gate": {"gate": "scalar"},
    "mean gate": {"gate": "mean"},
    "hidden gate": {"gate_hidden": 8},
    "mean gate, hidden ignored": {"gate": "mean", "gate_hidden": 8},
    "lstm, two layers": {"long_branch": "lstm", "long_layers": 2},
    "one event short": {"short_window": 1},
    "no rating": {"use_rating": False},
    "no time": {"use_time": False},
    "request time": {"request_time": True},
    "no text": {"text_dim": 0},
    "no ids": {"id_embeddings": False},
    "no memory": {"memory": False},
    "no neighbours": {"neighbours": False},
    "neighbours of a few items": {"neighbour_items": 7},
    "no text neighbours": {"text_neighbours": False},
    "no popularity": {"popularity": False},
    "no recent popularity": {"recent_popularity": False},
    "bare": NOTHING_COUNTED | {"use_rating": False, "use_time": False, "text_dim": 0},
}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("empty", [False, True], ids=["targets", "nothing to learn"])
def test_every_parameter_gets_a_gradient(variant: str, empty: bool) -> None:
    """Or DDP would wait for it; also on a worker whose share of the data has run out."""
    model = build(**VARIANTS[variant]).train()
    batch = training([history(LENGTH, 0), history(5, 1)])
    if empty:
        batch = replace(batch, targets=torch.full_like(batch.targets, -1))
    loss, count = model(batch, exclude_seen=True)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert count == (0 if empty else LENGTH - 1 + 4)
    if empty:
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
        assert loss.item() == 0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nothing_of_the_future_is_seen(variant: str) -> None:
    model = build(**VARIANTS[variant])
    whole, moment = history(LENGTH, 0), 6
    other = history(LENGTH, 9)
    known = np.arange(LENGTH) <= moment
    later = History(**{name: np.where(known, array, getattr(other, name)) for name, array in vars(whole).items()})
    later.timestamps[moment + 1 :] += 10**9
    asked = np.array([whole.timestamps[-1] + 10**10])
    first, second = (all_logits(model, scoring_batch([h], 1000, asked)) for h in (whole, later))
    torch.testing.assert_close(first[: moment + 1], second[: moment + 1], rtol=0, atol=0)
    assert not torch.equal(first[moment + 1 :], second[moment + 1 :])


def test_the_target_itself_changes_only_its_own_logit() -> None:
    """Leave-one-out touches the target's memory, and nothing else may know the target."""
    model = build()
    batch = training([history(LENGTH, 0)])
    plain, less = all_logits(model, batch), all_logits(model, batch, held_out=True)
    own = F.one_hot(batch.targets[batch.mask], ITEMS).bool()
    torch.testing.assert_close(plain[~own], less[~own])
    assert (less[own] <= plain[own]).all() and (less[own] < plain[own]).any()


@pytest.mark.parametrize("variant", ["default", "lstm, two layers", "request time", "no time"])
def test_padding_changes_nothing(variant: str) -> None:
    model = build(**VARIANTS[variant])
    histories = [history(n, n) for n in (1, 7, LENGTH, 3)]
    together = all_logits(model, scoring_batch(histories, 1000))
    alone = torch.cat([all_logits(model, scoring_batch([h], 1000)) for h in histories])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_scoring_reads_the_last_events_and_counts_the_rest() -> None:
    batch = scoring_batch([history(9, 0), history(2, 1)], 4)
    assert batch.items.shape == (2, 4)
    assert batch.offset.tolist() == [5, 0]
    assert batch.items[0].tolist() == history(9, 0).items[-4:].tolist()
    assert batch.mask.sum(1).tolist() == [4, 2]


# ---------------------------------------------------------------- the loss
def naive_loss(model: FusionModel, batch: Batch, exclude_seen: bool, smoothing: float) -> float:
    logits = all_logits(model, batch, held_out=True).detach()
    total = 0.0
    for (row, place), scores in zip(batch.mask.nonzero().tolist(), logits, strict=True):
        target = int(batch.targets[row, place])
        if target < 0:
            continue
        barred = set((~model.item_vectors.known).nonzero()[:, 0].tolist())
        if exclude_seen:
            barred |= set(batch.items[row, : place + 1].tolist()) - {target}
        allowed = [item for item in range(ITEMS) if item not in barred]
        log_p = scores[allowed].double().log_softmax(0)
        total -= (1 - smoothing) * float(log_p[allowed.index(target)]) + smoothing * float(log_p.mean())
    return total


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_equals_a_loop(exclude_seen: bool, smoothing: float) -> None:
    model = build()
    batch = training([history(LENGTH, 0), history(6, 1)])
    loss, count = model(batch, exclude_seen, smoothing)
    assert count == LENGTH - 1 + 5
    assert loss.item() == pytest.approx(naive_loss(model, batch, exclude_seen, smoothing), rel=1e-4)


def test_blocks_of_logits_give_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    batch = training([history(LENGTH, 0), history(6, 1)])

    def run() -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss, _ = model(batch, True, 0.1)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, gradients = run()
    monkeypatch.setattr(fusion, "LOGIT_BLOCK", 3 * ITEMS)
    blocked, again = run()
    assert blocked == pytest.approx(whole, rel=1e-5)
    for a, b in zip(gradients, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_unseen_items_are_no_negatives() -> None:
    """Training must not push down an item that it never saw: no gradient reaches its text through the softmax."""
    model = build(id_embeddings=False)
    text = model.item_vectors.text.clone().requires_grad_()
    model.item_vectors.text = text
    model(training([history(LENGTH, 0)]), True)[0].backward()
    assert text.grad is not None
    assert not text.grad[ITEMS - 1].any() and text.grad[0].any()


# ---------------------------------------------------------------- parts
def test_items_that_training_never_saw_are_their_text() -> None:
    model = build()
    vectors, project = model.item_vectors(), model.item_vectors.project
    assert project is not None and model.item_vectors.ids is not None
    described = project(model.item_vectors.text)
    torch.testing.assert_close(vectors[-1], described[-1])
    torch.testing.assert_close(vectors[:-1], described[:-1] + model.item_vectors.ids.weight[:-1])


def test_id_dropout_hides_whole_rows_in_training_only() -> None:
    vectors = build(id_dropout=0.5).item_vectors.train()
    assert vectors.project is not None
    cold = vectors.draw_cold()
    assert cold is not None and 0.2 < cold.float().mean() < 0.8
    hidden = (vectors(cold) == vectors.project(vectors.text)).all(1)
    assert torch.equal(hidden, cold | ~vectors.known)
    assert vectors.eval().draw_cold() is None
    assert not (vectors() == vectors.project(vectors.text)).all(1)[:-1].any()


def test_without_text_ids_are_never_hidden() -> None:
    vectors = build(text_dim=0, id_dropout=0.9).item_vectors.train()
    assert vectors.ids is not None and vectors.draw_cold() is None
    assert torch.equal(vectors()[:-1], vectors.ids.weight[:-1])


@pytest.mark.parametrize(("kind", "spread"), [("channel", True), ("scalar", False), ("mean", False)])
def test_kinds_of_gate(kind: str, spread: bool) -> None:
    model = build(gate=kind)
    batch = scoring_batch([history(LENGTH, 0)], 1000)
    interest = model.interest(batch, model.item_vectors())
    assert ((interest.gate > 0) & (interest.gate < 1)).all()
    assert bool(interest.gate.std(-1).max() > 1e-6) is spread
    if kind == "mean":
        assert torch.equal(interest.gate, torch.full_like(interest.gate, 0.5))
    torch.testing.assert_close(interest.user, interest.gate * interest.short + (1 - interest.gate) * interest.long)


def test_attention_weighs_only_what_was() -> None:
    model = build()
    interest = model.interest(scoring_batch([history(LENGTH, 0)], 1000), model.item_vectors())
    torch.testing.assert_close(interest.attention_long.sum(-1), torch.ones(1, LENGTH))
    torch.testing.assert_close(interest.attention_short.sum(-1), torch.ones(1, LENGTH))
    assert not interest.attention_long.triu(1).any()
    assert not interest.attention_short[0, 0, :-1].any()  # the first event has only itself


def test_ratings_are_read_only_if_asked_for() -> None:
    past = history(LENGTH, 0)
    other = replace(past, ratings=past.ratings + 1)
    for on in (True, False):
        model = build(use_rating=on)
        same = torch.equal(*(all_logits(model, scoring_batch([h], 1000)) for h in (past, other)))
        assert same is not on


def test_only_gaps_of_time_matter_and_the_event_input_can_do_without() -> None:
    past = history(LENGTH, 0)
    shifted = replace(past, timestamps=past.timestamps + 7 * SECOND)
    slower = replace(past, timestamps=past.timestamps[0] + 16 * (past.timestamps - past.timestamps[0]))
    for on in (True, False):
        model = build(use_time=on)
        vectors = model.item_vectors()
        first, second, third = (model.interest(scoring_batch([h], 1000), vectors) for h in (past, shifted, slower))
        assert torch.equal(first.user, second.user)
        assert torch.equal(first.long, third.long) is not on


def test_request_time_reaches_the_gate_only_if_asked_for() -> None:
    past = [history(LENGTH, 0)]
    soon, late = past[0].timestamps[-1:] + 1000, past[0].timestamps[-1:] + 10**10
    for on in (True, False):
        model = build(request_time=on)
        same = torch.equal(*(all_logits(model, scoring_batch(past, 1000, now)) for now in (soon, late)))
        assert same is not on


def test_context_counts_sessions_and_history() -> None:
    minute = 60 * SECOND
    times = torch.tensor([[0, minute, 2 * minute, 100 * minute, 101 * minute]]) + 10**12
    context = context_features(times, times + 5, torch.tensor([7]), True)
    assert context.shape == (1, 5, Gate.CONTEXT)
    assert torch.expm1(context[0, :, 1] * 7).round().tolist() == [8, 9, 10, 11, 12]
    assert torch.expm1(context[0, :, 2] * 5).round().tolist() == [0, 1, 2, 0, 1]
    assert torch.expm1(context[0, :, 3] * 25).round().tolist() == [5] * 5
    assert context[0, 0, 0] == 0


def test_time_buckets_cover_everything() -> None:
    gaps = torch.tensor([-5, 0, 1, 3, 2**31, 2**62])
    assert time_bucket(gaps).tolist() == [0, 0, 1, 2, 31, TIME_BUCKETS - 1]


def test_missing_ratings_differ_from_average_ones() -> None:
    past = history(LENGTH, 0)
    unrated = replace(past, ratings=np.full(LENGTH, np.nan, np.float32))
    average = replace(past, ratings=np.full(LENGTH, 3.0, np.float32))
    model = build()
    one, other = (all_logits(model, scoring_batch([h], 1000)) for h in (unrated, average))
    assert one.isfinite().all() and not torch.allclose(one, other)
