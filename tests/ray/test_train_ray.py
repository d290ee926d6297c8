"""The train job on a real cluster: a bundle at the end, also after kill -9 of a worker and after a broken run."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.train.v2.api.exceptions import TrainingFailedError

from springtide.bundle import FORMAT, load_bundle
from springtide.config import Settings
from springtide.errors import SpringtideError
from springtide.evaluation import recommend
from springtide.model.batch import History
from springtide.schemas import SEQUENCES
from springtide.training import update
from springtide.training.job import run
from toy import toy_settings
from write_workspace import USERS, grow_workspace, write_workspace

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
EPOCHS = 10


def settings_of(workspace: Path, **values: Any) -> Settings:
    given = {
        "train__epochs": EPOCHS,
        "train__patience": EPOCHS,
        "train__workers": 2,
        "train__learning_rate": 3e-3,
    } | values
    return toy_settings(workspace, **given)


def accuracy(result: dict[str, Any]) -> list[tuple[float, float, float]]:
    return [(e["loss"], e["ndcg@10"], e["positions"]) for e in result["epochs"]]


def starts(result: dict[str, Any]) -> list[int]:
    """The epochs in which a group of workers took its first step: every group measures its own start-up once."""
    times = [e["first_step_seconds"] for e in result["epochs"]]
    return [n for n, seconds in enumerate(times) if n == 0 or seconds != times[n - 1]]


def kill_a_worker(workspace: Path) -> tuple[threading.Thread, Callable[[], int]]:
    """kill -9 one training worker of this test's own cluster as soon as a checkpoint is committed."""
    killed: list[int] = []

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for snapshot in workspace.glob("runs/train-*/checkpoint_manager_snapshot.json"):
                if "checkpoint_dir_name" not in snapshot.read_text():
                    continue
                for process in psutil.Process().children(recursive=True):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread, lambda: len(killed)


