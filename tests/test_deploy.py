"""What deploy tells and waits for, without a cluster: the plan, further models, readiness and its reasons."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.serve._private.config import DeploymentConfig, DeploymentOptionUpdateType
from ray.serve.schema import DeploymentSchema

from springtide.errors import SpringtideError
from springtide.files import write_json, write_manifest
from springtide.serving import deploy, readiness
from springtide.serving.deploy import _applied, _check_listener, filled
from springtide.serving.lint import lint, load_config
from springtide.serving.models import Told, merged_encoders, merged_models
from springtide.serving.named import named_in_vain
from springtide.serving.plan import RESTARTING, SCALING, Step, normal, plan, told
from springtide.serving.reach import Cluster, call, packages_of
from springtide.serving.readiness import Refused, serving, versions, wait_ready, wait_running, why
from toy import toy_settings

LOCAL = load_config(Path(__file__).parents[1] / "serve_configs" / "local.yaml")
OLD = deepcopy(LOCAL)
OLD["applications"][0]["runtime_env"] = {"py_modules": ["gcs://one.zip"]}

OWN_POLICY = {"policy": {"policy_function": "ray.serve.autoscaling_policy:default_autoscaling_policy"}}


def running(config: Any, status: str = "RUNNING") -> Any:
    return {
        "applications": {
            app["name"]: {"status": status, "deployed_app_config": app} for app in normal(config)["applications"]
        }
    }


def changed(change: Callable[[Any, dict[str, Any]], None]) -> Any:
    """OLD after change(application, its deployments by name)."""
    config = deepcopy(OLD)
    app = config["applications"][0]
    change(app, {part["name"]: part for part in app["deployments"]})
    return config


def steps(old: Any, new: Any) -> dict[str, str]:
    return {step.deployment: str(step) for step in plan(old, normal(new))}


# ---------------------------------------------------------------- the plan
def test_nothing_changes() -> None:
    assert steps(running(OLD), OLD) == {n: f"{n} unchanged" for n in ("Ingress", "TextEncoder", "Scorer")}


def test_absent_and_empty_are_the_same() -> None:
    def add(app: Any, parts: dict[str, Any]) -> None:
        app["logging_config"] = None  # as the whole configuration's
        parts["Scorer"]["request_router_config"] = {}

    assert set(steps(running(OLD), changed(add)).values()) == {
        f"{n} unchanged" for n in ("Ingress", "TextEncoder", "Scorer")
    }


def test_everything_starts_on_an_empty_cluster() -> None:
    assert {step.effect for step in plan({"applications": {}}, normal(OLD))} == {"starts"}
    assert {step.effect for step in plan(running(OLD, "DELETING"), normal(OLD))} == {"starts"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda app, d: d["Scorer"]["user_config"].update(version="b", name="x"),
         {"Scorer": "Scorer reconfigured in place: user_config.name, user_config.version"}),
        (lambda app, d: d["Ingress"]["user_config"]["traffic"].update(split={"a": 1}),
         {"Ingress": "Ingress reconfigured in place: user_config.traffic"}),
        (lambda app, d: d["Scorer"].update(max_ongoing_requests=99, num_replicas=3),
         {"Scorer": "Scorer reconfigured in place: max_ongoing_requests"}),
        (lambda app, d: d["Scorer"].update(num_replicas=3),
         {"Scorer": "Scorer only scaling and queues change: num_replicas"}),
        (lambda app, d: d["TextEncoder"]["ray_actor_options"].update(num_cpus=1),
         {"TextEncoder": "TextEncoder restarts: ray_actor_options.num_cpus"}),
        (lambda app, d: d["TextEncoder"].update(ray_actor_options={"num_cpus": 0.3, "num_gpus": 1}, user_config={}),
         {"TextEncoder": "TextEncoder restarts: ray_actor_options.num_gpus"}),
        (lambda app, d: app.update(logging_config={"enable_access_log": False, "log_level": "DEBUG"}),
         {n: f"{n} reconfigured in place: logging_config.log_level" for n in ("Ingress", "TextEncoder", "Scorer")}),
        (lambda app, d: app["runtime_env"].update(py_modules=["gcs://two.zip"]),
         {n: f"{n} restarts: runtime_env.py_modules (the code)" for n in ("Ingress", "TextEncoder", "Scorer")}),
        (lambda app, d: app["args"].update(scorer_timeout_s=9),
         {n: f"{n} restarts: args.scorer_timeout_s" for n in ("Ingress", "TextEncoder", "Scorer")}),
        (lambda app, d: d["Scorer"].update(autoscaling_config=OWN_POLICY, num_replicas=None),
         {n: f"{n} restarts: Scorer.autoscaling_config.policy" for n in ("Ingress", "TextEncoder", "Scorer")}),
    ],
)  # fmt: skip
def test_each_change_has_its_effect(change: Any, expected: dict[str, str]) -> None:
    found = steps(running(OLD), changed(change))
    assert {name: step for name, step in found.items() if not step.endswith("unchanged")} == expected


def test_an_application_that_is_not_named_stops() -> None:
    other = changed(lambda app, _: app.update(name="other", route_prefix="/other"))
    found = plan({"applications": {**running(OLD)["applications"], **running(other)["applications"]}}, normal(OLD))
    assert [line for line in told(found) if "stops" in line or "plan" in line] == [
        "plan for springtide:",
        "plan for other:",
        *(f"  {n} stops: the configuration does not name it" for n in ("Ingress", "TextEncoder", "Scorer")),
    ]


def test_no_value_is_told() -> None:
    secret = changed(lambda app, _: app["args"].update(store="redis://:secret@10.0.0.5:6379/0"))
    assert "secret" not in "".join(told(plan(running(OLD), normal(secret))))


def test_our_rules_are_those_of_ray() -> None:
    """Ray marks how each option of a deployment is applied; options without a mark belong to the placement."""
    marks = {
        name: (field.json_schema_extra or {}).get("update_type")  # type: ignore[union-attr]
        for name, field in DeploymentConfig.model_fields.items()
    }
    for name in DeploymentSchema.model_fields:
        mark = marks.get(name, DeploymentOptionUpdateType.HeavyWeight)
        if name in ("name", "deployment_actors"):  # of the code version
            continue
        assert (name in RESTARTING) == (mark == DeploymentOptionUpdateType.HeavyWeight), name
        assert (name in SCALING) == (mark == DeploymentOptionUpdateType.LightWeight), name


# ---------------------------------------------------------------- filling in further models
@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    for folder, encoder in (("bundle", "/bert"), ("bundles/b", "/bert"), ("bundles/other", "/another")):
        settings = toy_settings(tmp_path, text__encoder=encoder)
        write_json(tmp_path / folder / "config.json", {"settings": settings.model_dump(mode="json"), "which": folder})
        write_manifest(tmp_path / folder)
    return tmp_path


def with_models(experiment: Path, models: Any, traffic: Any) -> Any:
    config = deepcopy(LOCAL)
    parts = {part["name"]: part["user_config"] for part in config["applications"][0]["deployments"]}
    parts["Scorer"]["models"], parts["Ingress"]["traffic"] = models, traffic
    return filled(config, toy_settings(experiment))


def test_further_models_are_filled_in(experiment: Path) -> None:
    config = with_models(
        experiment, {"b": {"bundle": "bundles/b"}}, {"split": {"toy": 9, "b": 1}, "shadow": {"b": 0.1}}
    )
    assert lint(config) == []
    scorer = next(d for d in config["applications"][0]["deployments"] if d["name"] == "Scorer")["user_config"]
    assert scorer["models"]["b"]["bundle"] == str(experiment / "served" / scorer["models"]["b"]["version"])
    assert scorer["bundle"] == str(experiment / "served" / scorer["version"])
    assert versions(config) == {"toy": scorer["version"], "b": scorer["models"]["b"]["version"]}
    assert scorer["version"] != scorer["models"]["b"]["version"]


@pytest.mark.parametrize(
    ("models", "traffic", "why"),
    [
        ({"b": {"bundle": "bundles/none"}}, {}, "there is no bundle at"),
        ({"b": {"bundle": "bundles/other"}}, {}, "model b was trained with the text encoder /another and the primary"),
        ({}, {"split": {"default": 1}}, "traffic.split names the model default, but Scorer serves toy"),
        ({}, {"shadow": {"c": 1}}, "traffic.shadow names the model c"),
    ],
)
def test_models_that_cannot_be_served_are_told_before(experiment: Path, models: Any, traffic: Any, why: str) -> None:
    with pytest.raises(SpringtideError, match=why):
        with_models(experiment, models, traffic)


# ---------------------------------------------------------------- waiting
def model(name: str, version: str, **values: Any) -> dict[str, Any]:
    return {"model": f"{name}@{version}", "name": name, "version": version, **values}


def test_all_the_models_asked_for_and_no_others() -> None:
    wanted = {"a": "1", "b": "2"}
    assert serving([model("a", "1"), model("b", "2")], wanted) == ["a@1", "b@2"]
    assert serving([model("a", "1")], wanted) is None
    assert serving([model("a", "0"), model("b", "2")], wanted) is None
    assert serving([model("a", "1"), model("b", "2"), model("c", "3")], wanted) is None
    assert serving([model("a", "7")], {"a": None}) == ["a@7"]
    with pytest.raises(SpringtideError, match=r"the model a was refused: damaged; still serving: a@0, b@2"):
        serving([model("a", "0", error="damaged"), model("b", "2")], wanted)
    with pytest.raises(SpringtideError, match=r"the model c was refused: none there; still serving: a@1"):
        serving([model("a", "1"), {"model": "c", "name": "c", "error": "none there"}], wanted)


def test_every_replica_must_serve_what_was_asked_for() -> None:
    """As the Ingress tells it, who asks all of them."""
    old, new, refused = model("a", "0"), model("a", "1"), model("a", "0", error="damaged")

    def told(*replicas: list[Any], asked: int | None = None) -> Any:
        return merged_models(Told([{"models": models} for models in replicas], asked or len(replicas)))

    merged = told([new], [old], [new])
    assert merged["replicas"] == 3 and merged["models"] == [{**new, "versions": ["0", "1"]}]
    assert serving(merged["models"], {"a": "1"}) is None
    assert serving(told([new], [new], [new])["models"], {"a": "1"}) == ["a@1"]
    absent = told([new], [new, model("b", "2")])
    assert absent["models"][1]["versions"] == [None, "2"]
    assert serving(absent["models"], {"a": "1", "b": "2"}) is None
    with pytest.raises(Refused, match="damaged"):
        serving(told([new], [refused])["models"], {"a": "1"})
    assert told([old]) == {"models": [old]}
    assert told([new], [new], asked=3) == {"models": [new], "replicas": 2, "replicas_asked": 3}


class Serve:
    """Plays a cluster: each configuration that is applied gets the state that its `says` has, or runs."""

    def __init__(self, before: Any, **says: str) -> None:
        """before: the configuration that runs, None: none; says: state of what is applied first, second ..."""
        self.applied: list[Any] = []
        self.says, self.faults = list(says.values()), list[Exception | None]()
        self.now = running(before) if before is not None else {"applications": {}}
        self.packages = {"gcs://one.zip", "gcs://two.zip"}

    def deploy_applications(self, config: Any) -> None:
        self.fail()
        status = self.says[len(self.applied)] if len(self.applied) < len(self.says) else "RUNNING"
        self.applied.append(config)
        self.now = running(config, status)
        part = {"status": status, "message": "RuntimeError: Ingress cannot start: no tokens"}
        for app in self.now["applications"].values():
            app["deployments"] = {"Ingress": part}

    def get_serve_details(self) -> Any:
        self.fail()
        return self.now

    def fail(self) -> None:
        if self.faults and (fault := self.faults.pop(0)) is not None:
            raise fault

    def _package_exists(self, package: str) -> bool:
        return package in self.packages


def new(app: Any, parts: dict[str, Any]) -> None:
    app["runtime_env"] = {"py_modules": ["gcs://two.zip"]}


NEW = normal(changed(new))
FAILED = "Serve could not deploy springtide: Ingress cannot start: no tokens"
PUT_BACK = "; the configuration before was put back"


def applied(serve: Serve, before: Any = None, effect: str = "restarts", seconds: float = 2) -> str:
    """What is said when NEW is applied and does not come to serve. before: what Serve told at first."""
    cluster = Cluster(serve, serve, serve.now if before is None else before)
    with pytest.raises(SpringtideError) as caught:
        _applied(cluster, NEW, [Step("springtide", "Scorer", effect)], time.monotonic() + seconds, seconds, said.append)
    return str(caught.value)


said: list[str] = []


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    said.clear()


def of(config: Any) -> Any:
    return config["applications"]


@pytest.mark.parametrize("effect", ["reconfigured", "unchanged", "restarts"])
def test_a_refused_configuration_is_not_left_in_place(effect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless replicas were replaced for it and serve without what they refused: they would be once more."""

    def refuse(*_: Any) -> None:
        raise Refused("the model was refused")

    monkeypatch.setattr(deploy, "wait_ready", refuse)
    serve = Serve(OLD)
    assert applied(serve, effect=effect) == "the model was refused" + PUT_BACK * (effect != "restarts")
    assert list(map(of, serve.applied)) == [of(NEW), of(normal(OLD))][: 1 + (effect != "restarts")]


