"""A made-up news log: what is read today was not there last week, so most of what a test asks for was never trained on.

    python benchmarks/news.py DIR [--seed 0]

writes DIR/clicks.csv, DIR/articles.csv and DIR/news.yaml, with a split in time. Equal arguments give equal files. Then

    for job in prepare embed train evaluate; do python jobs/$job.py --config DIR/news.yaml --set train.workers=1; done

How it is drawn: articles of twelve sections appear at any time of forty days, some more attractive than others, and
fade by half in twelve hours. A headline is four words of its section and one of any. A reader likes two sections,
half of the readers come in the course of the log, and a visit goes on for three articles or so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl
import yaml

SECTIONS = (
    "striker goal league coach derby penalty transfer keeper stadium cup",
    "serve court grand slam racket final seed set match umpire",
    "minister parliament vote coalition bill election senate party debate law",
    "shares bank rates inflation bonds stocks investors profit quarter index",
    "chip phone software startup robot data cloud app battery computer",
    "rocket orbit moon satellite launch probe telescope mars crew station",
    "hospital vaccine virus doctors drug trial heart patients cancer diet",
    "storm heat flood emissions carbon drought glacier wind rain fire",
    "actor director premiere movie oscar studio sequel drama comedy screen",
    "album singer tour concert band chart guitar opera festival song",
    "police suspect murder robbery prison judge fraud arrest witness jury",
    "beach airline hotel island train border museum holiday tourists visa",
)
READERS, ARTICLES, DAYS = 2500, 4000, 40
DAY_S = 86_400
FIRST_S = 1_700_000_000  # 14 November 2023
HALF_LIFE_S = DAY_S / 2  # of an article's attraction
OLDEST_S = 4 * DAY_S  # older articles are not shown any more
LIKED, OTHERS = (8.0, 4.0), 0.3  # how much a reader likes two sections, and each of the others
VISITS = 12  # of a reader of the first day; of the others as many as they have time for
GO_ON = 0.65  # chance of one article more
LEAST_SHOWN = 20  # articles there must be for a visit


def make_articles(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Section [A], seconds of appearance ascending [A], attraction [A] and headline of each article."""
    words = [line.split() for line in SECTIONS]
    section = rng.integers(0, len(words), ARTICLES)
    appears = np.sort(rng.uniform(0, DAYS * DAY_S, ARTICLES))
    attraction = np.exp(rng.normal(0, 1, ARTICLES))
    headlines = []
    for own in section.tolist():
        other = words[rng.integers(len(words))]
        said = [*rng.choice(words[own], 4, replace=False), other[rng.integers(len(other))]]
        headlines.append(" ".join(said).capitalize())
    return section, appears, attraction, headlines


def read(
    rng: np.random.Generator, section: np.ndarray, appears: np.ndarray, attraction: np.ndarray
) -> list[tuple[int, int]]:
    """(second, article) of everything that one reader reads."""
    begins = rng.uniform(0, DAYS * DAY_S) if rng.random() < 0.5 else 0.0
    likes = np.full(len(SECTIONS), OTHERS)
    likes[rng.choice(len(SECTIONS), 2, replace=False)] = LIKED
    span = DAYS * DAY_S - begins
    visits = np.sort(begins + span * rng.random(rng.poisson(VISITS * span / (DAYS * DAY_S))))
    clicks: dict[int, int] = {}
    for visit in visits.tolist():
        now = visit
        for _ in range(rng.geometric(1 - GO_ON)):
            shown = np.arange(*np.searchsorted(appears, [now - OLDEST_S, now]))
            if len(shown) < LEAST_SHOWN:
                break
            pull = attraction[shown] * 0.5 ** ((now - appears[shown]) / HALF_LIFE_S) * likes[section[shown]]
            article = int(rng.choice(shown, p=pull / pull.sum()))
            clicks.setdefault(article, int(now))
            now += rng.uniform(20, 300)
    return [(second, article) for article, second in clicks.items()]


def write(folder: Path, seed: int) -> int:
    """Write the log, the articles and an experiment below `folder`. Returns the number of clicks."""
    rng = np.random.default_rng(seed)
    section, appears, attraction, headlines = make_articles(rng)
    clicks = [(second, reader, article) for reader in range(READERS)
              for second, article in read(rng, section, appears, attraction)]  # fmt: skip
    second, reader, article = np.array(sorted(clicks)).T
    folder.mkdir(parents=True, exist_ok=True)
    log = pl.DataFrame({"user_id": reader, "item_id": article, "timestamp": FIRST_S + second})
    log.with_columns(
        pl.format("r{}", "user_id").alias("user_id"), pl.format("a{}", "item_id").alias("item_id")
    ).write_csv(folder / "clicks.csv")
    ids = [f"a{n}" for n in range(ARTICLES)]
    pl.DataFrame({"item_id": ids, "headline": headlines}).write_csv(folder / "articles.csv")
    experiment = {
        "name": "news",
        "workspace": str(folder.absolute() / "workspace"),
        "data": {
            "events": {"paths": str(folder.absolute() / "clicks.csv")},
            "items": {
                "paths": str(folder.absolute() / "articles.csv"),
                "columns": {"title": "headline"},
                "text": "{headline}",
            },
            "split": "temporal",
        },
    }
    (folder / "news.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")
    return len(clicks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks/news.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{write(args.folder, args.seed):,} clicks in {args.folder}")
