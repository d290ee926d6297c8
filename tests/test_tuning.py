"""The search space, and how many trials a cluster can hold without a deadlock."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from springtide.config import ModelConfig, Settings, as_given, load_settings, parse_settings, with_values
from springtide.data.prepared import load_prepared
from springtide.errors import SpringtideError
from springtide.training.worker import STOPPED
from springtide.tuning import job
from springtide.tuning.job import tune_config
from springtide.tuning.release import trial_folder
from springtide.tuning.space import check_space, concurrent_trials, param_space
from toy import toy_settings
from write_workspace import write_workspace


def settings(tmp_path: Path, **space: object) -> Settings:
    return with_values(toy_settings(tmp_path), {"tune.space": {key.replace("__", "."): v for key, v in space.items()}})


def test_the_default_space_is_valid(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_space(toy_settings(tmp_path))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("key", "domain", "said"),
    [
        ("model__gat", ["channel"], "did you mean model.gate?"),
        ("model__gate", ["chanel"], "model.gate"),
        ("model__dim", [], "give a list of choices"),
        ("train__learning_rate", {"min": 0, "max": 1, "log": True}, "log needs min above 0"),
        ("train__learning_rate", {"min": 2, "max": 1}, "min below max"),
        ("train__learning_rate", {"min": 0.1, "max": 1, "lgo": True}, "give a list"),
        ("train__learning_rate", {"min": "low", "max": 1}, "give a list"),
        ("train__learning_rate", {"min": False, "max": True}, "give a list"),
        ("train__crop", {"min": 0, "max": float("inf")}, "give a list"),
        ("train__crop", {"min": 0, "max": 10**400}, "give a list"),
        ("train__crop", {"min": 0.5, "max": 1.5}, "no trial can have train.crop=1.5: train.crop"),
        ("train__seed", {"min": 0.5, "max": 7}, "tune.space train.seed: it varies in whole numbers"),
        ("train__crop", {"min": 0, "max": 0.5, "integer": True}, "tune.space train.crop: it varies in whole numbers"),
        ("model__dim", {"min": 32, "max": 128}, r"must be a multiple of short_heads \(2\)"),
        ("model__dim", {"min": 4, "max": 6, "integer": True}, r"model.dim=5: model: dim \(5\) must be a multiple"),
        ("model__use_rating", {"min": 0, "max": 1}, "no trial can have model.use_rating=0.5"),
        ("data__min_user_events", [1, 2], "only settings of model and train"),
        ("train__workers", [1, 2], "the same for all trials"),
        ("train__epochs", [1, 2], "the same for all trials"),
        ("model", [{"dim": 16}], "only settings of model and train"),
    ],
)
def test_a_wrong_space_is_refused_with_its_name(tmp_path: Path, key: str, domain: object, said: str) -> None:
    with pytest.raises(SpringtideError, match=said.replace("?", r"\?")):
        check_space(settings(tmp_path, **{key: domain}))


def test_values_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    branches = {"model__long_branch": ["none", "lstm"], "model__short_branch": ["none", "attention"]}
    with pytest.raises(SpringtideError, match="no trial can have model.long_branch=none, model.short_branch=none: "):
        check_space(settings(tmp_path, **branches))
    many = {f"train__{name}": {"min": 1, "max": 99} for name in ("seed", "patience", "negatives", "cache_mb")}
    check_space(settings(tmp_path, **many))
    with pytest.raises(SpringtideError, match="both none"):  # though not every combination can be tried
        check_space(settings(tmp_path, **many, **branches))


def test_values_that_only_go_with_each_other_are_taken(tmp_path: Path) -> None:
    check_space(
        settings(tmp_path, model__short_heads=[3], model__dim=[12, 48])
    )  # alone, 3 heads do not fit a dim of 16


def test_ranges_become_samplers_within_their_ends(tmp_path: Path) -> None:
    ranges: dict[str, Any] = {
        "train__patience": {"min": 8, "max": 9},
        "train__negatives": {"min": 8, "max": 9, "log": True},
        "train__crop": {"min": 0, "max": 1, "integer": True},
        # As YAML reads 1e-3, without a dot.
        "train__learning_rate": {"min": "1e-3", "max": "1e-2", "log": True},
    }
    checked = settings(tmp_path, **ranges)
    check_space(checked)
    space = param_space(checked.tune.space)
    assert {space["train.patience"].sample() for _ in range(50)} == {8, 9}
    assert {space["train.negatives"].sample() for _ in range(50)} == {8, 9}
    assert {space["train.crop"].sample() for _ in range(50)} == {0, 1}
    assert all(1e-3 <= space["train.learning_rate"].sample() <= 1e-2 for _ in range(50))


@pytest.mark.parametrize(
    ("model", "space", "idle"),
    [
        (
            {"preset": "lstm"},
            {"model.gate": ["mean", "scalar"], "model.gate_hidden": [0, 8]},
            "gate, model.gate_hidden",
        ),
        ({"fusion": "sum"}, {"model.gate": ["mean", "scalar"], "train.seed": [0, 1]}, "gate"),
        ({"gate": "mean"}, {"model.gate_hidden": [0, 8]}, "gate_hidden"),
        ({"long_branch": "none"}, {"model.fusion": ["sum", "gate"]}, "fusion"),
        ({"short_branch": "none"}, {"model.short_heads": [1, 2]}, "short_heads"),
        # Where it counts in some trials, there is a point in it.
        ({}, {"model.gate": ["mean", "scalar"], "model.gate_hidden": [0, 8]}, None),
        ({"fusion": "sum"}, {"model.fusion": ["gate", "sum"], "model.gate": ["mean", "scalar"]}, None),
        ({"short_branch": "none", "long_branch": "transformer"}, {"model.short_heads": [1, 2]}, None),
    ],
    ids=str,
)
def test_what_varies_without_effect_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: dict[str, Any], space: dict[str, Any], idle: str | None
) -> None:
    tree = as_given(toy_settings(tmp_path)) | {"model": model, "tune": {"space": space}}
    with caplog.at_level(logging.WARNING):
        check_space(parse_settings(tree))
    told = [f"tune.space varies model.{idle}, which changes nothing beside the other settings"] if idle else []
    assert caplog.messages == told


@given(cpus=st.floats(1, 256), workers=st.integers(1, 8), each=st.floats(0.1, 4), trials=st.integers(1, 50))
def test_the_trials_that_run_at_once_leave_a_cpu_for_reading(
    cpus: float, workers: int, each: float, trials: int
) -> None:
    chosen = with_values(
        toy_settings(Path("/nowhere")),
        {"tune.workers_per_trial": workers, "train.cpus_per_worker": each, "tune.trials": trials},
    )
    per_trial = 0.1 + workers * each
    try:
        running = concurrent_trials(cpus, 0, chosen, 0.1)
    except SpringtideError:
        assert cpus - 1 < per_trial
        return
    assert 1 <= running <= trials
    assert running * per_trial <= cpus - 1 + 1e-6
    assert running == trials or (running + 1) * per_trial > cpus - 1 - 1e-6


def test_two_cores_run_one_trial_at_a_time(tmp_path: Path) -> None:
    assert concurrent_trials(2, 0, toy_settings(tmp_path), 0.1) == 1


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_search_holds_trials_back(tmp_path: Path, at_once: int) -> None:
    """Ray ignores max_concurrent_trials beside this search_alg, so the limit must be the search's own."""
    config = tune_config(with_values(toy_settings(tmp_path), {"tune.trials": 5}), at_once)
    assert config.max_concurrent_trials is None and config.num_samples == 5
    assert config.search_alg.max_concurrent == at_once


