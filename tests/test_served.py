"""Bundles that are served: copied by version, never changed, and removed only when nothing names them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from springtide.bundle import load_bundle
from springtide.errors import SpringtideError
from springtide.serving import served
from springtide.serving.deploy import check_kept
from springtide.serving.deployments import _load_engine
from springtide.serving.options import ScorerOptions
from springtide.serving.served import FOLDER, keep, prune, served_path, version_of
from toy import toy_bundle

DAY_S = 86_400


def kept(workspace: Path, seed: int) -> Path:
    source = toy_bundle(workspace, seed=seed)
    version = version_of(source)
    keep(source, workspace, version)
    return served_path(workspace, version)


def test_what_is_served_outlives_the_next_training_and_damage(tmp_path: Path) -> None:
    first = kept(tmp_path, 0)
    version = load_bundle(first).version
    assert first.name == version
    weights = tmp_path / "bundle" / "model.safetensors"
    with weights.open("r+b") as file:  # in place
        file.write(b"damaged")
    assert load_bundle(first).version == version
    second = kept(tmp_path, 1)
    assert load_bundle(first).version == version != load_bundle(second).version == second.name


def test_a_copy_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    copy = kept(tmp_path, 0)
    (copy / "items.parquet").unlink()
    keep(tmp_path / "bundle", tmp_path, copy.name)
    assert load_bundle(copy).version == copy.name


def test_another_bundle_is_no_copy_of_the_version(tmp_path: Path) -> None:
    source = toy_bundle(tmp_path)
    with pytest.raises(SpringtideError, match="replaced while it was deployed"):
        keep(source, tmp_path, "0123456789ab")
    assert not served_path(tmp_path, "0123456789ab").exists()
    config = {
        "applications": [
            {"deployments": [{"user_config": {"bundle": str(tmp_path / "none"), "version": "0123456789ab"}}]}
        ]
    }
    with pytest.raises(SpringtideError, match="replaced while it was deployed"):
        check_kept(config)


def test_a_scorer_serves_no_other_version_than_its_own(tmp_path: Path) -> None:
    source = toy_bundle(tmp_path)
    assert _load_engine(ScorerOptions(bundle=str(source), version=version_of(source))).bundle.version
    with pytest.raises(SpringtideError, match="the configuration says 0123456789ab; deploy again"):
        _load_engine(ScorerOptions(bundle=str(source), version="0123456789ab"))


def test_only_what_nothing_names_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "KEPT", 2)
    now = time.time()
    for age in range(7):
        folder = tmp_path / FOLDER / f"v{age}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
        os.utime(folder / "manifest.json", (now - age * DAY_S / 2, now - age * DAY_S / 2))
    running = {"applications": {"x": {"deployments": [{"user_config": {"bundle": str(tmp_path / FOLDER / "v5")}}]}}}
    further = {"models": {"b": {"bundle": str(tmp_path / FOLDER / "v4")}}}
    assert prune(tmp_path, [running, further], now + 1) == ["v2", "v3", "v6"]
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["v0", "v1", "v4", "v5"]
    assert prune(tmp_path / "nothing", [running]) == []
