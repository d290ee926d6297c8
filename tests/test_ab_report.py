"""springtide ab-report over written logs: the join and its window, what is left out, both event sources, sentences."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from springtide.cli import main
from springtide.errors import SpringtideError
from springtide.serving.ab_report import Question, report, table
from springtide.serving.exposures import ExposureLog, exposure
from springtide.serving.options import ExposureOptions, TrafficOptions
from springtide.serving.store import open_store
from springtide.serving.traffic import Choice, choose

HOUR = 3_600_000
DAY = Question(window_ms=24 * HOUR, resamples=200)
NOW = 10**12


def show(folder: Path, rows: list[tuple[Any, ...]], pseudonymise: bool = True) -> Path:
    """Write exposures given as (user, choice, items, time, model)."""
    log = ExposureLog(folder, ExposureOptions(pseudonymise=pseudonymise))
    for number, (user, choice, items, time, model) in enumerate(rows):
        answer = {"items": [{"item_id": item} for item in items], "model": model, "source": "history"}
        log.record(exposure(f"r{number}", user, choice, answer, time))
    log.close()
    return folder


def take(path: Path, events: list[tuple[str, str, int]], action: str = "buy") -> str:
    """Write an event log of (user, item, time)."""
    store = open_store(str(path))
    store.append(
        [
            {"event_id": f"{action}{n}", "user_id": user, "item_id": item, "timestamp": time, "action": action}
            for n, (user, item, time) in enumerate(events)
        ]
    )
    store.close()
    return str(path)


def test_users_are_one_whether_they_were_hidden_or_not(tmp_path: Path) -> None:
    """The setting was turned off, or on, while the log went on."""
    for number, pseudonymise in enumerate((True, False, True)):
        show(tmp_path / "shown", [(u, A if u != "cat" else B, ["x"], NOW + number, "m@1") for u in ("ann", "cat")],
             pseudonymise)  # fmt: skip
    found = report(tmp_path / "shown", take(tmp_path / "log", [("ann", "x", NOW + HOUR)]), DAY, now=NOW + 48 * HOUR)
    a, b = found["arms"]["a"], found["arms"]["b"]
    assert (a["users"], a["exposures"], b["users"], b["exposures"]) == (1, 3, 1, 3)
    assert a["hit_rate"].value == 1 and b["hit_rate"].value == 0
    (tmp_path / "shown" / "salt").unlink()
    with pytest.raises(SpringtideError, match="hidden behind a salt that is not there"):
        report(tmp_path / "shown", str(tmp_path / "log"), DAY)


A, B = Choice("a", "split", 0.5), Choice("b", "split", 0.5)


@pytest.mark.parametrize("pseudonymise", [True, False])
def test_the_join_by_hand(tmp_path: Path, pseudonymise: bool) -> None:
    shown = show(
        tmp_path / "exposures",
        [
            ("ann", A, ["x", "y", "z"], NOW, "a@1"),  # takes z, then y: a hit, best rank 2, two of three
            ("ann", A, ["x", "w", "v"], NOW + HOUR, "a@1"),  # nothing of these
            ("bob", A, ["x", "y", "z"], NOW, "a@1"),  # took x before and z after the window
            ("cat", B, ["x", "y"], NOW, "b@1"),  # takes x
        ],
        pseudonymise,
    )
    events = take(
        tmp_path / "events.sqlite3",
        [
            ("ann", "z", NOW + 1),
            ("ann", "y", NOW + 2 * HOUR),
            ("ann", "y", NOW + 3 * HOUR),
            ("bob", "x", NOW),
            ("bob", "z", NOW + 24 * HOUR + 1),
            ("cat", "x", NOW + 24 * HOUR),
            ("dan", "x", NOW + 1),
        ],
    )
    found = report(shown, events, DAY, now=NOW + 48 * HOUR)
    a, b = found["arms"]["a"], found["arms"]["b"]
    assert (found["control"], a["users"], a["exposures"], b["users"], b["exposures"]) == ("a", 2, 3, 1, 1)
    assert a["hit_rate"].value == pytest.approx(1 / 3)
    assert a["reciprocal_rank"].value == pytest.approx(0.5 / 3)
    assert a["ctr_per_user"].value == pytest.approx((2 / 6 + 0) / 2)
    assert (b["hit_rate"].value, b["reciprocal_rank"].value, b["ctr_per_user"].value) == (1, 1, 0.5)
    assert found["differences"]["b"]["hit_rate"].value == pytest.approx(2 / 3)
    assert found["sample_ratio"]["mismatch"] is False


def test_what_cannot_be_compared_is_left_out_and_counted(tmp_path: Path) -> None:
    shown = show(
        tmp_path / "exposures",
        [
            (None, A, ["x"], NOW, "a@1"),
            ("ann", Choice("b", "request"), ["x"], NOW, "b@1"),
            ("bob", Choice(None, "default"), ["x"], NOW, "a@1"),
            ("cat", A, ["x"], NOW, "a@1"),
            ("cat", B, ["x"], NOW, "b@1"),
            ("dan", B, ["x"], NOW + 30 * HOUR, "a@2"),  # a stood in for b
            ("eve", A, ["x"], NOW, "a@1"),
        ],
    )
    found = report(shown, take(tmp_path / "e.sqlite3", [("eve", "x", NOW + 1)]), DAY, now=NOW + 31 * HOUR)
    assert found["exposures"] == {
        "used": 2, "without_user": 1, "model_asked_for": 1, "without_split": 1, "of_users_in_several_arms": 2,
        "window_not_over": 1,
    }  # fmt: skip
    assert found["arms"]["b"]["answered_by_another"] == 1
    assert found["arms"]["b"]["models"] == ["a@2"]


def test_without_a_split_models_stand_side_by_side(tmp_path: Path) -> None:
    plain = Choice(None, "default")
    shown = show(tmp_path / "exposures", [("ann", plain, ["x"], NOW, "a@1"), ("bob", plain, ["x"], NOW, "a@1")])
    found = report(shown, take(tmp_path / "e.sqlite3", [("ann", "x", NOW + 1)]), DAY)
    assert (found["drawn_at_random"], found["sample_ratio"], list(found["arms"])) == (False, None, ["a"])
    assert found["arms"]["a"]["hit_rate"].value == 0.5


def test_actions_and_times_choose(tmp_path: Path) -> None:
    shown = show(tmp_path / "exposures", [("ann", A, ["x"], NOW, "a@1"), ("bob", B, ["x"], NOW + 2 * HOUR, "b@1")])
    events = take(tmp_path / "e.sqlite3", [("ann", "x", NOW + 1)], "buy")
    take(tmp_path / "e.sqlite3", [("bob", "x", NOW + 2 * HOUR + 1)], "view")
    bought = report(shown, events, Question(DAY.window_ms, "a", ("buy",), resamples=50))
    assert (bought["arms"]["a"]["hit_rate"].value, bought["arms"]["b"]["hit_rate"].value) == (1, 0)
    none = report(shown, events, Question(DAY.window_ms, "a", ("purchase", "buy"), resamples=50))
    assert none["actions_without_an_event"] == ["purchase"] and not bought["actions_without_an_event"]
    assert "no event has the action purchase" in table(none) and "no event has" not in table(bought)
    late = report(shown, events, Question(DAY.window_ms, since=NOW + 1, resamples=50))
    assert list(late["arms"]) == ["b"]
    early = report(shown, events, Question(DAY.window_ms, until=NOW + 1, resamples=50))
    assert list(early["arms"]) == ["a"]


def test_a_simulated_test_from_logs_finds_the_truth(tmp_path: Path) -> None:
    """2,000 users drawn by the split itself; b's users take a shown item with 0.5 instead of 0.3."""
    rng = np.random.default_rng(2)
    options = TrafficOptions(split={"a": 3, "b": 1}, salt="truth")
    rows: list[tuple[Any, ...]] = []
    events: list[tuple[str, str, int]] = []
    for number in range(2000):
        user = f"u{number}"
        choice = choose(options, None, user, "")
        for visit in range(int(rng.integers(1, 4))):
            time = NOW + visit * 48 * HOUR
            rows.append((user, choice, [f"i{visit}-{rank}" for rank in range(5)], time, f"{choice.model}@1"))
            if rng.random() < {"a": 0.3, "b": 0.5}[str(choice.model)]:
                events.append((user, f"i{visit}-{rng.integers(5)}", time + int(rng.integers(1, 24 * HOUR))))
    shown = show(tmp_path / "exposures", rows)
    table = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row")
    (tmp_path / "exported").mkdir()
    table.write_parquet(tmp_path / "exported" / "part-0.parquet")
    found = report(shown, str(tmp_path / "exported"), Question(DAY.window_ms, resamples=500))
    assert found["control"] == "a"
    assert found["sample_ratio"]["mismatch"] is False
    apart = found["differences"]["b"]["hit_rate"]
    assert 0.05 < apart.low < 0.2 < apart.high < 0.35
    mean_reciprocal = sum(1 / rank for rank in range(1, 6)) / 5
    assert found["arms"]["b"]["reciprocal_rank"].value == pytest.approx(0.5 * mean_reciprocal, abs=0.05)
    from_store = report(shown, take(tmp_path / "e.sqlite3", events), Question(DAY.window_ms, resamples=500))
    assert from_store["arms"] == found["arms"]


