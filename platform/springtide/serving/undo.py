"""Undoing a deployment that never serves: what served before is applied again, unless somebody went on meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from springtide.errors import SpringtideError
from springtide.serving.plan import UNCHANGED, normal, plan
from springtide.serving.reach import Cluster, call, is_there, packages_of
from springtide.serving.readiness import wait_running

Json = dict[str, Any]
# Others may be recovering from a fault, in which they may be answering: Serve then calls them DEPLOYING or UNHEALTHY.
NEVER_SERVED = ("NOT_STARTED", "DEPLOY_FAILED", "DELETING")


def undo(cluster: Cluster, config: Json, seconds: float, say: Callable[[str], None]) -> str:
    """Put back what served before `config` was applied, wait for it, and return what became of it, for the end of a
    sentence.

    A replica that starts later would find only the configuration that failed; where replicas were replaced for that,
    nobody may be answering.
    """
    served = {
        name: app
        for name, app in (cluster.running.get("applications") or {}).items()
        if app.get("deployed_app_config") and app.get("status") not in NEVER_SERVED
    }
    if not served:
        return "; it is left in place, as nothing served before"
    if _runs(cluster.running, config):
        return ""  # there is no other one
    old = {**config, "applications": [app["deployed_app_config"] for app in served.values()]}
    deadline = time.monotonic() + seconds
    try:
        if not _runs(cluster.details(deadline), config):
            return "; another configuration was deployed meanwhile, so nothing was undone"
        if not all(is_there(cluster.jobs, package, deadline) for package in packages_of(served)):
            return "; the code of the configuration before is no longer on the cluster, so deploy it from its checkout"
        say("putting the configuration before back")
        call(lambda: cluster.apps.deploy_applications(old), deadline)
    except SpringtideError as error:
        return f"; the configuration before could not be put back: {error}"
    try:
        wait_running(lambda: cluster.details(deadline), old, deadline, say)
    except SpringtideError as error:
        return f"; the configuration before was put back and does not serve yet: {error}"
    return "; the configuration before was put back"


def _runs(running: Json, config: Json) -> bool:
    """Whether the applications are those of a configuration, and as it has them."""
    return all(step.effect == UNCHANGED for step in plan(running, normal(config)))
