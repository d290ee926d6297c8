"""The transition memory against loops that a reader can check, above all that no example sees its own transition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noise import NOISE_ITEMS, random_log, train_on_noise
from springtide.model import memory as memory_module
from springtide.model.memory import LONG_DECAY, SHORT_DECAY, TransitionMemory, count_transitions

torch.set_num_threads(1)
ITEMS = 6
WEIGHTS = (0.7, 1.6)  # of the short and the long reading

Rows = list[list[tuple[int, bool]]]
logs = st.lists(st.lists(st.tuples(st.integers(0, ITEMS - 1), st.booleans()), max_size=12), max_size=4)


def naive_counts(rows: Rows, distances: int, decay: float, without: tuple[int, int] | None = None) -> np.ndarray:
    """C[a, b] by the definition; `without` = (row, place): that event is nobody's successor."""
    counts = np.zeros((ITEMS, ITEMS))
    for number, row in enumerate(rows):
        for place, (item, target) in enumerate(row):
            if not target or (number, place) == without:
                continue
            for distance in range(1, min(distances, place) + 1):
                counts[row[place - distance][0], item] += decay ** (distance - 1)
    return counts


def truncated(counts: np.ndarray, neighbours: int) -> np.ndarray:
    """Only the `neighbours` largest of each row, ties by item."""
    kept = np.zeros_like(counts)
    for a, row in enumerate(counts):
        best = sorted((b for b in range(ITEMS) if row[b] > 0), key=lambda b: (-round(row[b], 6), b))[:neighbours]
        kept[a, best] = row[best]
    return kept


def naive_score(memory: TransitionMemory, counts: np.ndarray, past: list[int], item: int) -> float:
    """past: items before the moment, oldest first."""
    tau = math.exp(memory.log_tau.item())
    score = 0.0
    for weight, decay, scale in zip(WEIGHTS, (SHORT_DECAY, LONG_DECAY), memory.log_scale.exp().tolist(), strict=True):
        kernel = [decay**j for j in range(memory.recent)]
        for share, recent in zip(kernel, past[::-1], strict=False):
            told = math.log1p(counts[recent, item] * memory.items / tau)
            score += weight * scale * share / sum(kernel) * told
    return score


def ask(memory: TransitionMemory, past: list[int], depth: int, target: int | None = None) -> torch.Tensor:
    """[I] scores after `past`."""
    recent, valid = lookback(past, depth)
    later = None if target is None else torch.tensor([[target]])
    return memory(recent, valid, torch.tensor([WEIGHTS]), later)[0]  # type: ignore[no-any-return]


def pairs_of(rows: Rows) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array([i for i, _ in row], np.int64), np.array([t for _, t in row], bool)) for row in rows]


def memory_of(rows: Rows, distances: int, decay: float, recent: int, neighbours: int) -> TransitionMemory:
    memory = TransitionMemory(ITEMS, distances, decay, recent, neighbours)
    memory.load_counts(count_transitions(pairs_of(rows), ITEMS, distances, decay))
    return memory