def test_a_split_that_changed_is_no_one_test(tmp_path: Path) -> None:
    changed = Choice("a", "split", 0.9)
    shown = show(tmp_path / "x", [("ann", A, ["x"], NOW, "a@1"), ("bob", changed, ["x"], NOW, "a@1")])
    with pytest.raises(SpringtideError, match="weights of the split changed"):
        report(shown, take(tmp_path / "e.sqlite3", []), DAY)


def test_a_test_that_was_changed_midway_is_reported_one_period_at_a_time(tmp_path: Path) -> None:
    options = [TrafficOptions(split={"a": 1, "b": 1}, salt=salt) for salt in ("", "again")]
    users = [f"u{number}" for number in range(40)]
    rows = [
        (user, choose(one, None, user, ""), ["x"], NOW + place * HOUR, "m@1")
        for place, one in enumerate(options)
        for user in users
    ]
    shown, events = show(tmp_path / "shown", rows), take(tmp_path / "log", [])
    with pytest.raises(SpringtideError, match=r"shown are of 2 tests.*--since 2001-09-09T01:46:41\+00:00 is that of"):
        report(shown, events, DAY)
    for period in ({"until": NOW + 1}, {"since": NOW + 1000}):
        found = report(shown, events, Question(DAY.window_ms, resamples=50, **period))
        assert found["exposures"]["used"] == len(users)


