"""The end of a cluster: every process that it started, whether it names the cluster's folder or not, and no other."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from springtide.local_cluster import TAG, stop


def sleeping(*, tag: str = "", named: str = "") -> subprocess.Popen[bytes]:
    """A process that sleeps, with a tag in its environment or a name in its command line."""
    env = {**os.environ, TAG: tag} if tag else dict(os.environ)
    return subprocess.Popen(["sh", "-c", "sleep 60; true", named], env=env, start_new_session=True)


def test_what_names_the_folder_or_carries_its_tag_ends_and_nothing_else(tmp_path: Path) -> None:
    folder, longer = tmp_path / "one", tmp_path / "one-more"
    folder.mkdir()
    ours = [sleeping(tag=str(folder)), sleeping(named=str(folder))]
    others = [sleeping(), sleeping(tag=str(longer))]
    try:
        stop(folder)
        assert [process.wait(5) for process in ours] == [-15, -15]
        assert [process.poll() for process in others] == [None, None]
        assert not folder.exists()
    finally:
        for process in [*ours, *others]:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
