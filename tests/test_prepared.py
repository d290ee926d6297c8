"""Tests of what is said when the settings and the prepared log do not go together."""

import logging
from pathlib import Path
from typing import Any

import pytest

from springtide.config import Settings
from springtide.config_data import ColumnRule, EventColumns
from springtide.data.prepared import load_prepared
from springtide.errors import SpringtideError
from springtide.evaluation import compare
from springtide.evaluation import job as evaluate
from springtide.files import write_json
from springtide.training import job as train
from springtide.training import update
from springtide.tuning import job as tune
from toy import toy_settings
from write_workspace import write_workspace

CHANGES: dict[str, Any] = {
    "split": "temporal",
    "target_actions": ["click"],
    "min_user_events": 3,
    "min_item_events": 2,
    "deduplicate": "user_item",
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a log that was prepared with them."""
    chosen = toy_settings(write_workspace(tmp_path / "toy"))
    report = Path(chosen.workspace) / "prepared" / "report.json"
    write_json(report, load_prepared(chosen.workspace).report | {"settings": chosen.data.model_dump(mode="json")})
    return chosen


def changed(settings: Settings, name: str, value: Any) -> Settings:
    return settings.model_copy(update={"data": settings.data.model_copy(update={name: value})})


@pytest.mark.parametrize("name", CHANGES)
def test_settings_of_another_split_are_refused(settings: Settings, name: str) -> None:
    data = changed(settings, name, CHANGES[name]).data
    said = rf"^data\.{name} is .* in the settings, but the log .* was prepared with .*; run the prepare job again"
    with pytest.raises(SpringtideError, match=said):
        load_prepared(settings.workspace, data)
    load_prepared(settings.workspace, settings.data)
    load_prepared(settings.workspace)  # who does not say what the settings are does not learn from the log


@pytest.mark.parametrize("stage", [train, evaluate, compare, tune, update])
def test_every_stage_that_learns_or_judges_refuses_them(settings: Settings, stage: Any) -> None:
    with pytest.raises(SpringtideError, match=r"^data\.min_item_events is 2 in the settings"):
        stage.run(changed(settings, "min_item_events", 2))


@pytest.mark.parametrize(
    "rule",
    [{"action": "view"}, {"keep": [ColumnRule(column="price", above=0)]}, {"columns": EventColumns(item_id="sku")}],
)
def test_other_events_of_the_same_files_are_refused(settings: Settings, rule: dict[str, Any]) -> None:
    source = settings.data.events[0].model_copy(update=rule)
    with pytest.raises(SpringtideError, match=r"^data\.events reads other columns, or by other rules, than when"):
        load_prepared(settings.workspace, changed(settings, "events", [source]).data)


def test_the_order_of_the_actions_says_nothing(settings: Settings) -> None:
    report = Path(settings.workspace) / "prepared" / "report.json"
    of_two = changed(settings, "target_actions", ["a", "b"]).data
    write_json(report, load_prepared(settings.workspace).report | {"settings": of_two.model_dump(mode="json")})
    load_prepared(settings.workspace, changed(settings, "target_actions", ["b", "a"]).data)


def test_another_source_is_told_and_what_changes_no_event_is_not(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    moved = settings.data.events[0].model_copy(update={"paths": ["elsewhere.csv"]})
    with caplog.at_level(logging.WARNING):
        load_prepared(settings.workspace, changed(settings, "exclude_seen", not settings.data.exclude_seen).data)
        load_prepared(settings.workspace, changed(settings, "partitions", 3).data)
        assert not caplog.messages
        load_prepared(settings.workspace, changed(settings, "events", [moved]).data)
    assert len(caplog.messages) == 1 and "another data.events than" in caplog.messages[0]


def test_a_report_without_settings_is_of_no_other_log(settings: Settings) -> None:
    report = Path(settings.workspace) / "prepared" / "report.json"
    write_json(report, {"users": 1})
    load_prepared(settings.workspace, changed(settings, "split", "temporal").data)