def test_lines_that_name_no_test_are_of_one_test(tmp_path: Path) -> None:
    """Those of an older version; what a newer one shows is drawn otherwise and is another test."""
    old = [("ann", A, ["x"], NOW, "a@1"), ("bob", B, ["x"], NOW + 1, "b@1")]
    events = take(tmp_path / "log", [])
    assert report(show(tmp_path / "old", old), events, DAY)["exposures"]["used"] == 2
    newer = show(tmp_path / "old", [("ann", Choice("a", "split", 0.5, "t"), ["x"], NOW + 2, "a@1")])
    with pytest.raises(SpringtideError, match="of 2 tests"):
        report(newer, events, DAY)


@pytest.mark.parametrize(
    ("question", "events", "why"),
    [
        (DAY, "nowhere.sqlite3", "there is no event log at"),
        (DAY, "http://host/1", "cannot be read"),
        (DAY, "nowhere.parquet", "cannot read the events"),
        (DAY, "empty.parquet", "no column user_id"),
        (Question(DAY.window_ms, control="c"), "e.sqlite3", "no exposure is of the control 'c'; there are a"),
        (Question(DAY.window_ms, until=5), "e.sqlite3", "can be compared"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, question: Question, events: str, why: str) -> None:
    shown = show(tmp_path / "exposures", [("ann", A, ["x"], NOW, "a@1")])
    take(tmp_path / "e.sqlite3", [])
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "empty.parquet")
    source = events if "://" in events else str(tmp_path / events)
    with pytest.raises(SpringtideError, match=why):
        report(shown, source, question)


# ---------------------------------------------------------------- the command
def test_the_command_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(tmp_path / "exposures", [("ann", A, ["x"], NOW, "a@1"), ("bob", B, ["x"], NOW, "b@1")])
    take(tmp_path / "history.sqlite3", [("ann", "x", NOW + 1)])
    main(["ab-report", "--workspace", str(tmp_path), "--control", "a", "--resamples", "50", "--until", "2100-01-01"])
    printed = capsys.readouterr().out
    assert "a (control)" in printed and "b - a" in printed and "chi-square" in printed
    written = json.loads((tmp_path / "results" / "ab-report.json").read_text())
    assert (written["job"], written["status"]) == ("ab-report", "ok")
    assert written["differences"]["b"]["hit_rate"] == {"value": -1.0, "low": -1.0, "high": -1.0}


def test_the_command_fails_with_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "springtide", "ab-report", "--workspace", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"ab-report: there are no exposures in {tmp_path}/exposures; turn `exposures` on in Ingress' user_config\n"
    )


@pytest.mark.parametrize(
    ("option", "why"), [(["--since", "soon"], "--since 'soon'"), (["--resamples", "0"], "above 0")]
)
def test_senseless_options_are_refused(tmp_path: Path, option: list[str], why: str) -> None:
    with pytest.raises(SystemExit, match=why):
        main(["ab-report", "--workspace", str(tmp_path), *option])


def test_jobs_are_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["train", "--help"])
    assert done.value.code == 0
    assert "--set section.key=value" in capsys.readouterr().out