@pytest.fixture(scope="module")
def undisturbed(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    workspace = write_workspace(tmp_path_factory.mktemp("undisturbed"))
    return workspace, run(settings_of(workspace))


def weights(workspace: Path) -> bytes:
    return (workspace / "bundle" / "model.safetensors").read_bytes()


def test_two_workers_train_a_bundle(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    workspace, result = undisturbed
    assert starts(result) == [0] and [e["epoch"] for e in result["epochs"]] == list(range(1, EPOCHS + 1))
    trained = sum(len(items) - 3 for items in _histories(workspace))
    assert {e["positions"] for e in result["epochs"]} == {trained}
    assert {e["users"] for e in result["epochs"]} == {USERS}
    assert result["epochs"][-1]["loss"] < result["epochs"][0]["loss"]
    best = max(result["epochs"], key=lambda e: float(e["ndcg"]))  # over all ranks, which is steadier than ten
    assert result["validation"] == {"ndcg@10": best["ndcg@10"], "epoch": best["epoch"]} and best["ndcg@10"] > 0.2
    bundle = load_bundle(result["bundle"])
    assert bundle.metrics["validation"] == result["validation"]
    # What is deployed has learned from the validation events too, for as many epochs as were best.
    assert result["refit"] and len(result["refit_epochs"]) == result["validation"]["epoch"]
    assert {e["positions"] for e in result["refit_epochs"]} == {trained + USERS}
    assert {e["users"] for e in result["refit_epochs"]} == {0}
    assert not any("ndcg@10" in e for e in result["refit_epochs"])  # nobody to validate on is not nobody hit
    assert bundle.recommender.popularity.sum() == trained + 2 * USERS
    past = History(np.array([3, 4, 5]), np.ones(3, np.int64), np.full(3, np.nan, np.float32), np.arange(3) * 10**6)
    first = bundle.recommender.top_k(bundle.recommender.score([past]).logits, 3)[0][0]
    assert 6 in first  # item i is usually followed by i + 1
    (folder,) = (workspace / "runs").iterdir()
    assert str(folder) == result["run"] and (folder / "finished").exists()
    assert len(list(folder.glob("checkpoint_*/progress.json"))) == 2  # train.keep_checkpoints
    assert not [f.name for f in folder.rglob("*") if f.suffix in (".pt", ".bin", ".ckpt")]


def _histories(workspace: Path) -> list[list[int]]:
    files = (workspace / "prepared" / "sequences").iterdir()
    return [items for file in files for items in pq.read_table(file)["items"].to_pylist()]


def test_a_killed_worker_changes_nothing_in_the_result(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    workspace = write_workspace(tmp_path / "killed")
    thread, killed = kill_a_worker(workspace)
    result = run(settings_of(workspace))
    thread.join()
    assert killed() == 1
    assert len(starts(result)) == 2 and starts(result)[1] >= 1  # went on from a checkpoint, not from the beginning
    assert accuracy(result) == accuracy(undisturbed[1])
    assert weights(workspace) == weights(undisturbed[0])


def test_a_rerun_goes_on_where_a_broken_run_stopped(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path / "broken")
    settings = settings_of(workspace, train__max_failures=0)
    thread, killed = kill_a_worker(workspace)
    with pytest.raises(TrainingFailedError):
        run(settings)
    thread.join()
    assert killed() == 1 and not (workspace / "bundle").exists()
    result = run(settings)
    assert len(starts(result)) == 2 and starts(result)[1] >= 1
    assert accuracy(result) == accuracy(undisturbed[1])
    assert weights(workspace) == weights(undisturbed[0])

    # Trained to the end, but the driver died before it wrote the bundle: nothing is trained again.
    Path(result["run"], "finished").unlink()
    again = run(settings)
    assert again["epochs"] == result["epochs"] and again["refit_epochs"] == result["refit_epochs"]


def test_a_loss_that_is_not_finite_ends_in_a_sentence(ray_session: Any, tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path / "diverged")
    with pytest.raises(SpringtideError, match="the loss is not finite in epoch 1"):
        run(settings_of(workspace, train__learning_rate=1e30))
    assert not (workspace / "bundle").exists()


def test_what_can_never_run_is_refused_at_once(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    workspace = undisturbed[0]
    with pytest.raises(SpringtideError, match="the log has 4 partitions"):
        run(settings_of(workspace, train__workers=5))
    with pytest.raises(SpringtideError, match="leave nothing of the cluster's 4 CPUs"):
        run(settings_of(workspace, train__cpus_per_worker=2))
    with pytest.raises(SpringtideError, match="no prepared log"):
        run(settings_of(tmp_path))
    short = write_workspace(tmp_path / "short")
    for file in (short / "prepared" / "sequences").iterdir():
        rows = pq.read_table(file).to_pylist()
        pq.write_table(
            pa.Table.from_pylist([row | {"targets": [False] * len(row["items"])} for row in rows], SEQUENCES), file
        )
    with pytest.raises(SpringtideError, match="no sequence to learn from"):
        run(settings_of(short))
    assert json.loads((workspace / "bundle" / "config.json").read_text())["format"] == FORMAT


def test_an_update_learns_what_is_new(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    workspace = tmp_path / "updated"
    shutil.copytree(undisturbed[0], workspace)
    grow_workspace(workspace, new_events=5, users=20)
    settings = settings_of(workspace, train__update_epochs=3)
    old = load_bundle(workspace / "bundle")
    result = update.run(settings)
    assert len(result["epochs"]) == 3
    # Twenty came back with five events each, one of them for the test now and the one before them no longer. A few
    # others were held out later than anything was learned: theirs may be new, for all that times tell.
    files = (workspace / "prepared" / "sequences").iterdir()
    times = [times for file in files for times in pq.read_table(file)["timestamps"].to_pylist()]
    assert old.recommender.log_end is not None
    late = [len(row) for row in times if row[-1] > old.recommender.log_end]
    assert {e["positions"] for e in result["epochs"]} == {sum(length - 2 for length in late)}
    assert 20 * 5 <= result["new_events"] == 20 * 5 + len(late) - 20 < 20 * 5 + USERS / 4
    bundle = load_bundle(workspace / "bundle")
    assert bundle.metrics["updated_from"] == old.version != bundle.version
    known = [{"item_id": "i41"}, {"item_id": "i40"}]
    recommender = bundle.recommender
    assert recommender.history(known)[1] == [] and old.recommender.history(known)[1] == ["i41", "i40"]
    scores = recommender.score([recommender.history(known)[0]]).logits
    assert recommender.index["i41"] in recommender.top_k(scores, 3)[0][0]  # the two were always taken in turn
    assert not list((workspace / "runs").glob("update-*"))
    assert update.run(settings)["new_events"] == 0 and load_bundle(workspace / "bundle").version == bundle.version


@pytest.mark.timeout(240)
def test_training_and_recommending_fit_beside_a_service(ray_session: Any, tmp_path: Path) -> None:
    """With as little to spare as two cores have on which Ingress, TextEncoder and Scorer are served: 1.1."""

    @ray_session.remote(num_cpus=2.9)
    class Service:
        def ready(self) -> bool:
            return True

    service = Service.remote()
    try:
        assert ray_session.get(service.ready.remote())
        settings = settings_of(write_workspace(tmp_path), train__workers=1, train__epochs=1, train__refit=False)
        assert len(run(settings)["epochs"]) == 1
        assert recommend.run(settings)["users"] == USERS
    finally:
        ray_session.kill(service)