def test_a_trial_that_diverged_says_why(tmp_path: Path) -> None:
    """It ends without an error that Tune would answer by trying again, from the same weights."""
    folder = trial_folder(str(tmp_path), "b")
    folder.mkdir(parents=True)
    (folder / STOPPED).write_text("the loss is not finite in epoch 2", encoding="utf-8")
    assert job._stopped(tmp_path, "b") == job._stopped(tmp_path, None) == "the loss is not finite in epoch 2"
    assert job._stopped(tmp_path, "a") is None


# ---------------------------------------------------------------- a trial, and what is made of the best one
def unsized(workspace: Path) -> Settings:
    """Settings that leave the size of the model to the preset or the log."""
    return parse_settings(as_given(toy_settings(workspace)) | {"model": {}})


def trial(monkeypatch: pytest.MonkeyPatch, settings: Settings, varied: dict[str, Any], train: Any) -> Path:
    """Run a trial in this process with `train` in the place of Ray Train. Returns its folder."""
    monkeypatch.setattr("ray.tune.get_context", lambda: SimpleNamespace(get_trial_id=lambda: "a"))
    monkeypatch.setattr("ray.tune.integration.ray_train.TuneReportCallback", lambda: None)
    monkeypatch.setattr(job, "train", train)
    runs = Path(settings.workspace) / "runs"
    job.run_trial({**varied, "base": as_given(job.base_of(settings)), "runs": str(runs)})
    return trial_folder(str(runs), "a")


