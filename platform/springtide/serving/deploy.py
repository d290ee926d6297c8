"""Deploy: lint a Serve configuration, fill in the experiment's paths, send the code, tell what will restart, apply, and
wait until it answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from springtide.config import Settings
from springtide.errors import SpringtideError
from springtide.files import verify_manifest
from springtide.serving.lint import check_config, load_config
from springtide.serving.named import named_in_vain
from springtide.serving.options import IMPORT_PATH
from springtide.serving.plan import RECONFIGURE, SCALE, UNCHANGED, Step, normal, plan, told
from springtide.serving.reach import Cluster, call, clients, is_there, packages_of, upload_code
from springtide.serving.readiness import NotServing, Refused, wait_ready, wait_running
from springtide.serving.served import keep, prune, served_path, version_of
from springtide.serving.store import file_of
from springtide.serving.undo import undo

Json = dict[str, Any]
STORE_FILE = "history.sqlite3"  # in the workspace
_KEEPING = {"port": "add --set serve.port={}", "host": "write host: {} in the Serve file"}  # what runs


def run(settings: Settings) -> Json:
    """The deploy job: serve the experiment's bundle by `serve.config` on the cluster that the environment names."""
    serve = settings.serve
    return deploy(settings, port=serve.port, allow_public=serve.allow_public, plan_only=serve.plan_only)


def deploy(
    settings: Settings,
    config_path: str | Path | None = None,
    address: str | None = None,
    *,
    port: int | None = None,
    allow_public: bool = False,
    timeout_s: float | None = None,
    plan_only: bool = False,
    say: Callable[[str], None] = print,
) -> Json:
    """Serve the experiment's bundle on a running cluster and return {"url", "model", "models", "applications", "plan",
    "applied", "seconds"}; with plan_only, tell what would restart and what would only be reconfigured, and stop.

    address: the cluster's dashboard (http://host:8265); None finds it as `ray job submit` does. port replaces
    http_options.port. A configuration that Serve reports as failed, or not as running within timeout_s (None:
    serve.timeout_s), is undone, for which it waits as long again; so is one that is refused while the old one goes on
    serving. Raises SpringtideError for these, for one that fails the linter, a damaged bundle, and an application that
    runs but does not answer in time.
    """
    started, patience = time.monotonic(), timeout_s or settings.serve.timeout_s
    linted = load_config(config_path or settings.serve.config, allow_public)
    config = filled(linted, settings, port)
    check_config(config, "filled-in Serve configuration", allow_public)
    in_vain = list(named_in_vain(config, Path(settings.workspace) / "bundle"))
    deadline = time.monotonic() + patience
    cluster = _reached(address, config, deadline)
    steps = plan(cluster.running, normal(config))
    for line in (*told(steps), *in_vain):
        say(line)
    if plan_only:
        say("nothing was applied: serve.plan_only is on")
        return {"plan": [asdict(step) for step in steps], "applied": False}
    workspace = Path(settings.workspace).resolve()
    for source in _bundles_in(linted, workspace):
        keep(source, workspace, version_of(source))
    check_kept(config)
    names = [app["name"] for app in config["applications"]]
    say(f"deploying {', '.join(names)} through the dashboard {cluster.jobs.get_address()}")
    url, models = _applied(cluster, config, steps, deadline, patience, say)
    _prune(cluster, config, workspace, deadline, say)
    say(f"serving {', '.join(models)} at {url}, API documentation at {url}/docs")
    return {
        "url": url,
        "model": models[0],
        "models": models,
        "applications": names,
        "plan": [asdict(step) for step in steps],
        "applied": True,
        "seconds": round(time.monotonic() - started, 2),
    }


def _reached(address: str | None, config: Json, deadline: float) -> Cluster:
    """The cluster with the code on it, which is written into the configuration."""
    jobs, apps = clients(address, deadline)
    running = call(apps.get_serve_details, deadline)
    _check_listener(running, config)
    for package in packages_of(running.get("applications") or {}):
        is_there(jobs, package, deadline)  # so that the cluster keeps it for as long as it may have to be put back
    code = upload_code(jobs, deadline)
    for app in config["applications"]:
        app.setdefault("runtime_env", {}).setdefault("py_modules", []).append(code)
    return Cluster(jobs, apps, running)


def _applied(
    cluster: Cluster, config: Json, steps: list[Step], deadline: float, patience: float, say: Callable[[str], None]
) -> tuple[str, list[str]]:
    """Apply a configuration and wait until it answers; where, and by which models.

    What Serve does not call running, or a replica refuses, is undone in up to `patience` seconds. What runs and does
    not answer as it should is not: the fault may be of the store, of a token, or of the way from here. Raises
    SpringtideError for all of these.
    """
    call(lambda: cluster.apps.deploy_applications(config), deadline)
    http = config["http_options"]
    url = f"http://{_bracketed(str(http['host']))}:{http.get('port', 8000)}"
    try:
        wait_running(lambda: cluster.details(deadline), config, deadline, say)
        return url, wait_ready(url, config, deadline, say)
    except NotServing as error:
        raise SpringtideError(f"{error}{undo(cluster, config, patience, say)}") from None
    except Refused as error:
        in_place = all(step.effect in (RECONFIGURE, SCALE, UNCHANGED) for step in steps)
        # Replicas that were replaced serve without what they refused, and would be replaced once more.
        raise SpringtideError(f"{error}{undo(cluster, config, patience, say) if in_place else ''}") from None


