"""A preset that is not the default, trained, bundled and judged through the comparison on a real cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from springtide.bundle import load_bundle
from springtide.evaluation.compare import run
from toy import toy_settings
from write_workspace import write_workspace

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_a_preset_with_its_heads_trains_on_two_workers(ray_session: Any, tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path)
    values = {"compare__presets": ["cnn_lstm_attention"], "compare__epochs": 3, "train__workers": 2}
    run(toy_settings(workspace, model__long_hidden=12, **values))
    row = json.loads((workspace / "compare.json").read_text())["rows"][0]
    assert row["name"] == "cnn_lstm_attention" and row["epochs"] == 3 and 0 < row["mae"] < 5
    bundle = load_bundle(workspace / "compare" / "cnn_lstm_attention" / "bundle")
    losses = [epoch["loss"] for epoch in bundle.metrics["epochs"]]
    assert losses[-1] < losses[0] and bundle.settings.train.heads == (0.3, 0.3)
