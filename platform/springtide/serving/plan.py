"""What applying a Serve configuration would do to what runs: which replicas restart, and which only take new settings.

Mirrors the rules of Ray Serve: what an application's code version is made of restarts all its replicas, a few options
of a deployment restart its own, and everything else is applied to the replicas as they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ray.serve.schema import ServeDeploySchema

Json = dict[str, Any]
# Of a deployment: what Serve cannot change in a running replica, and what no replica needs to know of.
RESTARTING = {
    "ray_actor_options",
    "placement_group_bundles",
    "placement_group_strategy",
    "placement_group_bundle_label_selector",
    "max_replicas_per_node",
    "gang_scheduling_config",
}
SCALING = {"num_replicas", "max_queued_requests", "rolling_update_percentage", "max_surge_percent"}
# Of an application, and of all its deployments together: together its code version.
CODE = ("import_path", "runtime_env", "args", "autoscaling_policy")
CODE_OF_DEPLOYMENTS = ("request_router_config", "deployment_actors")

START, RESTART, RECONFIGURE, SCALE, STOP, UNCHANGED = (
    "starts",
    "restarts",
    "reconfigured",
    "scaled",
    "stops",
    "unchanged",
)
_SAID = {RECONFIGURE: "reconfigured in place", SCALE: "only scaling and queues change"}


@dataclass(frozen=True)
class Step:
    """What happens to one deployment, and the settings that make it so."""

    application: str
    deployment: str
    effect: str
    because: tuple[str, ...] = ()

    def __str__(self) -> str:
        why = f": {', '.join(self.because)}" if self.because else ""
        return f"{self.deployment} {_SAID.get(self.effect, self.effect)}{why}"


def plan(running: Json, wanted: Json) -> list[Step]:
    """The steps from what runs to a configuration, by application and deployment.

    running: what Serve's REST API tells (GET /api/serve/applications/); wanted: a Serve configuration. Applications
    that the configuration does not name are stopped by Serve when it is applied. The values of settings, which may be
    secret, are not told.
    """
    deployed = {
        name: app["deployed_app_config"]
        for name, app in (running.get("applications") or {}).items()
        if app.get("deployed_app_config") and app.get("status") != "DELETING"
    }
    steps: list[Step] = []
    for app in wanted["applications"]:
        steps += _application(app["name"], deployed.pop(app["name"], None), app)
    for name, app in deployed.items():
        steps += [Step(name, part, STOP, ("the configuration does not name it",)) for part in _parts(app)]
    return steps


def told(steps: list[Step]) -> list[str]:
    """Lines for a reader, an application each followed by its deployments."""
    lines: list[str] = []
    for number, step in enumerate(steps):
        if not number or step.application != steps[number - 1].application:
            lines.append(f"plan for {step.application}:")
        lines.append(f"  {step}")
    return lines


def _application(name: str, old: Json | None, new: Json) -> Iterator[Step]:
    parts = _parts(new)
    if old is None:
        yield from (Step(name, part, START) for part in parts)
        return
    before = _parts(old)
    code = [reason for key in CODE for reason in _differing(key, old.get(key), new.get(key))]
    for part in sorted({*before, *parts}):
        first, second = before.get(part, {}), parts.get(part, {})
        code += [f"{part}.{key}" for key in CODE_OF_DEPLOYMENTS if _value(first.get(key)) != _value(second.get(key))]
        if _policy(first) != _policy(second):
            code.append(f"{part}.autoscaling_config.policy")
    logging = _differing("logging_config", old.get("logging_config"), new.get("logging_config"))
    route = _differing("route_prefix", old.get("route_prefix"), new.get("route_prefix"))
    for part, options in parts.items():
        if part not in before:
            yield Step(name, part, RESTART if code else START, tuple(code))
        else:
            yield _deployment(name, part, before[part], options, code, [*logging, *route])


def _deployment(app: str, name: str, old: Json, new: Json, code: list[str], shared: list[str]) -> Step:
    keys = sorted(key for key in {*old, *new} if _value(old.get(key)) != _value(new.get(key)))
    restarting = [reason for key in keys if key in RESTARTING for reason in _differing(key, old.get(key), new.get(key))]
    if code or restarting:
        return Step(app, name, RESTART, (*code, *restarting))
    live = [reason for key in keys if key not in SCALING for reason in _differing(key, old.get(key), new.get(key))]
    if live or shared:
        return Step(app, name, RECONFIGURE, (*shared, *live))
    return Step(app, name, SCALE, tuple(keys)) if keys else Step(app, name, UNCHANGED)


def _parts(app: Json) -> dict[str, Json]:
    return {
        part["name"]: {key: value for key, value in part.items() if key != "name"} for part in app["deployments"] or []
    }


def _policy(deployment: Json) -> Any:
    scaling = deployment.get("autoscaling_config")
    return _value(scaling.get("policy")) if isinstance(scaling, dict) else None


def _differing(key: str, old: Any, new: Any) -> list[str]:
    """The dotted names of what differs, one level below a section; none if nothing does."""
    if _value(old) == _value(new):
        return []
    if not (isinstance(old or {}, dict) and isinstance(new or {}, dict)):
        return [key]
    old, new = old or {}, new or {}
    names = [f"{key}.{name}" for name in {**old, **new} if _value(old.get(name)) != _value(new.get(name))]
    return [f"{name} (the code)" if name == "runtime_env.py_modules" else name for name in names]


def _value(value: Any) -> Any:
    """Absent and empty are the same to Serve."""
    return None if value in ({}, []) else value


def normal(config: Json) -> Json:
    """A configuration as Serve would tell it back, so that both sides of a comparison are written alike."""
    parsed = ServeDeploySchema.model_validate(config)
    for app in parsed.applications:  # as Serve does when it takes the configuration
        if app.logging_config is None:
            app.logging_config = parsed.logging_config
    filled: Json = parsed.model_dump(mode="json", exclude_unset=True)
    return filled
