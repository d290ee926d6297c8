"""The search space, and how many trials a cluster can hold without a deadlock."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.config import Settings, with_values
from springtide.errors import SpringtideError
from springtide.training.worker import STOPPED
from springtide.tuning import job
from springtide.tuning.job import tune_config
from springtide.tuning.release import trial_folder
from springtide.tuning.space import check_space, concurrent_trials, param_space
from toy import toy_settings


def settings(tmp_path: Path, **space: object) -> Settings:
    return with_values(toy_settings(tmp_path), {"tune.space": {key.replace("__", "."): v for key, v in space.items()}})


def test_the_default_space_is_valid(tmp_path: Path) -> None:
    check_space(toy_settings(tmp_path))


@pytest.mark.parametrize(
    ("key", "domain", "said"),
    [
        ("model__gat", ["channel"], "did you mean model.gate?"),
        ("model__gate", ["chanel"], "model.gate"),
        ("model__dim", [], "give a list of choices"),
        ("train__learning_rate", {"min": 0, "max": 1, "log": True}, "log needs min above 0"),
        ("train__learning_rate", {"min": 2, "max": 1}, "min below max"),
        ("train__learning_rate", {"min": 0.1, "max": 1, "lgo": True}, "give a list"),
        ("data__min_user_events", [1, 2], "only settings of model and train"),
        ("train__workers", [1, 2], "the same for all trials"),
        ("train__epochs", [1, 2], "the same for all trials"),
        ("model", [{"dim": 16}], "only settings of model and train"),
    ],
)
def test_a_wrong_space_is_refused_with_its_name(tmp_path: Path, key: str, domain: object, said: str) -> None:
    with pytest.raises(SpringtideError, match=said.replace("?", r"\?")):
        check_space(settings(tmp_path, **{key: domain}))


def test_ranges_become_samplers_within_their_ends() -> None:
    space = param_space(
        {
            "model.dim": {"min": 8, "max": 9, "integer": True},
            "train.learning_rate": {"min": 1e-3, "max": 1e-2, "log": True},
        }
    )
    assert {space["model.dim"].sample() for _ in range(50)} == {8, 9}
    assert all(1e-3 <= space["train.learning_rate"].sample() <= 1e-2 for _ in range(50))


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
