"""The command line of the jobs: one sentence, a result file, and the right exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from springtide import jobs
from springtide.config import Settings
from springtide.errors import SpringtideError


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "experiment.yaml"
    tree = {"workspace": str(tmp_path / "workspace"), "data": {"events": {"paths": str(tmp_path / "log.csv")}}}
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def result(tmp_path: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "workspace" / "results" / f"{stage}.json").read_text()))


def test_a_missing_log_is_one_sentence_and_exit_1(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        jobs.main("prepare", ["--config", config])
    assert stopped.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("prepare: there is no file or folder") and "correct the data paths" in said
    assert result(tmp_path, "prepare")["status"] == "failed"
    assert not (tmp_path / "workspace" / "prepared").exists()


@pytest.mark.parametrize("stage", ["embed", "train", "tune", "evaluate", "compare", "recommend"])
def test_a_stage_without_the_one_before_says_which_to_run(
    stage: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        jobs.main(stage, ["--config", config])
    assert stopped.value.code == 1
    assert "run the prepare job" in capsys.readouterr().err


def test_an_unknown_key_names_the_nearest(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        jobs.main("train", ["--config", config, "--set", "train.epoch=3"])
    assert "did you mean train.epochs?" in capsys.readouterr().err


def test_a_fault_of_ours_shows_the_traceback(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr("springtide.data.prepare.run", broken)
    with pytest.raises(SystemExit):
        jobs.main("prepare", ["--config", config])
    said = capsys.readouterr().err
    assert "Traceback" in said and "prepare: unexpected ZeroDivisionError: by design" in said


def test_the_sentence_is_found_inside_other_errors(tmp_path: Path) -> None:
    class Wrapper(Exception):
        def __init__(self, cause: BaseException) -> None:
            super().__init__("wrapped")
            self.cause = cause

    assert jobs.explain(Wrapper(Wrapper(SpringtideError("the sentence"))), tmp_path) == "the sentence"
    full = jobs.explain(Wrapper(OSError(28, "No space left on device", "/data/x")), tmp_path)
    assert full is not None and "cannot write /data/x: No space left on device" in full
    assert jobs.explain(ValueError("ours"), tmp_path) is None


def test_a_relative_workspace_is_refused_inside_a_submitted_job(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(SystemExit):
        jobs.main("prepare", ["--config", config, "--set", "workspace=here"])
    assert "give an absolute path" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()


def test_paths_become_absolute(config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[Settings] = []

    def keep(settings: Settings) -> dict[str, Any]:
        found.append(settings)
        return {}

    monkeypatch.setattr("springtide.data.prepare.run", keep)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    (tmp_path / "default").mkdir()
    jobs.main("prepare", ["--config", config, "--set", "workspace=~/mine", "--set", "text.encoder=bert"])
    jobs.main("prepare", ["--config", config, "--set", "workspace=here"])
    jobs.main("prepare", ["--config", config, "--set", "text.encoder=some/model"])
    assert [s.workspace for s in found] == [str(tmp_path / name) for name in ("mine", "here", "workspace")]
    assert [s.text.encoder for s in found] == [str(tmp_path / "bert"), "default", "some/model"]
    assert (tmp_path / "mine" / "results" / "prepare.json").exists()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(SystemExit):
        jobs.main("prepare", ["--config", config, "--set", "text.encoder=bert"])
    assert len(found) == 3
