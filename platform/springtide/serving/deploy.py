"""Deploy: lint a Serve configuration, fill in the experiment's paths, send the code, apply, wait until it answers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from springtide.config import Settings
from springtide.errors import SpringtideError
from springtide.files import verify_manifest
from springtide.serving.lint import check_config, load_config
from springtide.serving.options import IMPORT_PATH
from springtide.serving.store import file_of

Json = dict[str, Any]
POLL_S = 0.5
TOKEN_VARIABLE = "SPRINGTIDE_TOKEN"
STORE_FILE = "history.sqlite3"  # in the workspace


def run(settings: Settings) -> Json:
    """The deploy job: serve the experiment's bundle by `serve.config` on the cluster that the environment names."""
    return deploy(settings, port=settings.serve.port, allow_public=settings.serve.allow_public)


def deploy(
    settings: Settings,
    config_path: str | Path | None = None,
    address: str | None = None,
    *,
    port: int | None = None,
    allow_public: bool = False,
    timeout_s: float | None = None,
    say: Callable[[str], None] = print,
) -> Json:
    """Serve the experiment's bundle on a running cluster and return {"url", "model", "applications", "seconds"}.

    address: the cluster's dashboard (http://host:8265); None finds it as `ray job submit` does. port replaces
    http_options.port. Raises SpringtideError for a configuration that fails the linter, a damaged bundle, an
    application that Serve reports as failed, or one that does not answer within timeout_s (None: serve.timeout_s).
    """
    started = time.monotonic()
    deadline = started + (timeout_s or settings.serve.timeout_s)
    config = filled(load_config(config_path or settings.serve.config, allow_public), settings, port)
    check_config(config, "filled-in Serve configuration", allow_public)
    jobs, apps = _clients(address)
    _check_listener(_call(apps.get_serve_details), config)
    code = upload_code(jobs)
    for app in config["applications"]:
        app.setdefault("runtime_env", {}).setdefault("py_modules", []).append(code)
    say(f"deploying {', '.join(app['name'] for app in config['applications'])} to {jobs.get_address()}")
    _call(lambda: apps.deploy_applications(config))
    _wait_running(apps, config, deadline)
    http = config["http_options"]
    url = f"http://{_bracketed(str(http['host']))}:{http.get('port', 8000)}"
    models = _wait_ready(url, config, deadline)
    say(f"serving {', '.join(models)} at {url}, API documentation at {url}/docs")
    return {
        "url": url,
        "model": models[0],
        "applications": [app["name"] for app in config["applications"]],
        "seconds": round(time.monotonic() - started, 2),
    }


def filled(config: Json, settings: Settings, port: int | None = None) -> Json:
    """A copy of a linted configuration with the experiment's bundle, its encoder, workspace and event log in it."""
    workspace = Path(settings.workspace).resolve()
    bundle = workspace / "bundle"
    verify_manifest(bundle, "bundle")
    version = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()[:12]
    # Not the settings' encoder: queries must be read by the one that read the items.
    trained = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    text = trained["settings"]["text"]
    served: Json = {"bundle": str(bundle), "version": version, "name": settings.name}
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
        for deployment in app["deployments"]:
            if deployment["name"] in values:
                deployment["user_config"] = {**deployment.get("user_config", {}), **values[deployment["name"]]}
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


