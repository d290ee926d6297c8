"""The jobs as users run them: `ray job submit` on a real cluster with token authentication, then Serve over HTTP.

The cluster's Python sees every dependency but not an installed springtide, so the code must travel with the job. The
log is a TSV with column names of its own and Chinese titles: only the YAML knows about it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from springtide.local_cluster import LocalCluster, _pids_of, free_ports, local_cluster

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
NOUNS = ["红茶", "绿茶", "咖啡", "面包", "蛋糕", "牛奶", "苹果", "香蕉", "饼干", "果汁"]
KINDS = ["北京", "上海", "广州", "成都"]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with all dependencies, in which `import springtide` fails.

    A folder named in a .pth file is searched, but its own .pth files are not read, and an editable install is one.
    """
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    inside = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (inside / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin" / "python")
    probe = subprocess.run(
        [python, "-c", "import ray, torch, springtide"], capture_output=True, text=True, cwd=folder, check=False
    )
    assert "No module named 'springtide'" in probe.stderr, f"springtide is importable by accident: {probe.stderr}"
    return python


@pytest.fixture(scope="module")
def cluster(bare_python: str) -> Iterator[LocalCluster]:
    os.environ.pop("PYTHONPATH", None)
    with local_cluster(cpus=4, python=bare_python) as running:
        yield running


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A raw log in a foreign shape, its configuration and a workspace."""
    folder = tmp_path_factory.mktemp("茶")
    rng = np.random.default_rng(1)
    goods = [f"SKU{i:03d}" for i in range(len(NOUNS) * len(KINDS))]
    rows = ["会员\t商品\t时间\t行为"]
    for member in range(80):
        item, when = int(rng.integers(len(goods))), 1_700_000_000 + int(rng.integers(10_000))
        for _ in range(int(rng.integers(5, 12))):
            rows.append(f"M{member}\t{goods[item]}\t{when}\t{'购买' if rng.random() < 0.3 else '浏览'}")
            item, when = (item + 1) % len(goods) if rng.random() < 0.8 else int(rng.integers(len(goods))), when + 500
    (folder / "log.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    titles = ["编号\t名称\t类别"] + [
        f"{sku}\t{KINDS[i // len(NOUNS)]}{NOUNS[i % len(NOUNS)]}\t{NOUNS[i % len(NOUNS)]}"
        for i, sku in enumerate(goods)
    ]
    (folder / "goods.tsv").write_text("\n".join(titles) + "\n", encoding="utf-8")
    settings = {
        "name": "茶",
        "workspace": str(folder / "workspace"),
        "data": {
            "events": {
                "paths": str(folder / "log.tsv"),
                "columns": {"user_id": "会员", "item_id": "商品", "timestamp": "时间", "action": "行为"},
            },
            "items": {
                "paths": str(folder / "goods.tsv"),
                "columns": {"item_id": "编号", "title": "名称", "categories": "类别"},
            },
            "exclude_seen": False,
            "partitions": 4,
        },
        "text": {"max_tokens": 16},
        "model": {"dim": 16, "text_dim": 8, "short_window": 4, "memory_recent": 4},
        "train": {"epochs": 2, "workers": 2, "batch_size": 16},
        "tune": {"space": {"model.gate": ["channel", "scalar"]}, "trials": 2, "epochs": 1, "grace_epochs": 1},
        "recommend": {"k": 5, "cpus_per_actor": 0.5},
    }
    path = folder / "tea.yaml"
    path.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    return {"config": str(path), "workspace": folder / "workspace", "goods": goods}


def submit(cluster: LocalCluster, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    """Submit from a small copy of the project, as a user's checkout would be."""
    command = cluster.ray(
        "job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT), "--", *entrypoint
    )
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)


def test_the_cluster_refuses_a_client_without_the_token(cluster: LocalCluster) -> None:
    request = urllib.request.Request(f"{cluster.dashboard}/api/jobs/")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 401


def test_code_travels_with_the_job(cluster: LocalCluster, tmp_path: Path) -> None:
    """A worker imports springtide from the upload, although its Python has none."""
    program = (
        "import sys; sys.path.insert(0, 'jobs'); import _path; from springtide.cluster import connect; connect()\n"
        "import ray\n"
        "@ray.remote(num_cpus=0.1)\n"
        "def where():\n"
        "    import springtide; return springtide.__file__\n"
        "print('FOUND', ray.get(where.remote()))\n"
    )
    done = submit(cluster, "python", "-c", program)
    assert done.returncode == 0, done.stdout + done.stderr
    found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    assert "runtime_resources" in found and str(ROOT) not in found