def test_a_configuration_that_does_not_start_is_not_left_in_place() -> None:
    serve = Serve(OLD, first="DEPLOY_FAILED")
    assert applied(serve) == FAILED + PUT_BACK
    assert list(map(of, serve.applied)) == [of(NEW), of(normal(OLD))]
    assert said == ["putting the configuration before back"]
    both = applied(Serve(OLD, first="DEPLOY_FAILED", second="DEPLOY_FAILED"))
    assert both == f"{FAILED}{PUT_BACK} and does not serve yet: {FAILED}"


def test_one_that_is_not_running_in_time_is_not_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "TELL_S", 0.2)
    serve = Serve(OLD, first="UNHEALTHY")
    late = applied(serve, seconds=1)
    assert late.startswith("springtide is not ready in time, Serve says UNHEALTHY: ") and late.endswith(PUT_BACK)
    assert said[0] == "waiting for springtide, Serve says UNHEALTHY: Ingress cannot start: no tokens"


@pytest.mark.parametrize("status", ["UNHEALTHY", "DEPLOYING"])
def test_what_was_recovering_is_put_back(status: str) -> None:
    serve = Serve(OLD, first="DEPLOY_FAILED")
    assert applied(serve, running(OLD, status)) == FAILED + PUT_BACK


@pytest.mark.parametrize(("before", "status"), [(None, ""), (OLD, "NOT_STARTED"), (OLD, "DEPLOY_FAILED")])
def test_where_nothing_served_before_it_stays(before: Any, status: str) -> None:
    serve = Serve(None, first="DEPLOY_FAILED")
    told = running(before, status) if before is not None else {"applications": {}}
    assert applied(serve, told) == f"{FAILED}; it is left in place, as nothing served before"
    assert len(serve.applied) == 1


