"""Synthetic behaviour logs: Zipf items, log-normal history lengths, sessions, and an order that a model can learn.

    python benchmarks/synthetic.py --events 1000000 --users 50000 --items 20000 --shards 8 --format parquet --out DIR

writes DIR/events/part-*.{parquet,csv} and DIR/items.{parquet,csv}. Equal arguments give equal files.

How a history is drawn: items fall into latent clusters. After an item, the next event is (a) with probability
`FOLLOW` one of the item's few fixed successors, else (b) an item of the same cluster, of the next one, or of any,
drawn by popularity. So first-order transitions predict much, the last few events more, and popularity the rest.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import polars as pl

ZIPF, ZIPF_SHIFT = 1.0, 5.0  # popularity of rank r is (r + shift)^-ZIPF (Zipf-Mandelbrot: real logs have a flat head)
LENGTH_SIGMA = 1.1  # of the log of a history's length
CLUSTER_SIZE = 100  # items a cluster, on average
SUCCESSORS = np.array([0.55, 0.25, 0.12, 0.08])  # how an item's successors share what follows it
FOLLOW = 0.35  # share of steps that go to a successor
STAY, ADVANCE = 0.60, 0.25  # of the other steps: same cluster, next cluster; the rest go anywhere
DUPLICATES = 0.002  # share of rows that repeat another row exactly, as retried log writes do
ACTIONS = ["view", "cart", "purchase", "rate"]
ACTION_SHARES = np.array([0.80, 0.09, 0.06, 0.05])
FIRST_DAY_MS = 1_700_000_000_000  # 2023-11-14
DAY_MS = 86_400_000
HORIZON_DAYS = 365

_ADJECTIVES = ["amber", "brisk", "calm", "dusky", "early", "faint", "gentle", "hollow", "iron", "jade", "keen", "pale"]
_NOUNS = ["anchor", "bridge", "candle", "desk", "engine", "fern", "garden", "harbour", "island", "lantern", "needle"]


def cumulative(weights: np.ndarray) -> np.ndarray:
    """Running sum of `weights` from 0: [n] -> [n + 1]."""
    return np.concatenate([[0.0], np.cumsum(weights)])


def draw(edges: np.ndarray, low: np.ndarray | int, high: np.ndarray | int, rng: np.random.Generator, size: int
         ) -> np.ndarray:  # fmt: skip
    """`size` indices from [low, high), each in proportion to its weight. `edges` is `cumulative(weights)`."""
    start, stop = edges[low], edges[high]
    found = np.searchsorted(edges, start + rng.random(size) * (stop - start), side="right") - 1
    return np.clip(found, low, np.asarray(high) - 1).astype(np.int32)


def history_lengths(events: int, users: int, rng: np.random.Generator) -> np.ndarray:
    """[users] log-normal lengths, each at least 1, that sum to `events` exactly, longest first."""
    if not 1 <= users <= events:
        raise ValueError(f"users ({users}) must be between 1 and events ({events})")
    shape = rng.lognormal(0.0, LENGTH_SIGMA, users)
    edges = np.floor(cumulative(shape) / shape.sum() * (events - users)).astype(np.int64)
    edges[-1] = events - users
    return np.sort(1 + np.diff(edges))[::-1]


def draw_items(lengths: np.ndarray, items: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Items of every history, one after the other.

    Returns [events] int32 item numbers and [items] int32 clusters. Items are numbered cluster by cluster.
    """
    clusters = max(1, items // CLUSTER_SIZE)
    cluster = np.sort(rng.integers(0, clusters, items)).astype(np.int32)
    popularity = rng.permutation((np.arange(1, items + 1) + ZIPF_SHIFT) ** -ZIPF)
    edges = cumulative(popularity)
    first = np.searchsorted(cluster, np.arange(clusters + 1))

    def in_cluster(wanted: np.ndarray, anywhere: np.ndarray | bool = False) -> np.ndarray:
        low, high = first[wanted], first[wanted + 1]
        free = anywhere | (low == high)
        return draw(edges, np.where(free, 0, low), np.where(free, items, high), rng, len(wanted))

    kinds = len(SUCCESSORS)
    own = np.repeat(cluster, kinds)
    step = rng.random(items * kinds) < 0.3
    successors = in_cluster((own + step) % clusters).reshape(items, kinds)
    itself = successors == np.arange(items)[:, None]
    successors[itself] = (successors[itself] + 1) % items

    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    out = np.empty(int(lengths.sum()), np.int32)
    now = draw(edges, 0, items, rng, len(lengths))
    out[starts] = now
    # One step of all histories at a time; `lengths` falls, so those still going are always the first ones.
    active = np.searchsorted(-lengths, -np.arange(lengths[0]), side="left")
    for position in range(1, int(lengths[0])):
        n = int(active[position])
        now = now[:n]
        kind = np.minimum(np.searchsorted(np.cumsum(SUCCESSORS), rng.random(n), side="right"), kinds - 1)
        move = rng.random(n)
        wanted = (cluster[now] + ((move >= STAY) & (move < STAY + ADVANCE))) % clusters
        other = in_cluster(wanted, anywhere=move >= STAY + ADVANCE)
        now = np.where(rng.random(n) < FOLLOW, successors[now, kind], other)
        out[starts[:n] + position] = now
    return out, cluster


def draw_timestamps(lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[events] int64 milliseconds on whole seconds: sessions of quick events, days apart, mostly in the evening."""
    n = int(lengths.sum())
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    pause = rng.random(n) < 0.15
    gaps = np.where(pause, rng.lognormal(np.log(1.5 * 86_400), 1.0, n), rng.lognormal(np.log(35), 1.2, n))
    gaps[starts] = 0.0
    elapsed = np.cumsum(gaps)
    elapsed -= np.repeat(elapsed[starts], lengths)
    last = elapsed[starts + lengths - 1]
    squeeze = np.minimum(1.0, HORIZON_DAYS * 86_400 / np.maximum(last, 1.0))
    slack = HORIZON_DAYS - last * squeeze / 86_400
    day = np.floor(rng.random(len(lengths)) * np.maximum(slack, 0.0))
    hour = np.clip(rng.normal(19.0, 3.5, len(lengths)), 0.0, 23.99)
    begin = day * 86_400 + hour * 3_600
    seconds = np.repeat(begin, lengths) + elapsed * np.repeat(squeeze, lengths)
    return FIRST_DAY_MS + np.floor(seconds).astype(np.int64) * 1_000


def make_log(events: int, users: int, items: int, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The log in the order of time (`user_id, item_id, timestamp, action, rating`) and the catalogue.

    The catalogue holds every item (`item_id, title, categories, description`), also those that no event names.
    Raises ValueError if there are fewer events than users.
    """
    rng = np.random.default_rng(seed)
    copies = int(events * DUPLICATES) if events - int(events * DUPLICATES) >= users else 0
    lengths = history_lengths(events - copies, users, rng)
    item, cluster = draw_items(lengths, items, rng)
    user = np.repeat(rng.permutation(users).astype(np.int32), lengths)
    timestamp = draw_timestamps(lengths, rng)
    kinds = np.cumsum(ACTION_SHARES)[:-1]
    action = np.searchsorted(kinds, rng.random(len(item)), side="right").astype(np.uint8)
    quality = rng.normal(3.6, 0.6, items)
    rating = np.clip(np.round(quality[item] + rng.normal(0.0, 0.8, len(item))), 1, 5).astype(np.float32)
    rating[action != ACTIONS.index("rate")] = np.nan

    rows = np.concatenate([np.arange(len(item)), rng.integers(0, len(item), copies)])
    rows = rows[np.argsort(timestamp[rows], kind="stable")]  # a server logs everybody's events as they come
    log = pl.DataFrame(
        {
            "user_id": _names("u", users).gather(user[rows]),
            "item_id": _names("i", items).gather(item[rows]),
            "timestamp": timestamp[rows],
            "action": pl.Series(ACTIONS).gather(action[rows]),
            "rating": pl.Series(rating[rows]).fill_nan(None),
        }
    )
    return log, _catalogue(cluster, rng)


def _names(letter: str, n: int) -> pl.Series:
    width = len(str(max(n - 1, 1)))
    return pl.select(pl.lit(letter) + pl.int_range(n).cast(pl.String).str.zfill(width)).to_series()


def _catalogue(cluster: np.ndarray, rng: np.random.Generator) -> pl.DataFrame:
    """Titles and descriptions share the words of the item's cluster, so text tells clusters apart."""
    n = len(cluster)
    adjectives, nouns = np.array(_ADJECTIVES), np.array(_NOUNS)
    theme = pl.Series(adjectives[cluster % len(adjectives)] + np.array([" "]) + nouns[cluster % len(nouns)])
    accent = pl.Series(adjectives[rng.integers(0, len(adjectives), n)])
    frame = pl.DataFrame({"item_id": _names("i", n), "cluster": cluster, "theme": theme, "accent": accent})
    return frame.select(
        "item_id",
        title=pl.format("{} {} {}", pl.col("theme").str.to_titlecase(), "accent", pl.int_range(pl.len())),
        categories=pl.format("cluster {}|group {}", "cluster", pl.col("cluster") // 10),
        description=pl.format("A {} {} from the {} collection", "accent", "theme", "theme"),
    )


def write_log(
    out: Path, events: int, users: int, items: int, *, shards: int = 8, format: str = "parquet", seed: int = 0
) -> tuple[Path, Path]:
    """Write the log in `shards` files, cut by time, and the catalogue. Returns the events folder and the items file."""
    if format not in ("parquet", "csv"):
        raise ValueError(f"format must be parquet or csv, not {format}")
    log, catalogue = make_log(events, users, items, seed)
    folder = out / "events"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} already holds files; choose an empty --out")
    edges = np.linspace(0, len(log), shards + 1).astype(int)
    for shard in range(shards):
        _write(log[int(edges[shard]) : int(edges[shard + 1])], folder / f"part-{shard:05d}.{format}")
    items_file = out / f"items.{format}"
    _write(catalogue, items_file)
    return folder, items_file


def _write(frame: pl.DataFrame, path: Path) -> None:
    if path.suffix == ".csv":
        frame.write_csv(path)
    else:
        frame.write_parquet(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--format", choices=["parquet", "csv"], default="parquet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    begin = time.perf_counter()
    try:
        folder, items_file = write_log(args.out, args.events, args.users, args.items,
                                       shards=args.shards, format=args.format, seed=args.seed)  # fmt: skip
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{args.events:,} events in {folder}, {args.items:,} items in {items_file}: "
          f"{time.perf_counter() - begin:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
