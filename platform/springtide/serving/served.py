"""The bundles that are served, each in a folder of its version below the workspace, which never changes.

A `bundle/` is replaced by the next training. A Scorer that starts later, after a fault or to share the load, must find
the version that its configuration names, so `deploy` copies it to where nothing else writes.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from springtide.errors import SpringtideError
from springtide.files import publish_directory, verify_manifest

log = logging.getLogger(__name__)
FOLDER = "served"  # in the workspace
KEPT = 3  # versions deployed last, whether anything names them or not
YOUNG_S = 86_400.0  # deployed since then: another cluster may serve it, of which this one knows nothing


def version_of(bundle: Path) -> str:
    """The version of a bundle, by its manifest. Raises SpringtideError if there is none."""
    try:
        return hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise SpringtideError(f"there is no bundle at {bundle} ({error.strerror}); run the train job") from None


def served_path(workspace: Path, version: str) -> Path:
    return workspace / FOLDER / version


def keep(source: Path, workspace: Path, version: str) -> None:
    """Copy a bundle to the folder of its version, unless it is there whole.

    A copy and no link: bytes that are changed in the source must not change what is served. Raises SpringtideError if
    the source has another version by now, is damaged, or if the disk refuses.
    """
    target = served_path(workspace, version)
    if not _whole(target):
        with publish_directory(target) as out:
            for name in [*verify_manifest(source, "bundle")["files"], "manifest.json"]:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, out / name)
            if version_of(out) != version:
                raise SpringtideError(f"the bundle {source} was replaced while it was deployed; deploy again")
            verify_manifest(out, "bundle")
    (target / "manifest.json").touch()  # when it was deployed last, for `prune`


def _whole(bundle: Path) -> bool:
    try:
        verify_manifest(bundle, "bundle")
    except SpringtideError:
        return False
    return True


def prune(workspace: Path, configurations: Iterable[Any], now: float | None = None) -> list[str]:
    """Remove versions that no configuration names, but the KEPT latest and young ones; returns those removed.

    configurations: JSON of any form, such as what Serve tells of its applications.
    """
    named = {text for configuration in configurations for text in _texts(configuration)}
    before = (time.time() if now is None else now) - YOUNG_S
    found = [path for path in (workspace / FOLDER).glob("*") if not path.name.startswith(".")]
    latest = sorted(found, key=_deployed, reverse=True)
    gone = [path for path in latest[KEPT:] if str(path) not in named and _deployed(path) < before]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    if gone:
        log.info("removed %d bundles that are no longer served", len(gone))
    return [path.name for path in gone]


def _deployed(bundle: Path) -> float:
    try:
        return (bundle / "manifest.json").stat().st_mtime
    except OSError:
        return 0.0


def _texts(value: Any) -> Iterator[str]:
    """Every text within JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for below in value.values():
            yield from _texts(below)
    elif isinstance(value, list):
        for below in value:
            yield from _texts(below)
