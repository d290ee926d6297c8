"""The import of the prepared log goes on until it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from springtide.errors import SpringtideError
from springtide.serving import seeding
from springtide.serving.seeding import FAILED, seed_until_done


def test_an_import_that_failed_is_tried_again_ever_more_seldom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries, told, waits = [0], list[str](), list[float]()

    def seed(*_: Any) -> int:
        tries[0] += 1
        if tries[0] == 1:
            raise SpringtideError("the event log is away")
        if tries[0] < 10:
            raise OSError("stale file handle")
        return 5

    monkeypatch.setattr(seeding, "seed_histories", seed)
    store: Any = None
    with caplog.at_level("ERROR"):
        seed_until_done(store, Path("w"), told.append, lambda: True, waits.append)
    assert told == [FAILED] * 9 + ["ok"]  # anybody may read this, so it says no more
    assert "the event log is away" in caplog.text and "stale file handle" in caplog.text
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_log_that_another_took_the_place_of_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    told, wanted = list[str](), [True, True, False, False]

    def fail(*_: Any) -> int:
        raise SpringtideError("the event log is away")

    monkeypatch.setattr(seeding, "seed_histories", fail)
    store: Any = None
    seed_until_done(store, Path("w"), told.append, lambda: wanted.pop(0), lambda _: None)
    assert len(told) == 2 and "ok" not in told
