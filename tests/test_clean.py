"""One chunk of raw rows to events and rejects: types, times, missing values and reasons."""

from __future__ import annotations

import datetime as dt
import decimal
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.config_data import EventSource
from springtide.data.clean import CLEANED, EARLIEST_MS, LATEST_MS, clean_chunk, to_milliseconds, to_numbers
from springtide.data.readers import RawChunk
from without_ray import prepare_without_ray, read_report, read_table, settings_for

NAN = float("nan")


def source(**values: Any) -> EventSource:
    columns = {"user_id": "u", "item_id": "i", "timestamp": "t", **values.pop("columns", {})}
    return EventSource.model_validate({"paths": "x", "columns": columns, **values})


def clean(raw: dict[str, Any], /, **values: Any) -> list[dict[str, Any]]:
    """Cleaned rows of raw columns; u, i and t have good values unless given."""
    rows = len(next(iter(raw.values())))
    table = pa.table({"u": ["u"] * rows, "i": ["i"] * rows, "t": ["1600000000"] * rows, **raw})
    cleaned = clean_chunk(RawChunk(table, pa.array(range(1, rows + 1), pa.int64()), []), source(**values), 0, 4)
    assert cleaned.schema.equals(CLEANED)
    assert len(cleaned) == rows
    return cleaned.to_pylist()


def milliseconds(*values: Any) -> list[int | None]:
    column = values[0] if isinstance(values[0], pa.Array) else pa.array(values)
    return to_milliseconds(pa.chunked_array([column])).to_pylist()


# ---------------------------------------------------------------- time
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1600000000", 1_600_000_000_000),
        ("1600000000000", 1_600_000_000_000),
        ("1600000000.5", 1_600_000_000_500),
        ("1600000000.003", 1_600_000_000_003),
        ("1.6e9", 1_600_000_000_000),
        (" 1600000000 ", 1_600_000_000_000),
        ("0", 0),
        ("-1", -1000),
        ("2020-09-13", 1_599_955_200_000),
        ("2020-09-13T12:26", 1_599_999_960_000),
        ("2020-09-13 12:26:40", 1_600_000_000_000),
        ("2020-09-13T12:26:40Z", 1_600_000_000_000),
        ("2020-09-13T12:26:40.25Z", 1_600_000_000_250),
        ("2020-09-13T12:26:40.123456789+00:00", 1_600_000_000_123),
        ("2020-09-13T20:26:40+08:00", 1_600_000_000_000),
        ("2020-09-13T20:26:40+0800", 1_600_000_000_000),
        ("2020-09-13T20:26:40+08", 1_600_000_000_000),
        ("2020-09-13T06:56:40-05:30", 1_600_000_000_000),
        ("2020-02-29", 1_582_934_400_000),
    ],
)
def test_the_three_forms_of_time(text: str, expected: int) -> None:
    assert milliseconds(text) == [expected]
    # A column may mix forms, and one impossible date must not cost its neighbours.
    assert milliseconds("2021-02-29", text, "1600000000", text) == [None, expected, 1_600_000_000_000, expected]


@pytest.mark.parametrize(
    "text",
    ["", " ", "soon", "nan", "inf", "1e999", "2020-13-01", "2021-02-29", "2020-09-31", "2020-09-13T24:01:00",
     "2020-09-13T12:26:60", "20-09-13", "13/09/2020", "2020-09-13T", "2020-09-13T12", "1899-12-31", "2200-01-01",
     "9999-12-31", "0000-01-01", "1600000000000000", "1600000000000000000", "-99999999999", "0x10", "1_000"],
)  # fmt: skip
def test_other_times_are_none(text: str) -> None:
    assert milliseconds(text) == [None]


@given(st.integers(EARLIEST_MS, LATEST_MS - 1))
def test_every_time_reads_back(time: int) -> None:
    moment = dt.datetime(1970, 1, 1) + dt.timedelta(milliseconds=time)
    plain, zoned = moment.isoformat(), moment.replace(tzinfo=dt.UTC).astimezone(dt.timezone(dt.timedelta(hours=-3.5)))
    assert milliseconds(plain, plain.replace("T", " ") + "Z", zoned.isoformat()) == [time] * 3
    if abs(time) < 10**14:
        assert milliseconds(f"{time / 1000:.3f}") == [time]
    if abs(time) >= 10**11:
        assert milliseconds(str(time)) == [time]


def test_typed_times() -> None:
    seconds = 1_600_000_000
    expected = seconds * 1000
    for unit, scale in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        for zone in (None, "UTC", "Asia/Shanghai"):
            assert milliseconds(pa.array([seconds * scale, None], pa.timestamp(unit, zone))) == [expected, None]
    for kind in (pa.int64(), pa.float64(), pa.uint32(), pa.decimal128(12, 0)):
        assert milliseconds(pa.array([decimal.Decimal(seconds) if "dec" in str(kind) else seconds, None], kind)) == [
            expected,
            None,
        ]
    assert milliseconds(pa.array([expected, seconds, NAN, math.inf])) == [expected, expected, None, None]
    assert milliseconds(pa.array([18_518], pa.date32())) == [18_518 * 86_400_000]
    assert milliseconds(pa.array([2**63 - 1, -(2**63)])) == [None, None]
    assert milliseconds(pa.array([True])) == [None]
    assert milliseconds(pa.nulls(2)) == [None, None]
    for kind in (pa.large_string(), pa.string_view()):
        assert milliseconds(pa.array(["2020-09-13"], kind)) == [1_599_955_200_000]


