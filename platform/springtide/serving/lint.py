"""A strict check of Serve configuration files, without a cluster: Ray's own schema lets misspelt keys through."""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from springtide.errors import SpringtideError
from springtide.serving.options import CALLS_PER_REPLICA, IMPORT_PATH, USER_CONFIG, AppOptions

Json = dict[str, Any]


def load_config(path: str | Path, allow_public: bool = False) -> Json:
    """Read a Serve configuration and lint it. Raises SpringtideError that lists every problem."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpringtideError(f"cannot read the Serve configuration {path}: {error.strerror}; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpringtideError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    check_config(config, str(path), allow_public)
    checked: Json = config
    return checked


def check_config(config: Any, where: str = "Serve configuration", allow_public: bool = False) -> None:
    """Raise SpringtideError if `lint` finds anything."""
    problems = lint(config, allow_public)
    if problems:
        raise SpringtideError(f"{where}: " + "; ".join(problems))


def lint(config: Any, allow_public: bool = False) -> list[str]:
    """Every problem of a parsed configuration, as sentences; an empty list if there is none."""
    if not isinstance(config, dict):
        return ["the file must hold keys such as http_options and applications"]
    problems = [*_unknown_keys(config, ServeDeploySchema, "")]
    if not problems:  # wrong values are told once the keys are right
        problems += _wrong_values(config)
    problems += [*_listeners(config, allow_public), *_open_doors(config)]
    for number, app in enumerate(_dicts(config.get("applications"))):
        problems += _application(app, f"applications.{number}")
    return list(dict.fromkeys(problems))


def _unknown_keys(value: Json, schema: type[BaseModel], where: str) -> Iterator[str]:
    """Keys that `schema` does not have, here and in every section below."""
    for key, below in value.items():
        path = f"{where}.{key}" if where else str(key)
        field = schema.model_fields.get(key)
        if field is None:
            yield f"unknown key {path}{_nearest(str(key), list(schema.model_fields))}"
            continue
        if (field.description or "").startswith("[DEPRECATED]"):
            yield f"{path} is deprecated in Ray; remove it"
        section = _section_in(field.annotation)
        if section is None:
            continue
        if isinstance(below, dict) and get_origin(field.annotation) is dict:  # names of the user's own -> sections
            for name, element in below.items():
                if isinstance(element, dict):
                    yield from _unknown_keys(element, section, f"{path}.{name}")
        elif isinstance(below, dict):
            yield from _unknown_keys(below, section, path)
        elif isinstance(below, list):
            for number, element in enumerate(below):
                if isinstance(element, dict):
                    yield from _unknown_keys(element, section, f"{path}.{number}")


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model within an annotation such as list[Model], Model | None or dict | Model."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _section_in(argument))), None)


def _wrong_values(config: Json) -> Iterator[str]:
    yield from _validate(ServeDeploySchema, config, "")
    for i, app in enumerate(_dicts(config.get("applications"))):
        for j, deployment in enumerate(_dicts(app.get("deployments"))):
            if isinstance(deployment.get("autoscaling_config"), dict):  # Ray checks it only when it is applied
                where = f"applications.{i}.deployments.{j}.autoscaling_config"
                yield from _validate(AutoscalingConfig, deployment["autoscaling_config"], where)


def _listeners(config: Json, allow_public: bool) -> Iterator[str]:
    http = config.get("http_options")
    host = http.get("host") if isinstance(http, dict) else None
    if host is None:
        yield "http_options.host is missing, and Ray would then listen on every interface; give 127.0.0.1"
    elif not allow_public and not _is_loopback(str(host)):
        yield (
            f"http_options.host {host} can be reached from other machines; give 127.0.0.1, or set "
            "serve.allow_public=true"
        )
    grpc = config.get("grpc_options")
    if isinstance(grpc, dict) and grpc.get("grpc_servicer_functions") and not allow_public:
        yield (
            "grpc_options.grpc_servicer_functions opens a port on every interface; remove it, or set "
            "serve.allow_public=true"
        )


def _open_doors(config: Json) -> Iterator[str]:
    """An address that other machines can reach needs tokens, whatever else is allowed."""
    http = config.get("http_options")
    host = str(http.get("host", "127.0.0.1")) if isinstance(http, dict) else "127.0.0.1"  # absent is told elsewhere
    if _is_loopback(host):
        return
    for number, app in enumerate(_dicts(config.get("applications"))):
        args = app.get("args") or {}
        if isinstance(args, dict) and not args.get("auth"):  # of another kind is told elsewhere
            yield (
                f"applications.{number}.args.auth is missing, and http_options.host {host} can be reached from other "
                "machines; name a tokens_file (python -m springtide.serving.tokens new), or give 127.0.0.1"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _application(app: Json, where: str) -> Iterator[str]:
    if app.get("import_path") != IMPORT_PATH:
        yield f"{where}.import_path must be {IMPORT_PATH}"
    if app.get("route_prefix", "/") != "/":
        yield f"{where}.route_prefix must be /, where deploy and load balancers ask whether the application is ready"
    yield from _options(AppOptions, app.get("args") or {}, f"{where}.args")
    found: set[str] = set()
    for number, deployment in enumerate(_dicts(app.get("deployments"))):
        path, name = f"{where}.deployments.{number}", str(deployment.get("name", ""))
        if name not in USER_CONFIG:
            yield f"{path}.name: there is no deployment {name!r}{_nearest(name, list(USER_CONFIG))}"
            continue
        if name in found:
            yield f"{path}.name: {name} appears twice"
        found.add(name)
        yield from _deployment(deployment, name, path)
    yield from _targets(_dicts(app.get("deployments")), where)
    for name in USER_CONFIG:
        if name not in found:
            yield f"{where}.deployments: {name} is missing, and its user_config says what it serves"


def _targets(deployments: list[Json], where: str) -> Iterator[str]:
    """Targets of autoscaling that no load would pass."""
    fewest = 1
    for deployment in deployments:
        if deployment.get("name") == "Ingress":
            auto = deployment.get("autoscaling_config")
            fewest = auto.get("min_replicas", 1) if isinstance(auto, dict) else deployment.get("num_replicas", 1)
    most = CALLS_PER_REPLICA * (fewest if isinstance(fewest, int) and fewest > 0 else 1)
    for number, deployment in enumerate(deployments):
        auto, path = deployment.get("autoscaling_config"), f"{where}.deployments.{number}.autoscaling_config"
        target = auto.get("target_ongoing_requests") if isinstance(auto, dict) else None
        if deployment.get("name") in ("TextEncoder", "Scorer") and isinstance(target, int | float) and target >= most:
            yield (
                f"{path}.target_ongoing_requests ({target:g}) may never be passed, "
                f"as an Ingress has at most {CALLS_PER_REPLICA} calls of a replica under way; set it below {most}"
            )


def _deployment(deployment: Json, name: str, where: str) -> Iterator[str]:
    options, user_config = USER_CONFIG[name], deployment.get("user_config")
    if not isinstance(user_config, dict):
        yield f"{where}.user_config is missing: {name} takes {', '.join(options.model_fields)}"
        return
    yield from _options(options, user_config, f"{where}.user_config")


def _options(options: type[BaseModel], value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where} must be a section"
        return
    unknown = [*_unknown_keys(value, options, where)]
    yield from unknown
    if not unknown:
        yield from _validate(options, value, where)


def _validate(schema: type[BaseModel], value: Json, where: str) -> Iterator[str]:
    try:
        schema.model_validate(value)
    except ValidationError as error:
        for problem in error.errors():
            path = ".".join(part for part in (where, *map(str, problem["loc"])) if part)
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{path}: {message[0].lower()}{message[1:]}" if path else message


def _nearest(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
    return f"; did you mean {near[0]}?" if near else ""


def _dicts(value: Any) -> list[Json]:
    return [element for element in value if isinstance(element, dict)] if isinstance(value, list) else []
