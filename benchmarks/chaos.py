"""What do callers notice when parts die? Faults under a steady load, and a table of what each of them cost.

    make chaos-serve                                     # all faults, three minutes each
    python benchmarks/chaos.py --seconds 25 --faults scorer encoder [--proxy default] [--keep DIR]

A cluster in its own network namespace (so only as root on Linux): two Ingress, two Scorers, one TextEncoder, HAProxy
with the throughput mode or Serve's own proxy, over a small untrained bundle. Eight clients ask, each pausing 50 ms
after an answer. After a fifth of the time the fault happens; the load goes on until ten seconds after it is over, even
if that takes longer. In the end every acknowledged event must be in the log. A fault that fails ends no other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import chaos_wrk
from chaos_cluster import SCORER, Cluster, running, small_disk
from chaos_figures import Counted, Figures, figures, missed
from harness import describe, machine, markdown, scratch, table, write_result
from isolation import isolated_place
from springtide.files import verify_manifest, write_manifest

LONGEST_S, AFTER_S = 600, 10  # of a fault beyond --seconds, and of load after it
KILLED = 0.001  # share of requests that may fail when one of two is killed
HEADER = ["fault", "s", "sent", "failed", "degraded", "shed", "refused", "slowest s", "gap s", "recovered s", "lost"]
Json = dict[str, Any]


@dataclass
class Run:
    """One fault on its way: the cluster, how long the load lasts, and what else was sent."""

    cluster: Cluster
    seconds: float
    beside: list[Counted]

    @property
    def outage(self) -> float:
        """Seconds that something stays broken where somebody has to mend it."""
        return self.seconds / 5

    def load(self, name: str, *options: str) -> tuple[Path, Any]:
        """Start chaos_load.py and return where it writes and its process."""
        out = self.cluster.root / "logs" / f"load-{name}.json"
        command = [sys.executable, "benchmarks/chaos_load.py", self.cluster.url, out, *options]
        env = {**self.cluster.env}
        return out, self.cluster.place.start(command, self.cluster.root / "logs" / "load.log", env)


# ---------------------------------------------------------------- faults: each returns when it was over, or when it was
def kill(title: str, place: int = 0) -> Callable[[Run], float]:
    """place: of the process among those of that title, by age."""

    def fault(run: Run) -> float:
        run.cluster.kill(title, place)
        return time.monotonic()

    return fault


def redis_away(run: Run) -> float:
    run.cluster.stop_redis()
    time.sleep(run.outage)
    run.cluster.start_redis()
    return time.monotonic()


def disk_full(run: Run) -> float:
    """Fill the disk of the event log to the last byte, later make room again."""
    assert run.cluster.full is not None
    ballast = run.cluster.full / "ballast"
    try:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:  # until it is full
            while file.write(bytes(4096)):
                pass
        time.sleep(run.outage)
    finally:
        ballast.unlink()
    return time.monotonic()


def node_lost(run: Run) -> float:
    """kill -9 of a worker node and the Scorer on it; a new node comes after a while."""
    before = time.monotonic()
    run.cluster.kill_node()
    time.sleep(run.outage)
    run.cluster.add_node()
    return before


def swap(run: Run) -> float:
    """A newly trained bundle, by deploy of the changed user_config."""
    run.cluster.train_again(seed=int(time.monotonic()))
    run.cluster.deploy(run.cluster.deployed)
    return time.monotonic()


def upgrade(run: Run) -> float:
    """Other code, so that every replica is replaced."""
    config = deepcopy(run.cluster.config)
    variables = config["applications"][0].setdefault("runtime_env", {}).setdefault("env_vars", {})
    variables["SPRINGTIDE_RELEASE"] = str(time.monotonic_ns())
    run.cluster.deploy(config)
    run.cluster.config = config  # the release from now on, of the faults that follow
    return time.monotonic()


def damaged(run: Run) -> float:
    """A bundle with a wrong byte: the deploy job refuses it before anything is sent."""
    weights = run.cluster.root / "workspace" / "bundle" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        run.cluster.deploy_refused(run.cluster.deployed, "differs from its checksum")
    finally:
        weights.write_bytes(whole)
    return time.monotonic()


def other_scores(run: Run) -> float:
    """A whole bundle that does not score as it did when it was written: the Scorers refuse it and keep the old one."""
    bundle = run.cluster.root / "workspace" / "bundle"
    kept = bundle.with_name("bundle.kept")
    shutil.copytree(bundle, kept)
    manifest = verify_manifest(bundle, "bundle")
    spoil_sample(bundle / "parity.json")
    write_manifest(bundle, {key: value for key, value in manifest.items() if key != "files"})
    try:
        run.cluster.deploy_refused(run.cluster.deployed, "was refused")
    finally:
        shutil.rmtree(bundle)
        kept.rename(bundle)
    run.cluster.deploy(run.cluster.deployed)
    return time.monotonic()


def stalled(run: Run) -> float:
    """200 connections that send half a request."""
    _, process = run.load("stalled", "--stall", "200", "--seconds", str(run.outage))
    process.wait(run.seconds)
    return time.monotonic()


def burst(run: Run) -> float:
    """Ten times the requests that 32 connections without pauses were just answered, for a fifth of the time."""
    place, url, folder = run.cluster.place, run.cluster.url, run.cluster.root
    capacity = chaos_wrk.answered_per_second(place, url, folder, 5)
    found = chaos_wrk.at_rate(place, url, folder, 10 * capacity, run.outage)
    over = time.monotonic()
    run.beside.append(found)
    print(
        f"  capacity {capacity:.0f}/s, burst of {found.sent / found.seconds:.0f}/s for {found.seconds:.0f} s",
        flush=True,
    )
    return over


def spoil_sample(path: Path) -> None:
    """Make the sample of scores one of another model."""
    sample = json.loads(path.read_text())
    for case in sample["cases"]:
        case["scores"] = [score + 1 for score in case["scores"]]
    path.write_text(json.dumps(sample))


@dataclass(frozen=True)
class Fault:
    """A fault, the configuration that it needs and the share of requests that may fail."""

    title: str
    act: Callable[[Run], float]
    allowed: float = KILLED
    needs: str = "sqlite"


FAULTS = {
    "none": Fault("no fault", lambda run: time.monotonic(), 0),
    "scorer": Fault("kill -9 of one Scorer", kill(SCORER)),
    "encoder": Fault("kill -9 of the only TextEncoder", kill("ServeReplica:springtide:TextEncoder")),
    "ingress": Fault("kill -9 of one Ingress", kill("ServeReplica:springtide:Ingress")),
    "proxy": Fault("kill -9 of the proxy", kill("PROXY")),
    "keeper": Fault("kill -9 of springtide-haproxy, as Ray knows it", kill("springtide-haproxy -db"), needs="haproxy"),
    "kept": Fault(
        "kill -9 of its child, and HAProxy with it", kill("springtide-haproxy -db", place=-1), needs="haproxy"
    ),
    "manager": Fault("kill -9 of Ray's manager of HAProxy", kill("HAProxyManager"), needs="haproxy"),
    "controller": Fault("kill -9 of Serve's controller", kill("ServeController")),
    "swap": Fault("new bundle swapped in", swap, 0),
    "damaged": Fault("damaged bundle deployed", damaged, 0),
    "parity": Fault("bundle with other scores deployed", other_scores, 0),
    "upgrade": Fault("new code, every replica replaced", upgrade, 0),
    "stalled": Fault("200 callers stall in mid-request", stalled, 0),
    "burst": Fault("burst of ten times the capacity", burst, 0, needs="wrk"),
    "redis": Fault("Redis stopped and started", redis_away, needs="redis"),
    "disk": Fault("SQLite's disk full", disk_full, needs="disk"),
    "node": Fault("worker node with a Scorer lost", node_lost, needs="node"),
}


class LeftOut(Exception):
    """Why a fault cannot be tried here."""


def prepare(cluster: Cluster, needs: str) -> None:
    """Deploy what a fault needs where it is not there yet. Raises LeftOut where that is not possible."""
    wanted = cluster.config
    if needs == "redis":
        if shutil.which("redis-server") is None:
            raise LeftOut("redis-server is not installed; tests/install_redis.sh does it")
        if not any("redis-server" in title for _, title in cluster.processes()):
            cluster.start_redis()
        wanted = cluster.with_store(f"redis://127.0.0.1:{cluster.redis_port}/0")
    elif needs == "disk":
        if cluster.full is None:
            raise LeftOut("no tmpfs can be mounted")
        wanted = cluster.with_store(str(cluster.full / "history.sqlite3"))
    elif needs == "wrk" and shutil.which("wrk") is None:
        raise LeftOut("wrk is not installed; on Debian `apt-get install wrk` does it")
    elif needs == "haproxy" and "RAY_SERVE_ENABLE_HA_PROXY" not in cluster.env:
        raise LeftOut("this is Serve's own proxy")
    elif needs == "node":
        if not cluster.nodes:
            cluster.add_node()
        wanted = with_a_scorer_on_each_node(wanted)
    if wanted != cluster.deployed:
        cluster.deploy(wanted)
    cluster.wait_ready()


def with_a_scorer_on_each_node(config: Json) -> Json:
    """The configuration with one Scorer on each node, the new one of an upgrade included, and all else on the head."""
    config = deepcopy(config)
    for deployment in config["applications"][0]["deployments"]:
        if deployment["name"] == "Scorer":
            deployment.update(max_replicas_per_node=1, max_surge_percent=0)
        else:
            deployment["ray_actor_options"]["resources"] = {"node:__internal_head__": 0.001}
    return config


def measure(cluster: Cluster, name: str, fault: Fault, args: argparse.Namespace) -> tuple[Figures, int, float]:
    """One fault under load: its figures, the number of acknowledged events lost and the seconds that it took."""
    run = Run(cluster, args.seconds, [])
    out, process = run.load(name, "--seconds", str(args.seconds + LONGEST_S), "--clients", str(args.clients))
    began = time.monotonic()
    time.sleep(args.seconds / 5)
    since = fault.act(run)
    time.sleep(max(0.0, max(began + args.seconds, since + AFTER_S) - time.monotonic()))
    process.terminate()  # it answers what is under way, and writes
    if process.wait(60):
        raise SystemExit(f"the load failed; see {cluster.root / 'logs' / 'load.log'}")
    seconds = time.monotonic() - began
    log = json.loads(out.read_text())
    cluster.wait_ready()
    return figures([tuple(row) for row in log["requests"]], run.beside, since), cluster.lost(out), seconds


def row(title: str, seconds: float, found: Figures, lost: int) -> list[str]:
    counts = [found.sent, found.failed, found.degraded, found.shed, found.refused]
    times = [f"{value:.1f}" for value in (found.slowest, found.gap, found.recovered)]
    return [title, f"{seconds:.0f}", *(f"{count:,}" for count in counts), *times, str(lost)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180, help="of load for each fault")
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--proxy", choices=["haproxy", "default"], default="haproxy")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="folder for logs and data, kept afterwards")
    args = parser.parse_args()
    facts, rows, found, goals = machine(), [], {}, []
    with scratch(args.keep) as root, small_disk(root / "full") as full, isolated_place() as place, ExitStack() as stack:
        if not place.isolated:
            raise SystemExit("faults are tried in a network namespace only: run this as root on Linux")
        cluster: Cluster | None = None
        for name in args.faults:
            fault = FAULTS[name]
            if name == "proxy":
                fault = replace(fault, act=kill("/haproxy -db" if args.proxy == "haproxy" else "ProxyActor"))
            try:
                cluster = cluster or stack.enter_context(running(place, root, full, args.proxy == "haproxy"))
                prepare(cluster, fault.needs)
                figures_, lost, seconds = measure(cluster, name, fault, args)
            except LeftOut as why:
                print(f"{fault.title}: left out, {why}", flush=True)
                continue
            except (Exception, SystemExit) as error:  # the others are measured all the same, on a new cluster
                print(f"{fault.title}: not measured, {error}", flush=True)
                goals.append(f"{fault.title}: not measured, {str(error).partition(chr(10))[0].rstrip(':')}")
                stack.close()
                cluster = None
                continue
            rows.append(row(fault.title, seconds, figures_, lost))
            found[name] = {"title": fault.title, "seconds": round(seconds, 1), "lost": lost, **asdict(figures_)}
            print(table(HEADER, rows[-1:]).splitlines()[-1], figures_.reasons or "", flush=True)
            goals += [f"{fault.title}: {sentence}" for sentence in missed(figures_, lost, fault.allowed)]
            write_result(f"chaos-{args.proxy}", {"machine": facts, "clients": args.clients, "faults": found})
    print(f"\n{describe(facts)}; {args.clients} clients; {args.proxy}\n")
    print(markdown(HEADER, rows))
    print("\n".join(["", "goals missed:", *goals] if goals else ["", "every goal met"]))


if __name__ == "__main__":
    main()