# ---------------------------------------------------------------- numbers
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_read_back(number: float) -> None:
    assert to_numbers(pa.chunked_array([[repr(number), f" {number!r}\t"]])).to_pylist() == [number, number]


@given(st.text(max_size=8))
def test_no_text_breaks_the_readers_of_numbers_and_times(text: str) -> None:
    column = pa.chunked_array([[text, None]])
    (number, absent) = to_numbers(column).to_pylist()
    assert absent is None
    assert number is None or math.isfinite(number)
    assert to_milliseconds(column).to_pylist()[1] is None


def test_ratings() -> None:
    values = ["4", " 4.5 ", "+.5", "-1e1", "", "nan", "NULL", None, "five", "4,5", "1e300", "inf", "4 stars"]
    rows = clean({"r": values}, columns={"rating": "r"})
    assert [row["rating"] for row in rows] == [4.0, 4.5, 0.5, -10.0, *[None] * 9]
    assert [row["reason"] for row in rows] == [None] * 8 + ["rating is no number"] * 5
    typed = clean({"r": pa.array([4.0, NAN, None])}, columns={"rating": "r"})
    assert [(row["rating"], row["reason"]) for row in typed] == [(4.0, None), (None, None), (None, None)]


# ---------------------------------------------------------------- ids
def test_missing_ids_are_rejected_with_the_first_reason() -> None:
    for missing in ("", " ", "\t", "nan", "NaN", "null", "None", None):
        (row,) = clean({"u": [missing]})
        assert (row["reason"], row["user_id"], row["item_id"]) == ("no user_id", None, None)
        assert clean({"i": [missing]})[0]["reason"] == "no item_id"
    (row,) = clean({"u": [""], "i": [""], "t": ["soon"]})
    assert row["reason"] == "no user_id"
    assert row["content"] == "\t\tsoon"


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([17850, None]), ["17850", None]),
        (pa.array([17850.0, NAN]), ["17850", None]),
        (pa.array([17850.0, 1.5, None, NAN, 2.0]), ["17850", "1.5", None, None, "2"]),
        (pa.array([1.0, 2.0], pa.float32()), ["1", "2"]),
        (pa.array([1.0, NAN], pa.float16()), ["1", None]),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (
            pa.array([decimal.Decimal("5.00"), decimal.Decimal("1.50"), None, decimal.Decimal("-100")]),
            ["5", "1.5", None, "-100"],
        ),
        (pa.array([decimal.Decimal("100"), decimal.Decimal("0")], pa.decimal128(9, 0)), ["100", "0"]),
        (pa.array([decimal.Decimal("0.00"), decimal.Decimal("10.05")], pa.decimal256(40, 2)), ["0", "10.05"]),
        (pa.array(["  a", "a\t", " a b ", "\u3000用户 "]), ["a", "a", "a b", "用户"]),
        (pa.array([b"17850    ", b" \xff"], pa.binary()), ["17850", None]),
        (pa.array([True]), ["true"]),
        (pa.array([b"\xff", b"ok"]), [None, "ok"]),
        (pa.array([b"\xff", b"ok"], pa.large_binary()), [None, "ok"]),
        (pa.array([b"\xff", b"ok"], pa.binary_view()), [None, "ok"]),
        (pa.array([b"ab", b"cd"], pa.binary(2)), ["ab", "cd"]),
        (pa.array(["用户"], pa.large_string()), ["用户"]),
        (pa.array(["用户"], pa.string_view()), ["用户"]),
        (pa.nulls(1), [None]),
    ],
)
def test_ids_of_every_type(column: pa.Array, expected: list[str | None]) -> None:
    rows = clean({"u": column})
    assert [row["user_id"] for row in rows] == expected
    assert [row["reason"] is None for row in rows] == [value is not None for value in expected]


def test_invalid_utf8_costs_its_row_only() -> None:
    rows = clean({"u": [b"a", b"\xe7\x94", b"b"], "i": [b"x", b"y", b"z"]})
    assert [row["reason"] for row in rows] == [None, "invalid UTF-8 in u", None]
    assert rows[1]["content"] == "\ty\t1600000000"


def test_white_space_around_ids_is_no_part_of_them_but_rules_see_what_is_written() -> None:
    fits = " " * 300 + "a" * 512 + " " * 300
    rows = clean({"u": [fits, "u"], "i": [" 17850", "17850"]}, keep=[{"column": "i", "matches": "^ ?17850$"}])
    assert [(row["user_id"], row["item_id"], row["reason"]) for row in rows] == [
        ("a" * 512, "17850", None),
        ("u", "17850", None),
    ]
    assert clean({"u": [" u"]}, keep=[{"column": "u", "matches": "^u"}])[0]["content"] == " u\ti\t1600000000"


