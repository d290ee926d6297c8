"""What in a log is allowed but hardly meant: one sentence each, printed by `prepare` and kept in report.json."""

from __future__ import annotations

import polars as pl

from springtide.data.sources import SourceFile

DESCRIBED = 0.5  # below this share of the logged items, their ids are probably written in another way
NEARLY_ALL = 0.95  # of the times of a file
DAYS = (30_000, 60_000)  # 1982 to 2064 as Excel counts
KINDS = {
    "dates": "dates written as numbers (yyyymmdd)",
    "days": "days as Excel counts them",
}


def look_at_times(events: pl.DataFrame) -> pl.DataFrame:
    """How many times of each file look like something else than seconds: (file, events, dates, days, counts).

    events: with `file` and `timestamp` in ms. counts: times that may be those of a counter, but no days.
    """
    seconds = pl.col("timestamp") / 1000
    whole = pl.when(seconds.is_between(19_000_101, 21_991_231) & (pl.col("timestamp") % 1000 == 0)).then(
        (pl.col("timestamp") // 1000).cast(pl.String)
    )
    return events.group_by("file").agg(
        events=pl.len().cast(pl.Int64),
        dates=whole.str.to_date("%Y%m%d", strict=False).count().cast(pl.Int64),
        days=seconds.is_between(*DAYS).sum().cast(pl.Int64),
        counts=((seconds > 0) & (seconds < DAYS[0])).sum().cast(pl.Int64),
    )


def doubt_times(looks: list[pl.DataFrame], files: list[SourceFile]) -> list[str]:
    """A sentence for each source and kind of times that would be somewhere in 1970. looks: of look_at_times."""
    sources = pl.DataFrame(
        {"file": [file.index for file in files], "source": [file.source for file in files]},
        {"file": pl.Int32, "source": pl.Int32},
    )
    found = pl.concat(looks).group_by("file").sum().join(sources, on="file").sort("file")
    # A counter from 1 passes through the range of days in some file, but begins below it in another.
    found = found.with_columns(days=pl.when(pl.col("counts").sum().over("source") == 0).then("days").otherwise(0))
    sentences = []
    for kind, name in KINDS.items():
        odd = found.filter(pl.col(kind) >= NEARLY_ALL * pl.col("events"))
        for (_,), some in odd.group_by("source", maintain_order=True):
            more = f" and {len(some) - 1} more files of its source" if len(some) > 1 else ""
            sentences.append(
                f"the times of {files[some['file'][0]].path}{more} look like {name}, but are read as seconds, which is "
                "early in 1970; write them as ISO dates, such as 2021-03-05"
            )
    return sentences


def doubt_items(logged: pl.Series, described: pl.Series) -> list[str]:
    """A sentence if the catalogue describes hardly any of the logged items. Both: ids."""
    unknown = logged.filter(~logged.is_in(described.implode())).sort()
    known = len(logged) - len(unknown)
    if known >= DESCRIBED * len(logged):
        return []
    others = described.filter(~described.is_in(logged.implode())).sort()
    example = f"{unknown[0]!r} of the log is not" + (f", while {others[0]!r} is" if len(others) else "")
    return [
        f"only {known} of {len(logged)} logged items are described in data.items ({example}); "
        "check that the ids of both are written in the same way"
    ]
