"""What an epoch draws: which moments it learns from, when they are asked, and what the network is shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.model.batch import Batch
from springtide.model.inputs import SESSION_MS
from springtide.training.sampling import STRETCH, Sampling, crop, disturb
from springtide.training.sequences import Sequences, epoch_batches, training_batch, training_windows
from toy import sequences_of

ITEMS = 30
PLAIN = Sampling(50, 100, 10**6)


def log(seed: int, users: int = 12, repeats: bool = True) -> Sequences:
    """Histories of several sessions each."""
    rng = np.random.default_rng(seed)
    rows, times = [], []
    for _ in range(users):
        length = int(rng.integers(2, 20))
        rows.append((rng.integers(0, ITEMS, length) if repeats else rng.permutation(ITEMS)[:length]).tolist())
        pauses, steps = rng.integers(SESSION_MS, 100 * SESSION_MS, length), rng.integers(0, SESSION_MS, length)
        gaps = np.where(rng.random(length) < 0.4, pauses, steps)
        times.append((10**12 + np.cumsum(gaps)).tolist())
    return sequences_of(rows, timestamps=times)


def whole(sequences: Sequences) -> Batch:
    return training_batch(sequences, training_windows(sequences, 50))


def disturbed(sequences: Sequences, seed: int, **values: float) -> tuple[Batch, Batch]:
    batch = whole(sequences)
    return batch, disturb(batch, replace(PLAIN, **values), np.random.default_rng(seed))


def same(one: Batch, other: Batch, but: set[str]) -> None:
    for name, value in vars(one).items():
        if name not in but:
            np.testing.assert_array_equal(value, getattr(other, name), name)


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=60)
def test_turning_round_never_shows_a_target(seed: int, repeats: bool) -> None:
    """Whatever is shown up to a moment really came before it, or the moment is not learned from."""
    batch, after = disturbed(log(seed, repeats=repeats), seed, reorder=0.7)
    same(batch, after, {"shown", "targets", "now"})
    assert after.shown is not None
    for row, place in (after.targets >= 0).nonzero().tolist():
        seen = after.shown[row, : place + 1].sort().values
        assert seen.tolist() == batch.items[row, : place + 1].sort().values.tolist()
        assert after.targets[row, place] == batch.targets[row, place]
    turned = (after.shown != batch.items).any(1)
    assert turned.any() or seed  # (a stretch of equal items looks the same)
    for row in range(len(batch.items)):
        lost = ((batch.targets[row] >= 0) & (after.targets[row] < 0)).nonzero()[:, 0].tolist()
        assert len(lost) < STRETCH and (not lost or lost[-1] - lost[0] == len(lost) - 1)


def test_about_a_share_of_the_rows_is_turned_round() -> None:
    batch, after = disturbed(log(0, users=400, repeats=False), 0, reorder=0.3)
    assert after.shown is not None
    long = batch.mask.sum(1) > 1
    assert 0.2 < (after.shown != batch.items).any(1)[long].float().mean() < 0.4
    assert (after.targets < 0).sum() > (batch.targets < 0).sum()


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_masking_hides_items_from_the_network_only(seed: int) -> None:
    batch, after = disturbed(log(seed), seed, mask=0.3)
    same(batch, after, {"shown", "now"})
    assert after.shown is not None
    hidden = after.shown == -1
    assert torch.equal(after.shown[~hidden], batch.items[~hidden])
    _, both = disturbed(log(seed), seed, mask=0.3, reorder=1.0)
    assert both.shown is not None and torch.equal(both.items, batch.items) and (both.shown[batch.mask] == -1).any()


def test_about_a_share_of_the_events_is_hidden() -> None:
    batch, after = disturbed(log(0, users=400), 0, mask=0.3)
    assert after.shown is not None and 0.27 < (after.shown == -1)[batch.mask].float().mean() < 0.33
    assert disturbed(log(0), 0)[1].shown is None


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=40)
def test_the_starts_of_sessions_are_always_learned_from(seed: int, share: float) -> None:
    batch, after = disturbed(log(seed), seed, within_session=share)
    same(batch, after, {"targets", "now"})
    starts = (batch.now - batch.timestamps > SESSION_MS) & (batch.targets >= 0)
    assert torch.equal(after.targets[starts], batch.targets[starts])
    kept = after.targets >= 0
    assert torch.equal(after.targets[kept], batch.targets[kept])
    within = (batch.targets >= 0) & ~starts
    if share in (0, 1):
        assert bool((kept & within).any()) is (share == 1 and bool(within.any()))


def test_about_a_share_of_the_rest_is_learned_from() -> None:
    batch, after = disturbed(log(0, users=600), 0, within_session=0.3)
    within = (batch.now - batch.timestamps <= SESSION_MS) & (batch.targets >= 0)
    assert 0.25 < (after.targets >= 0)[within].float().mean() < 0.35


@given(st.integers(0, 10**6))
@settings(max_examples=40)
def test_requests_come_between_the_events_they_lie_between(seed: int) -> None:
    batch, after = disturbed(log(seed), seed, request_time=True)
    same(batch, after, {"now"})
    real = batch.mask
    assert (after.now >= batch.timestamps)[real].all() and (after.now <= batch.now)[real].all()
    within = real & (batch.now - batch.timestamps <= SESSION_MS)
    assert torch.equal(after.now[within], batch.now[within])  # asked when the next event comes


def test_requests_between_sessions_come_at_any_time_of_the_pause() -> None:
    batch, after = disturbed(log(0, users=600), 0, request_time=True)
    pause = batch.now - batch.timestamps
    between = batch.mask & (pause > SESSION_MS)
    share = ((after.now - batch.timestamps)[between] / pause[between]).numpy()
    assert abs(share.mean() - 0.5) < 0.03 and share.min() < 0.02 and share.max() > 0.98


def test_a_model_that_is_not_told_the_time_is_asked_with_the_last_event() -> None:
    batch, after = disturbed(log(1), 1)
    assert torch.equal(after.now, batch.timestamps) and not torch.equal(batch.now, batch.timestamps)


# ---------------------------------------------------------------- cropping
@given(st.integers(0, 10**6), st.sampled_from([0.3, 1.0]), st.integers(1, 12))
@settings(max_examples=60)
def test_a_cropped_window_is_a_stretch_of_at_least_half(seed: int, share: float, length: int) -> None:
    sequences = log(seed)
    windows = training_windows(sequences, length)
    cut = crop(windows, share, np.random.default_rng(seed))
    first, end, offset = cut.T
    assert (first >= windows[:, 0]).all() and (end <= windows[:, 1]).all()
    assert (end - first >= np.maximum(1, (windows[:, 1] - windows[:, 0]) // 2)).all()
    user = np.searchsorted(sequences.start, first, side="right") - 1
    np.testing.assert_array_equal(offset, first - sequences.start[user])
    batch = training_batch(sequences, cut)
    for row, (begin, stop, _) in enumerate(cut.tolist()):
        count = stop - begin
        np.testing.assert_array_equal(batch.items[row, :count], sequences.items[begin:stop])
        np.testing.assert_array_equal(batch.targets[row, :count], sequences.items[begin + 1 : stop + 1])
        assert (batch.targets[row, count:] == -1).all()


def test_only_a_share_is_cropped_and_none_without() -> None:
    sequences = log(0, users=400)
    windows = training_windows(sequences, 50)
    assert crop(windows, 0.0, np.random.default_rng(0)) is windows
    long = windows[:, 1] - windows[:, 0] > 6
    cut = crop(windows, 0.3, np.random.default_rng(0))
    assert 0.2 < (cut != windows).any(1)[long].mean() < 0.4
    assert (cut[:, 0] != windows[:, 0]).any() and (cut[:, 1] != windows[:, 1]).any()


# ---------------------------------------------------------------- epochs
@pytest.mark.parametrize("values", [{}, {"within_session": 0.5, "crop": 0.5, "mask": 0.2, "reorder": 0.5}], ids=str)
def test_an_epoch_is_drawn_from_its_seed(values: dict[str, float]) -> None:
    sequences, sampling = log(0, users=50), Sampling(8, 6, 40, **values)
    one, again, other = (list(epoch_batches(sequences, sampling, (0, epoch))) for epoch in (1, 1, 2))
    for a, b in zip(one, again, strict=True):
        for name, value in vars(a).items():
            np.testing.assert_array_equal(value, getattr(b, name))
    assert [b.items.tolist() for b in one] != [b.items.tolist() for b in other]
    for batch in one:
        assert len(batch.items) <= 6 and (batch.mask.numel() <= 40 or len(batch.items) == 1)


def test_windows_of_like_length_share_a_batch() -> None:
    sequences = log(0, users=300)
    batches = list(epoch_batches(sequences, Sampling(20, 16, 10**6), (0,)))
    padded, real = sum(b.mask.numel() for b in batches), sum(int(b.mask.sum()) for b in batches)
    assert real / padded > 0.9
    lengths = [int(b.mask.sum(1).max()) for b in batches]
    assert lengths != sorted(lengths)  # yet the batches come in any order
