"""Joining a Ray cluster, or starting a private one, with this package on every worker.

The package travels as a `py_modules` upload, so a worker always runs the same code as the driver, whether or not
something of that name is installed where the worker lives.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import springtide
from springtide.errors import SpringtideError

PACKAGE = Path(springtide.__file__).resolve().parent

# Ray's defaults suit big clusters; on two cores each of these is minutes or a deadlock. Set before Ray is imported.
SMALL_MACHINE = {
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",  # default 32 actors to read one footer
    "RAY_DATA_DEFAULT_MIN_PARALLELISM": "4",
    "RAY_DATA_USE_DATASOURCE_V2": "0",  # it lists files by a task of a whole CPU, which a service beside it has taken
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # also how often a report is picked up
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # or relative paths change their meaning inside a worker
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every line of a worker is shown twice
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "POLARS_MAX_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

READ_CPUS = 0.25  # of a task that only reads what `prepare` wrote: where a service runs, two cores have one to spare


def in_job() -> bool:
    """Was this process started by `ray job submit`?"""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def prepare_environment() -> None:
    """Environment of the driver; call it before anything imports Ray."""
    for name, value in SMALL_MACHINE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's ports answer on every address, so never without a token


def connect() -> None:
    """Connect to the cluster of this job or of RAY_ADDRESS; else start a local one that ends with the process.

    Raises SpringtideError if the cluster does not answer.
    """
    prepare_environment()
    import ray
    from ray.data import DataContext

    if not ray.is_initialized():
        attached = in_job() or "RAY_ADDRESS" in os.environ
        options: dict[str, Any] = {}
        if not attached:
            options = {"address": "local", "num_cpus": max(2, os.cpu_count() or 2), "include_dashboard": False,
                       "object_store_memory": _object_store_bytes()}  # fmt: skip
        try:
            ray.init(runtime_env=_runtime_env(), logging_level="warning", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            message = " ".join(str(error).split())
            where = os.environ.get("RAY_ADDRESS", "a local cluster")
            raise SpringtideError(
                f"cannot join Ray at {where}: {message:.300}; check RAY_ADDRESS and RAY_AUTH_MODE"
            ) from None
    context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says on every run that bars are off
    context.execution_options.preserve_order = True  # the same input gives the same blocks


def _object_store_bytes() -> int:
    """A quarter of the memory, at most 2 GiB: Ray spills to disk beyond."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(2 << 30, pages // 4)


def _runtime_env() -> dict[str, Any]:
    """What this process adds to its job's own runtime environment (Ray refuses a key that both set)."""
    job_config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = job_config.get("runtime_env") or {}
    given_variables = given.get("env_vars") or {}
    ours = {name: os.environ[name] for name in SMALL_MACHINE if name not in given_variables}
    if "RAY_ADDRESS" in os.environ and "RAY_ADDRESS" not in given_variables:
        # Ray Train's clean-up looks the cluster up again, and finds several where a machine runs more than one.
        ours["RAY_ADDRESS"] = os.environ["RAY_ADDRESS"]
    environment: dict[str, Any] = {"env_vars": ours}
    if "py_modules" not in given:
        environment["py_modules"] = [str(PACKAGE)]
    return environment
