"""Bounds of the HTTP requests, and the rule that reads timestamps."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from springtide.serving.schemas import (
    MAX_EVENTS,
    MAX_HISTORY,
    MAX_ID,
    EncodeRequest,
    Event,
    EventsBody,
    Identifier,
    RecommendRequest,
    parse_timestamp,
)

EVENTS: TypeAdapter[Any] = TypeAdapter(EventsBody)


@pytest.mark.parametrize(
    ("value", "ms"),
    [
        (874724710, 874724710_000),
        (874724710.5, 874724710_500),
        (874724710_000, 874724710_000),
        (99_999_999_999, 99_999_999_999_000),
        (100_000_000_000, 100_000_000_000),
        (-100_000_000_000, -100_000_000_000),
        (0, 0),
        ("874724710", 874724710_000),
        (" 874724710.25 ", 874724710_250),
        ("1997-09-20T03:05:10Z", 874724710_000),
        ("1997-09-20 03:05:10", 874724710_000),
        ("1997-09-20T05:05:10.250+02:00", 874724710_250),
        ("1997-09-20", 874713600_000),
    ],
)
def test_timestamps(value: Any, ms: int) -> None:
    assert parse_timestamp(value) == ms


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        [],
        "",
        "soon",
        "nan",
        math.nan,
        math.inf,
        1.7e15,
        10**30,
        -(10**30),
        "1" * 5000,
        "1e400",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59-00:01",
    ],
)
def test_timestamps_that_are_none(value: Any) -> None:
    with pytest.raises(ValueError):
        parse_timestamp(value)


def test_an_event_may_be_a_day_ahead_of_the_clock_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    event = {"user_id": "u", "item_id": "i"}
    for fine in (1_000_086_400, "2001-09-10T01:46:40Z", -5, None):
        EVENTS.validate_python({**event, "timestamp": fine})
    for wrong in (1_000_086_401, "2001-09-10T01:46:41Z", "9999-01-01"):
        with pytest.raises(ValidationError, match="more than a day after this server's clock"):
            EVENTS.validate_python([event, {**event, "timestamp": wrong}])
    replayed = {"now": "2050-01-01", "history": [{"item_id": "i", "timestamp": "2049-12-31"}]}
    assert RecommendRequest.model_validate(replayed).now == 2_524_608_000_000  # nothing is stored of these


def test_someone_to_recommend_to() -> None:
    with pytest.raises(ValidationError, match="at least one"):
        RecommendRequest.model_validate({"k": 5})
    assert RecommendRequest.model_validate({"history": []}).k == 10
    assert RecommendRequest.model_validate({"user_id": 7}).user_id == "7"


@pytest.mark.parametrize(
    "body",
    [
        {"user_id": "u", "k": 0},
        {"user_id": "u", "k": 10**9},
        {"user_id": "u", "k": 1.5},
        {"user_id": "u", "diversity": 1.1},
        {"user_id": "u", "diversity": math.nan},
        {"user_id": ""},
        {"user_id": "u" * 513},
        {"user_id": "a\nb"},
        {"user_id": "a\x00"},
        {"user_id": "\ud800"},
        {"user_id": True},
        {"user_id": math.nan},
        {"query": ""},
        {"query": "q" * 2001},
        {"query": "\udfff"},
        {"user_id": "u", "filter": {}},
        {"user_id": "u", "filters": {"category": ["x"]}},
        {"history": [{"item": "a"}]},
        {"history": [{"item_id": "a", "rating": math.inf}]},
        {"history": [{"item_id": "a", "rating": "good"}]},
        {"history": [{"item_id": "a", "timestamp": "soon"}]},
        {"history": [{"item_id": "a"}] * (MAX_HISTORY + 1)},
    ],
)
def test_out_of_bounds(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RecommendRequest.model_validate(body)


def test_what_is_within_bounds() -> None:
    request = RecommendRequest.model_validate(
        {"user_id": "ü" * 512, "query": "浪漫喜剧\nzwei", "k": 1000, "history": [{"item_id": "编号 1", "timestamp": 5}]}
    )
    assert request.history is not None
    assert request.history[0].timestamp == 5000
    longest = RecommendRequest.model_validate({"history": [{"item_id": "a"}] * MAX_HISTORY})
    assert len(longest.history or []) == MAX_HISTORY


def test_one_event_or_a_list() -> None:
    one = {"user_id": "u", "item_id": 5, "event_id": "e"}
    assert isinstance(EVENTS.validate_python(one), Event)
    assert [e.item_id for e in EVENTS.validate_python([one, one])] == ["5", "5"]
    for wrong in ([], [one] * (MAX_EVENTS + 1), "event", None, [None], {"item_id": "a"}, {**one, "when": 5}):
        with pytest.raises(ValidationError):
            EVENTS.validate_python(wrong)


def test_text_or_texts() -> None:
    assert EncodeRequest.model_validate({"text": "a"}).text == "a"
    for wrong in ({}, {"text": "a", "texts": ["b"]}, {"texts": []}, {"texts": ["a"] * 65}, {"texts": [""]}):
        with pytest.raises(ValidationError):
            EncodeRequest.model_validate(wrong)


@pytest.mark.parametrize(
    ("given", "told"), [(" i1\n", "i1"), (7, "7"), (" " * 2 * MAX_ID + "茶", "茶"), ("x" * MAX_ID, "x" * MAX_ID)]
)
def test_ids_are_stripped_before_they_are_measured(given: Any, told: str) -> None:
    assert TypeAdapter(Identifier).validate_python(given) == told


@pytest.mark.parametrize("given", ["", "  ", "\n", "x" * (MAX_ID + 1), "a\0b", True, 1.5, None])
def test_what_is_no_id(given: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Identifier).validate_python(given)