def test_a_trial_of_a_preset_has_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[ModelConfig] = []

    def train(settings: Settings, *_: Any) -> None:
        trained.append(settings.model)

    settings = unsized(write_workspace(tmp_path))
    for varied in ({"model.preset": "lstm"}, {"model.preset": "bert_lstm"}, {"model.gate": "mean"}):
        trial(monkeypatch, settings, varied, train)
    assert [(model.dim, model.long_layers) for model in trained] == [(50, 2), (32, 2), (32, 1)]


def test_a_trial_that_cannot_run_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any) -> None:
        raise SpringtideError("embed has not run; run it first")

    settings = unsized(write_workspace(tmp_path))
    for varied, said in (({}, "embed has not run; run it first"), ({"model.dim": 15}, "must be a multiple")):
        folder = trial(monkeypatch, settings, varied, train)
        assert said in (folder / STOPPED).read_text()


def test_a_worker_that_died_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any) -> None:
        raise RuntimeError("worker 0 died")

    with pytest.raises(RuntimeError, match="worker 0 died"):
        trial(monkeypatch, unsized(write_workspace(tmp_path)), {}, train)


def test_the_bundle_is_there_before_anything_tells_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, folder = unsized(write_workspace(tmp_path)), tmp_path / "tune"
    prepared, bundled = load_prepared(str(tmp_path)), []
    row = {"trial": "a", "settings": {"model.preset": "lstm"}, "ndcg": 0.2, "ndcg@10": 0.1, "epochs": 1}
    rows = [row | {"seconds": 1.0, "error": None}]
    monkeypatch.setattr(job, "read_progress", lambda checkpoint: None)

    def interrupted(chosen: Settings, *_: Any) -> None:
        bundled.append(chosen)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "write_trained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.publish(settings, prepared, rows, tmp_path / "run" / "checkpoint")
    assert not folder.exists()
    monkeypatch.setattr(job, "write_trained", lambda chosen, *_: bundled.append(chosen) or {"validation": {}})
    assert job.publish(settings, prepared, rows, tmp_path / "run" / "checkpoint") == {"validation": {}}
    assert json.loads((folder / "trials.json").read_text()) == rows and (folder / "trials.csv").exists()
    assert bundled[0] == bundled[1] == load_settings(folder / "best.yaml")
    assert (bundled[0].model.dim, bundled[0].model.long_layers, bundled[0].train.epochs) == (50, 2, 2)
    # What the preset says is left to it, so that another one takes effect.
    assert yaml.safe_load((folder / "best.yaml").read_text())["model"] == {"preset": "lstm"}
