"""A few hundred requests made from the OpenAPI document; `make fuzz-http` asks ten thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz_http import fuzz, toy_application


def test_no_request_is_answered_by_a_fault_of_ours(tmp_path: Path) -> None:
    with toy_application(tmp_path) as app:
        answers = fuzz(app, 300)
    asked: dict[str, set[int]] = {}
    for name, status in answers:
        asked.setdefault(name, set()).add(status)
    assert sum(answers.values()) > 250
    assert {200, 422} <= asked["POST /v1/recommend"]
    assert {202, 422} <= asked["POST /v1/events"]
    assert {200, 404} & asked["GET /v1/items/{item_id}/similar"]


def test_a_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from springtide.serving.engine import Engine

    monkeypatch.setattr(Engine, "similar", lambda *_: 1 / 0)
    with toy_application(tmp_path) as app, pytest.raises(AssertionError, match="503"):
        fuzz(app, 40)
