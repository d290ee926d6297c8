"""Calls to a cluster's dashboard, none of which is waited for beyond a deadline, and the code that is sent there."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from springtide.errors import SpringtideError

Json = dict[str, Any]
Result = TypeVar("Result")
GRACE_S = 5.0  # for the call under way at the deadline, so that the reason is told and not only that time is up


@dataclass(frozen=True)
class Cluster:
    """A cluster that has our code."""

    jobs: Any  # Ray's client of jobs and packages
    apps: Any  # Serve's client
    running: Json  # what Serve told before anything was applied

    def details(self, deadline: float) -> Json:
        """What Serve tells now. Raises SpringtideError."""
        return dict(call(self.apps.get_serve_details, deadline + GRACE_S))


def clients(address: str | None, deadline: float) -> tuple[Any, Any]:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
    from ray.job_submission import JobSubmissionClient

    jobs = call(lambda: JobSubmissionClient(address), deadline)
    return jobs, call(lambda: ServeSubmissionClient(jobs.get_address()), deadline)


def upload_code(jobs: Any, deadline: float) -> str:
    """Put the `springtide` package on the cluster and return its gcs:// address, the same for the same code.

    Serve takes no local folders, so this goes the way that `ray job submit` sends py_modules: over the dashboard, with
    its token. The copy leaves out caches, or every start of Python would count as new code and restart the replicas.
    """
    import springtide

    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "springtide"
        shutil.copytree(Path(springtide.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        runtime_env: Json = {"py_modules": [str(copy)]}
        call(lambda: jobs._upload_py_modules_if_needed(runtime_env), deadline)
    return str(runtime_env["py_modules"][0])


def packages_of(applications: Json) -> list[str]:
    """gcs:// addresses of the code that applications run, as Serve tells of them."""
    environments = [(app.get("deployed_app_config") or {}).get("runtime_env") or {} for app in applications.values()]
    named = [str(uri) for environment in environments for uri in environment.get("py_modules") or ()]
    return [uri for uri in named if uri.startswith("gcs://")]  # others, such as s3://, do not lie on the cluster


def is_there(jobs: Any, package: str, deadline: float) -> bool:
    """Whether the cluster still has the code of a gcs:// address; asking keeps it for ten minutes."""
    return bool(call(lambda: jobs._package_exists(package), deadline))


def call(work: Callable[[], Any], deadline: float) -> Any:
    """Run one call to the cluster; any refusal, and no answer by the deadline (time.monotonic), becomes a sentence."""
    try:
        return in_time(work, deadline)
    except TimeoutError:
        raise SpringtideError(
            "the Ray cluster did not answer in time; check that its dashboard answers, or raise serve.timeout_s"
        ) from None
    except Exception as error:  # the client raises RuntimeError, ConnectionError, AuthenticationError and requests'
        reason = " ".join(str(error).split())
        raise SpringtideError(
            f"the Ray cluster refused or did not answer: {reason[:600]}; check that it runs (ray start --head), "
            "its dashboard address and RAY_AUTH_MODE"
        ) from error


def in_time(work: Callable[[], Result], deadline: float) -> Result:
    """What `work` returns or raises; TimeoutError at the deadline. Ray's clients wait for a dashboard without end.

    The call goes on in a thread that does not keep the process: nothing can take it back.
    """
    if deadline <= time.monotonic():  # nothing is begun that nobody would wait for
        raise TimeoutError
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="dashboard", daemon=True).start()
    return future.result(max(0.0, deadline - time.monotonic()))