def test_what_ran_before_is_not_applied_twice() -> None:
    serve = Serve(NEW, first="DEPLOY_FAILED")
    assert applied(serve) == FAILED and len(serve.applied) == 1


def test_applications_that_were_stopped_are_started_again_and_new_ones_stopped() -> None:
    def named(config: Any, name: str) -> Any:
        return {**of(config)[0], "name": name, "route_prefix": f"/{name}"}

    before = {**normal(OLD), "applications": [of(normal(OLD))[0], named(normal(OLD), "other")]}
    serve = Serve(before, first="DEPLOY_FAILED")
    assert applied(serve) == FAILED + PUT_BACK
    assert [app["name"] for app in of(serve.applied[1])] == ["springtide", "other"]


def test_a_dashboard_that_fails_once_undoes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "wait_ready", lambda *_: ["springtide@1"])
    serve = Serve(OLD)
    serve.faults = [None, ConnectionError("reset by peer"), None]
    cluster = Cluster(serve, serve, serve.now)
    assert _applied(cluster, NEW, [], time.monotonic() + 9, 9, print)[1] == ["springtide@1"]
    silent = Serve(OLD)
    silent.faults = [None, *[ConnectionError("reset by peer")] * 99]
    assert "reset by peer" in applied(silent, seconds=1) and len(silent.applied) == 1


