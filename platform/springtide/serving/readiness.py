"""Waiting until a deployed configuration answers, for a bounded time, and the reason where it never does."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from springtide.errors import SpringtideError
from springtide.text.encoder import name_in

Json = dict[str, Any]
POLL_S = 0.5
TELL_S = 15.0  # without a word
TOKEN_VARIABLE = "SPRINGTIDE_TOKEN"


class NotServing(SpringtideError):
    """Serve could not start a configuration, or not in time."""


class Refused(SpringtideError):
    """Replicas go on with the model or the text encoder before, and refused the one that their configuration names."""


def wait_running(
    details: Callable[[], Json], config: Json, deadline: float, say: Callable[[str], None] = lambda line: None
) -> None:
    """Wait until Serve calls every application of a configuration running, and say now and then what it waits for.

    details: asks Serve's REST API. Raises NotServing with Serve's reason when an application could not be deployed, or
    is not running by the deadline (time.monotonic), and SpringtideError where Serve tells nothing by then.
    """
    names, tell = [app["name"] for app in config["applications"]], now_and_then(say)
    while True:
        try:
            applications = details().get("applications", {})
        except SpringtideError:  # a dashboard that fails once says nothing of what it was asked about
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)
            continue
        states = {name: applications.get(name, {}) for name in names}
        failed = [name for name, app in states.items() if app.get("status") == "DEPLOY_FAILED"]
        if failed:
            raise NotServing(f"Serve could not deploy {failed[0]}: {why(states[failed[0]])}")
        waiting = [name for name, app in states.items() if app.get("status") != "RUNNING"]  # UNHEALTHY may pass
        if not waiting:
            return
        reason = f"Serve says {states[waiting[0]].get('status', 'NOT_STARTED')}: {why(states[waiting[0]])}"
        if time.monotonic() > deadline:
            raise NotServing(
                f"{waiting[0]} is not ready in time, {reason}; free resources of the cluster or raise serve.timeout_s"
            )
        tell(f"waiting for {waiting[0]}, {reason}")
        time.sleep(POLL_S)


def now_and_then(say: Callable[[str], None]) -> Callable[[str], None]:
    """Says what it is given if nothing was said for TELL_S."""
    last = time.monotonic()

    def tell(line: str) -> None:
        nonlocal last
        if time.monotonic() - last > TELL_S:
            last = time.monotonic()
            say(line)

    return tell


def why(app: Json) -> str:
    """Serve's reason, by deployment: the last error of one that failed, else its state and what Serve says of it."""
    parts: Json = app.get("deployments") or {}
    for name, part in [*parts.items(), ("", app)]:
        lines = [line.strip() for line in part.get("message", "").splitlines() if line.strip()]
        error = next((line for line in reversed(lines) if " cannot start: " in line or "Error: " in line), "")
        if error:
            error = error.removeprefix("RuntimeError: ")[:800]
            return error if not name or error.startswith(name) else f"{name}: {error}"
    late = [
        f"{name} is {part.get('status', 'unknown')} ({_running(part)}) {part.get('message', '')}".strip()
        for name, part in parts.items()
        if part.get("status") != "HEALTHY"
    ]
    return " ".join("; ".join(filter(None, [app.get("message", ""), *late])).split())[-800:] or "no reason given"


def _running(part: Json) -> str:
    replicas = part.get("replicas") or []
    running = sum(replica.get("state") == "RUNNING" for replica in replicas)
    return f"{running} of {part.get('target_num_replicas', len(replicas))} replicas running"


def wait_ready(url: str, config: Json, deadline: float, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Wait for /readyz, for every model and version that a configuration asks for, and, where items have texts, for its
    text encoder; return the models' labels, and say now and then what it waits for.

    Raises Refused at once when a model or the encoder was, which leaves the old ones serving, and SpringtideError where
    nobody tells which models serve, and at the deadline.
    """
    wanted, encoder, tell = versions(config), encoder_of(config), now_and_then(say)
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            status, state = get(f"{url}/readyz")
            if status == 200:
                status, answer = get(f"{url}/v1/models")
                if status in (401, 403, 429):
                    raise SpringtideError(
                        f"it was applied and answers, but /v1/models refused ({status}) to tell which models serve; "
                        f"set {TOKEN_VARIABLE} to a token that has the scope read and may ask now"
                    )
                served = serving(answer["models"], wanted)
                reading = encoder if any(model.get("text") for model in answer["models"]) else None
                if served is None:
                    reason = "the old models are still served"
                elif "replicas_asked" in answer:  # one of those that did not tell may have refused
                    reason = "not every Scorer tells what it serves"
                elif _read_by(url, answer["encoder"], reading):
                    return served
                else:
                    reason = f"queries are not read by {encoder} in every TextEncoder"
            else:
                reason = f"/readyz says {json.dumps(state)[:300]}"
        except (OSError, ValueError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
        tell(f"waiting for {url}: {reason}")
        time.sleep(POLL_S)
    raise SpringtideError(f"{url} is not ready in time: {reason}; see the Serve logs, or raise serve.timeout_s")


def encoder_of(config: Json) -> str | None:
    """The text encoder that a filled-in configuration asks for."""
    parts = (part for app in config["applications"] for part in app["deployments"] if part["name"] == "TextEncoder")
    return next((part["user_config"].get("encoder") for part in parts), None)


def _read_by(url: str, told: Json, encoder: str | None) -> bool:
    """Whether texts are read by this encoder (None: there are none): in every replica, and in one that a text starts.

    Raises Refused if one failed to load it.
    """
    if encoder is None:
        return True
    if "error" in told:
        raise Refused(
            f"the text encoder {encoder} was refused: {told['error']}; queries are still read by "
            f"{', '.join(told['encoders'])}"
        )
    if "replicas_asked" in told:
        return False
    status, answer = get(f"{url}/v1/encode", {"text": "ready"})
    readers = [*told["encoders"], str(answer.get("encoder"))]
    return status == 200 and all(name_in(reader) == encoder for reader in readers)


def versions(config: Json) -> dict[str, str | None]:
    """Name -> version of every model that a filled-in configuration asks for, the primary first."""
    found: dict[str, str | None] = {}
    for app in config["applications"]:
        for deployment in app["deployments"]:
            if deployment["name"] == "Scorer":
                options = deployment["user_config"]
                found[options.get("name", "default")] = options.get("version")
                found.update({name: model.get("version") for name, model in (options.get("models") or {}).items()})
    return found


def serving(models: list[Json], wanted: dict[str, str | None]) -> list[str] | None:
    """The labels of the models if they are those wanted and no others, in every replica; None while they are not.

    Raises Refused if one was refused.
    """
    if refused := [model for model in models if model.get("error")]:
        kept = ", ".join(model["model"] for model in models if model.get("version")) or "none"
        raise Refused(f"the model {refused[0]['name']} was refused: {refused[0]['error']}; still serving: {kept}")
    if any(model.get("versions") for model in models):
        return None
    found = {model["name"]: model["version"] for model in models}
    if found.keys() != wanted.keys() or any(v is not None and found[name] != v for name, v in wanted.items()):
        return None
    return [model["model"] for model in models]


def get(url: str, body: Json | None = None) -> tuple[int, Any]:
    """Status and JSON of a GET, or of a POST with a body, past any proxy of the environment: the address is this
    machine's or the cluster's.

    Where tokens are asked for, the environment variable SPRINGTIDE_TOKEN holds one with the scope read.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    token = os.environ.get(TOKEN_VARIABLE)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")
