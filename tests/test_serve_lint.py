"""The linter finds what Ray's schema lets through, and the files we ship pass it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from springtide.config import parse_settings
from springtide.errors import SpringtideError
from springtide.files import write_json, write_manifest
from springtide.serving.deploy import filled
from springtide.serving.lint import lint, load_config

FOLDER = Path(__file__).parents[1] / "serve_configs"
LOCAL: dict[str, Any] = yaml.safe_load((FOLDER / "local.yaml").read_text())


def app(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["applications"][0]
    return found


def part(config: dict[str, Any], name: str) -> dict[str, Any]:
    return next(d for d in app(config)["deployments"] if d["name"] == name)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.name)
def test_the_files_that_we_ship_pass(path: Path) -> None:
    assert lint(load_config(path)) == []


def test_gpu_replicas_have_their_own_share_of_a_gpu() -> None:
    config = load_config(FOLDER / "gpu.yaml")
    for name in ("TextEncoder", "Scorer"):
        deployment = part(config, name)
        assert 0 < deployment["ray_actor_options"]["num_gpus"] <= 1
        assert deployment["autoscaling_config"]["max_replicas"] > 1
        assert deployment["user_config"]["device"] == "cuda"


def put(*path: Any, value: Any = 1) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        node: Any = config
        for step in path[:-1]:
            node = part(node, step[1:]) if isinstance(step, str) and step.startswith("@") else node[step]
        node[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        node: Any = config
        for step in path[:-1]:
            node = part(node, step[1:]) if isinstance(step, str) and step.startswith("@") else node[step]
        del node[path[-1]]

    return change


AUTO = {"min_replicas": 1, "max_replicas": 2}
CASES: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("top", put("proxy_locations"), "did you mean proxy_location?"),
    ("http_options", put("http_options", "hosts"), "http_options.hosts; did you mean host?"),
    ("logging_config", put("logging_config", "enable_acces_log"), "did you mean enable_access_log?"),
    ("application", put("applications", 0, "import_pth"), "applications.0.import_pth; did you mean import_path?"),
    ("args", put("applications", 0, "args", "stor"), "applications.0.args.stor; did you mean store?"),
    ("args value", put("applications", 0, "args", "encoder_timeout_s", value=0), "args.encoder_timeout_s: input"),
    ("store", put("applications", 0, "args", "store", value="mysql://host/1"), "args.store: an event log is a file"),
    ("store without number", put("applications", 0, "args", "store", value="redis://host"), "redis://host:port/number"),
    ("deployment", put("@Scorer", "num_replica"), "num_replica; did you mean num_replicas?"),
    ("ray_actor_options", put("@Scorer", "ray_actor_options", "num_cpu"), "num_cpu; did you mean num_cpus?"),
    ("user_config", put("@Scorer", "user_config", "bundel"), "user_config.bundel; did you mean bundle?"),
    ("model", put("@Scorer", "user_config", "models", value={"b": {"bundel": "x"}}), "b.bundel; did you mean bundle?"),
    ("model value", put("@Scorer", "user_config", "models", value={"b": {}}), "user_config.models.b.bundle: field req"),
    ("model's name", put("@Scorer", "user_config", "models", value={"a/b": {"bundle": "x"}}), "models.a/b.[key]: str"),
    ("same name", put("@Scorer", "user_config", "models", value={"default": {"bundle": "x"}}), "name of the primary"),
    ("traffic", put("@Ingress", "user_config", "traffic", value={"splits": {}}), "traffic.splits; did you mean split?"),
    ("weights", put("@Ingress", "user_config", "traffic", value={"split": {"a": 0}}), "one weight must be above 0"),
    ("exposures", put("@Ingress", "user_config", "exposures", value={"queue": 0}), "user_config.exposures.queue:"),
    ("user_config value", put("@Scorer", "user_config", "device", value="tpu"), "user_config.device:"),
    ("encoder user_config", put("@TextEncoder", "user_config", "max_token"), "did you mean max_tokens?"),
    ("deployment logging", put("@Ingress", "logging_config", value={"levl": "INFO"}), "logging_config.levl"),
    ("autoscaling", put("@Scorer", "autoscaling_config", value={"max_replica": 2}), "did you mean max_replicas?"),
    ("autoscaling policy", put("@Scorer", "autoscaling_config", value={**AUTO, "policy": {"polcy_function": "a:b"}}),
     "did you mean policy_function?"),
    ("deprecated", put("@Scorer", "autoscaling_config", value={**AUTO, "smoothing_factor": 1.0}), "deprecated in Ray"),
    ("autoscaling target", put("@Scorer", "autoscaling_config", value={**AUTO, "target_ongoing_requests": 16}),
     "target_ongoing_requests (16) may never be passed"),
    ("router", put("@Scorer", "request_router_config", value={"request_router_clas": "x"}), "request_router_class?"),
    ("deployment name", put("@Scorer", "name", value="Scorr"), "there is no deployment 'Scorr'; did you mean Scorer?"),
    ("deployment twice", put("@Ingress", "name", value="Scorer"), "Scorer appears twice"),
    ("deployment missing", drop("applications", 0, "deployments", 2), "Scorer is missing"),
    ("user_config missing", drop("@Scorer", "user_config"), "user_config is missing"),
    ("user_config of Ingress", put("@Ingress", "user_config", value={"lg": 1}), "user_config.lg; did you mean log?"),
    ("batch tokens", put("@TextEncoder", "user_config", "max_batch_tokens", value=8), "at least max_tokens"),
    ("no host", drop("http_options", "host"), "http_options.host is missing"),
    ("wildcard host", put("http_options", "host", value="0.0.0.0"), "can be reached from other machines"),
    ("wildcard IPv6 host", put("http_options", "host", value="::"), "can be reached from other machines"),
    ("grpc", put("grpc_options", value={"grpc_servicer_functions": ["a.b"]}), "opens a port on every interface"),
    ("two places of tokens", put("applications", 0, "args", "auth", value={"tokens_file": "a", "tokens_env": "B"}),
     "give either tokens_file or tokens_env"),
    ("import path", put("applications", 0, "import_path", value="other.module:build"), "import_path must be"),
    ("prefix", put("applications", 0, "route_prefix", value="/shop"), "applications.0.route_prefix must be /, where"),
    ("no route", put("applications", 0, "route_prefix", value=None), "applications.0.route_prefix must be /, where"),
    ("wrong value", put("@Scorer", "num_replicas", value=-1), "num_replicas"),
    ("wrong autoscaling value", put("@Scorer", "autoscaling_config", value={"min_replicas": -1}), "min_replicas"),
    ("port in the application", put("applications", 0, "port", value=8001), "8001"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_faults_are_named(change: Callable[[dict[str, Any]], None], sentence: str) -> None:
    config = copy.deepcopy(LOCAL)
    change(config)
    assert sentence in "; ".join(lint(config))


def test_a_public_host_can_be_allowed_with_tokens() -> None:
    config = copy.deepcopy(LOCAL)
    config["http_options"]["host"] = "0.0.0.0"
    assert "args.auth is missing" in "; ".join(lint(config, allow_public=True))
    app(config)["args"]["auth"] = {"tokens_file": "tokens.json"}
    assert lint(config, allow_public=True) == []
    assert lint(config) != []


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_args_that_are_no_section_get_a_sentence(host: str) -> None:
    config = copy.deepcopy(LOCAL)
    config["http_options"]["host"] = host
    app(config)["args"] = ["x"]
    assert "applications.0.args must be a section" in lint(config, allow_public=True)


def test_unreadable_files_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SpringtideError, match="cannot read the Serve configuration"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(SpringtideError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "text.yaml").write_text("text")
    with pytest.raises(SpringtideError, match="must hold keys"):
        load_config(tmp_path / "text.yaml")


def test_deploy_fills_in_the_experiment(tmp_path: Path) -> None:
    data = {"events": {"paths": "x.csv"}}
    settings = parse_settings({"name": "films", "workspace": str(tmp_path), "data": data, "text": {"max_tokens": 32}})
    with pytest.raises(SpringtideError, match="there is no bundle"):
        filled(LOCAL, settings)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "file").write_bytes(b"weights")
    trained = settings.model_copy(update={"text": settings.text.model_copy(update={"encoder": "/models/bert"})})
    write_json(tmp_path / "bundle" / "config.json", {"settings": trained.model_dump(mode="json")})
    write_manifest(tmp_path / "bundle")
    config = filled(LOCAL, settings, port=8123)
    assert part(config, "Ingress")["user_config"]["policies"] == part(LOCAL, "Scorer")["user_config"]["policies"]
    assert lint(config) == []
    assert config["http_options"]["port"] == 8123
    assert app(config)["args"]["store"] == str(tmp_path / "history.sqlite3")
    assert part(config, "Scorer")["user_config"]["name"] == "films"
    version = part(config, "Scorer")["user_config"]["version"]
    assert part(config, "Scorer")["user_config"]["bundle"] == str(tmp_path / "served" / version)
    assert part(config, "TextEncoder")["user_config"]["max_tokens"] == 32
    assert part(config, "TextEncoder")["user_config"]["encoder"] == "/models/bert"  # what the items were read with
    assert app(LOCAL)["args"]["workspace"] == "workspace"
    (tmp_path / "bundle" / "file").write_bytes(b"weightz")
    with pytest.raises(SpringtideError, match="file differs from its checksum"):
        filled(LOCAL, settings)
    gpu = load_config(FOLDER / "gpu.yaml")
    (tmp_path / "bundle" / "file").write_bytes(b"weights")
    for store in ("/var/lib/springtide/history.sqlite3", "sqlite:///var/lib/log", "redis://10.0.0.5:6379/0"):
        app(gpu)["args"]["store"] = store
        assert app(filled(gpu, settings))["args"]["store"] == store