def test_what_somebody_else_deployed_meanwhile_stays() -> None:
    serve, real = Serve(OLD, first="DEPLOY_FAILED"), Serve.get_serve_details
    looks = []

    def details() -> Any:
        looks.append(1)
        return real(serve) if len(looks) == 1 else running(OLD)

    serve.get_serve_details = details  # type: ignore[method-assign]
    assert applied(serve) == f"{FAILED}; another configuration was deployed meanwhile, so nothing was undone"
    assert len(serve.applied) == 1


def test_what_cannot_be_put_back_is_told() -> None:
    serve = Serve(OLD, first="DEPLOY_FAILED")
    serve.packages.clear()
    gone = "; the code of the configuration before is no longer on the cluster, so deploy it from its checkout"
    assert applied(serve) == FAILED + gone and len(serve.applied) == 1
    serve = Serve(OLD, first="DEPLOY_FAILED")
    serve.faults = [None, None, None, RuntimeError("no such package")]
    assert applied(serve).startswith(f"{FAILED}; the configuration before could not be put back: ")


def test_code_that_lies_elsewhere_is_not_looked_for() -> None:
    environment = {"py_modules": ["s3://bucket/own.zip", "gcs://one.zip"]}
    apps = {"a": {"deployed_app_config": {"runtime_env": environment}}, "b": {"deployed_app_config": None}}
    assert packages_of(apps) == ["gcs://one.zip"]


