"""cluster.yaml is valid for `ray up`, checked offline with Ray's own code, and keeps the promises of its comments."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    return yaml.safe_load((REPO / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def prepared(raw: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` sees it: merged with the defaults of the AWS provider."""
    return prepare_config(copy.deepcopy(raw))


def test_ray_accepts_it(prepared: dict[str, Any]) -> None:
    validate_config(prepared)


def test_ray_would_refuse_a_misspelt_key(raw: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**copy.deepcopy(raw), "idle_timeout_minute": 1}))


def test_head_has_no_gpu_and_workers_are_autoscaled_gpus(prepared: dict[str, Any]) -> None:
    types = dict(prepared["available_node_types"])
    head = types.pop(prepared["head_node_type"])
    assert head["resources"]["GPU"] == 0 and head["resources"]["CPU"] >= 2
    assert head["max_workers"] == 0  # no second head as a worker
    assert types
    for worker in types.values():
        assert worker["resources"]["GPU"] >= 1
        assert worker["min_workers"] == 0 < worker["max_workers"] <= prepared["max_workers"]


def test_token_authentication_is_explicit_on_every_node(prepared: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        starts = [command for command in prepared[f"{role}_start_ray_commands"] if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0].split("ray start")[0]
        assert any(".bashrc" in c and "RAY_AUTH_MODE=token" in c for c in prepared[f"{role}_setup_commands"])
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN=" not in (REPO / "cluster.yaml").read_text()  # a token never stands in a file of the project


def test_nothing_but_loopback_is_offered_and_nothing_is_stopped(prepared: dict[str, Any]) -> None:
    (head,) = prepared["head_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in head
    commands = [c for key, value in prepared.items() if key.endswith("_commands") for c in value]
    assert not [c for c in commands if "ray stop" in c or "0.0.0.0" in c]


def test_nodes_are_set_up_like_a_laptop(prepared: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        commands = prepared[f"{role}_setup_commands"]
        assert any("python3.11 -m venv" in command for command in commands)
        assert any("pip install -c constraints.txt ." in command for command in commands)
    local = [source for source in prepared["file_mounts"].values() if not source.startswith("~")]
    assert {"platform", "pyproject.toml", "constraints.txt"} <= set(local)
    assert [source for source in local if not (REPO / source).exists()] == []


def test_commands_are_valid_shell(prepared: dict[str, Any]) -> None:
    commands = [c for key, value in prepared.items() if key.endswith("_commands") for c in value]
    assert len(commands) > 10
    for command in commands:
        checked = subprocess.run(["bash", "-n", "-c", command], check=False, capture_output=True, text=True)
        assert checked.returncode == 0, f"{command}: {checked.stderr}"


def test_serve_runs_in_its_fast_mode_on_every_node(prepared: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        (start,) = prepared[f"{role}_start_ray_commands"]
        assert "RAY_SERVE_ENABLE_HA_PROXY=1" in start and "RAY_SERVE_THROUGHPUT_OPTIMIZED=1" in start
        assert "/bin/springtide-haproxy;" in start
        assert 'RAY_SERVE_HAPROXY_RETRY_ON="conn-failure empty-response"' in start


def test_it_offers_what_the_gpu_serve_config_asks_for(prepared: dict[str, Any]) -> None:
    path = REPO / "serve_configs" / "gpu.yaml"
    types = [node["resources"] for node in prepared["available_node_types"].values()]
    for application in yaml.safe_load(path.read_text())["applications"]:
        for deployment in application["deployments"]:
            options = deployment.get("ray_actor_options", {})
            asked = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0)}
            asked |= options.get("resources", {})
            fits = [all(offer.get(name, 0) >= amount for name, amount in asked.items()) for offer in types]
            assert any(fits), f"no node of cluster.yaml can hold {deployment['name']}: {asked}"
