"""Whole-or-nothing output and the manifest that notices one flipped byte."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from springtide.errors import SpringtideError
from springtide.files import publish_directory, verify_manifest, write_json, write_manifest, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def publish(final: Path, text: str) -> None:
    with publish_directory(final) as out:
        (out / "a.txt").write_text(text)


def test_a_published_directory_replaces_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    publish(final, "one")
    (final / "stale.txt").write_text("gone tomorrow")
    publish(final, "two")
    assert names(final) == ["a.txt"]
    assert (final / "a.txt").read_text() == "two"
    assert names(final.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SpringtideError("no")])
def test_a_failure_leaves_the_old_directory_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    final = tmp_path / "out"
    publish(final, "one")
    with pytest.raises(type(error)), publish_directory(final) as out:
        (out / "half.txt").write_text("half")
        raise error
    assert names(tmp_path) == ["out"]
    assert names(final) == ["a.txt"]


def test_a_reader_sees_the_old_directory_until_the_new_one_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "out"
    publish(final, "one")
    with publish_directory(final) as out:
        (out / "a.txt").write_text("two")
        assert (final / "a.txt").read_text() == "one"
    assert (final / "a.txt").read_text() == "two"


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with pytest.raises(SpringtideError, match="No space left") as caught, publish_directory(final):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(final) in str(caught.value)
    assert names(tmp_path) == []


def test_a_file_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpringtideError, match="cannot write"), publish_directory(tmp_path / "file" / "out"):
        raise AssertionError("never reached")
    with pytest.raises(SpringtideError, match="cannot write"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": "红茶", "a": [1.5, None]})
    assert path.read_text(encoding="utf-8") == '{\n  "b": "红茶",\n  "a": [\n    1.5,\n    null\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == [1.5, None]
    assert names(path.parent) == ["a.json"]


def test_the_manifest_names_the_file_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(1000))
    (tmp_path / "sub" / "b.bin").write_bytes(b"b")
    written = write_manifest(tmp_path, {"version": 1})
    assert verify_manifest(tmp_path, "bundle") == written
    assert sorted(written["files"]) == ["a.bin", "sub/b.bin"]

    flipped = bytearray(1000)
    flipped[500] ^= 1
    (tmp_path / "a.bin").write_bytes(flipped)
    with pytest.raises(SpringtideError, match=r"a\.bin differs"):
        verify_manifest(tmp_path, "bundle")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(SpringtideError, match=r"a\.bin is missing"):
        verify_manifest(tmp_path, "bundle")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', "nonsense"])
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(SpringtideError, match="damaged"):
        verify_manifest(tmp_path, "bundle")


def test_no_manifest_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SpringtideError, match="there is no bundle"):
        verify_manifest(tmp_path, "bundle")


def test_what_a_killed_writer_hid_comes_back(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    hidden = tmp_path / ".bundle.old-0123abcd"  # as kill -9 between the two renames leaves it
    hidden.mkdir()
    (hidden / "kept").write_text("old")
    with pytest.raises(ValueError), publish_directory(final):
        raise ValueError("the next writer fails too")
    assert (final / "kept").read_text() == "old" and not hidden.exists()
