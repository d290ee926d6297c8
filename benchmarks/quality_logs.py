"""The logs of benchmarks/quality.py: finding them, converting what no setting can read, and proving how they were cut.

The peers' figures (peers.json) belong to certain splits. The sha256 of the three parts tells whether `prepare` made the
same ones, row by row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

LOGS = Path(__file__).with_name("quality.yaml")
PARTS = ("train", "valid", "test")  # by number, as in the prepared events
# The columns of MovieLens-100K's u.item, each 1 or 0.
GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
          "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War",
          "Western")  # fmt: skip


class MissingLog(Exception):
    """The sentence about a log that is not there."""


@dataclass(frozen=True)
class Log:
    """One entry of quality.yaml."""

    name: str
    title: str
    folder: str  # below DATA
    data: dict[str, Any]  # the settings section, with {raw} and {made} in its paths

    def section(self, raw: Path, made: Path) -> dict[str, Any]:
        """The settings section `data` with real paths."""
        section: dict[str, Any] = json.loads(json.dumps(self.data))  # a copy without YAML's shared parts
        for source in (section["events"], section["items"]):
            source["paths"] = source["paths"].replace("{raw}", str(raw)).replace("{made}", str(made))
        return section


def load_logs(path: Path = LOGS) -> dict[str, Log]:
    """Every log of quality.yaml by name."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: Log(name, **entry) for name, entry in entries.items()}


def locate(log: Log, data: Path, made: Path) -> dict[str, Any]:
    """The settings section `data` of a log whose raw files lie below `data`; converted files go to `made`.

    Raises MissingLog if its files are not there.
    """
    raw = data / log.folder
    if not raw.is_dir():
        raise MissingLog(f"there is no folder {raw}")
    convert = {"ml-100k": movielens_100k, "ml-latest-small": rated_movies, "amazon-sports": sequences}.get(log.name)
    if convert is not None:
        made.mkdir(parents=True, exist_ok=True)
        raw = convert(raw, made)
    section = log.section(raw, made)
    for source in (section["events"], section["items"]):
        path = Path(source["paths"])
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            raise MissingLog(f"there is nothing at {path}")
    return section


def source_files(section: Mapping[str, Any]) -> str:
    """A hash that changes with the names and sizes of a log's files."""
    paths = sorted({section["events"]["paths"], section["items"]["paths"]})
    files = [file for path in map(Path, paths) for file in ([path] if path.is_file() else sorted(path.iterdir()))]
    said = [f"{file.name} {file.stat().st_size}" for file in files]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:10]


# ---------------------------------------------------------------- converters
def _need(*paths: Path) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise MissingLog(f"there is no {missing[0]}")


def movielens_100k(raw: Path, made: Path) -> Path:
    """The folder with ml-100k.inter and ml-100k.item: `raw`, or `made` once GroupLens' own u.data and u.item are there
    in that form.
    """
    if (raw / "ml-100k.inter").is_file() or not (raw / "u.data").is_file():
        _need(raw / "ml-100k.inter", raw / "ml-100k.item")
        return raw
    _need(raw / "u.item")
    events = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + (raw / "u.data").read_text("utf-8")
    (made / "ml-100k.inter").write_text(events, encoding="utf-8")
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for line in (raw / "u.item").read_text("latin-1").splitlines():
        item, title, released, _, _, *flags = line.split("|")
        genres = [genre for genre, flag in zip(GENRES, flags, strict=True) if flag == "1"]
        year = released[-4:]
        lines.append("\t".join([item, title.removesuffix(f" ({year})"), year, " ".join(genres)]))
    (made / "ml-100k.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


def rated_movies(raw: Path, made: Path) -> Path:
    """Write movies.csv without the movies that nobody rated."""
    _need(raw / "ratings.csv", raw / "movies.csv")
    rated = pl.read_csv(raw / "ratings.csv", columns=["movieId"], infer_schema=False).unique()
    movies = pl.read_csv(raw / "movies.csv", infer_schema=False)
    movies.join(rated, on="movieId", how="semi", maintain_order="left").write_csv(made / "movies.csv")
    return raw


def sequences(raw: Path, made: Path) -> Path:
    """Lines `user item item ...` to `user, item, position`, and lines `item word word ...` to `item, words`."""
    users, texts = raw / "user_sequence.txt", raw / "item_generative_indexing_phase_0.txt"
    _need(users, texts)
    with users.open(encoding="utf-8") as lines, (made / "events.tsv").open("w", encoding="utf-8") as file:
        file.write("user\titem\tposition\n")
        for line in lines:
            if line.strip():
                user, *items = line.split()
                file.writelines(f"{user}\t{item}\t{position}\n" for position, item in enumerate(items))
    with texts.open(encoding="utf-8") as lines, (made / "items.tsv").open("w", encoding="utf-8") as file:
        file.write("item\twords\n")
        for line in lines:
            if line.strip():
                item, *words = line.split()
                file.write(f"{item}\t{' '.join(words)}\n")
    return raw


# ---------------------------------------------------------------- the split
def read_events(prepared: Path) -> pl.DataFrame:
    """The prepared events as `user, item, timestamp, pos, part`, each user's in order."""
    events = pl.read_parquet(prepared / "events" / "*.parquet")
    named = events.select(
        user="user_id", item="item_id", timestamp="timestamp", pos=pl.col("position").cast(pl.Int64), part="part"
    )
    return named.sort("user", "pos")


def split_hashes(events: pl.DataFrame) -> dict[str, str]:
    """The sha256 of each part: its rows `user <tab> item <tab> pos`, in the order of user and pos."""
    found = {}
    for number, part in enumerate(PARTS):
        rows = events.filter(pl.col("part") == number).select(pl.format("{}\t{}\t{}", "user", "item", "pos"))
        found[part] = hashlib.sha256("\n".join(rows.to_series().to_list()).encode()).hexdigest()
    return found