def test_what_runs_and_does_not_answer_is_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def hide(*_: Any) -> None:
        raise SpringtideError("it answers, but has no token for us")

    monkeypatch.setattr(deploy, "wait_ready", hide)
    serve = Serve(OLD)
    assert applied(serve) == "it answers, but has no token for us" and len(serve.applied) == 1


def test_nothing_is_applied_when_the_time_is_up() -> None:
    serve = Serve(OLD)
    assert "did not answer in time" in applied(serve, seconds=-1) and not serve.applied


def test_another_address_than_that_of_serve_is_refused_with_the_way_to_keep_it() -> None:
    running = {"http_options": {"host": "127.0.0.1", "port": 8100}}
    _check_listener(running, {"http_options": {"host": "127.0.0.1", "port": 8100}})
    with pytest.raises(SpringtideError, match=r"port 8100 and cannot change it to 8000; add --set serve.port=8100, or"):
        _check_listener(running, {"http_options": {"host": "127.0.0.1", "port": 8000}})


# ---------------------------------------------------------------- names that nothing has
def test_names_in_vain_are_told(tmp_path: Path) -> None:
    rows = [{"item_id": "50", "categories": ["Comedy"]}, {"item_id": "51", "categories": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    policies = {
        "seen_actions": ["rating", "purchse"],
        "action_weights": {"wiew": 0},
        "exclude_categories": ["comedy"],
        "caps": {"categories": {"Comedy": 2}},
        "block_items": ["50", *map(str, range(60, 68))],
    }

    def set_policies(app: Any, parts: dict[str, Any]) -> None:
        parts["Scorer"]["user_config"]["policies"] = policies
        app["args"]["auth"] = {"tokens_file": str(tmp_path / "none.json")}

    write_json(tmp_path / "config.json", {"actions": ["<unknown>", "rating", "purchase"]})
    told = named_in_vain(changed(set_policies), tmp_path)
    assert told[0].startswith(f"the token file {tmp_path / 'none.json'} cannot be read")
    assert told[1:4] == [
        "policies.action_weights: wiew is no action of the log",
        "policies.seen_actions: purchse is no action of the log; did you mean purchase?",
        "policies.exclude_categories: comedy is no category of the trained catalogue; did you mean Comedy?",
    ]
    assert told[4:] == [
        *(f"policies.block_items: {n} is no item of the trained catalogue" for n in range(60, 65)),
        "policies.block_items: and 3 more that are no item of the trained catalogue",
    ]
    assert not named_in_vain(OLD, tmp_path / "none")  # nothing is named, so nothing is read
    (tmp_path / "items.parquet").write_bytes(b"torn")
    assert named_in_vain(changed(set_policies), tmp_path) == told[:3]  # the rest is not known


class Answers(BaseHTTPRequestHandler):
    """Plays an Ingress: `script` is a list of (/readyz status, models), the last of which stays."""

    script: list[tuple[int, Any]] = []
    read_by = ["default@1"]  # one more text asked, the next one
    encoder: list[dict[str, Any]] = [{"encoders": []}]  # as /v1/models has it, one more time asked, the next one
    replicas: list[dict[str, Any]] = [{}]  # of the Scorer, likewise

    def do_GET(self) -> None:
        status, models = self.script[0]
        if self.path == "/v1/models" and len(self.script) > 1:
            self.script.pop(0)
        body: dict[str, Any] = {"ready": status == 200, "checks": {"scorer": "loading"}}
        if self.path == "/v1/models":
            body = {"models": models, "encoder": self.encoder[0], **self.replicas[0]}
            self.encoder[:], self.replicas[:] = self.encoder[1:] or self.encoder, self.replicas[1:] or self.replicas
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.read_by[:] = self.read_by[1:] or self.read_by
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"encoder": self.read_by[0]}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def ingress() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Answers.encoder, Answers.replicas = [{"encoders": []}], [{}]
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def scorer_of(**models: str) -> Any:
    primary, *further = models
    options = {"name": primary, "version": models[primary], "models": {n: {"version": models[n]} for n in further}}
    return {"applications": [{"name": "x", "deployments": [{"name": "Scorer", "user_config": options}]}]}


def test_it_waits_for_the_version(ingress: str) -> None:
    Answers.script = [(200, [model("a", "0")]), (200, [model("a", "1")])]
    assert wait_ready(ingress, scorer_of(a="1"), time.monotonic() + 20) == ["a@1"]


def test_it_waits_for_the_text_encoder(ingress: str) -> None:
    """Which goes on with the one before where a new one cannot be loaded."""
    config = scorer_of(a="1")
    config["applications"][0]["deployments"].append({"name": "TextEncoder", "user_config": {"encoder": "/new"}})
    Answers.script, Answers.read_by = [(200, [model("a", "1", text=True)])], ["default@1", "default@1", "/new@2"]
    assert wait_ready(ingress, config, time.monotonic() + 20) == ["a@1"]
    Answers.read_by = ["default@1"]
    with pytest.raises(SpringtideError, match="queries are not read by /new"):
        wait_ready(ingress, config, time.monotonic() + 1)
    Answers.read_by, Answers.encoder = ["/new@2"], [{"encoders": ["/new@2", "default@1"]}, {"encoders": ["/new@2"]}]
    assert wait_ready(ingress, config, time.monotonic() + 20) == ["a@1"]
    assert Answers.encoder == [{"encoders": ["/new@2"]}]  # until every replica reads by it
    Answers.script, Answers.read_by = [(200, [model("a", "1", text=False)])], ["default@1"]
    assert wait_ready(ingress, config, time.monotonic() + 20) == ["a@1"]


def test_it_stops_at_an_encoder_that_one_replica_refuses(ingress: str) -> None:
    config = scorer_of(a="1")
    config["applications"][0]["deployments"].append({"name": "TextEncoder", "user_config": {"encoder": "/new"}})
    new, kept = {"encoder": "/new@2"}, {"encoder": "default@1", "error": "/new is no folder"}
    Answers.script, Answers.read_by = [(200, [model("a", "1", text=True)])], ["/new@2"]
    Answers.encoder = [merged_encoders(Told([new, kept], 2))]
    with pytest.raises(
        Refused,
        match="the text encoder /new was refused: /new is no folder; queries are still read by /new@2, default@1",
    ):
        wait_ready(ingress, config, time.monotonic() + 20)


@pytest.mark.parametrize(
    ("silent", "reason"), [("replicas", "not every Scorer tells"), ("encoder", "not read by /new in every TextEncoder")]
)
def test_it_waits_until_every_replica_has_told(ingress: str, silent: str, reason: str) -> None:
    config = scorer_of(a="1")
    config["applications"][0]["deployments"].append({"name": "TextEncoder", "user_config": {"encoder": "/new"}})
    Answers.script, Answers.read_by = [(200, [model("a", "1", text=True)])], ["/new@2"]
    slow = {"encoders": [], "replicas_asked": None}
    setattr(Answers, silent, [slow, {"encoders": []}])
    assert wait_ready(ingress, config, time.monotonic() + 20) == ["a@1"]
    assert getattr(Answers, silent) == [{"encoders": []}]
    setattr(Answers, silent, [slow])
    with pytest.raises(SpringtideError, match=reason):
        wait_ready(ingress, config, time.monotonic() + 1)


def test_it_stops_at_a_refusal(ingress: str) -> None:
    Answers.script = [(200, [model("a", "0", error="bundle x: y differs from its checksum")])]
    began = time.monotonic()
    with pytest.raises(SpringtideError, match="the model a was refused: bundle x: y differs"):
        wait_ready(ingress, scorer_of(a="1"), began + 20)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("status", "why"), [(503, "/readyz says .*loading"), (200, "the old models are still served")])
