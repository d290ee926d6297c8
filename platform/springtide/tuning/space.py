"""The `tune.space` section: which settings of model and train vary, and how."""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from springtide.config import ModelConfig, Settings, TrainConfig, with_values
from springtide.errors import SpringtideError

log = logging.getLogger(__name__)
# The number of trials at a time is computed from these, and ASHA's rungs from the epochs.
FIXED = {
    "train.workers": "tune.workers_per_trial",
    "train.cpus_per_worker": "train.cpus_per_worker",
    "train.use_gpu": "train.use_gpu",
    "train.epochs": "tune.epochs",
}
SECTIONS: dict[str, type[ModelConfig | TrainConfig]] = {"model": ModelConfig, "train": TrainConfig}
INSIDE = 16  # whole numbers in a range, beside its ends, that are tried before a search,
CROSSINGS = 2000  # and the most combinations of values


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool
    whole: bool


def check_space(settings: Settings) -> None:
    """Try what trials may draw, values with each other too, and warn of settings that vary without effect.

    Raises SpringtideError naming the setting whose name or value is not valid, or the values that do not go together.
    """
    space = settings.tune.space
    for key in space:
        if key in FIXED:
            raise SpringtideError(f"tune.space {key}: it is the same for all trials; set {FIXED[key]} in its section")
        section, _, name = key.partition(".")
        if section not in SECTIONS or not name:
            raise SpringtideError(
                f"tune.space {key}: only settings of model and train can vary within one prepared log"
            )
    idle = set(space)
    for trial in _crossings({key: _values(key, domain) for key, domain in space.items()}):
        said = ", ".join(f"{key}={value}" for key, value in trial.items())
        idle &= _unread(with_values(settings, trial, f"tune.space: no trial can have {said}").model)
    if idle:
        log.warning("tune.space varies %s, which changes nothing beside the other settings", ", ".join(sorted(idle)))


def _values(key: str, domain: Any) -> list[Any]:
    """The choices, or the ends of a range and some values between them."""
    if isinstance(domain, list) and domain:
        return domain
    low, high, log_scale, whole = _range(key, domain)
    if not whole:
        return [low, math.sqrt(low * high) if log_scale else (low + high) / 2, high]
    numbers = range(int(low), int(high) + 1)
    return sorted({numbers[0], numbers[-1], *random.Random(0).sample(numbers, min(INSIDE, len(numbers)))})


def _range(key: str, domain: Any) -> Range:
    """A range as it was given; that of a setting in whole numbers is one of whole numbers. Raises SpringtideError."""
    if isinstance(domain, dict) and set(domain) <= {"min", "max", "log", "integer"} and {"min", "max"} <= set(domain):
        low, high = _number(domain["min"]), _number(domain["max"])
        if math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not domain.get("log")):
            section, _, name = key.partition(".")
            field = SECTIONS[section].model_fields.get(name)
            whole = bool(domain.get("integer")) or (field is not None and field.annotation is int)
            if whole and not (low.is_integer() and high.is_integer()):
                raise SpringtideError(
                    f"tune.space {key}: it varies in whole numbers; give whole numbers as min and max"
                )
            return Range(low, high, bool(domain.get("log")), whole)
    raise SpringtideError(
        f"tune.space {key}: give a list of choices, or min below max with optional log and integer "
        "(log needs min above 0)"
    )


def _number(value: Any) -> float:
    """A number, also one that YAML takes for text because it has no dot (1e-4); NaN for anything else."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _crossings(values: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of the values, or some at random where there are too many."""
    if math.prod(map(len, values.values())) <= CROSSINGS:
        yield from (dict(zip(values, drawn, strict=True)) for drawn in itertools.product(*values.values()))
        return
    dice = random.Random(0)
    for _ in range(CROSSINGS):
        yield {key: dice.choice(some) for key, some in values.items()}


def _unread(model: ModelConfig) -> set[str]:
    """Which of the settings of its fusion and its attention a model does not read."""
    both = "none" not in (model.long_branch, model.short_branch)
    gated = both and model.fusion == "gate"
    read = {
        "model.fusion": both,
        "model.gate": gated,
        "model.gate_hidden": gated and model.gate != "mean",
        "model.short_heads": model.short_branch == "attention" or model.long_branch == "transformer",
    }
    return {name for name, is_read in read.items() if not is_read}


def param_space(space: dict[str, Any]) -> dict[str, Any]:
    """The same space as Ray Tune samplers, by dotted setting."""
    from ray import tune

    samplers: dict[str, Any] = {}
    for key, domain in space.items():
        if isinstance(domain, list):
            samplers[key] = tune.choice(domain)
            continue
        low, high, log_scale, whole = _range(key, domain)
        if whole:
            samplers[key] = (tune.lograndint if log_scale else tune.randint)(int(low), int(high) + 1)
        else:
            samplers[key] = (tune.loguniform if log_scale else tune.uniform)(low, high)
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
