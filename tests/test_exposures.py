"""The exposure log: every line arrives, parts rotate, nobody waits for the disk, and users are hidden."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from springtide.errors import SpringtideError
from springtide.serving.exposures import SALT, ExposureLog, exposure, pseudonym, read, salt_of
from springtide.serving.options import ExposureOptions
from springtide.serving.traffic import Choice

CHOICE = Choice("a", "split", 0.5, "t1")


def row(number: int, user: str | None = "alice", **answer: Any) -> dict[str, Any]:
    items = [{"item_id": f"i{n}", "score": 1.0} for n in range(3)]
    return exposure(f"r{number}", user, CHOICE, {"items": items, "model": "a@1", "source": "history", **answer}, number)


def test_what_a_line_holds() -> None:
    assert row(7, degraded=True) == {
        "request_id": "r7", "time": 7, "user": "alice", "model": "a@1", "arm": "a", "by": "split", "share": 0.5,
        "test": "t1", "source": "history", "degraded": True, "items": ["i0", "i1", "i2"],
    }  # fmt: skip
    drawn = row(7, items=[{"item_id": "x", "score": 1.0, "propensity": 0.25}])
    assert (drawn["items"], drawn["propensities"]) == (["x"], [0.25])


def test_lines_of_many_threads_all_arrive(tmp_path: Path) -> None:
    written = ExposureLog(tmp_path, ExposureOptions(max_mb=0.01, queue=100_000))

    def record(start: int) -> None:
        for number in range(start, start + 500):
            written.record(row(number))

    threads = [threading.Thread(target=record, args=(500 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written.close()
    assert sorted(line["time"] for line in read(tmp_path)) == list(range(4000))
    parts = list(tmp_path.glob("*.jsonl"))
    assert len(parts) > 10
    assert all(part.stat().st_size < 0.01 * 2**20 + 1000 for part in parts)
    assert written.told() == {"written": 4000, "dropped": 0, "waiting": 0}


def test_a_part_is_closed_by_age(tmp_path: Path) -> None:
    written = ExposureLog(tmp_path, ExposureOptions(max_age_s=0.2))
    for number in range(3):
        written.record(row(number))
        time.sleep(0.4)
    written.close()
    assert len(list(tmp_path.glob("*.jsonl"))) == 3


def test_users_are_hidden_behind_a_salt_of_the_folder(tmp_path: Path) -> None:
    for _ in range(2):  # another replica, or a restart: the same pseudonyms
        written = ExposureLog(tmp_path, ExposureOptions())
        written.record(row(1))
        written.record(row(2, user=None))
        written.close()
    users = [line["user"] for line in read(tmp_path)]
    salt = salt_of(tmp_path)
    assert salt is not None
    assert sorted(map(str, users)) == sorted(map(str, [pseudonym(salt, "alice"), None] * 2))
    assert all("alice" not in path.read_text() for path in tmp_path.iterdir())
    assert stat.S_IMODE((tmp_path / SALT).stat().st_mode) == 0o600
    assert pseudonym(b"other", "alice") != pseudonym(salt, "alice")


def test_users_may_be_written_as_they_are(tmp_path: Path) -> None:
    written = ExposureLog(tmp_path, ExposureOptions(pseudonymise=False))
    written.record(row(1, user='a "quoted"\u2028 name'))
    written.close()
    assert [line["user"] for line in read(tmp_path)] == ['a "quoted"\u2028 name']
    assert salt_of(tmp_path) is None


def test_a_disk_that_hangs_costs_exposures_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    original = ExposureLog._write

    def slow(self: ExposureLog, rows: list[Any]) -> None:
        release.wait(60)
        original(self, rows)

    monkeypatch.setattr(ExposureLog, "_write", slow)
    written = ExposureLog(tmp_path, ExposureOptions(queue=10))
    began = time.monotonic()
    for number in range(5000):
        written.record(row(number))
    assert time.monotonic() - began < 2
    assert written.told()["dropped"] >= 5000 - 2 * 10 - 1
    release.set()
    written.close()
    kept = [line["time"] for line in read(tmp_path)]
    assert len(kept) == written.written == 5000 - written.dropped


def test_a_disk_that_refuses_is_counted_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("springtide.serving.exposures._RETRY_S", 0.0)
    folder = tmp_path / "exposures"
    written = ExposureLog(folder, ExposureOptions(pseudonymise=False))
    folder.write_text("a file in the way")
    written.record(row(1))
    deadline = time.monotonic() + 10
    while not written.dropped and time.monotonic() < deadline:
        time.sleep(0.01)
    folder.unlink()
    written.record(row(2))
    written.close()
    assert written.told() == {"written": 1, "dropped": 1, "waiting": 0}
    assert [line["time"] for line in read(folder)] == [2]


def test_old_parts_are_removed(tmp_path: Path) -> None:
    for name, days in (("old.jsonl", 40), ("young.jsonl", 20), (SALT, 400)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - days * 86_400,) * 2)
    written = ExposureLog(tmp_path, ExposureOptions(keep_days=30))
    written.record(row(1))
    written.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert "old.jsonl" not in names and {"young.jsonl", SALT} <= names


def test_no_line_is_lost_where_a_drain_reaches_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when others go on recording while the queue is drained: it holds more than one drain takes."""
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    written = ExposureLog(tmp_path, ExposureOptions(queue=3))
    written._queue.maxsize = 0
    for number in range(7):
        written.record(row(number))
    written._queue.put(None)
    drained = [written._next() for _ in range(3)]
    assert [[line["time"] for line in lines] for lines, _ in drained] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [last for _, last in drained] == [False, False, True]


def test_a_part_that_another_replica_removes_first_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")  # listed, and not there when it is looked at
    written = ExposureLog(tmp_path, ExposureOptions())
    written.record(row(1))
    written.close()
    assert written.told() == {"written": 1, "dropped": 0, "waiting": 0}


def test_kill_9_loses_at_most_what_waited(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_exposures import ExposureLog, ExposureOptions, row
log = ExposureLog(Path({str(tmp_path)!r}), ExposureOptions())
for number in range(1000):
    log.record(row(number))
time.sleep(1.5)
print("written", flush=True)
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert sum(1 for _ in read(tmp_path)) == 1000


def test_a_torn_last_line_is_left_out_and_a_damaged_one_told(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2))[:20])
    (tmp_path / "2.jsonl").write_text(json.dumps(row(3)) + "\n")
    assert [line["time"] for line in read(tmp_path)] == [1, 3]
    (tmp_path / "2.jsonl").write_text("{\n" + json.dumps(row(3)) + "\n")
    with pytest.raises(SpringtideError, match=r"2\.jsonl, line 1, is not JSON"):
        list(read(tmp_path))


def test_no_exposures_at_all(tmp_path: Path) -> None:
    with pytest.raises(SpringtideError, match="there are no exposures"):
        list(read(tmp_path))
