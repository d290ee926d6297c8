"""The comparison of presets: its figures by hand, and the whole stage with Ray's part played by one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from springtide.bundle import load_bundle
from springtide.config import Settings
from springtide.data.prepared import Prepared
from springtide.errors import SpringtideError
from springtide.evaluation import compare
from springtide.evaluation import compare_metrics as beyond
from springtide.evaluation.ranking import build_cases, flatten
from springtide.files import write_json, write_manifest
from springtide.presets import PRESETS
from springtide.schemas import SEQUENCES, TEST, TRAIN
from springtide.training import job
from springtide.training.loop import Progress, fit, make_optimizer
from springtide.training.sequences import from_table
from springtide.training.texts import feature_rows, fit_texts
from springtide.training.worker import ShardFeed, build_model, write_inputs
from toy import ITEMS_IN_TOY, tables_of, toy_items, toy_log, toy_settings
from write_workspace import USERS, write_workspace

TRAIN_AND_VALID = len(toy_log(USERS)) - USERS  # the last event of each is for the test
CHOSEN = ["lstm", "bert_lstm", "cnn_lstm_attention"]


# ---------------------------------------------------------------- figures
def test_click_figures_by_hand() -> None:
    found = beyond.click_figures(np.array([0.9, 0.5, 0.2, 0.7]), np.array([0.1, 0.6, 0.4, 0.3]))
    assert found == pytest.approx({"accuracy": 6 / 8, "precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4})
    nothing = beyond.click_figures(np.zeros(2), np.zeros(2))
    assert nothing == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0}
    assert beyond.click_figures(np.zeros(0), np.zeros(0))["accuracy"] == 0


def test_errors_count_rated_targets_only() -> None:
    ratings = np.array([1, np.nan, 5], np.float32)
    assert beyond.mean_absolute_error(np.array([2.0, 99.0, 2.0]), ratings) == 2
    assert beyond.mean_absolute_error(np.zeros(1), np.array([np.nan])) is None


def test_negatives_are_what_the_user_never_takes(tmp_path: Path) -> None:
    table = Prepared(write_workspace(tmp_path) / "prepared", "toy").sequences()
    events = flatten(table, ITEMS_IN_TOY)
    cases = build_cases(events, TEST, "leave_one_out")
    drawn = beyond.draw_negatives(cases)
    assert np.array_equal(drawn, beyond.draw_negatives(cases)) and len(set(drawn.tolist())) > 10
    trained = set(events.items[events.parts == TRAIN].tolist())
    for case, item in enumerate(drawn.tolist()):
        assert item in trained - {*cases.history(case).items.tolist(), int(cases.targets[case])}
    last = {row["user_id"]: row["ratings"][-1] for row in table.to_pylist()}
    expected = [last[user] for user in events.user_ids.take(cases.users).to_pylist()]
    assert events.ratings[cases.rows].tolist() == expected


# ---------------------------------------------------------------- the stage
class Shard:
    def __init__(self, table: Any) -> None:
        self.table = table

    def iter_batches(self, **_: Any) -> Any:
        yield self.table


TRAINED: list[str] = []
REFITTED: list[str] = []


def train_here(
    settings: Settings, prepared: Prepared, run_folder: Path, submitted: float, refit: bool = False
) -> Progress:
    """training.job.train in this process."""
    (REFITTED if refit else TRAINED).append(settings.model.preset)
    table = prepared.sequences().combine_chunks()
    run_folder.mkdir(parents=True)
    tables = tables_of(from_table(table, 0, refit), len(prepared.items), settings.model)
    features = fit_texts(settings, prepared, "meaning")
    rows = feature_rows(settings, prepared, features)
    write_inputs(run_folder / "inputs.safetensors", tables, rows, features)
    write_json(run_folder / job.CHOICES, {"text_features": "meaning"})
    model, _ = build_model(settings, len(prepared.actions), run_folder / "inputs.safetensors")
    feed = ShardFeed(Shard(table), settings.model, settings.train, 0.0, refit, None)

    def after(progress: Progress) -> None:
        progress.epochs[-1] |= {"first_step_seconds": 0.1, "report_seconds": 0.5}

    return fit(
        model,
        make_optimizer(model, settings.train),
        feed,
        settings.train,
        settings.data.exclude_seen,
        Progress(),
        after,
    )


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (compare, job):
        monkeypatch.setattr(module, "train", train_here)
    TRAINED.clear()
    REFITTED.clear()
    return write_workspace(tmp_path / "toy")


def settings_of(workspace: Path, **values: Any) -> Settings:
    given = {"compare__presets": CHOSEN, "compare__epochs": 2, "evaluate__bootstrap": 100, "model__long_hidden": 12}
    return toy_settings(workspace, **(given | values))


def rows_of(workspace: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((workspace / "compare.json").read_text())["rows"]}


def test_models_are_not_judged_by_what_they_were_fitted_on(workspace: Path) -> None:
    with pytest.raises(SpringtideError, match="cannot be judged by them"):
        compare.run(settings_of(workspace, evaluate__part="valid", train__refit=True))
    assert TRAINED == []


def test_every_preset_gets_a_line(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = compare.run(settings_of(workspace))
    rows, said = rows_of(workspace), capsys.readouterr().out
    assert list(rows)[:3] == CHOSEN and list(rows)[-1] == compare.MEAN_RATING and "popularity" in rows
    for name in CHOSEN:
        row, bundle = rows[name], load_bundle(workspace / "compare" / name / "bundle")
        assert bundle.settings.model.preset == name and bundle.settings.train.heads == (0.3, 0.3)
        assert bundle.settings.model.long_hidden == 12  # what is given is given to all of them
        assert bundle.recommender.popularity.sum() == TRAIN_AND_VALID
        assert row["epochs"] == 2 and row["parameters"] == bundle.metrics["parameters"]
        assert row["wall_seconds"] > 1 and row["cpu_seconds"] > 0
        for figure in ("accuracy", "precision", "recall", "f1", "hr@10", "ndcg@10", "mrr@20", "coverage@10"):
            assert 0 <= row[figure] <= 1, figure
        assert 0 < row["mae"] < 5 and 0 < row["diversity@10"] < 2 and row["novelty@10"] > 0
        low, high = row["ndcg@10_interval"]
        assert low <= row["ndcg@10"] <= high
        assert result["ndcg@10"][name] == row["ndcg@10"]
        assert not (workspace / "compare" / name / "runs").exists()
    assert set(rows[compare.MEAN_RATING]) == {"name", "mae"} and "accuracy" not in rows["popularity"]
    page = (workspace / "compare.md").read_text()
    for name in rows:
        assert f"| {name} |" in page and f"\n{name} " in said
    assert "–" in page and f"{USERS} of them" in page
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1


def test_what_is_given_is_given_to_every_preset(tmp_path: Path) -> None:
    """Also where it is what the settings' own preset says anyway."""
    given = {"model__dropout": 0.3, "model__text_dim": 128}
    model = compare.settings_of(toy_settings(tmp_path, **given), "lstm").model
    assert (model.dropout, model.text_dim, model.long_hidden) == (0.3, 128, 50)


