"""What every job shares: its command line, its result file, and one clear sentence when it fails."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from springtide.cluster import in_job, prepare_environment
from springtide.config import Settings, TextConfig, load_settings, with_values
from springtide.errors import SpringtideError
from springtide.files import disk_error, write_json

STAGES = {
    "prepare": "springtide.data.prepare",
    "embed": "springtide.text.embed",
    "train": "springtide.training.job",
    "update": "springtide.training.update",
    "tune": "springtide.tuning.job",
    "evaluate": "springtide.evaluation.job",
    "compare": "springtide.evaluation.compare",
    "recommend": "springtide.evaluation.recommend",
    "deploy": "springtide.serving.deploy",
    "export": "springtide.serving.export",
}
DEFAULT_ENCODER = TextConfig().encoder  # a word, even where a folder has that name
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}


def main(stage: str, arguments: Sequence[str] | None = None) -> None:
    """Run one stage as a process: exit status 0, or 1 after one sentence on standard error."""
    prepare_environment()
    parser = argparse.ArgumentParser(
        prog=f"jobs/{stage}.py", description=importlib.import_module(STAGES[stage]).__doc__
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the experiment, a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a setting")
    parser.add_argument("--debug", action="store_true", help="show where an error arose")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for noisy in ("ray", "httpx", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    settings: Settings | None = None
    started = time.time()
    try:
        settings = _absolute(load_settings(options.config, options.set))
        body = importlib.import_module(STAGES[stage]).run(settings)
        _finish(settings, stage, {"status": "ok", "seconds": round(time.time() - started, 3), **body})
    except KeyboardInterrupt:
        sys.exit(f"{stage}: interrupted")
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        sentence = explain(error, Path(settings.workspace) if settings else Path.cwd())
        if options.debug or sentence is None:
            traceback.print_exception(error)
        sentence = sentence or f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if settings is not None:
            try:
                _finish(
                    settings, stage, {"status": "failed", "seconds": round(time.time() - started, 3), "error": sentence}
                )
            except SpringtideError as second:  # nowhere to write it: the sentence below says why
                logging.getLogger(__name__).debug("no result file: %s", second)
        print(f"{stage}: {sentence}", file=sys.stderr, flush=True)
        sys.exit(1)


def explain(error: BaseException, workspace: Path) -> str | None:
    """The sentence for a user, found inside whatever Ray wrapped around it; None for a fault of ours."""
    seen: set[int] = set()
    queue: list[Any] = [error]
    while queue:
        current = queue.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if type(current) is SpringtideError:
            return str(current)
        if isinstance(current, PermissionError):
            return f"permission denied: {current.filename or workspace}; give this user access to it, then run again"
        if isinstance(current, OSError) and current.errno in DISK_FAULTS:
            return str(disk_error(current, Path(current.filename or workspace)))
        failures = getattr(current, "worker_failures", None) or {}
        queue += [getattr(current, "cause", None), current.__cause__, current.__context__, *failures.values()]
    return None


def _absolute(settings: Settings) -> Settings:
    """The workspace, and an encoder given as a folder, as absolute paths: Ray's workers live in other folders.

    Raises SpringtideError for a relative one inside a submitted job, whose folder is a copy that Ray deletes.
    """
    workspace, encoder = Path(settings.workspace).expanduser(), Path(settings.text.encoder).expanduser()
    if in_job() and not workspace.is_absolute():
        raise SpringtideError(
            f"workspace {settings.workspace!r} is relative, but a submitted job runs in a temporary copy of your "
            "folder: give an absolute path that every node shares, for example --set workspace=/data/my-experiment"
        )
    absolute = {"workspace": str(workspace.absolute())}
    if settings.text.encoder != DEFAULT_ENCODER and encoder.is_dir():
        if in_job() and not encoder.is_absolute():
            raise SpringtideError(
                f"text.encoder {settings.text.encoder!r} is a folder in the temporary copy that a submitted job runs "
                "in: give an absolute path that every node shares"
            )
        absolute["text.encoder"] = str(encoder.absolute())
    return with_values(settings, absolute)


def _finish(settings: Settings, stage: str, body: dict[str, Any]) -> None:
    path = Path(settings.workspace) / "results" / f"{stage}.json"
    write_json(path, {"job": stage, "name": settings.name, **body})
    if body["status"] == "ok":
        logging.getLogger(__name__).info("%s: done in %.1f s, result in %s", stage, body["seconds"], path)
