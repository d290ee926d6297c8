"""What the benchmarks share: measured subprocesses, generated experiments, tables and result files."""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class Measured:
    """One finished subprocess."""

    seconds: float  # wall
    max_rss: int  # bytes; the largest process among it and those it waited for
    peak_pss: int  # bytes; the whole tree at its largest, 0 if not sampled
    cpu_seconds: float  # of the whole tree if sampled (to a few tenths), else of those that were waited for


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without any Ray cluster in it, and with a token that only the caller knows."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1", **extra}  # fmt: skip


def run_measured(command: Sequence[str | Path], log: Path, sample: bool = False, env: Mapping[str, str] | None = None
                 ) -> Measured:  # fmt: skip
    """Run a command from the repository's root, its output in `log`, and wait for it.

    `sample` watches the process tree, which costs some time: do not use the seconds of such a run.
    Raises SystemExit with the end of the log if the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        begin = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], cwd=REPO, env=dict(env or environment()),
                                   stdout=output, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        watcher = TreeWatcher(process.pid) if sample else None
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            kill_group(process.pid)
            raise
        seconds = time.perf_counter() - begin
        peak, cpu = watcher.stop() if watcher else (0, 0.0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed ({process.returncode}):\n{tail(log)}")
    return Measured(seconds, usage.ru_maxrss * 1024, peak, max(cpu, usage.ru_utime + usage.ru_stime))


class TreeWatcher(threading.Thread):
    """Samples the proportional set size (shared pages counted once) and the CPU time of a process and all below it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.ended = psutil.Process(pid), threading.Event()
        self.peak = 0
        self.cpu: dict[psutil.Process, float] = {}  # as last seen, also of those that have ended
        self.start()

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self.sample())

    def sample(self) -> int:
        """Bytes of the tree now, 0 once it is gone."""
        total = 0
        try:
            processes = [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        for process in processes:
            try:
                times = process.cpu_times()
                self.cpu[process] = times.user + times.system
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue
        return total

    def stop(self) -> tuple[int, float]:
        """Peak bytes and CPU seconds."""
        self.ended.set()
        self.join()
        return self.peak, sum(self.cpu.values())


def kill_group(pid: int) -> None:
    """End the process group of a process that `run_measured` or `start_server` started."""
    try:
        os.killpg(pid, signal.SIGTERM)
        time.sleep(1.0)
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def write_experiment(path: Path, workspace: Path, log: Path, format: str, **sections: Any) -> Path:
    """A settings file for a log of benchmarks/synthetic.py, with 5-core and leave_one_out."""
    columns = {name: name for name in ("user_id", "item_id", "timestamp", "action", "rating")}
    experiment: dict[str, Any] = {
        "name": "benchmark",
        "workspace": str(workspace),
        "data": {
            "events": {"paths": str(log / "events"), "format": format, "columns": columns},
            "split": "leave_one_out",
            "min_user_events": 5,
            "min_item_events": 5,
        },
    }
    for name, section in sections.items():
        experiment[name] = {**experiment.get(name, {}), **section} if isinstance(section, dict) else section
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(experiment, sort_keys=False))
    return path


def job(stage: str, config: Path, *overrides: str) -> list[str]:
    """The command of a job as a user types it."""
    command = [sys.executable, f"jobs/{stage}.py", "--config", str(config)]
    return [*command, *(part for override in overrides for part in ("--set", override))]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return {
        "cpus": os.cpu_count(),
        "cpu": next(names, platform.processor()),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("ray", "torch", "polars", "pyarrow")},
    }


def _lines(path: str) -> Iterator[str]:
    try:
        yield from Path(path).read_text().splitlines()
    except OSError:
        return


def describe(facts: Mapping[str, Any]) -> str:
    """`machine()` in a line, with a warning if others were using it."""
    load = facts["load_before"][0]
    busy = " (BUSY: rates and seconds are distorted, CPU figures less so)" if load > 0.5 * facts["cpus"] else ""
    return (f"{facts['cpus']} x {facts['cpu']}, {facts['memory_gib']} GiB, load {load:g}{busy}; "
            f"ray {facts['ray']}, torch {facts['torch']}, polars {facts['polars']}")  # fmt: skip


def write_result(name: str, body: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json and return its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(body, indent=2) + "\n")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain text: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(width) if column else cell.ljust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a document."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


@contextmanager
def scratch(keep: Path | None) -> Iterator[Path]:
    """A folder for data and logs: `keep` if given (and then kept), else a temporary one that is removed."""
    import tempfile

    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="springtide-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
