"""Settings: what a YAML file and `--set` may say, and the sentence for what they may not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from springtide.config import ModelConfig, Settings, load_settings, parse_settings, set_by_path, with_values
from springtide.errors import SpringtideError
from springtide.training.job import sized

REPOSITORY = Path(__file__).resolve().parent.parent
MINIMAL = "data: {events: {paths: log.csv}}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def sentence(path: Path, *overrides: str) -> str:
    with pytest.raises(SpringtideError) as caught:
        load_settings(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def sections() -> list[tuple[str, type[BaseModel]]]:
    return [
        (name, field.annotation)
        for name, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    ]


def test_one_source_may_stand_without_its_list(minimal: Path) -> None:
    settings = load_settings(minimal)
    assert settings.data.events[0].paths == ["log.csv"]
    assert settings.data.split == "leave_one_out"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs" / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_configs_in_the_repository_are_valid(path: Path) -> None:
    settings = load_settings(path)
    assert settings.name == path.stem
    assert settings.workspace == f"workspace/{path.stem}"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("name=shop", lambda s: s.name == "shop"),
        ("name=a=b", lambda s: s.name == "a=b"),
        (" name = shop", lambda s: s.name == "shop"),
        ("train.epochs=3", lambda s: s.train.epochs == 3),
        ("train.learning_rate=1.5e-3", lambda s: s.train.learning_rate == 0.0015),
        ("evaluate.ks=[1, 2]", lambda s: s.evaluate.ks == [1, 2]),
        ("data.exclude_seen=no", lambda s: s.data.exclude_seen is False),
        ("data.target_actions=buy", lambda s: s.data.target_actions == ["buy"]),
        ("data.target_actions=", lambda s: s.data.target_actions is None),
        ("data.items={paths: [a.csv, b.csv]}", lambda s: s.data.items.paths == ["a.csv", "b.csv"]),
        ("data.items.paths=a.csv", lambda s: s.data.items.paths == ["a.csv"]),
        ("data.events.paths=other.csv", lambda s: s.data.events[0].paths == ["other.csv"]),
        ("data.events.columns.user_id=3", lambda s: s.data.events[0].columns.user_id == 3),
        ("data.events={paths: 用户.csv}", lambda s: s.data.events[0].paths == ["用户.csv"]),
        ("tune.space.model.dim=[32, 64]", lambda s: s.tune.space == {"model.dim": [32, 64]}),
        ("tune.space={model.dim: [32]}", lambda s: s.tune.space == {"model.dim": [32]}),
    ],
)
def test_set_takes_any_yaml_value(minimal: Path, override: str, read: Any) -> None:
    assert read(load_settings(minimal, [override]))


def test_set_reaches_into_lists(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("data: {events: [{paths: a.csv}]}")
    two.write_text("data: {events: [{paths: a.csv}, {paths: b.csv}]}")
    assert load_settings(one, ["data.events.paths=x"]).data.events[0].paths == ["x"]
    assert load_settings(one, ["data.events.0.paths=x"]).data.events[0].paths == ["x"]
    assert [e.paths for e in load_settings(two, ["data.events.1.paths=x"]).data.events] == [["a.csv"], ["x"]]
    assert "0 to 1" in sentence(two, "data.events.paths=x")
    assert "0 to 1" in sentence(two, "data.events.2.paths=x")
    empty = tmp_path / "empty.yaml"
    empty.write_text("data: {events: []}")
    assert "empty" in sentence(empty, "data.events.paths=x")


def test_one_setting_of_the_space_can_be_set_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(MINIMAL + "tune: {space: {model.dim: [32], model.gate: [mean]}}\n")
    assert load_settings(path, ["tune.space.model.dim=[64]", "tune.space.train.crop={min: 0, max: 1}"]).tune.space == {
        "model.dim": [64],
        "model.gate": ["mean"],
        "train.crop": {"min": 0, "max": 1},
    }


def test_later_overrides_win_and_the_file_is_not_touched(minimal: Path) -> None:
    assert load_settings(minimal, ["train.epochs=3", "train.epochs=4"]).train.epochs == 4
    assert minimal.read_text() == MINIMAL


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.epochs", "section.key=value"),
        ("=3", "section.key=value"),
        ("train.epochs=[1", "not valid YAML"),
        ("train.epochs=!!python/object:os.system {}", "not valid YAML"),
        ("train.epochs.deep=3", "unknown setting"),
        ("name.deep=3", "unknown setting"),
        ("data.events.paths.deep=3", "drop what follows"),
        ("train.epochs=0", "train.epochs"),
        ("train.epochs=many", "got 'many'"),
        ("train.epoch=3", "did you mean train.epochs?"),
        ("data.evnts=[]", "did you mean data.events?"),
        ("data.events.colums.user_id=u", "did you mean data.events.0.columns?"),
        ("data.events.columns.usr_id=u", "did you mean data.events.0.columns.user_id?"),
        ("data.items={paths: a, txt: b}", "did you mean data.items.text?"),
        ("modle.dim=3", "did you mean model?"),
        ("data.split=random", "leave_one_out"),
        ("data.events=[]", "data.events"),
        ("data.events={}", "data.events.0.paths is missing"),
        ("data.events.paths=[]", "data.events.0.paths: the list is empty"),
        ("data.events.paths=''", "data.events.0.paths: a value is empty"),
        ("data.items={paths: [a.csv, ' ']}", "data.items.paths: a value is empty"),
        (
            "data.items={paths: a.csv, text: []}",
            "data.items.text: the list is empty; write something into it, or leave",
        ),
        ("data.items={paths: a.csv, text: ''}", "data.items.text: a value is empty"),
        ("data.target_actions=[]", "data.target_actions: the list is empty"),
        ("data.events.keep=[{column: a}]", "exactly one of matches, above and below"),
        ("data.events.keep=[{column: a, above: 1, below: 2}]", "exactly one of matches, above and below"),
        ("data.events.keep=[{column: a, matches: '(?<=x)'}]", "RE2"),
        ("data.events={paths: a, action: buy, columns: {action: what}}", "not both"),
        ("model.dim=15", "multiple of short_heads"),
        ("model={id_embeddings: false, text_dim: 0}", "text_dim"),
    ],
)
def test_a_wrong_override_gets_one_sentence(minimal: Path, override: str, says: str) -> None:
    if override.startswith(("train.epochs.deep", "name.deep")):
        says = "value, not a section" if override.startswith("name") else "epochs"
        minimal.write_text(MINIMAL + "name: a\ntrain: {epochs: 3}\n")
    assert says in sentence(minimal, override)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"data: [", "not valid YAML"),
        (b"data:\n\t- x", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"[1, 2]", "must hold sections"),
        (b"hello", "must hold sections"),
        (b"", "data is missing"),
        (b"data:", "data"),
        (b"data: 3", "data"),
        (b"1: 2", "1"),
    ],
)
def test_a_broken_file_gets_one_sentence(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text)
    message = sentence(path)
    assert says in message
    assert "broken.yaml" in message


def test_a_file_that_cannot_be_read_gets_one_sentence(tmp_path: Path) -> None:
    assert "--config" in sentence(tmp_path / "absent.yaml")
    assert "--config" in sentence(tmp_path)


def test_several_problems_are_counted_and_the_misspelling_comes_first(minimal: Path) -> None:
    message = sentence(minimal, "train.epochs=0", "train.workers=0", "train.epoch=1")
    assert "train.epochs?" in message
    assert "(and 2 more)" in message


@given(st.data())
def test_every_misspelt_name_gets_a_valid_one(data: st.DataObject) -> None:
    section, model = data.draw(st.sampled_from(sections()))
    name = data.draw(st.sampled_from(sorted(model.model_fields)))
    cut = data.draw(st.integers(0, len(name) - 1))
    wrong = name[:cut] + name[cut + 1 :]
    if wrong in model.model_fields:
        return
    tree: dict[str, Any] = {"data": {"events": {"paths": "a.csv"}}}
    tree.setdefault(section, {})[wrong] = 1
    with pytest.raises(SpringtideError) as caught:
        parse_settings(tree)
    hint = str(caught.value).split("did you mean ")[1].split("?")[0]
    assert hint.removeprefix(f"{section}.") in model.model_fields


def test_settings_survive_a_round_trip_and_change_only_where_told(minimal: Path) -> None:
    settings = load_settings(minimal, ["data.items={paths: items.csv, text: [a, b]}", "tune.trials=3"])
    assert with_values(settings, {}) == settings
    changed = with_values(settings, {"model.dim": 32, "data.events.paths": "b.csv"})
    assert (changed.model.dim, changed.data.events[0].paths) == (32, ["b.csv"])
    assert changed.data.items == settings.data.items
    with pytest.raises(SpringtideError, match=r"model\.dim"):
        with_values(settings, {"model.dmi": 32})
    with pytest.raises(ValueError, match="frozen"):
        settings.name = "other"


def test_positions_may_stand_for_names_in_a_text(minimal: Path) -> None:
    items = load_settings(
        minimal, ["data.items={paths: i.tsv, columns: {item_id: 0, title: 1}, text: [1, 2]}"]
    ).data.items
    assert items is not None
    assert items.text == ["1", "2"]


def test_set_by_path_makes_missing_sections() -> None:
    tree: dict[str, Any] = {"a": None}
    set_by_path(tree, "a.b.c", 1)
    set_by_path(tree, "d", 2)
    assert tree == {"a": {"b": {"c": 1}}, "d": 2}


# ---------------------------------------------------------------- what follows from other settings
def test_what_is_absent_follows_from_the_split(minimal: Path) -> None:
    for split, asked, share in (("temporal", True, 0.1), ("leave_one_out", False, 1.0)):
        settings = load_settings(minimal, [f"data.split={split}"])
        assert (settings.model.request_time, settings.train.within_session) == (asked, share)
        assert Settings.model_validate(settings.model_dump(mode="json")) == settings
    given = load_settings(minimal, ["data.split=temporal", "model.request_time=false", "train.within_session=0.5"])
    assert (given.model.request_time, given.train.within_session) == (False, 0.5)
    other = with_values(load_settings(minimal), {"data.split": "temporal"})
    assert (other.model.request_time, other.train.within_session) == (True, 0.1)


def test_a_model_is_as_wide_and_deep_as_its_log_is_long_unless_told(minimal: Path) -> None:
    def size(kept: int, *overrides: str) -> ModelConfig:
        report = {"totals": {"kept": kept}}
        settings = with_values(load_settings(minimal, list(overrides)), {"name": "written out"})  # as every job does
        return sized(settings, SimpleNamespace(report=report)).model  # type: ignore

    def width(kept: int, *overrides: str) -> int:
        return size(kept, *overrides).dim

    assert width(1000) < width(1_000_000) < width(10**9)
    assert width(1000, "model.dim=48") == width(10**9, "model.dim=48") == 48
    assert width(1000, "model.preset=gru") == width(10**9, "model.preset=gru") == 50
    assert width(1000, "data.split=temporal") == width(1000)  # what follows from the split is no width
    assert (size(1000).long_layers, size(10**9).long_layers) == (1, 2)
    assert size(10**9, "model.long_layers=1").long_layers == 1
    assert size(1000, "model.preset=gru").long_layers == 2