def _prune(cluster: Cluster, config: Json, workspace: Path, deadline: float, say: Callable[[str], None]) -> None:
    try:
        prune(workspace, [cluster.running, config, cluster.details(deadline)])
    except SpringtideError as error:
        say(f"old copies of bundles stay for now: {error}")


def filled(config: Json, settings: Settings, port: int | None = None) -> Json:
    """A copy of a linted configuration with the experiment's bundle, its encoder, workspace and event log in it.

    Bundles are named by where `keep` puts this version of them.
    """
    workspace = Path(settings.workspace).resolve()
    # Not the settings' encoder: queries must be read by the one that read the items.
    served, trained = _bundle_at(workspace / "bundle", workspace)
    served["name"] = settings.name
    text = trained["settings"]["text"]
    values: dict[str, Json] = {
        "Ingress": {"log": trained.get("log"), **served},
        "Scorer": served,
        "TextEncoder": {"encoder": text["encoder"], "max_tokens": text["max_tokens"]},
    }
    config = deepcopy(config)
    if port is not None:
        config["http_options"]["port"] = port
    for app in config["applications"]:
        if app["import_path"] != IMPORT_PATH:
            continue
        app.setdefault("name", "default")
        args = {**(app.get("args") or {}), "workspace": str(workspace)}
        args["store"] = store_of(settings, args["store"])
        app["args"] = args
        parts = {deployment["name"]: deployment for deployment in app["deployments"]}
        for name in values.keys() & parts.keys():
            parts[name]["user_config"] = {**parts[name].get("user_config", {}), **values[name]}
        _fill_models(app, workspace, text["encoder"])
        policies = parts["Scorer"]["user_config"].get("policies")
        parts["Ingress"]["user_config"]["policies"] = policies  # what is blocked stays so while the Scorer is down
    return config


def store_of(settings: Settings, configured: str) -> str:
    """The event log of an experiment, where a Serve file configures this one. Raises SpringtideError for a bad address.

    A relative path in the file stands for the workspace's own log; an absolute one is a choice, such as a disk of the
    head node's own. Addresses of a Redis stay as they are.
    """
    workspace = Path(settings.workspace).resolve()
    store = settings.serve.store or configured
    try:
        file = file_of(store)
    except ValueError as error:
        raise SpringtideError(f"serve.store: {error}") from None
    if file is None or file.is_absolute():
        return store
    return str(workspace / (STORE_FILE if settings.serve.store is None else file))


def _bundle_at(path: Path, workspace: Path) -> tuple[Json, Json]:
    """What a configuration says of a whole bundle, and the bundle's config.json. Raises SpringtideError for others."""
    verify_manifest(path, "bundle")
    version = version_of(path)
    trained: Json = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return {"bundle": str(served_path(workspace, version)), "version": version}, trained


def _bundles_in(linted: Json, workspace: Path) -> list[Path]:
    """Where the bundles lie that a configuration asks for, before it is filled in."""
    parts = [part for app in linted["applications"] for part in app["deployments"] if part["name"] == "Scorer"]
    further = [model["bundle"] for part in parts for model in (part["user_config"].get("models") or {}).values()]
    return [workspace / "bundle", *(workspace / bundle for bundle in further)]


def check_kept(config: Json) -> None:
    """Raise SpringtideError if a filled-in configuration names a bundle that was not kept."""
    for app in config["applications"]:
        for part in app["deployments"]:
            options = part.get("user_config") or {}
            for one in (options, *(options.get("models") or {}).values()):
                if one.get("version") and not (Path(one["bundle"]) / "manifest.json").is_file():
                    raise SpringtideError(
                        f"version {one['version']} of a bundle was replaced while it was deployed; deploy again"
                    )


def _fill_models(app: Json, workspace: Path, encoder: str) -> None:
    """Paths and versions of the further models, and a check that traffic goes only to models that are there.

    Raises SpringtideError for a damaged bundle, one whose items another encoder read, and an unknown name.
    """
    options = {deployment["name"]: deployment["user_config"] for deployment in app["deployments"]}
    models = {}
    for name, model in (options["Scorer"].get("models") or {}).items():
        models[name], trained = _bundle_at(workspace / model["bundle"], workspace)
        if trained["settings"]["text"]["encoder"] != encoder:
            raise SpringtideError(
                f"model {name} was trained with the text encoder {trained['settings']['text']['encoder']} and the "
                f"primary with {encoder}, but one TextEncoder reads the queries of both; deploy it on its own"
            )
    options["Scorer"]["models"] = models
    served = [options["Scorer"]["name"], *models]
    traffic = options["Ingress"].get("traffic") or {}
    for section in ("split", "shadow"):
        for name in traffic.get(section) or {}:
            if name not in served:
                raise SpringtideError(
                    f"traffic.{section} names the model {name}, but Scorer serves {', '.join(served)} (the primary has "
                    "the experiment's name); correct the name or add it to Scorer's models"
                )


def _check_listener(details: Json, config: Json) -> None:
    """Serve keeps the address it was started with and only logs that it ignores a new one."""
    running, wanted = details.get("http_options") or {}, config["http_options"]
    for key in ("host", "port"):
        if key in running and key in wanted and running[key] != wanted[key]:
            raise SpringtideError(
                f"Serve already runs on this cluster with http_options.{key} {running[key]} and cannot change it to "
                f"{wanted[key]}; {_KEEPING[key].format(running[key])}, or run `serve shutdown` first, which stops it"
            )


def _bracketed(host: str) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reachable}]" if ":" in reachable else reachable
