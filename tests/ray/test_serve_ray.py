"""The deployments on a real cluster: answers over HTTP, a swap of models under load, and kill -9 of every replica."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from springtide.files import write_json, write_manifest
from springtide.schemas import SEQUENCES
from springtide.serving.deploy import filled
from springtide.serving.exposures import read as read_exposures
from springtide.serving.lint import load_config
from springtide.serving.plan import normal, plan
from springtide.serving.served import keep, version_of
from toy import ACTIONS, toy_bundle, toy_items, toy_log, toy_settings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
APP = "springtide"
CONFIG = Path(__file__).parents[2] / "serve_configs" / "local.yaml"


@dataclass
class Served:
    """A running application over a workspace, deployed from serve_configs/local.yaml as the deploy job does."""

    ray: Any
    workspace: Path
    port: int
    client: httpx.Client

    def config(self, file: Path = CONFIG) -> dict[str, Any]:
        bundle = self.workspace / "bundle"
        keep(bundle, self.workspace, version_of(bundle))
        config = filled(load_config(file), toy_settings(self.workspace), self.port)
        config["applications"][0]["runtime_env"] = {
            "py_modules": self.ray.get_runtime_context().runtime_env["py_modules"]
        }
        return config

    def apply(self, config: dict[str, Any]) -> None:
        """What Serve's REST API does with a configuration; the session's cluster has no dashboard to ask."""
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
        deadline = time.monotonic() + 120
        while (state := serve.status().applications[APP]).status != "RUNNING":
            assert state.status != "DEPLOY_FAILED", state
            assert time.monotonic() < deadline, state
            time.sleep(0.1)

    def recommend(self, **body: Any) -> Any:
        answer = self.client.post("/v1/recommend", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def pids(self, deployment: str = "") -> set[int]:
        """Processes of the application's replicas, or of those of one deployment."""
        found = self.ray.util.list_named_actors(all_namespaces=True)
        wanted = f"::{APP}#{deployment}"
        replicas = [self.ray.get_actor(a["name"], a["namespace"]) for a in found if wanted in a["name"]]
        return set(self.ray.get([replica.__ray_call__.remote(lambda _: os.getpid()) for replica in replicas]))

    def replicas(self, deployment: str) -> int:
        """Replicas of a deployment that take requests."""
        states = serve.status().applications[APP].deployments[deployment].replica_states
        return int(states.get("RUNNING", 0))

    def wait_replicas(self, deployment: str, wanted: int, seconds: float) -> float:
        """Wait until so many replicas run, and return the seconds that it took."""
        began = time.monotonic()
        while (found := self.replicas(deployment)) != wanted:
            assert time.monotonic() - began < seconds, f"{deployment} has {found} replicas, not {wanted}"
            time.sleep(0.1)
        return time.monotonic() - began

    def wait_model(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while True:
            (model,) = self.client.get("/v1/models").json()["models"]
            if wanted(model):
                return dict(model)
            assert time.monotonic() < deadline, model
            time.sleep(0.1)

    def wait_ready(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        state = "no answer"
        while time.monotonic() < deadline:
            try:
                answer = self.client.get("/readyz")
                if answer.status_code == 200:
                    return
                state = answer.text
            except httpx.HTTPError as error:
                state = repr(error)
            time.sleep(0.2)
        pytest.fail(f"not ready: {state}")


def write_prepared(workspace: Path) -> int:
    """The toy log as `prepare` would leave it; returns its events."""
    users: dict[str, list[dict[str, Any]]] = {}
    for event in toy_log():
        users.setdefault(event["user_id"], []).append(event)
    sequences = {
        "user_id": list(users),
        "items": [[int(e["item_id"][1:]) for e in events] for events in users.values()],
        "actions": [[ACTIONS.index(e["action"]) for e in events] for events in users.values()],
        "ratings": [[e["rating"] for e in events] for events in users.values()],
        "timestamps": [[e["timestamp"] for e in events] for events in users.values()],
        "parts": [[0] * len(events) for events in users.values()],
        "targets": [[True] * len(events) for events in users.values()],
    }
    prepared = workspace / "prepared"
    for folder, table in (("items", toy_items()), ("sequences", pa.table(sequences, schema=SEQUENCES))):
        (prepared / folder).mkdir(parents=True)
        pq.write_table(table, prepared / folder / "part-0.parquet")
    write_json(prepared / "vocabulary.json", {"actions": ACTIONS})
    write_manifest(prepared, {"content_hash": "toy"})
    return sum(len(events) for events in users.values())


@pytest.fixture(scope="module")
def served(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    workspace = tmp_path_factory.mktemp("serve")
    write_prepared(workspace)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        found = Served(ray_session, workspace, port, client)
        toy_bundle(workspace)
        found.apply(found.config())
        found.wait_ready()
        yield found
    serve.shutdown()


def test_every_endpoint_answers(served: Served) -> None:
    client = served.client
    health = client.get("/healthz", headers={"X-Request-ID": "mine"})
    assert health.status_code == 200 and health.headers.get_list("X-Request-ID") == ["mine"]
    assert client.get("/docs").status_code == 200
    stranger = served.recommend(user_id="stranger", k=3)
    assert (stranger["source"], len(stranger["items"])) == ("popular", 3)
    known = served.recommend(user_id="u1", k=40)  # from the prepared log
    seen = {event["item_id"] for event in toy_log() if event["user_id"] == "u1"}
    assert known["source"] == "history"
    assert {item["item_id"] for item in known["items"]} == {f"i{n:02d}" for n in range(40)} - seen
    assert known["gate"]["long"] + known["gate"]["short"] == pytest.approx(1)
    both = served.recommend(history=[{"item_id": "i03"}], query="Item number 4", k=5, diversity=0.5, explain=True)
    assert both["source"] == "history+query"
    assert both["explanation"]["recent"][0]["item_id"] == "i03"
    assert served.recommend(query="浪漫喜剧", filters={"categories": ["odd"]}, k=40)["source"] == "query"
    vectors = client.post("/v1/encode", json={"texts": ["a short text", "another, rather longer, text"]}).json()
    assert [sum(x * x for x in v) for v in vectors["vectors"]] == pytest.approx([1, 1], abs=1e-4)
    assert len(client.get("/v1/items/i03/similar", params={"k": 5}).json()["items"]) == 5
    assert client.get("/v1/users/u1/interests").json()["events"][0]["title"].startswith("Item number")
    broken = client.post("/v1/recommend", content="{", headers={"Content-Type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")


def test_concurrent_queries_get_their_own_vectors(served: Served) -> None:
    """In int8 a vector differs a little with its company, so each must be nearest to its own."""
    words = [
        "river",
        "piano",
        "bread",
        "rocket",
        "winter",
        "doctor",
        "carpet",
        "lemon",
        "soldier",
        "window",
        "tiger",
        "market",
    ]
    texts = [f"{word} " + "and more of it " * (n % 7) for n, word in enumerate(words)]
    alone = {text: served.client.post("/v1/encode", json={"text": text}).json()["vector"] for text in texts}
    found: dict[str, list[float]] = {}

    def ask(text: str) -> None:
        found[text] = served.client.post("/v1/encode", json={"text": text}).json()["vector"]

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cosines = np.array([found[text] for text in texts]) @ np.array([alone[text] for text in texts]).T
    assert cosines.argmax(1).tolist() == list(range(len(texts)))
    assert cosines.diagonal().min() > 0.97


def test_an_event_changes_the_next_answer(served: Served) -> None:
    event = {"event_id": "first", "user_id": "newcomer", "item_id": "i20", "action": "view"}
    assert served.recommend(user_id="newcomer")["source"] == "popular"
    assert served.client.post("/v1/events", json=event).json() == {"accepted": 1, "duplicates": 0}
    assert served.client.post("/v1/events", json=event).json() == {"accepted": 0, "duplicates": 1}
    after = served.recommend(user_id="newcomer", k=40)
    assert after["source"] == "history"
    assert "i20" not in {item["item_id"] for item in after["items"]}


def test_an_item_put_and_what_is_taken_reach_the_model(served: Served) -> None:
    text = "a violet kite with a very long tail"
    answer = served.client.put("/v1/items/kite", json={"title": "Kite", "text": text, "categories": ["toys"]})
    assert answer.status_code == 200, answer.text
    assert served.recommend(query=text, k=1)["items"][0]["item_id"] == "kite"
    assert served.recommend(query=text, k=3, filters={"categories": ["toys"]})["items"][0]["item_id"] == "kite"
    now = int(time.time() * 1000)
    many = [{"user_id": f"k{n}", "item_id": "kite", "timestamp": now, "event_id": f"kite-{n}"} for n in range(900)]
    assert served.client.post("/v1/events", json=many).json()["accepted"] == 900
    served.wait_model(lambda model: model["live"]["observed_events"] >= 900)
    assert served.recommend(user_id="nobody yet", k=1)["items"][0]["item_id"] == "kite"


def test_a_model_is_swapped_without_a_failed_request(served: Served) -> None:
    before = served.recommend(user_id="u1")["model"]
    pids = served.pids()
    statuses: list[int] = []
    stop = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=served.client.base_url, timeout=60, trust_env=False) as client:
            while not stop.is_set():
                statuses.append(client.post("/v1/recommend", json={"user_id": "u2"}).status_code)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        toy_bundle(served.workspace, seed=1)  # a retrained model takes the place of the old one
        served.apply(served.config())
        after = served.wait_model(lambda model: model["model"] != before)["model"]

        config = served.config()
        scorer = next(d for d in config["applications"][0]["deployments"] if d["name"] == "Scorer")
        weights = Path(scorer["user_config"]["bundle"]) / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        scorer["user_config"]["version"] = "damaged"
        served.apply(config)
        refused = served.wait_model(lambda model: "error" in model)
        weights.write_bytes(whole)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert refused["model"] == after  # the one before stays
    assert "model.safetensors differs from its checksum" in refused["error"]
    assert len(statuses) > 10
    assert set(statuses) == {200}
    assert served.pids() == pids  # swapped inside the running replicas
    served.apply(served.config())
    served.wait_model(lambda model: "error" not in model)


def test_kill_9_of_the_only_scorer_degrades_and_fails_nothing(served: Served) -> None:
    answers: list[tuple[int, bool, float]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            began = time.monotonic()
            answer = served.client.post("/v1/recommend", json={"user_id": "u1", "k": 3})
            degraded = answer.status_code == 200 and answer.json().get("degraded", False)
            answers.append((answer.status_code, degraded, time.monotonic() - began))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(1)
        (pid,) = served.pids("Scorer")
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 120
        while not any(degraded for _, degraded, _ in answers) or answers[-1][1]:
            assert time.monotonic() < deadline, "no degraded answer, or no whole one after it"
            time.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for status, _, _ in answers} == {200}
    assert max(seconds for _, _, seconds in answers) < 10  # the limit of one call is 2, on a busy machine
    served.wait_ready()


def test_metrics_tell_what_happened(served: Served) -> None:
    text = served.client.get("/metrics").text
    assert 'springtide_requests_total{method="POST",route="/v1/recommend",status="200"}' in text
    assert 'springtide_stage_seconds_count{stage="scorer"}' in text
    assert 'degraded="true"' in text


def test_an_acknowledged_event_survives_kill_9_of_every_replica(served: Served) -> None:
    assert served.client.post("/v1/events", json={"user_id": "survivor", "item_id": "i07"}).status_code == 202
    pids = served.pids()
    assert len(pids) == 3
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while True:
        try:
            answer = served.client.get("/v1/users/survivor/interests")
            if answer.status_code == 200:
                break
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, "the replicas did not come back"
        time.sleep(0.5)
    assert [event["item_id"] for event in answer.json()["events"]] == ["i07"]
    assert served.recommend(user_id="survivor", query="back again")["source"].startswith("history")


def test_a_further_model_is_added_split_and_taken_away(served: Served) -> None:
    """By changed configurations alone: no replica restarts, as the plan says."""
    toy_bundle(served.workspace / "challenger", seed=2)
    config = served.config()
    parts = {part["name"]: part["user_config"] for part in config["applications"][0]["deployments"]}
    before, pids = _get_global_client().get_serve_details(), served.pids()
    assert {step.effect for step in plan(before, normal(config))} == {"unchanged"}
    parts["Scorer"]["models"] = {"challenger": {"bundle": str(served.workspace / "challenger" / "bundle")}}
    parts["Ingress"]["traffic"] = {"split": {"toy": 1, "challenger": 1}, "shadow": {"challenger": 1}}
    effects = {step.deployment: step.effect for step in plan(before, normal(config))}
    assert effects == {"Ingress": "reconfigured", "TextEncoder": "unchanged", "Scorer": "reconfigured"}
    served.apply(config)
    models = [[served.recommend(user_id=f"user-{n}")["model"] for n in range(20)] for _ in range(2)]
    assert models[0] == models[1]
    assert {model.split("@")[0] for model in models[0]} == {"toy", "challenger"}
    assert served.recommend(user_id="u1", model="challenger")["model"].startswith("challenger@")
    deadline = time.monotonic() + 30
    while True:
        told = served.client.get("/v1/models").json()
        lines = list(read_exposures(served.workspace / "exposures"))  # with those of the tests before, maybe
        by = Counter(line["by"] for line in lines)
        if told["shadows"] and by["split"] >= 40 and by["request"] >= 1:  # written in the background
            break
        assert time.monotonic() < deadline, (told, by)
        time.sleep(0.1)
    assert [model["name"] for model in told["models"]] == ["toy", "challenger"]
    assert told["split"] == {"toy": 0.5, "challenger": 0.5}
    assert (told["shadows"][0]["shadow"], told["shadows"][0]["failed"]) == ("challenger", 0)
    assert not any(str(line["user"]).startswith("user-") for line in lines)
    served.apply(served.config())
    assert [model["name"] for model in served.client.get("/v1/models").json()["models"]] == ["toy"]
    assert served.client.post("/v1/recommend", json={"user_id": "u", "model": "challenger"}).status_code == 404
    assert served.pids() == pids


def test_scorer_and_encoder_follow_their_own_load(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """serve_configs/autoscaling.yaml with short delays: encoder to zero and back, Scorer from one to two and back."""
    config = served.config(CONFIG.with_name("autoscaling.yaml"))
    app = config["applications"][0]
    often = {f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5" for who in ("REPLICA", "HANDLE")}
    app["runtime_env"]["env_vars"] = often
    for part in app["deployments"]:
        if "autoscaling_config" in part:
            short = {"look_back_period_s": 2, "upscale_delay_s": 1, "downscale_delay_s": 5, "max_replicas": 2}
            part["autoscaling_config"] |= {**short, "target_ongoing_requests": 2}
        if part["name"] == "TextEncoder":
            part["autoscaling_config"]["downscale_to_zero_delay_s"] = 10  # longer than a breaker stays open
        if part["name"] == "Scorer":
            part["user_config"]["batch_wait_ms"] = 100  # a queue without work for the processor
    served.apply(config)
    served.wait_ready()
    to_zero = served.wait_replicas("TextEncoder", 0, 30)

    began = time.monotonic()
    first = served.recommend(history=[{"item_id": "i03"}], query="first words after a quiet time")
    answered = time.monotonic() - began
    assert first["degraded"] and first["items"]
    assert answered < 5  # the limit is a second; it must not wait for the encoder's start
    number = 0
    while served.recommend(history=[{"item_id": "i03"}], query=f"words {number}").get("degraded"):
        assert time.monotonic() - began < 60, "no query was answered whole"
        time.sleep(0.5)
        number += 1
    whole = time.monotonic() - began
    assert served.replicas("TextEncoder") >= 1

    stop = threading.Event()
    answers: list[tuple[int, bool]] = []

    def load() -> None:
        with httpx.Client(base_url=served.client.base_url, timeout=60, trust_env=False) as client:
            while not stop.is_set():
                answer = client.post("/v1/recommend", json={"user_id": "u2"})
                answers.append((answer.status_code, answer.json().get("degraded", False)))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        up = served.wait_replicas("Scorer", 2, 90)  # a replica takes long to start where the processor is busy
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    down = served.wait_replicas("Scorer", 1, 40)
    assert set(answers) == {(200, False)}
    with capsys.disabled():
        print(
            f"\nencoder to zero {to_zero:.1f} s; from zero: first query degraded after {answered:.1f} s, whole after "
            f"{whole:.1f} s; Scorer 1 -> 2 in {up:.1f} s of load, 2 -> 1 {down:.1f} s after it"
        )
