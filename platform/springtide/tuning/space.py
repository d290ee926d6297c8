"""The `tune.space` section: which settings of model and train vary, and how."""

from __future__ import annotations

import math
from typing import Any

from springtide.config import Settings, with_values
from springtide.errors import SpringtideError

# The number of trials at a time is computed from these, and ASHA's rungs from the epochs.
FIXED = {
    "train.workers": "tune.workers_per_trial",
    "train.cpus_per_worker": "train.cpus_per_worker",
    "train.use_gpu": "train.use_gpu",
    "train.epochs": "tune.epochs",
}


def check_space(settings: Settings) -> None:
    """Try both ends of every range and every choice against the settings tree.

    Raises SpringtideError naming the setting whose name or value is not valid.
    """
    for key, domain in settings.tune.space.items():
        for value in _examples(key, domain):
            try:
                with_values(settings, {key: value})
            except SpringtideError as error:
                raise SpringtideError(f"tune.space {key}: {error}") from None
        if key in FIXED:
            raise SpringtideError(f"tune.space {key}: it is the same for all trials; set {FIXED[key]} in its section")
        if key.split(".")[0] not in ("model", "train") or "." not in key:
            raise SpringtideError(
                f"tune.space {key}: only settings of model and train can vary within one prepared log"
            )


def _examples(key: str, domain: Any) -> list[Any]:
    if isinstance(domain, list) and domain:
        return domain
    if isinstance(domain, dict) and set(domain) <= {"min", "max", "log", "integer"} and {"min", "max"} <= set(domain):
        low, high = domain["min"], domain["max"]
        numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (low, high))
        if numeric and math.isfinite(low) and low < high and (low > 0 or not domain.get("log")):
            return [int(low), int(high)] if domain.get("integer") else [float(low), float(high)]
    raise SpringtideError(
        f"tune.space {key}: give a list of choices, or min below max with optional log and integer "
        "(log needs min above 0)"
    )


def param_space(space: dict[str, Any]) -> dict[str, Any]:
    """The same space as Ray Tune samplers, by dotted setting."""
    from ray import tune

    samplers: dict[str, Any] = {}
    for key, domain in space.items():
        if isinstance(domain, list):
            samplers[key] = tune.choice(domain)
            continue
        low, high, log = domain["min"], domain["max"], bool(domain.get("log"))
        if domain.get("integer"):
            samplers[key] = (tune.lograndint if log else tune.randint)(int(low), int(high) + 1)
        else:
            samplers[key] = (tune.loguniform if log else tune.uniform)(float(low), float(high))
    return samplers


def concurrent_trials(cpus: float, gpus: float, settings: Settings, driver_cpus: float) -> int:
    """How many trials can run at once so that each one's workers start and Ray Data keeps a whole CPU for reading.

    A trial is a driver actor plus its workers, which Ray Train reserves separately: with one trial too many, every
    driver waits for workers that can never start. Raises SpringtideError if not even one trial fits.
    """
    per_trial = driver_cpus + settings.tune.workers_per_trial * settings.train.cpus_per_worker
    fit = math.floor((cpus - 1) / per_trial + 1e-9)
    if settings.train.use_gpu:  # one trial may wait for machines that an autoscaler has yet to start
        fit = min(fit, max(1, int(gpus // settings.tune.workers_per_trial)))
    if fit < 1:
        raise SpringtideError(
            f"a trial needs {per_trial:g} CPUs beside 1 for reading data, and the cluster has {cpus:g}; "
            "lower tune.workers_per_trial or train.cpus_per_worker"
        )
    return min(fit, settings.tune.trials)
