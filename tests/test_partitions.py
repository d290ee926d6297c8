"""Duplicates, k-core, order of ties and splits, against the same rules written out in plain Python."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.errors import SpringtideError
from springtide.schemas import PARTS
from without_ray import prepare_without_ray, read_report, read_table, settings_for


class Event(NamedTuple):
    user: str
    item: str
    time: int  # seconds
    action: str = "view"


def write_log(path: Path, events: Sequence[Event]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"u": e.user, "i": e.item, "t": e.time, "a": e.action}) + "\n" for e in events]
    path.write_text("".join(lines), encoding="utf-8")


def run(workspace: Path, events: Sequence[Event], files: int = 1, **data: Any) -> dict[str, list[tuple[str, int, str]]]:
    """Prepare a log cut into some files. Returns each user's history: (item, seconds, part)."""
    for number in range(files):
        share = slice(len(events) * number // files, len(events) * (number + 1) // files)
        write_log(workspace / "log" / f"{number}.jsonl", events[share])
    columns = {"user_id": "u", "item_id": "i", "timestamp": "t", "action": "a"}
    source = {"paths": str(workspace / "log"), "columns": columns}
    prepare_without_ray(settings_for(workspace, source, **data))
    read_report(workspace)
    return histories(workspace)


def histories(workspace: Path) -> dict[str, list[tuple[str, int, str]]]:
    """Each user's history, read off the events and found again in the sequences."""
    names = {number: name for name, number in PARTS.items()}
    found: dict[str, list[tuple[str, int, str]]] = {}
    for row in read_table(workspace, "events").sort("user_id", "position").iter_rows(named=True):
        history = found.setdefault(row["user_id"], [])
        assert row["position"] == len(history)
        history.append((row["item_id"], row["timestamp"] // 1000, names[row["part"]]))
    catalogue = read_table(workspace, "items")["item_id"].to_list()
    assert catalogue == sorted(catalogue)
    for row in read_table(workspace, "sequences").iter_rows(named=True):
        expected = found[row["user_id"]]
        assert [catalogue[item] for item in row["items"]] == [item for item, _, _ in expected]
        assert [time // 1000 for time in row["timestamps"]] == [time for _, time, _ in expected]
        assert [names[part] for part in row["parts"]] == [part for _, _, part in expected]
    assert len(read_table(workspace, "sequences")) == len(found)
    return found


# ---------------------------------------------------------------- the rules in plain Python
def plain(
    events: Sequence[Event],
    kind: str,
    min_user: int,
    min_item: int,
    deduplicate: str = "user_item",
    targets: Sequence[str] | None = None,
) -> dict[str, list[tuple[str, int, str]]] | None:
    """What `prepare` must find; None where no test event is left."""
    kept: list[Event] = []
    seen = set()
    for event in sorted(events, key=lambda e: e.time):  # stable: ties keep their order
        key = event if deduplicate == "exact" else (event.user, event.item, event.action)
        if key not in seen:
            seen.add(key)
            kept.append(event)
    before = -1
    while len(kept) != before:
        before = len(kept)
        items = Counter(event.item for event in kept)
        kept = [event for event in kept if items[event.item] >= min_item]
        users = Counter(event.user for event in kept)
        kept = [event for event in kept if users[event.user] >= min_user]

    def is_target(event: Event) -> bool:
        return targets is None or event.action in targets

    times = [event.time for event in kept if is_target(event)]
    if not times:
        return None
    cut_valid, cut_test = (times[math.floor(share * len(times))] for share in (0.8, 0.9))
    if kind == "temporal" and cut_valid == times[0]:
        return None
    found: dict[str, list[tuple[str, int, str]]] = {}
    for user in sorted({event.user for event in kept}):
        history = [event for event in kept if event.user == user]
        places = [place for place, event in enumerate(history) if is_target(event)]
        for place, event in enumerate(history):
            if kind == "temporal":
                part = "test" if event.time >= cut_test else "valid" if event.time >= cut_valid else "train"
            elif len(places) < 3 or place <= places[-3]:
                part = "train"
            else:
                ahead = [p for p in places if p >= place]
                part = "test" if len(ahead) <= 1 and place > places[-2] else "valid"
                if place > places[-3] and place < places[-2]:
                    part = "train"  # before the validation target: its history
                elif places[-2] < place < places[-1]:
                    part = "valid"  # after the validation target and before the test target: history of the test only
            found.setdefault(user, []).append((event.item, event.time, part))
    return found if any(part == "test" for history in found.values() for _, _, part in history) else None


EVENTS = st.lists(
    st.builds(
        Event,
        st.sampled_from("abcdef"),
        st.sampled_from(["p", "q", "r", "s", "t"]),
        st.integers(0, 12),
        st.sampled_from(["view", "buy"]),
    ),
    min_size=12,
    max_size=90,
)


@settings(max_examples=60)
@given(
    events=EVENTS,
    kind=st.sampled_from(["leave_one_out", "temporal"]),
    core=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    deduplicate=st.sampled_from(["user_item", "exact"]),
    targets=st.sampled_from([None, ["buy"]]),
    files=st.integers(1, 3),
)
def test_any_log_is_prepared_as_in_plain_python(
    tmp_path_factory: pytest.TempPathFactory,
    events: list[Event],
    kind: str,
    core: tuple[int, int],
    deduplicate: str,
    targets: list[str] | None,
    files: int,
) -> None:
    expected = plain(events, kind, *core, deduplicate, targets)
    workspace = tmp_path_factory.mktemp("any")
    options = {
        "split": kind,
        "deduplicate": deduplicate,
        "target_actions": targets,
        "min_user_events": core[0],
        "min_item_events": core[1],
    }
    if expected is None:
        with pytest.raises(SpringtideError):
            run(workspace, events, files, **options)
        assert not (workspace / "prepared").exists()
    else:
        assert run(workspace, events, files, **options) == expected


# ---------------------------------------------------------------- the rules one by one
def test_ties_keep_the_order_of_the_log(tmp_path: Path) -> None:
    items = ["z", "a", "m", "b", "y", "c"]
    log = [Event("u", item, 5) for item in items]
    found = run(tmp_path, [*log, Event("u", "first", 4)], files=3)
    assert [item for item, _, _ in found["u"]] == ["first", *items]
    ties = read_report(tmp_path)["ties"]
    assert ties == {"events": 5, "share": 5 / 7, "users_whose_last_two_tie": 1}


def test_exact_duplicates_keep_the_first_row(tmp_path: Path) -> None:
    log = [
        Event("u", "a", 1),
        Event("u", "b", 2),
        Event("u", "a", 1),
        Event("u", "a", 3),
        Event("u", "a", 1, "buy"),
        Event("u", "b", 2),
    ]
    run(tmp_path, log, files=2)
    assert read_table(tmp_path, "events").select("file", "row").sort("file", "row").rows() == [
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
    ]
    report = read_report(tmp_path)
    assert [entry["deduplicated"] for entry in report["files"]] == [1, 1]


def test_user_item_duplicates_keep_the_earliest(tmp_path: Path) -> None:
    log = [Event("u", "a", 9), Event("u", "a", 1), Event("u", "b", 2), Event("u", "c", 3), Event("u", "a", 4, "buy")]
    found = run(tmp_path, log, deduplicate="user_item")
    assert [(item, time) for item, time, _ in found["u"]] == [("a", 1), ("b", 2), ("c", 3), ("a", 4)]


def test_the_k_core_goes_on_to_the_end(tmp_path: Path) -> None:
    """A chain that unravels by one user a round: user n holds items n and n + 1, and the first and last are rare."""
    square = [Event(f"core{user}", f"core{item}", item) for user in range(3) for item in range(3)]
    chain = [Event(f"u{n:02d}", f"i{n + step:02d}", n) for n in range(12) for step in range(2)]
    found = run(tmp_path, chain + square, min_user_events=2, min_item_events=2)
    assert sorted(found) == ["core0", "core1", "core2"]
    report = read_report(tmp_path)
    assert report["k_core"]["rounds"] > 5
    assert report["totals"]["quarantined"] == len(chain)


def test_a_cut_in_time_is_the_same_for_all(tmp_path: Path) -> None:
    log = [Event(f"u{n % 7}", f"i{n % 5}", n) for n in range(100)]
    found = run(tmp_path, log, split="temporal")
    times = {part: [t for h in found.values() for _, t, p in h if p == part] for part in PARTS}
    assert (min(times["valid"]), min(times["test"])) == (80, 90)
    assert (max(times["train"]), max(times["valid"])) == (79, 89)
    assert read_report(tmp_path)["split"]["cuts_ms"] == [80_000, 90_000]


def test_only_targets_are_tested(tmp_path: Path) -> None:
    log = [Event("u", f"i{n}", n, action) for n, action in enumerate(["buy", "view", "buy", "view", "buy", "view"])]
    log += [Event("v", f"i{n}", n) for n in range(6)]
    found = run(tmp_path, log, target_actions="buy")
    assert [part for _, _, part in found["u"]] == ["train", "train", "valid", "valid", "test", "test"]
    assert {part for _, _, part in found["v"]} == {"train"}
    sequence = read_table(tmp_path, "sequences").filter(user_id="u")
    assert sequence["targets"].to_list() == [[True, False, True, False, True, False]]
    assert read_report(tmp_path)["items"] == 6


def test_an_unknown_action_is_zero_and_may_be_called_anything(tmp_path: Path) -> None:
    log = [Event("u", f"i{n}", n, action) for n, action in enumerate(["<unknown>", "", "view", "buy"])]
    run(tmp_path, log)
    vocabulary = json.loads((tmp_path / "prepared" / "vocabulary.json").read_text())
    assert vocabulary == {"actions": ["<unknown>", "buy", "view"]}
    assert read_table(tmp_path, "sequences")["actions"].to_list() == [[0, 0, 2, 1]]


def test_the_order_in_which_rows_arrive_changes_nothing(tmp_path: Path) -> None:
    log = [Event(f"u{n % 5}", f"i{n % 11}", n // 3) for n in range(200)]
    columns = {"user_id": "u", "item_id": "i", "timestamp": "t", "action": "a"}
    hashes = []
    write_log(tmp_path / "log" / "0.jsonl", log)
    for name in ("one", "two"):
        chosen = settings_for(tmp_path / name, {"paths": str(tmp_path / "log"), "columns": columns})
        hashes.append(prepare_without_ray(chosen)["content_hash"])
    assert hashes[0] == hashes[1]


# ---------------------------------------------------------------- logs that cannot be split
@pytest.mark.parametrize(
    ("events", "options", "says"),
    [
        ([], {}, "the log is empty"),
        ([Event("u", "a", 1)], {}, "at least 3 events"),
        ([Event("u", item, 1) for item in "ab"], {}, "at least 3 events"),
        ([Event(user, "a", 1) for user in "abcdef"], {"split": "temporal"}, "earliest timestamp"),
        ([Event("u", item, 1) for item in "abcdef"], {"min_item_events": 2}, "k-core"),
        (
            [Event("u", item, 1) for item in "abcdef"],
            {"target_actions": ["buy"]},
            "has 'buy', but the log has only view",
        ),
        ([Event("", item, 1) for item in "abcdef"], {}, 'rejected with "no user_id"'),
    ],
)
def test_a_log_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, events: list[Event], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpringtideError, match=says) as caught:
        run(tmp_path, events, **options)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_one_user_and_equal_timestamps_are_a_log(tmp_path: Path) -> None:
    found = run(tmp_path, [Event("u", item, 7) for item in "abcd"])
    assert [(item, part) for item, _, part in found["u"]] == [
        ("a", "train"),
        ("b", "train"),
        ("c", "valid"),
        ("d", "test"),
    ]
    assert {part for _, _, part in run(tmp_path, [Event("u", "a", 1)], split="none")["u"]} == {"train"}


# ---------------------------------------------------------------- against another program
@pytest.mark.skipif(
    "SPRINGTIDE_YARDSTICK" not in os.environ, reason="SPRINGTIDE_YARDSTICK names no script to compare with"
)
@pytest.mark.parametrize("kind", ["leave_one_out", "temporal"])
def test_the_split_equals_the_yardstick(tmp_path: Path, kind: str) -> None:
    pandas = pytest.importorskip("pandas")
    spec = importlib.util.spec_from_file_location("yardstick", os.environ["SPRINGTIDE_YARDSTICK"])
    assert spec is not None
    assert spec.loader is not None
    yardstick = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(yardstick)
    import random

    rng = random.Random(1)
    log = [Event(f"u{rng.randrange(40)}", f"i{int(rng.random() ** 2 * 60)}", rng.randrange(400)) for _ in range(3000)]
    found = run(tmp_path, log, files=3, split=kind, deduplicate="user_item", min_user_events=5, min_item_events=5)
    frame = yardstick.prepare(pandas.DataFrame([e[:3] for e in log], columns=["user", "item", "timestamp"]), core=5)
    cut = yardstick.split_loo if kind == "leave_one_out" else yardstick.split_temporal
    expected: dict[str, dict[int, tuple[str, int, str]]] = {}
    for name, part in zip(PARTS, cut(frame), strict=True):
        for user, item, time, place in part[["user", "item", "timestamp", "pos"]].itertuples(index=False):
            expected.setdefault(user, {})[place] = (item, time, name)
    assert found == {user: [rows[place] for place in sorted(rows)] for user, rows in expected.items()}
