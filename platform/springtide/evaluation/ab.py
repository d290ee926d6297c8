"""Arms of an A/B test compared: figures per arm, their differences, bootstrap intervals by user, sample ratio mismatch.

Pure numpy: arrays in, arrays out. What a user does on one visit is like what they do on the next, so users are drawn
again and not exposures: intervals over exposures would be too narrow (Deng et al. 2017, "Trustworthy analysis of
online A/B tests"). The chi-square on the users per arm finds a split that did not divide them as it was told to
(Fabijan et al. 2019, "Diagnosing sample ratio mismatch").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from springtide.evaluation.metrics import SEED, Estimate

FIGURES = ("hit_rate", "reciprocal_rank", "ctr_per_user")
MISMATCH_BELOW = 0.001  # p-value; the split is checked once per report, so false alarms must be rare
_CELLS = 4_000_000  # users times resamples drawn at once


@dataclass(frozen=True)
class Arm:
    """What U users of one arm saw and took, a row per user."""

    exposures: np.ndarray  # [U] answers shown, at least 1 each
    hits: np.ndarray  # [U] of them with an item that the user then took
    reciprocal: np.ndarray  # [U] sum over exposures of 1 / rank of the best item taken, 0 without
    shown: np.ndarray  # [U] items shown, over all exposures
    taken: np.ndarray  # [U] of them taken

    def __len__(self) -> int:
        return len(self.exposures)


@dataclass(frozen=True)
class SampleRatio:
    """Whether users were divided as the split says."""

    p_value: float
    mismatch: bool


def figures(arm: Arm) -> np.ndarray:
    """[3] float64 by FIGURES: hits per exposure, reciprocal rank per exposure, and the mean of each user's taken per
    shown items. NaN for an arm without users."""
    return _ratios(_columns(arm).sum(0, keepdims=True))[0]


def resampled(arm: Arm, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[resamples, 3] the figures of as many users drawn with replacement."""
    columns = _columns(arm)
    users = len(columns)
    if not users:
        return np.full((resamples, len(FIGURES)), np.nan)
    out = []
    for start in range(0, resamples, step := max(1, _CELLS // users)):
        drawn = rng.integers(users, size=(min(step, resamples - start), users))
        out.append(_ratios(columns[drawn].sum(1)))
    return np.concatenate(out)


def compare(
    arms: Mapping[str, Arm], control: str, resamples: int = 2000, seed: int = SEED
) -> tuple[dict[str, dict[str, Estimate]], dict[str, dict[str, Estimate]]]:
    """Each arm's figures, and each other arm's differences to the control, with 95 % percentile intervals.

    Arms are drawn independently of one another, as their users are. Raises KeyError without such a control.
    """
    rng = np.random.default_rng(seed)
    drawn = {name: resampled(arm, resamples, rng) for name, arm in arms.items()}
    found = {name: figures(arm) for name, arm in arms.items()}
    own = {name: _estimates(found[name], drawn[name]) for name in arms}
    apart = {
        name: _estimates(found[name] - found[control], drawn[name] - drawn[control]) for name in arms if name != control
    }
    return own, apart


def sample_ratio(users: Mapping[str, int], shares: Mapping[str, float]) -> SampleRatio | None:
    """Pearson's chi-square of the users per arm against the shares; None with fewer than two arms.

    What the shares lack to 1 is an arm that nobody was seen in.
    """
    missing = 1 - sum(shares.values())
    if missing > 1e-6:
        shares = {**shares, "": missing}
    if len(shares) < 2 or not sum(users.values()):
        return None
    observed = [users.get(name, 0) for name in shares]
    expected = np.array(list(shares.values())) / sum(shares.values()) * sum(observed)
    p_value = float(stats.chisquare(observed, expected).pvalue)
    return SampleRatio(p_value, p_value < MISMATCH_BELOW)


def _columns(arm: Arm) -> np.ndarray:
    """[U, 5]: what the figures are ratios of, summed over users."""
    rate = arm.taken / np.maximum(arm.shown, 1)
    return np.stack([arm.hits, arm.reciprocal, arm.exposures, rate, np.ones(len(arm))], 1).astype(np.float64)


def _ratios(sums: np.ndarray) -> np.ndarray:
    """[n, 5] sums -> [n, 3] figures."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([sums[:, 0] / sums[:, 2], sums[:, 1] / sums[:, 2], sums[:, 3] / sums[:, 4]], 1)


def _estimates(values: np.ndarray, draws: np.ndarray) -> dict[str, Estimate]:
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return {name: Estimate(*map(float, (values[i], low[i], high[i]))) for i, name in enumerate(FIGURES)}