def upload_code(jobs: Any) -> str:
    """Put the `springtide` package on the cluster and return its gcs:// address, the same for the same code.

    Serve takes no local folders, so this goes the way that `ray job submit` sends py_modules: over the dashboard, with
    its token. The copy leaves out caches, or every start of Python would count as new code and restart the replicas.
    """
    import springtide

    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "springtide"
        shutil.copytree(Path(springtide.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        runtime_env: Json = {"py_modules": [str(copy)]}
        _call(lambda: jobs._upload_py_modules_if_needed(runtime_env))
    return str(runtime_env["py_modules"][0])


def _clients(address: str | None) -> tuple[Any, Any]:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
    from ray.job_submission import JobSubmissionClient

    jobs = _call(lambda: JobSubmissionClient(address))
    return jobs, _call(lambda: ServeSubmissionClient(jobs.get_address()))


def _call(work: Callable[[], Any]) -> Any:
    """Run one call to the cluster; any refusal becomes a sentence."""
    try:
        return work()
    except Exception as error:  # the client raises RuntimeError, ConnectionError, AuthenticationError and requests'
        reason = " ".join(str(error).split())
        raise SpringtideError(
            f"the Ray cluster refused or did not answer: {reason[:600]}; check that it runs (ray start --head), "
            "its dashboard address and RAY_AUTH_MODE"
        ) from error


def _wait_running(apps: Any, config: Json, deadline: float) -> None:
    names = [app["name"] for app in config["applications"]]
    while True:
        details = _call(apps.get_serve_details)
        states = {name: details.get("applications", {}).get(name, {}) for name in names}
        failed = [name for name, app in states.items() if app.get("status") in ("DEPLOY_FAILED", "UNHEALTHY")]
        if failed:
            raise SpringtideError(f"Serve could not deploy {failed[0]}: {_why(states[failed[0]])}")
        if all(app.get("status") == "RUNNING" for app in states.values()):
            return
        if time.monotonic() > deadline:
            name = next(n for n, app in states.items() if app.get("status") != "RUNNING")
            raise SpringtideError(
                f"{name} is not ready in time, Serve says {states[name].get('status', 'NOT_STARTED')}: "
                f"{_why(states[name])}; free resources of the cluster or raise serve.timeout_s"
            )
        time.sleep(POLL_S)


def _check_listener(details: Json, config: Json) -> None:
    """Serve keeps the address it was started with and only logs that it ignores a new one."""
    running, wanted = details.get("http_options") or {}, config["http_options"]
    for key in ("host", "port"):
        if key in running and key in wanted and running[key] != wanted[key]:
            raise SpringtideError(
                f"Serve already runs on this cluster with http_options.{key} {running[key]} and cannot change it to "
                f"{wanted[key]}; run `serve shutdown` first, or deploy with the old one"
            )


def _why(app: Json) -> str:
    """Serve's reason: the last line of the traceback of a part that failed, else what Serve says of the whole."""
    parts = [d.get("message", "") for d in app.get("deployments", {}).values()]
    for message in [*parts, app.get("message", "")]:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        told = next((line for line in reversed(lines) if " cannot start: " in line or "Error: " in line), "")
        if told:
            return told.removeprefix("RuntimeError: ")[:800]
    return " ".join("; ".join(filter(None, [app.get("message", ""), *parts])).split())[-800:] or "no reason given"


def _wait_ready(url: str, config: Json, deadline: float) -> list[str]:
    """Wait for /readyz and for the version that was asked for; return the models' labels."""
    wanted = {
        str(deployment["user_config"]["version"])
        for app in config["applications"]
        for deployment in app["deployments"]
        if deployment["name"] == "Scorer"
    }
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            status, state = _get(f"{url}/readyz")
            if status == 200:
                status, answer = _get(f"{url}/v1/models")
                if status in (401, 403):
                    raise SpringtideError(
                        f"it serves, but /v1/models refused to tell which model; set {TOKEN_VARIABLE} to a token that "
                        "has the scope read"
                    )
                models = answer["models"]
                reason = next((m["error"] for m in models if m.get("error")), "the old model is still served")
                if {m["version"] for m in models} >= wanted:
                    return [m["model"] for m in models]
                if reason != "the old model is still served":
                    raise SpringtideError(f"the new model was refused and the old one still serves: {reason}")
            else:
                reason = f"/readyz says {json.dumps(state)[:300]}"
        except (OSError, ValueError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
        time.sleep(POLL_S)
    raise SpringtideError(f"{url} is not ready in time: {reason}; see the Serve logs, or raise serve.timeout_s")


def _get(url: str) -> tuple[int, Any]:
    """Status and JSON of a GET, past any proxy of the environment: the address is this machine's or the cluster's.

    Where tokens are asked for, the environment variable SPRINGTIDE_TOKEN holds one with the scope read.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    token = os.environ.get(TOKEN_VARIABLE)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def _bracketed(host: str) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reachable}]" if ":" in reachable else reachable
