"""The A/B report: exposures joined with the events that followed them, per arm of a split, as figures and a table."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from springtide.errors import SpringtideError
from springtide.evaluation.ab import FIGURES, Arm, SampleRatio, compare, sample_ratio
from springtide.evaluation.metrics import Estimate
from springtide.serving.exposures import SALT, hidden, pseudonym, read, salt_of
from springtide.serving.store import file_of, open_store

Json = dict[str, Any]
_CHUNK = 10_000  # events read from a store at once
_SHOWN: dict[str, Any] = {
    "user": pl.String,
    "time": pl.Int64,
    "arm": pl.String,
    "model": pl.String,
    "by": pl.String,
    "share": pl.Float64,
    "test": pl.String,
    "degraded": pl.Boolean,
    "items": pl.List(pl.String),
}
_TAKEN: dict[str, Any] = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "action": pl.String}


@dataclass(frozen=True)
class Question:
    """What to compare. Times are milliseconds since 1970."""

    window_ms: int  # how long after an exposure an event still counts for it
    control: str | None = None  # None: the arm with the most users
    actions: tuple[str, ...] = ()  # that count as taking an item; none: all
    since: int | None = None  # exposures from then on
    until: int | None = None  # and before then
    resamples: int = 2000


def report(exposures: Path, events: str, question: Question, now: int | None = None) -> Json:
    """Join a folder of exposures with an event log (see `read_events`) and compare the arms.

    Every user counts in the arm that was drawn for them, also where another model stood in for a missing one or parts
    were down. Where nothing was drawn, the models are told side by side, and their users were not divided at random.
    Raises SpringtideError for logs that cannot be read, exposures of several tests, and a control that none names.
    """
    shown, left_out = usable(read_exposures(exposures, question), exposures)
    taken = read_events(events, exposures, question.actions)
    per_user = users_of(shown, taken, question.window_ms)
    arms = {str(name): _arm(part) for (name,), part in sorted(per_user.group_by(["arm"]))}
    control = question.control or max(arms, key=lambda name: len(arms[name]))
    if control not in arms:
        raise SpringtideError(f"no exposure is of the control {control!r}; there are {', '.join(arms)}")
    own, apart = compare(arms, control, question.resamples)
    drawn = shown["by"][0] == "split"
    ratio = sample_ratio({name: len(arm) for name, arm in arms.items()}, _shares(shown)) if drawn else None
    finished = (int(time.time() * 1000) if now is None else now) - question.window_ms
    return {
        "control": control,
        "window_hours": question.window_ms / 3_600_000,
        "drawn_at_random": drawn,
        "exposures": {**left_out, "window_not_over": shown.filter(pl.col("time") > finished).height},
        "sample_ratio": None if ratio is None else asdict(ratio),
        "arms": {name: {**_told(shown.filter(pl.col("arm") == name), arms[name]), **own[name]} for name in arms},
        "differences": apart,
        "actions_without_an_event": [action for action in question.actions if action not in taken["action"]],
    }


def read_exposures(folder: Path, question: Question) -> pl.DataFrame:
    """The exposures of the time asked for, with the columns of the log but `propensities`.

    Every user by one name, whichever way the lines were written: by the pseudonym, where the folder has a salt. Raises
    SpringtideError if there are pseudonyms and no salt, which nobody can join with events.
    """
    salt = salt_of(folder)

    def named(row: Json) -> Json:
        user = row["user"]
        if hidden(row):
            if salt is None:
                raise SpringtideError(
                    f"users in {folder} are hidden behind a salt that is not there; put the file {SALT} back"
                )
        elif user is not None and salt is not None:
            user = pseudonym(salt, user)
        return {**{name: row.get(name) for name in _SHOWN}, "user": user}

    rows = (
        named(row)
        for row in read(folder)
        if (question.since is None or row["time"] >= question.since)
        and (question.until is None or row["time"] < question.until)
    )
    return pl.DataFrame(rows, _SHOWN)


def usable(shown: pl.DataFrame, where: Path) -> tuple[pl.DataFrame, Json]:
    """Exposures that can be compared, numbered by `exposure`, and how many were left out for which reason.

    Left out are those without a user, whose outcome nobody can know, those whose caller chose the model, and users that
    were in several arms. Where a split was on, what was shown without one is left out too.
    """
    named = shown.filter(pl.col("user").is_not_null())
    by = "split" if (named["by"] == "split").any() else "default"
    _check_one_test(named.filter(pl.col("by") == "split"), where)
    one_way = named.filter(pl.col("by") == by).with_columns(
        arm=pl.col("arm").fill_null(pl.col("model").str.split("@").list.first())
    )
    kept = one_way.filter(pl.col("arm").n_unique().over("user") == 1)
    if not len(kept):
        raise SpringtideError(f"no exposure in {where} can be compared: none of this time has a user and an arm")
    counts = {
        "used": kept.height,
        "without_user": shown.height - named.height,
        "model_asked_for": named.filter(pl.col("by") == "request").height,
        "without_split": named.filter(pl.col("by") == "default").height if by == "split" else 0,
        "of_users_in_several_arms": one_way.height - kept.height,
    }
    return kept.with_row_index("exposure"), counts


def _check_one_test(drawn: pl.DataFrame, where: Path) -> None:
    """Raises SpringtideError if split or salt changed meanwhile: whoever was moved then carries one arm into another.

    All lines of versions that did not name their test count as one.
    """
    last = drawn.group_by("test").agg(pl.col("time").max()).sort("time")["time"]
    if len(last) > 1:
        began = datetime.fromtimestamp(last[-2] // 1000 + 1, UTC).isoformat()
        raise SpringtideError(
            f"the exposures in {where} are of {len(last)} tests, as the split or its salt changed meanwhile; choose "
            f"one period with --since and --until (--since {began} is that of the last one)"
        )


def read_events(source: str, exposures: Path, actions: tuple[str, ...]) -> pl.DataFrame:
    """What users took, as user, item_id, timestamp and, of chosen actions, action; users named as in the exposures.

    source: an event log's file or address, or a Parquet file or folder with its columns. Raises SpringtideError if it
    cannot be read.
    """
    path = Path(source)
    if path.suffix == ".parquet" or path.is_dir():
        try:
            found = pl.read_parquet(path / "**/*.parquet" if path.is_dir() else path)
            events = found.select(pl.col(name).cast(dtype) for name, dtype in _TAKEN.items() if name in found.columns)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise SpringtideError(f"cannot read the events in {source}: {' '.join(str(error).split())[:200]}") from None
        if missing := [name for name in ("user_id", "item_id", "timestamp") if name not in events.columns]:
            raise SpringtideError(f"the events in {source} have no column {missing[0]}; export them again")
    else:
        events = pl.DataFrame(_stored(source), _TAKEN)
    if actions:
        if "action" not in events.columns:
            raise SpringtideError(f"the events in {source} have no column action, so none can be chosen by it")
        events = events.filter(pl.col("action").is_in(list(actions)))
    salt = salt_of(exposures)
    if salt is not None:
        users = events["user_id"].unique()
        hidden = pl.Series([pseudonym(salt, user) for user in users], dtype=pl.String)
        events = events.with_columns(pl.col("user_id").replace_strict(users, hidden, return_dtype=pl.String))
    return events.select("item_id", "timestamp", *(["action"] if actions else []), user="user_id")


def _stored(source: str) -> Iterable[Json]:
    """The live events of an event log."""
    try:
        path = file_of(source)
    except ValueError as error:
        raise SpringtideError(f"the events {source!r} cannot be read: {error}") from None
    if path is not None and not path.is_file():
        raise SpringtideError(f"there is no event log at {path}; name it, or exported Parquet, with --events")
    store = open_store(source, require_aof=False)
    try:
        cursor = 0
        while True:
            events, cursor = store.since(cursor, _CHUNK)
            if not events:
                return
            yield from ({name: event[name] for name in _TAKEN} for event in events)
    finally:
        store.close()


def users_of(shown: pl.DataFrame, taken: pl.DataFrame, window_ms: int) -> pl.DataFrame:
    """Per arm and user: exposures, hits, reciprocal, shown and taken, as evaluation.ab.Arm has them.

    shown: exposure, user, arm, time, items; taken: user, item_id, timestamp. An item counts as taken from an exposure
    if an event of it came later than the exposure and no more than window_ms after it. An event may count for several
    exposures that showed its item.
    """
    places = shown.select(
        "exposure", "user", "time", pl.col("items").alias("item_id"), pl.int_ranges(1, pl.col("items").list.len() + 1)
        .alias("rank"),
    ).explode("item_id", "rank")  # fmt: skip
    later = pl.col("timestamp") - pl.col("time")
    outcome = (
        places.join(taken, on=["user", "item_id"])
        .filter((later > 0) & (later <= window_ms))
        .group_by("exposure")
        .agg(best=pl.col("rank").min(), taken=pl.col("item_id").n_unique())
    )
    return (
        shown.join(outcome, on="exposure", how="left")
        .group_by("arm", "user")
        .agg(
            exposures=pl.len(),
            hits=pl.col("best").count(),
            reciprocal=(1 / pl.col("best")).sum(),
            shown=pl.col("items").list.len().sum(),
            taken=pl.col("taken").sum(),
        )
        .sort("arm", "user")
    )


def _arm(users: pl.DataFrame) -> Arm:
    names = ("exposures", "hits", "reciprocal", "shown", "taken")
    return Arm(*(users[name].cast(pl.Float64).to_numpy() for name in names))


def _shares(shown: pl.DataFrame) -> dict[str, float]:
    """The split by arm. Raises SpringtideError if it changed while these exposures were made."""
    pairs = shown.select("arm", "share").unique().sort("arm", "share")
    if pairs.height > pairs["arm"].n_unique():
        raise SpringtideError(
            "the weights of the split changed during these exposures, so its arms cannot be compared as one test; "
            "choose one period with --since and --until"
        )
    return {str(arm): float(share) for arm, share in pairs.iter_rows()}


def _told(shown: pl.DataFrame, arm: Arm) -> Json:
    name = pl.col("model").str.split("@").list.first()
    return {
        "users": len(arm),
        "exposures": int(arm.exposures.sum()),
        "models": sorted(shown["model"].unique()),
        "answered_by_another": shown.filter(name != pl.col("arm")).height,
        "degraded": shown.filter(pl.col("degraded")).height,
    }


# ---------------------------------------------------------------- for reading
def table(found: Json) -> str:
    """The report in lines of text."""
    lines = [f"{'arm':<20} {'users':>8} {'exposures':>10}" + "".join(f" {name:>28}" for name in FIGURES)]
    for name, arm in found["arms"].items():
        mark = " (control)" if name == found["control"] else ""
        lines.append(f"{name + mark:<20} {arm['users']:>8} {arm['exposures']:>10}" + _cells(arm))
    for name, apart in found["differences"].items():
        lines.append(f"{name + ' - ' + found['control']:<20} {'':>8} {'':>10}" + _cells(apart))
    notes = [f"{count} exposures {reason.replace('_', ' ')}" for reason, count in found["exposures"].items() if count]
    lines += ["", "; ".join(notes), f"an item counts as taken within {found['window_hours']:g} h; intervals are 95 %"]
    for action in found["actions_without_an_event"]:
        lines.append(f"no event has the action {action}")
    if not found["drawn_at_random"]:
        lines.append(
            "no split was on: users were not divided at random, so differences may be theirs and not the models'"
        )
    ratio = found["sample_ratio"]
    if ratio is not None:
        verdict = "MISMATCH, do not trust the differences" if ratio["mismatch"] else "as the split says"
        lines.append(f"users per arm: {verdict} (chi-square p = {ratio['p_value']:.3g})")
    return "\n".join(lines)


def _cells(figures: Json) -> str:
    return "".join(f" {e.value:>9.4f} [{e.low:.4f}, {e.high:.4f}]".rjust(29) for e in map(figures.get, FIGURES) if e)


def plain(found: Json) -> Json:
    """The report as JSON can carry it; a figure that nothing was counted for is null."""

    def of(value: Any) -> Any:
        if isinstance(value, (Estimate, SampleRatio)):
            return of(asdict(value))
        if isinstance(value, dict):
            return {key: of(below) for key, below in value.items()}
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return {key: of(value) for key, value in found.items()}
