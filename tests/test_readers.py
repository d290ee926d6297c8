"""Raw files to chunks: no row without its number, no bad byte that costs more than its row."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.config_data import Column
from springtide.data import readers
from springtide.data.readers import read_chunks
from springtide.data.sources import guess_format, list_files, open_filesystem
from springtide.errors import SpringtideError
from without_ray import prepare_without_ray, read_report, settings_for


def read(
    path: Path, columns: list[Column] | None = None, format: Any = None
) -> tuple[dict[int, list[Any]], dict[int, str]]:
    """Values of the good rows and reasons of the bad ones, both by row number."""
    good: dict[int, list[Any]] = {}
    bad: dict[int, str] = {}
    columns = columns or ["u", "i"]
    for chunk in read_chunks(list_files([str(path)], format, 0, 0)[0][0], columns):
        assert chunk.table.column_names == [readers.column_name(c) for c in columns]
        assert len(chunk.rows) == len(chunk.table)
        rows = zip(*(column.to_pylist() for column in chunk.table.columns), strict=True)
        for number, row in zip(chunk.rows.to_pylist(), rows, strict=True):
            assert number not in good
            good[number] = [v.decode("utf-8", "backslashreplace") if isinstance(v, bytes) else v for v in row]
        for number, reason, _ in chunk.bad_rows:
            assert number not in bad
            bad[number] = reason
    assert not set(good) & set(bad)
    return good, bad


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def sentence(path: Path, columns: list[Column] | None = None, format: Any = None) -> str:
    with pytest.raises(SpringtideError) as caught:
        read(path, columns, format)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- delimited text
CSV_CASES: list[tuple[bytes, dict[int, list[str]], dict[int, str]]] = [
    (b"u,i\n1,2\n3,4\n", {1: ["1", "2"], 2: ["3", "4"]}, {}),
    (b"i,x,u\n1,2,3", {1: ["3", "1"]}, {}),
    (b"\xef\xbb\xbfu,i\r\n1,2\r\n", {1: ["1", "2"]}, {}),
    (b"\n\nu,i\n\n1,2\n\n\n3,4\n\n", {1: ["1", "2"], 2: ["3", "4"]}, {}),
    (b"u,i\n1,2\n3\n4,5,6\n7,8\n", {1: ["1", "2"], 4: ["7", "8"]}, {2: "1 columns, not 2", 3: "3 columns, not 2"}),
    (b"u,i\n1\n2\n", {}, {1: "1 columns, not 2", 2: "1 columns, not 2"}),
    (b'u,i\n"a,b","c""d"\n"e\nf",g\nh,i\n', {1: ["a,b", 'c"d'], 2: ["e\nf", "g"], 3: ["h", "i"]}, {}),
    (b'u,i\n5" pipe,2\nx,y\n', {1: ['5" pipe', "2"], 2: ["x", "y"]}, {}),
    (b"u,i\n\xff1,2\n\xff3\n5,6\n", {1: ["\\xff1", "2"], 3: ["5", "6"]}, {2: "1 columns, not 2"}),
    ("u,i\n用户,�\n".encode(), {1: ["用户", "�"]}, {}),
    (b"u,i\n,\n", {1: ["", ""]}, {}),
    (b"u,i\n", {}, {}),
    (b"u,i", {}, {}),
    (b"", {}, {}),
    (b"\n\n", {}, {}),
    (b"u,i,\xff\n1,2,3\n", {1: ["1", "2"]}, {}),
    (b'u,i\n1,2\n"3,4\n5",6,7\n8,9\n', {1: ["1", "2"], 3: ["8", "9"]}, {2: "3 columns, not 2, over 2 lines"}),
]


@pytest.mark.parametrize(("content", "good", "bad"), CSV_CASES)
def test_csv(tmp_path: Path, content: bytes, good: dict[int, list[str]], bad: dict[int, str]) -> None:
    assert read(write(tmp_path / "a.csv", content)) == (good, bad)


def test_tsv_knows_no_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b'u\ti\n"1\t2"\n3\t"4"\n5, 6\t7\nx\n')
    assert read(path) == ({1: ['"1', '2"'], 2: ["3", '"4"'], 3: ["5, 6", "7"]}, {4: "1 columns, not 2"})


def test_positions_mean_a_file_without_header(tmp_path: Path) -> None:
    path = write(tmp_path / "u.data", b"1\t2\t3\n4\n5\t6\t7\n")
    assert read(path, [2, 0], "tsv") == ({1: ["3", "1"], 3: ["7", "5"]}, {2: "1 columns, not 3"})
    assert "no column 7; it has f0, f1, f2" in sentence(path, [0, 7], "tsv")
    assert "not some of each" in sentence(path, [0, "b"], "tsv")


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    assert "no column 'u'; it has user, 物品" in sentence(write(tmp_path / "a.csv", "\nuser,物品\n1,2\n".encode()))
    assert "it has user;i" in sentence(write(tmp_path / "b.csv", b"user;i\n1;2\n"))
    assert "it has a, b" in sentence(write(tmp_path / "c.jsonl", b'{"b": 1}\n{"a": 2}\n'))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "d.parquet")
    assert "it has x" in sentence(tmp_path / "d.parquet")
    assert "UTF-16" in sentence(write(tmp_path / "e.csv", "u,i\n1,2\n".encode("utf-16")))


@pytest.mark.parametrize(
    "content", [b'u,i\n1,2\n"3,4\n5,6\n', b'u,i\n1,2\n3,"4\n5,6\n', b'u,i,x\n1,2,3\n3,4,"5\n5,6,7']
)
def test_an_unclosed_quote_does_not_swallow_the_rest_in_silence(tmp_path: Path, content: bytes) -> None:
    message = sentence(write(tmp_path / "a.csv", content))
    assert "quote opened in row 2 is never closed" in message


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "csv.bz2"])
def test_compression_is_read_off_the_name(tmp_path: Path, suffix: str) -> None:
    pack = {"csv": bytes, "csv.gz": gzip.compress, "csv.bz2": bz2.compress}[suffix]
    assert read(write(tmp_path / f"a.{suffix}", pack(b"u,i\n1,2\n")))[0] == {1: ["1", "2"]}


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz"])
def test_a_torn_archive_is_one_sentence(tmp_path: Path, name: str) -> None:
    text = b"u,i\n" + b"\n".join(b"%d,%d" % (n * n * n, n) for n in range(10_000))
    assert f"{name} as" in sentence(write(tmp_path / name, gzip.compress(text)[:-2000]))
    assert f"{name} as" in sentence(write(tmp_path / name, text))


@given(
    lines=st.lists(
        st.sampled_from([b"", b"a,b", b"zz", b"1,2,3", b"\xff,b", b"\xe7\x94", "用,户".encode(), b"x" * 40 + b",y"])
    ),
    block=st.integers(70, 300),
    end=st.sampled_from([b"\n", b"\r\n"]),
    closed=st.booleans(),
)
def test_rows_keep_their_numbers_over_blocks(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block: int, end: bytes, closed: bool
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "a.csv"
    path.write_bytes(end.join([b"u,i", *lines]) + (end if closed else b""))
    rows = [line for line in lines if line]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block)
        patch.setattr(readers, "END_COLUMNS", 8)
        good, bad = read(path)
    numbered = dict(enumerate(rows, 1))
    expected = {n: r.decode("utf-8", "backslashreplace").split(",") for n, r in numbered.items() if r.count(b",") == 1}
    assert good == expected
    assert sorted(bad) == [n for n, r in numbered.items() if r.count(b",") != 1]


def test_a_line_longer_than_a_block_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 20)
    path = write(tmp_path / "a.csv", b"u,i\n1,2\n" + b"x" * (3 << 20) + b",3\n4,5\n")
    assert "a line longer than 1 MiB" in sentence(path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_line_of_ten_megabytes_is_a_row(tmp_path: Path, name: str) -> None:
    long = "x" * 10_000_000
    rows = [["1", "2"], [long, "3"], ["4", "5"]]
    if name == "a.jsonl":
        text = "\n".join(json.dumps({"u": u, "i": i}) for u, i in rows)
    else:
        text = "\n".join(("," if name == "a.csv" else "\t").join(row) for row in [["u", "i"], *rows])
    assert read(write(tmp_path / name, text.encode())) == (dict(enumerate(rows, 1)), {})


# ---------------------------------------------------------------- JSON lines
def test_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        b'{"u": 1, "i": 2.0, "x": {}}',
        b'{"u": "a", ',
        b"",
        b'{"u": 1.5, "i": null}',
        b"[1, 2]",
        b'{"i": ["a", null, 3]}',
        b'\xff{"u": 1}',
        b'{"u": NaN, "i": true}',
        b"   ",
        '{"u": "用户", "i": "\\u7528"}'.encode(),
        b'{"u": 12345678901234567890, "i": ""}',
        b"[" * 100_000,
    ]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    good = {
        1: ["1", "2"], 3: ["1.5", None], 5: [None, "a|3"], 7: ["nan", "true"], 8: ["用户", "用"],
        9: ["12345678901234567890", ""],
    }  # fmt: skip
    bad = {2: "not JSON", 4: "not a JSON object", 6: "invalid UTF-8", 10: "not JSON"}
    assert read(path) == (good, bad)
    monkeypatch.setattr(readers, "JSON_LINES", 2)
    assert read(path) == (good, bad)
    assert read(write(tmp_path / "b.ndjson.gz", gzip.compress(b"\n".join(lines)))) == (good, bad)


@pytest.mark.parametrize("content", [b"", b"\n", b"nonsense\n"])
def test_json_lines_without_a_record(tmp_path: Path, content: bytes) -> None:
    good, bad = read(write(tmp_path / "a.jsonl", content))
    assert good == {}
    assert len(bad) == len(content.split())


# ---------------------------------------------------------------- Parquet
def test_parquet_keeps_types_and_joins_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({
        "u": pa.array(["a", None, "a"]).dictionary_encode(),
        "i": pa.array([["x", "y"], None, []]),
        "n": pa.array([1.0, None, 3.0]),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    monkeypatch.setattr(readers, "PARQUET_ROWS", 2)
    assert read(tmp_path / "a.parquet", ["n", "u", "i"]) == (
        {1: [1.0, "a", "x|y"], 2: [None, None, None], 3: [3.0, "a", ""]},
        {},
    )


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress)])
def test_packed_parquet_is_unpacked(tmp_path: Path, suffix: str, pack: Any) -> None:
    pq.write_table(pa.table({"u": [1, 2], "i": ["x", "y"]}), tmp_path / "a")
    packed = pack((tmp_path / "a").read_bytes())
    assert read(write(tmp_path / f"a.parquet.{suffix}", packed)) == ({1: [1, "x"], 2: [2, "y"]}, {})
    assert f"b.parquet.{suffix} as parquet" in sentence(write(tmp_path / f"b.parquet.{suffix}", packed[:-20]))


def test_parquet_of_another_kind_is_one_sentence(tmp_path: Path) -> None:
    pq.write_table(pa.table({"u": [{"a": 1}], "i": [1]}), tmp_path / "a.parquet")
    assert "'u' holds struct" in sentence(tmp_path / "a.parquet")
    assert "as parquet" in sentence(write(tmp_path / "b.parquet", b"u,i\n1,2\n"))
    assert "as parquet" in sentence(write(tmp_path / "c.parquet", b""))


# ---------------------------------------------------------------- where files lie
def test_folders_are_read_in_order_without_strangers(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv.gz", "sub/c.jsonl", "README.md", "_SUCCESS", ".hidden.csv", "_temporary/d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found, skipped = list_files([str(tmp_path)], None, 2, 5)
    assert skipped == [str(tmp_path / "README.md")]
    assert [file.path.removeprefix(f"{tmp_path}/") for file in found] == ["a.csv.gz", "b.csv", "sub/c.jsonl"]
    assert [file.index for file in found] == [5, 6, 7]
    assert {file.source for file in found} == {2}


def test_a_file_that_is_named_is_read_whatever_its_name(tmp_path: Path) -> None:
    for name in ("_log", ".log"):
        write(tmp_path / name, b"u,i\n1,2\n")
        assert read(tmp_path / name, format="csv")[0] == {1: ["1", "2"]}


def test_of_a_folder_every_file_that_may_be_a_log_is_read_if_the_format_is_set(tmp_path: Path) -> None:
    """A file whose name tells that format does not hide those beside it."""
    for name in (
        "part-00000",
        "part-00001.gz",
        "events.csv",
        "events.csv.1",
        "x.json",
        "README.md",
        "_SUCCESS",
        ".part-00000.crc",
    ):
        write(tmp_path / name, b"u,i\n1,2\n")
    files, skipped = list_files([str(tmp_path)], "csv", 0, 0)
    names = ["events.csv", "events.csv.1", "part-00000", "part-00001.gz"]
    assert [Path(file.path).name for file in files] == names
    assert {file.format for file in files} == {"csv"}
    assert [file.compression for file in files] == [None, None, None, "gzip"]
    assert [Path(path).name for path in skipped] == ["README.md", "x.json"]


def test_files_that_are_not_read_are_told(tmp_path: Path) -> None:
    log = b"user_id,item_id,timestamp\nu,i,1\nu,j,2\nu,k,3\n"
    for name in ("log/a.csv", "log/a.csv.1", "log/_SUCCESS", "items/b.csv", "items/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, log)
    prepare_without_ray(
        settings_for(tmp_path / "w", {"paths": str(tmp_path / "log")}, items={"paths": str(tmp_path / "items")})
    )
    assert read_report(tmp_path / "w")["skipped_files"] == [
        str(tmp_path / "items" / "b.txt"),
        str(tmp_path / "log" / "a.csv.1"),
    ]


def test_a_folder_or_file_of_no_format_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SpringtideError, match="holds no csv, tsv, jsonl or parquet file; correct"):
        list_files([str(tmp_path)], None, 0, 0)
    write(tmp_path / "part-00000", b"u,i\n1,2\n")
    with pytest.raises(SpringtideError, match="holds no csv.* but .*part-00000: set format"):
        list_files([str(tmp_path)], None, 0, 0)
    with pytest.raises(SpringtideError, match="set format"):
        list_files([str(tmp_path / "part-00000")], None, 0, 0)


@pytest.mark.parametrize("name", ["a b.csv", "100%25.csv", "日志.csv", "a?b.csv", "a=b.csv"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_odd_names_are_found_and_opened_again(tmp_path: Path, name: str, scheme: str) -> None:
    write(tmp_path / name, b"u,i\n1,2\n")
    ((file,), _) = list_files([scheme + str(tmp_path)], None, 0, 0)
    filesystem, path = open_filesystem(file.uri)
    with filesystem.open_input_stream(path) as stream:
        assert stream.read() == b"u,i\n1,2\n"


def test_a_relative_path_opens_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.csv", b"u,i\n1,2\n")
    monkeypatch.chdir(tmp_path)
    ((file,), _) = list_files(["a.csv"], None, 0, 0)
    monkeypatch.chdir("/")
    assert file.path == "a.csv"
    assert [len(chunk.table) for chunk in read_chunks(file, ["u"])] == [1]


def test_a_tilde_is_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.csv", b"u,i\n1,2\n")
    ((file,), _) = list_files(["~/a.csv"], None, 0, 0)
    assert (file.path, file.uri) == (str(tmp_path / "a.csv"),) * 2
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "~log.csv", b"u,i\n1,2\n")  # no user's home
    assert [file.path for file in list_files(["~log.csv"], None, 0, 0)[0]] == ["~log.csv"]


@pytest.mark.parametrize("path", ["/nowhere/a.csv", "nowhere", "foo://bucket/a.csv"])
def test_a_path_to_nowhere_is_one_sentence(path: str) -> None:
    with pytest.raises(SpringtideError) as caught:
        list_files([path], None, 0, 0)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.csv", ("csv", None)),
        ("a.b.CSV.GZ", ("csv", "gzip")),
        ("ml-100k.inter", ("tsv", None)),
        ("a.json.zst", ("jsonl", "zstd")),
        ("a.gz", (None, "gzip")),
        ("a", (None, None)),
        ("a.pq", ("parquet", None)),
    ],
)
def test_the_name_tells_the_format(name: str, expected: tuple[str | None, str | None]) -> None:
    assert guess_format(name) == expected