def test_a_preset_that_cannot_take_the_settings_is_told_before_any_is_trained(workspace: Path) -> None:
    settings = settings_of(workspace, compare__presets=["lstm", "bert_lstm"], model__text_dim=0)
    with pytest.raises(SpringtideError, match="compare, preset bert_lstm: model: id_embeddings: false needs text_dim"):
        compare.run(settings)
    assert TRAINED == []


def test_what_was_trained_is_not_trained_again(workspace: Path) -> None:
    compare.run(settings_of(workspace))
    first = rows_of(workspace)
    compare.run(settings_of(workspace))
    assert TRAINED == REFITTED == CHOSEN and rows_of(workspace) == first
    compare.run(settings_of(workspace, train__learning_rate=1e-3, compare__presets=["lstm"]))
    assert [*CHOSEN, "lstm"] == TRAINED
    (workspace / "compare" / "lstm" / "trained.json").unlink()  # stopped before it was done
    compare.run(settings_of(workspace, train__learning_rate=1e-3, compare__presets=["lstm", "lstm"]))
    assert [*CHOSEN, "lstm", "lstm"] == TRAINED
    # No weight depends on it, but what the bundle recommends.
    compare.run(settings_of(workspace, train__learning_rate=1e-3, train__coverage_cost=0, compare__presets=["lstm"]))
    assert [*CHOSEN, "lstm", "lstm", "lstm"] == TRAINED


def rewrite(workspace: Path, **columns: Any) -> None:
    """Change columns of the prepared sequences."""
    for file in (workspace / "prepared" / "sequences").iterdir():
        rows = pq.read_table(file).to_pylist()
        for row in rows:
            row |= {name: [value] * len(row["items"]) for name, value in columns.items()}
        pq.write_table(SEQUENCES.empty_table().from_pylist(rows, SEQUENCES), file)
    write_manifest(workspace / "prepared", {"content_hash": "changed"})


def test_a_log_without_texts_ratings_and_times(workspace: Path) -> None:
    rewrite(workspace, ratings=float("nan"), timestamps=0)
    items = toy_items()
    plain = items.set_column(items.schema.get_field_index("text"), items.schema.field("text"), [[""] * len(items)])
    pq.write_table(plain, workspace / "prepared" / "items" / "part-0.parquet")
    write_json(
        workspace / "prepared" / "report.json",
        {
            "users": USERS,
            "totals": {"kept": 600},
            "split": {"valid": USERS, "cuts_ms": []},
            "catalogue": {"with_text": 0},
        },
    )
    write_manifest(workspace / "prepared", {"content_hash": "changed"})
    compare.run(settings_of(workspace, compare__presets=list(PRESETS), compare__epochs=1))
    rows = rows_of(workspace)
    assert rows["bert_lstm"] == {"name": "bert_lstm", "note": "left out: it reads texts alone, and no item has one"}
    assert [name for name in PRESETS if name != "bert_lstm"] == TRAINED and compare.MEAN_RATING not in rows
    for name in TRAINED:
        assert rows[name]["mae"] is None and 0 <= rows[name]["ndcg@10"] <= 1 and rows[name]["diversity@10"] > 0
        assert load_bundle(workspace / "compare" / name / "bundle").settings.train.heads == (0, 0.3)
    assert "bert_lstm left out" in (workspace / "compare.md").read_text()


def test_nothing_to_test_on_is_told(workspace: Path) -> None:
    with pytest.raises(SpringtideError, match="split: none has nothing to test on"):
        compare.run(settings_of(workspace, data__split="none"))
    rewrite(workspace, targets=False)
    with pytest.raises(SpringtideError, match="the test part holds no event to predict"):
        compare.run(settings_of(workspace))