def lookback(past: list[int], depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    newest = past[::-1][:depth]
    recent = torch.tensor([newest + [0] * (depth - len(newest))])
    return recent, torch.arange(depth)[None] < len(newest)


@given(logs, st.integers(1, 14), st.sampled_from([1.0, 0.8, 0.3]))
@settings(max_examples=60)
def test_counts_equal_a_loop(rows: Rows, distances: int, decay: float) -> None:
    counted = count_transitions(iter(pairs_of(rows)), ITEMS, distances, decay)
    np.testing.assert_allclose(counted.toarray(), naive_counts(rows, distances, decay), rtol=1e-5)
    assert counted.dtype == np.float32
    assert counted.has_sorted_indices


@given(logs, st.integers(1, 4), st.integers(1, 5), st.integers(1, ITEMS))
@settings(max_examples=60)
def test_scores_equal_the_formula(rows: Rows, distances: int, recent: int, neighbours: int) -> None:
    memory = memory_of(rows, distances, 0.8, recent, neighbours)
    counts = truncated(naive_counts(rows, distances, 0.8), neighbours)
    for past in ([], [2], [0, 1, 2, 3, 4, 5, 0], [1, 1, 1]):
        scored = ask(memory, past, recent)
        expected = [naive_score(memory, counts, past, item) for item in range(ITEMS)]
        np.testing.assert_allclose(scored.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@given(logs, st.integers(1, 4), st.integers(1, 5), st.integers(1, ITEMS), st.sampled_from([1.0, 0.8, 0.3]))
@settings(max_examples=150)
def test_leaving_one_out_equals_counting_again_without_it(
    rows: Rows, distances: int, recent: int, neighbours: int, decay: float
) -> None:
    """Also where an item stands at several distances, within `recent` or beyond it, and where lists are truncated."""
    memory = memory_of(rows, distances, decay, recent, neighbours)
    for number, row in enumerate(rows):
        for place in range(1, len(row)):
            item, target = row[place]
            if not target:
                continue
            past = [i for i, _ in row[:place]]
            counts = truncated(naive_counts(rows, distances, decay, without=(number, place)), neighbours)
            scored = ask(memory, past, max(recent, distances), item)[item]
            assert scored.item() == pytest.approx(naive_score(memory, counts, past, item), rel=1e-4, abs=1e-4)


def test_repeated_items_leave_with_every_distance() -> None:
    """In 1 1 1 2 the pair (1, 2) was counted at three distances, all of them by the one moment that asks."""
    rows: Rows = [[(1, True), (1, True), (1, True), (2, True)]]
    memory = memory_of(rows, distances=3, decay=0.8, recent=2, neighbours=6)
    assert ask(memory, [1, 1, 1], 3)[2].item() > 0.5
    assert ask(memory, [1, 1, 1], 3, 2)[2].item() == 0


def test_items_that_come_again_later_leave_with_every_time() -> None:
    """Of a history 0 2 | 1 1 1 the memory must not keep, after 0 2, that 1 came three times."""
    memory = TransitionMemory(3, 4, 0.5, 3, 10)
    memory.load_counts(count_transitions([(np.array([0, 2, 1, 1, 1]), np.ones(5, bool))], 3, 4, 0.5))
    recent, valid = torch.tensor([[2, 0, 0]]), torch.tensor([[True, True, False]])
    left = memory(recent, valid, torch.ones(1, 2), later=torch.tensor([[1, 1, 1]]))
    assert left[0, 1] == 0
    # The target comes once and the other item twice: both leave, what others did stays.
    memory.load_counts(count_transitions([(np.array([0, 2, 1, 1]), np.ones(4, bool))] * 2, 3, 4, 0.5))
    alone = TransitionMemory(3, 4, 0.5, 3, 10)
    alone.load_counts(count_transitions([(np.array([0, 2, 1, 1]), np.ones(4, bool))], 3, 4, 0.5))
    recent, valid = torch.tensor([[0, 0, 0]]), torch.tensor([[True, False, False]])
    found = memory(recent, valid, torch.ones(1, 2), later=torch.tensor([[2, 1, 1]]))
    torch.testing.assert_close(found, alone(recent, valid, torch.ones(1, 2)))


def test_nothing_of_rounding_is_left() -> None:
    """However large the scale, a pair that only the example itself made scores exactly zero."""
    rows: Rows = [[(i, True) for i in (0, 1, 2, 3, 4, 0, 0, 1, 0, 5)]]
    memory = memory_of(rows, distances=9, decay=0.7, recent=9, neighbours=6)
    with torch.no_grad():
        memory.log_tau.fill_(-20.0)
    assert float(ask(memory, [i for i, _ in rows[0][:-1]], 9, 5)[5].detach()) == 0


def test_other_items_keep_their_scores() -> None:
    rows: Rows = [[(i % ITEMS, True) for i in range(0, 40, 3)], [(i * i % ITEMS, True) for i in range(10)]]
    memory = memory_of(rows, distances=3, decay=0.8, recent=4, neighbours=6)
    plain, less = ask(memory, [0, 1, 4], 4), ask(memory, [0, 1, 4], 4, 3)
    others = torch.arange(ITEMS) != 3
    assert torch.equal(plain[others], less[others])


@pytest.mark.parametrize("dense", [0, 16])
def test_many_moments_score_like_each_alone(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and gradients, of a batch read as whole rows or place by place, and of each moment on its own."""
    rows: Rows = [[(i % ITEMS, True) for i in range(0, 40, 3)], [(i * i % ITEMS, True) for i in range(10)]]
    memory = memory_of(rows, distances=3, decay=0.8, recent=4, neighbours=3)
    recent = torch.randint(0, ITEMS, (9, 4), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(4) < torch.tensor([0, 1, 2, 3, 4, 4, 4, 4, 4])[:, None]
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    later = torch.randint(-1, ITEMS, (9, 4), generator=torch.Generator().manual_seed(2))
    later[:, 0] = torch.randint(1, 4, (9,), generator=torch.Generator().manual_seed(3))
    columns = torch.tensor([1, 2, 3, 5])
    learned = [*memory.parameters(), weights]
    for of in ({}, {"later": later}, {"later": later, "columns": columns}, {"columns": columns}):
        monkeypatch.setattr(memory_module, "DENSE", dense)
        together = memory(recent, valid, weights, **of)
        with torch.no_grad():
            torch.testing.assert_close(memory(recent, valid, weights, **of), together)
        monkeypatch.setattr(memory_module, "DENSE", 0)
        each = [{name: value[n : n + 1] if name == "later" else value for name, value in of.items()} for n in range(9)]
        alone = torch.cat(
            [memory(recent[n : n + 1], valid[n : n + 1], weights[n : n + 1], **some) for n, some in enumerate(each)]
        )
        torch.testing.assert_close(together, alone)
        assert together[4].any() and not together[0].any()
        found = torch.autograd.grad((together**2).sum(), learned)
        for one, other in zip(found, torch.autograd.grad((alone**2).sum(), learned), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            assert other.any()


def test_new_counts_replace_the_old_and_stay_out_of_the_state() -> None:
    memory = memory_of([[(0, True), (1, True)]], 1, 1.0, 2, 3)
    memory.load_counts(sp.csr_matrix((ITEMS, ITEMS), dtype=np.float32))
    assert torch.equal(ask(memory, [0], 2), torch.zeros(ITEMS))
    assert set(memory.state_dict()) == {"log_scale", "log_tau"}


def test_gradients_reach_the_weights_and_tau() -> None:
    memory = memory_of([[(0, True), (1, True), (2, True)], [(0, True), (1, True)]], 2, 0.8, 3, 6)
    ask(memory, [2, 0], 3, 1)[1].backward()
    assert memory.log_scale.grad is not None and (memory.log_scale.grad > 0).all()
    assert memory.log_tau.grad is not None and memory.log_tau.grad < 0


# ---------------------------------------------------------------- what a leak would do
def test_on_noise_the_memory_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    log = random_log(NOISE_ITEMS, users=64, length=20)
    loss, weight = train_on_noise(log, NOISE_ITEMS, ("memory", "popularity"), "transitions_short")
    without, _ = train_on_noise(log, NOISE_ITEMS, ("popularity",))
    assert loss > without - 0.005  # popularity can be learned by heart, a little; the memory adds nothing to it
    assert math.log(NOISE_ITEMS) > without > math.log(NOISE_ITEMS) - 0.1
    untrained = math.log(2)  # softplus(0)
    assert weight < untrained / 6
    monkeypatch.setattr(
        TransitionMemory,
        "_own_counts",
        lambda self, recent, _, later: torch.zeros(*later.shape, min(recent.shape[1], self.recent)),
    )
    leaked_loss, leaked_weight = train_on_noise(log, NOISE_ITEMS, ("memory", "popularity"), "transitions_short")
    assert leaked_loss < loss - 1  # the leak wins in training: it knows the answers
    assert leaked_weight > untrained


@given(logs, logs, st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=200)
def test_counts_of_a_few_rows_are_taken_as_if_all_had_been(
    rows: Rows, more: Rows, neighbours: int, distances: int, grown: int
) -> None:
    """Buffer for buffer, also after items were added."""
    decay = 0.5
    memory = memory_of(rows, distances, decay, 2, neighbours)
    memory.grow(grown)
    counts = count_transitions(pairs_of(rows), ITEMS, distances, decay)
    counts.resize(ITEMS + grown, ITEMS + grown)
    shifted = [[(item + grown, wanted) for item, wanted in row] for row in more]
    added = count_transitions(pairs_of(shifted), ITEMS + grown, distances, decay)
    total = counts + added
    wanted = memory.arrange(total)
    found = memory.rearrange(total, np.flatnonzero(np.diff(added.indptr)))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