def test_long_values_are_rejected_and_their_content_is_cut() -> None:
    long = "长" * 1_000_000
    rows = clean({"u": [long, "a", "b"], "i": ["x", long, "y"], "a": ["v", "v", long]}, columns={"action": "a"})
    assert [row["reason"] for row in rows] == [f"{name} above 512 bytes" for name in ("user_id", "item_id", "action")]
    assert {len(row["content"]) for row in rows} == {300}


# ---------------------------------------------------------------- actions and rules
def test_actions() -> None:
    assert clean({"u": ["a"]})[0]["action"] == "interaction"
    assert clean({"u": ["a"]}, action="buy")[0]["action"] == "buy"
    rows = clean({"a": ["view", "", None, "nan", "<unknown>"]}, columns={"action": "a"})
    assert [row["action"] for row in rows] == ["view", None, None, None, None]
    assert {row["reason"] for row in rows} == {None}


def test_the_first_action_rule_that_fits_wins() -> None:
    rules = [
        {"column": "n", "matches": "^C", "action": "cancellation"},
        {"column": "q", "below": 0, "action": "return"},
    ]
    rows = clean({"n": ["C1", "2", "3", None], "q": ["-1", "-1", "1", "x"]}, action="buy", action_rules=rules)
    assert [row["action"] for row in rows] == ["cancellation", "return", "buy", "buy"]


def test_keep_rules() -> None:
    keep = [{"column": "q", "above": 0}, {"column": "i", "matches": r"^\d{5}"}]
    rows = clean(
        {"q": ["1", "0", "-2", "many", None, "3"], "i": ["12345", "12345", "1", "12345A", "12345", "POST"]}, keep=keep
    )
    above, matches = "filtered: q is not above 0", r"filtered: i does not match ^\d{5}"
    assert [row["reason"] for row in rows] == [None, above, above, above, above, matches]


# ---------------------------------------------------------------- many rows at once
def test_users_have_the_same_partition_whatever_their_neighbours() -> None:
    alone = {user: clean({"u": [user]})[0]["bucket"] for user in map(str, range(50))}
    assert set(alone.values()) == {0, 1, 2, 3}
    together = clean({"u": [*alone, ""]})
    assert {row["user_id"]: row["bucket"] for row in together[:-1]} == alone


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "", "nan", "\udcff", "x" * 600]),
            st.sampled_from(["i", "j", "", "9"]),
            st.sampled_from(["1600000000", "2020-01-01", "2020-02-30", "", "later"]),
            st.sampled_from(["1", "", "two"]),
            st.sampled_from(["", ",surplus", None]),
        ),
        max_size=30,
    )
)
def test_every_row_is_kept_quarantined_or_deduplicated(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str, str, str | None]]
) -> None:
    folder = tmp_path_factory.mktemp("messy")
    lines = ["short" if end is None else ",".join(fields) + end for *fields, end in rows]
    half = len(lines) // 2
    always = [f"sure,{item},{time},5" for time, item in enumerate("ijk", 1_500_000_000)]
    for name, some in (("a.csv", lines[:half]), ("b.csv", lines[half:] + always)):
        text = "\n".join(["u,i,t,r", *some]) + "\n"
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    columns = {"user_id": "u", "item_id": "i", "timestamp": "t", "rating": "r"}
    prepare_without_ray(settings_for(folder, {"paths": str(folder), "columns": columns}, min_item_events=1))
    report = read_report(folder)
    assert [entry["rows"] for entry in report["files"]] == [half, len(lines) - half + 3]
    events, quarantine = read_table(folder, "events"), read_table(folder, "quarantine")
    paths = [entry["path"] for entry in report["files"]]
    kept = {(paths[file], row) for file, row in events.select("file", "row").iter_rows()}
    rejected = set(quarantine.select("file", "row").iter_rows()) if len(quarantine) else set()
    assert not kept & rejected
    good = [
        end == "" and user in ("a", "b") and item != "" and time in ("1600000000", "2020-01-01") and rating != "two"
        for user, item, time, rating, end in rows
    ]
    numbered = [(paths[n >= half], n - half * (n >= half) + 1) for n in range(len(rows))]
    assert rejected == {place for place, fine in zip(numbered, good, strict=True) if not fine}
    distinct = {fields for fields, fine in zip(rows, good, strict=True) if fine}
    assert report["totals"]["kept"] == len(distinct) + 3


def test_the_workspace_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"u,i{n},{n}\n" for n in range(3)))
    workspace = tmp_path / "run=1 用"
    prepare_without_ray(settings_for(workspace, {"paths": str(tmp_path)}))
    from springtide.data.prepared import load_prepared

    assert load_prepared(workspace).sequences()["items"].to_pylist() == [[0, 1, 2]]