def test_it_says_what_it_waited_for(ingress: str, status: int, why: str) -> None:
    Answers.script = [(status, [model("a", "0")])]
    with pytest.raises(SpringtideError, match=f"is not ready in time: {why}"):
        wait_ready(ingress, scorer_of(a="1"), time.monotonic() + 1)


def test_nobody_answers() -> None:
    with pytest.raises(SpringtideError, match="not ready in time: URLError"):
        wait_ready("http://127.0.0.1:9", scorer_of(a="1"), time.monotonic() + 1)


def test_waiting_for_serve_is_bounded_and_says_which_part() -> None:
    part = {"status": "UPDATING", "message": "", "target_num_replicas": 2, "replicas": [{"state": "RUNNING"}]}
    healthy = {"status": "HEALTHY", "message": ""}
    state = {"status": "DEPLOYING", "message": "", "deployments": {"Scorer": part, "Ingress": healthy}}
    with pytest.raises(
        SpringtideError, match=r"x is not ready in time, Serve says DEPLOYING: Scorer is UPDATING \(1 of 2"
    ):
        wait_running(lambda: {"applications": {"x": state}}, scorer_of(a="1"), time.monotonic() - 1)
    with pytest.raises(SpringtideError, match="Serve says NOT_STARTED"):
        wait_running(lambda: {"applications": {}}, scorer_of(a="1"), time.monotonic() - 1)
    failed = {**state, "status": "DEPLOY_FAILED"}
    failed["deployments"] = {
        "Scorer": {**part, "message": "Traceback\n  RuntimeError: Scorer cannot start: no bundle\n\n"}
    }
    with pytest.raises(SpringtideError, match=r"^Serve could not deploy x: Scorer cannot start: no bundle$"):
        wait_running(lambda: {"applications": {"x": failed}}, scorer_of(a="1"), time.monotonic() + 9)


def test_a_dashboard_that_hangs_is_not_waited_for_beyond_the_deadline() -> None:
    release, began = threading.Event(), time.monotonic()
    with pytest.raises(SpringtideError, match="did not answer in time"):
        call(lambda: release.wait(60), began + 0.2)
    assert time.monotonic() - began < 30
    release.set()

    def refuse() -> None:
        raise ConnectionError("no route")

    assert call(lambda: 5, time.monotonic() + 20) == 5
    with pytest.raises(SpringtideError, match="refused or did not answer: no route"):
        call(refuse, time.monotonic() + 20)


def test_reasons() -> None:
    assert why({}) == "no reason given"
    error = {"status": "UNHEALTHY", "message": "Traceback (most recent call last)\n  MemoryError: out of memory\n"}
    assert why({"deployments": {"Scorer": error}}) == "Scorer: MemoryError: out of memory"
    assert why({"message": "ValueError: no such import path", "deployments": {}}) == "ValueError: no such import path"
