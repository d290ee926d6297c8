"""The generator of synthetic logs: exact counts, equal runs, and the shapes that the benchmarks count on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import synthetic

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "synthetic.py"
EVENTS, USERS, ITEMS = 100_000, 5_000, 2_000


@pytest.fixture(scope="module")
def log() -> pl.DataFrame:
    return synthetic.make_log(EVENTS, USERS, ITEMS, seed=3)[0]


def test_counts_are_exact(log: pl.DataFrame) -> None:
    items = synthetic.make_log(EVENTS, USERS, ITEMS, seed=3)[1]
    assert len(log) == EVENTS
    assert log["user_id"].n_unique() == USERS
    assert len(items) == items["item_id"].n_unique() == ITEMS
    assert log["item_id"].is_in(items["item_id"].implode()).all()
    assert log["timestamp"].is_sorted()
    assert log.null_count().row(0)[:4] == (0, 0, 0, 0)
    assert not items.select(pl.all().str.len_chars().min()).row(0).count(0)


def test_seed_decides_everything(log: pl.DataFrame) -> None:
    again, other = (synthetic.make_log(EVENTS, USERS, ITEMS, seed=seed)[0] for seed in (3, 4))
    assert again.equals(log)
    assert not other.equals(log)


def test_history_lengths_are_log_normal(log: pl.DataFrame) -> None:
    lengths = log.group_by("user_id").len()["len"].to_numpy()
    logs = np.log(lengths[lengths >= 3])
    assert lengths.mean() == pytest.approx(EVENTS / USERS)
    assert 0.4 < np.median(lengths) / lengths.mean() < 0.7  # skewed: exp(-sigma^2 / 2) = 0.55
    assert 0.7 < logs.std() < 1.2
    assert lengths.max() > 10 * np.median(lengths)


def test_item_popularity_is_zipf(log: pl.DataFrame) -> None:
    counts = np.sort(log.group_by("item_id").len()["len"].to_numpy())[::-1]
    ranks = np.arange(1, len(counts) + 1)
    middle = slice(20, 500)
    slope = np.polyfit(np.log(ranks[middle]), np.log(counts[middle]), 1)[0]
    assert -1.3 < slope < -0.6
    assert 0.3 < counts[: ITEMS // 20].sum() / EVENTS < 0.8  # the head of 5 %


def test_timestamps_come_in_sessions_with_ties(log: pl.DataFrame) -> None:
    gaps = log.sort("user_id", "timestamp").select(gap=pl.col("timestamp").diff().over("user_id")).drop_nulls()["gap"]
    assert (gaps % 1000 == 0).all()
    assert 0.001 < (gaps == 0).mean() < 0.05
    assert 0.7 < (gaps < 600_000).mean() < 0.95
    assert log["timestamp"].max() - log["timestamp"].min() < 366 * 86_400_000  # type: ignore[operator]


def test_actions_ratings_and_duplicates(log: pl.DataFrame) -> None:
    shares = dict(log["action"].value_counts(normalize=True).iter_rows())
    assert shares["view"] == pytest.approx(0.8, abs=0.02) and set(shares) == {"view", "cart", "purchase", "rate"}
    assert (log["rating"].is_not_null() == (log["action"] == "rate")).all()
    assert set(log["rating"].drop_nulls().unique()) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    assert 100 < len(log) - len(log.unique()) < 400  # 0.2 % of rows repeat another


def test_the_last_item_predicts_the_next(log: pl.DataFrame) -> None:
    """Guessing an item's most frequent successor must beat guessing the most popular item by far."""
    pairs = log.unique(maintain_order=True).sort("user_id", "timestamp", maintain_order=True).select(
        before=pl.col("item_id").shift().over("user_id"), item="item_id"
    ).drop_nulls()  # fmt: skip
    half = len(pairs) // 2
    fit, test = pairs[:half], pairs[half:]
    best = fit.group_by("before", "item").len().sort("len").group_by("before").agg(pl.col("item").last().alias("guess"))
    guesses = test.join(best, on="before", how="left")
    by_last = (guesses["guess"] == guesses["item"]).fill_null(False).mean()
    popular = fit["item"].value_counts(sort=True)["item"][0]
    by_popularity = (test["item"] == popular).mean()
    assert by_last > 0.15
    assert by_last > 3 * by_popularity


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_command_line_writes_shards(tmp_path: Path, kind: str) -> None:
    arguments = ["--events", "3000", "--users", "200", "--items", "150", "--shards", "3", "--format", kind]
    for folder in ("one", "two"):
        done = subprocess.run([sys.executable, str(SCRIPT), *arguments, "--out", str(tmp_path / folder)],
                              check=False, capture_output=True, text=True, timeout=60)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "3,000 events" in done.stdout
    one, two = (sorted(p for p in (tmp_path / f).rglob("*") if p.is_file()) for f in ("one", "two"))
    assert [p.name for p in one] == [*(f"part-0000{i}.{kind}" for i in range(3)), f"items.{kind}"]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    read = pl.read_csv if kind == "csv" else pl.read_parquet
    assert sum(len(read(p)) for p in one if p.name.startswith("part")) == 3000


def test_more_users_than_events_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--events", "10", "--users", "20", "--out", str(tmp_path)],
                          check=False, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 1
    assert "users (20)" in done.stderr and "Traceback" not in done.stderr
