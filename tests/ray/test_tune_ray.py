"""A search on a small cluster: no more trials at once than fit, ASHA stops some, and nothing is left behind."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.placement_group import placement_group_table

from springtide.bundle import load_bundle
from springtide.config import Settings
from springtide.tuning.job import run
from toy import toy_settings
from write_workspace import write_workspace

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_a_search_fits_the_cluster_and_cleans_up(ray_session: Any, tmp_path: Path) -> None:
    settings = toy_settings(
        write_workspace(tmp_path),
        train__cpus_per_worker=1.0,
        tune__space={
            "model.gate": ["channel", "scalar"],
            "train.learning_rate": {"min": 1e-4, "max": 1e-2, "log": True},
        },
        tune__trials=3,
        tune__epochs=2,
        tune__grace_epochs=1,
    )
    result = run(settings)
    # 4 CPUs less one for reading hold two trials of 1.1 CPUs; a third would wait for ever beside them.
    assert result["concurrent_trials"] == 2
    rows = json.loads((tmp_path / "tune" / "trials.json").read_text())
    assert len(rows) == 3 and all(row["error"] is None for row in rows)
    scores = [row["ndcg"] for row in rows]  # over all ranks: by this a trial's best epoch is kept, and the best trial
    assert scores == sorted(scores, reverse=True)
    assert result["epochs_run"] == sum(row["epochs"] for row in rows) <= 6
    best = Settings.model_validate(yaml.safe_load((tmp_path / "tune" / "best.yaml").read_text()))
    assert best.model.gate == rows[0]["settings"]["model.gate"]
    assert best.train.learning_rate == pytest.approx(rows[0]["settings"]["train.learning_rate"])
    assert load_bundle(tmp_path / "tune" / "bundle").metrics["validation"]["ndcg@10"] == rows[0]["ndcg@10"]
    assert result["best"]["ndcg@10"] == result["validation"]["ndcg@10"]
    deadline = time.monotonic() + 60
    while left := [g for g in placement_group_table().values() if g["state"] not in ("REMOVED", "PENDING_REMOVAL")]:
        assert time.monotonic() < deadline, f"placement groups were left: {left}"
        time.sleep(0.5)