def test_every_job_runs_and_the_log_is_served(cluster: LocalCluster, experiment: dict[str, Any]) -> None:
    workspace = experiment["workspace"]
    for stage in ("prepare", "embed", "train", "tune", "evaluate", "recommend"):
        done = submit(cluster, "python", f"jobs/{stage}.py", "--config", experiment["config"])
        assert done.returncode == 0, f"{stage}: {done.stdout[-3000:]}{done.stderr[-1000:]}"
        assert json.loads((workspace / "results" / f"{stage}.json").read_text())["status"] == "ok"
    ranked = pq.read_table(workspace / "recommendations")
    assert len(ranked) == 80 * 5
    assert set(ranked["item_id"].to_pylist()) <= set(experiment["goods"])
    best = yaml.safe_load((workspace / "tune" / "best.yaml").read_text())
    first, _ = json.loads((workspace / "tune" / "trials.json").read_text())
    assert best["model"]["gate"] == first["settings"]["model.gate"] in ("channel", "scalar")
    assert (workspace / "report.html").stat().st_size > 10_000

    url = deploy(cluster, experiment)
    answer = call(f"{url}/v1/recommend", {"user_id": "M3", "k": 3})
    assert answer["source"] == "history" and all(item["title"] for item in answer["items"])
    assert call(f"{url}/v1/recommend", {"query": "红茶", "k": 3})["source"] == "query"

    # An acknowledged event outlives the death of every Serve process, and the next answer knows it.
    before = call(f"{url}/v1/recommend", {"user_id": "newcomer", "k": 3})
    assert before["source"] == "popular"
    sku = experiment["goods"][7]
    call(f"{url}/v1/events", {"user_id": "newcomer", "item_id": sku, "event_id": "e-1"}, status=202)
    killed = kill_serve(cluster)
    assert killed, "no Serve process was found to kill"
    after = retry(lambda: whole(call(f"{url}/v1/recommend", {"user_id": "newcomer", "k": 3})), seconds=120)
    assert after["source"] == "history", after
    assert (
        call(f"{url}/v1/events", {"user_id": "newcomer", "item_id": sku, "event_id": "e-1"}, status=202)["duplicates"]
        == 1
    )
    expected = experiment["goods"][8]
    assert after["items"][0]["item_id"] == expected or expected in [
        i["item_id"] for i in call(f"{url}/v1/recommend", {"user_id": "newcomer", "k": 10})["items"]
    ]

    # An Ingress that cannot start is not left in place of the one that served.
    broken = yaml.safe_load((ROOT / "serve_configs" / "local.yaml").read_text())
    broken["applications"][0]["args"]["auth"] = {"tokens_file": str(workspace / "none.json")}
    (workspace / "broken.yaml").write_text(yaml.safe_dump(broken))
    port = url.rpartition(":")[2]
    done = run_deploy(cluster, experiment, f"serve.port={port}", f"serve.config={workspace / 'broken.yaml'}")
    assert done.returncode == 1
    assert "none.json cannot be read" in done.stdout  # before anything is applied
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("deploy: Serve could not deploy springtide: Ingress")
    assert said.endswith("; the configuration before was put back")
    again = retry(lambda: whole(call(f"{url}/v1/recommend", {"user_id": "newcomer", "k": 3})), seconds=60)
    assert again["source"] == "history" and again["items"]
    still = run_deploy(cluster, experiment, f"serve.port={port}", "serve.plan_only=true").stdout
    assert [line.split()[1] for line in still.splitlines() if line.startswith("  ")] == ["unchanged"] * 3


def test_a_failing_job_exits_non_zero_with_one_sentence(cluster: LocalCluster, experiment: dict[str, Any]) -> None:
    done = submit(
        cluster,
        "python",
        "jobs/prepare.py",
        "--config",
        experiment["config"],
        "--set",
        "data.events.paths=/nowhere.tsv",
    )
    assert done.returncode != 0
    assert "prepare: there is no file or folder /nowhere.tsv" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout


def test_a_relative_workspace_is_refused_in_a_job(cluster: LocalCluster, experiment: dict[str, Any]) -> None:
    done = submit(cluster, "python", "jobs/prepare.py", "--config", experiment["config"], "--set", "workspace=here")
    assert done.returncode != 0
    assert "give an absolute path" in done.stdout + done.stderr


def run_deploy(cluster: LocalCluster, experiment: dict[str, Any], *settings: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "jobs/deploy.py",
        "--config",
        experiment["config"],
        *(f"--set={one}" for one in settings),
    ]
    environment = {**cluster.environment, "RAY_API_SERVER_ADDRESS": cluster.dashboard}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def deploy(cluster: LocalCluster, experiment: dict[str, Any]) -> str:
    done = run_deploy(cluster, experiment, f"serve.port={free_ports(1)[0]}")
    assert done.returncode == 0, done.stdout + done.stderr
    return str(json.loads((experiment["workspace"] / "results" / "deploy.json").read_text())["url"])


def kill_serve(cluster: LocalCluster) -> list[int]:
    """kill -9 of the proxy, the controller and every replica of this cluster."""
    victims = []
    for pid in _pids_of(cluster.temp_dir):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if title.startswith(("ray::ServeReplica", "ray::ServeController", "ray::ProxyActor", "ray::HAProxyManager")):
            victims.append(pid)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    return victims


def call(url: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == status
        return dict(json.loads(answer.read()))


def whole(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, unless a part was down: a Scorer may come back after its Ingress. Raises OSError then."""
    if answer.get("degraded"):
        raise OSError(f"the answer is degraded: {answer}")
    return answer


def retry(work: Any, seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return work()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
