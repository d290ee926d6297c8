"""Shared fixtures. Unit tests never ask for `ray_session`; the Ray tests share the one cluster that it starts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from springtide.cluster import PACKAGE, SMALL_MACHINE, prepare_environment

prepare_environment()
settings.register_profile("springtide", deadline=None)  # how long an example takes tells how busy the machine is
settings.load_profile("springtide")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """One small cluster for the whole session: 4 logical CPUs, token authentication, the package by upload."""
    import ray

    token = os.environ.get("RAY_AUTH_TOKEN")
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = "springtide-test-session-token-0123456789"
    with tempfile.TemporaryDirectory(prefix="st", dir="/tmp") as folder:  # socket names have a length limit
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=300 << 20,
            logging_level="warning",
            log_to_driver=False,
            _temp_dir=folder,
            runtime_env={"py_modules": [str(PACKAGE)], "env_vars": dict(SMALL_MACHINE)},
        )
        try:
            yield ray
        finally:
            ray.shutdown()
            if token is None:
                os.environ.pop("RAY_AUTH_TOKEN", None)
            else:
                os.environ["RAY_AUTH_TOKEN"] = token


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """An empty workspace."""
    return tmp_path / "workspace"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The quick tests first: units, then those on the shared cluster, then those that start one of their own."""
    items.sort(key=lambda item: 2 if item.get_closest_marker("cluster") else int("ray_session" in item.fixturenames))  # type: ignore[attr-defined]
