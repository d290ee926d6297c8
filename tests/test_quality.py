"""The quality benchmark without its jobs: converters, peers, figures, tables, and what is not run twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import polars as pl
import pytest

import quality
import quality_report as report
from quality_logs import (
    GENRES,
    Log,
    MissingLog,
    load_logs,
    locate,
    movielens_100k,
    rated_movies,
    read_events,
    sequences,
    source_files,
    split_hashes,
)
from springtide.config import parse_settings
from springtide.errors import SpringtideError

HASHES = {"train": "a", "valid": "b", "test": "c"}
PEERS = {
    "split": "leave_one_out", "users": 10, "catalogue": 20, "sha256": HASHES,
    "peers": [{"name": "strong", "ndcg@10": 0.2, "hr@10": 0.3, "coverage@10": 0.5, "cpu_seconds": None, "how": "so"}],
}  # fmt: skip


def a_run(seed: int = 0, ndcg: float = 0.25, **other: Any) -> dict[str, Any]:
    estimate = {"value": ndcg, "lo": ndcg - 0.05, "hi": ndcg + 0.05}
    return {
        "seed": seed, "split": HASHES, "catalogue": 20, "users": 10, "code": quality.code_version(),
        "ndcg@10": estimate, "hr@10": {**estimate}, "coverage@10": {"value": 0.4}, "valid_ndcg@10": ndcg + 0.01,
        "own_best": {"name": "item_knn", "ndcg@10": {"value": 0.2},
                     "ratio": {"value": ndcg / 0.2, "lo": 1.0, "hi": 2.0}},
        "validation": [[ndcg + 0.1, ndcg + 0.01]], "live_to_frozen": None, "train_cpu_seconds": 1234.5,
        "train_seconds": 60.0, "epochs": 3, **other,
    }  # fmt: skip


# ---------------------------------------------------------------- the logs
def test_every_log_is_data_and_nothing_else() -> None:
    peers = report.load_peers()
    for name, log in load_logs().items():
        section = log.section(Path("/raw"), Path("/made"))
        settings = parse_settings({"data": section})
        assert settings.data.events[0].paths[0].startswith(("/raw/", "/made/"))
        assert settings.data.deduplicate == "user_item"
        assert settings.data.min_user_events == settings.data.min_item_events == 5
        assert settings.data.split == peers[name]["split"]
    assert set(peers) == set(load_logs()) >= set(quality.DEFAULT_LOGS)


def test_sequences_become_events_and_words(tmp_path: Path) -> None:
    (tmp_path / "user_sequence.txt").write_text("u1 a b c\n\nu2 c a\n")
    (tmp_path / "item_generative_indexing_phase_0.txt").write_text("a red  shoe\nb\nc blue\n")
    made = tmp_path / "made"
    made.mkdir()
    assert sequences(tmp_path, made) == tmp_path
    lines = (made / "events.tsv").read_text().splitlines()
    assert lines == ["user\titem\tposition", "u1\ta\t0", "u1\tb\t1", "u1\tc\t2", "u2\tc\t0", "u2\ta\t1"]
    assert (made / "items.tsv").read_text() == "item\twords\na\tred shoe\nb\t\nc\tblue\n"


def test_grouplens_files_take_the_form_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n")
    flags = "|".join("1" if genre in ("Animation", "Children's") else "0" for genre in GENRES)
    item = f"1|Misérables, Les (1995)|01-Jan-1995||http://x|{flags}\n"
    (tmp_path / "u.item").write_bytes(item.encode("latin-1"))
    made = tmp_path / "made"
    made.mkdir()
    assert movielens_100k(tmp_path, made) == made
    assert (made / "ml-100k.inter").read_text().splitlines() == [
        "user_id:token\titem_id:token\trating:float\ttimestamp:float", "196\t242\t3\t881250949"
    ]  # fmt: skip
    assert (made / "ml-100k.item").read_text("utf-8").splitlines()[1] == (
        "1\tMisérables, Les\t1995\tAnimation Children's"
    )
    for name in ("ml-100k.inter", "ml-100k.item"):
        (tmp_path / name).write_text("")
    assert movielens_100k(tmp_path, made) == tmp_path


def test_movies_that_nobody_rated_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,10,4.0,5\n2,10,3.0,6\n1,30,1.0,7\n")
    (tmp_path / "movies.csv").write_text('movieId,title,genres\n10,"A, The",x|y\n20,B,x\n30,C,y\n')
    made = tmp_path / "made"
    made.mkdir()
    rated_movies(tmp_path, made)
    assert (made / "movies.csv").read_text() == 'movieId,title,genres\n10,"A, The",x|y\n30,C,y\n'


@pytest.mark.parametrize("name", list(load_logs()))
def test_a_missing_log_is_told(name: str, tmp_path: Path) -> None:
    log = load_logs()[name]
    with pytest.raises(MissingLog, match=f"no folder .*{log.folder}"):
        locate(log, tmp_path, tmp_path / "made")
    (tmp_path / log.folder).mkdir()
    with pytest.raises(MissingLog, match="there is no"):
        locate(log, tmp_path, tmp_path / "made")


def write_prepared(folder: Path) -> None:
    for name in ("events", "items"):
        (folder / name).mkdir(parents=True)
    rows = [("u2", "x", 5, 0, 0), ("u1", "y", 9, 1, 1), ("u1", "x", 3, 0, 0), ("u1", "z", 9, 2, 2)]
    columns = ["user_id", "item_id", "timestamp", "position", "part"]
    pl.DataFrame(rows, columns, orient="row").write_parquet(folder / "events" / "part-0.parquet")
    pl.DataFrame({"item_id": ["y", "x", "z"]}).write_parquet(folder / "items" / "part-0.parquet")


def test_the_hash_is_over_user_item_and_position(tmp_path: Path) -> None:
    write_prepared(tmp_path)

    def of(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    found = split_hashes(read_events(tmp_path))
    assert found == {"train": of("u1\tx\t0\nu2\tx\t0"), "valid": of("u1\ty\t1"), "test": of("u1\tz\t2")}


# ---------------------------------------------------------------- figures
def test_peers_are_complete_and_best_first() -> None:
    for name, entry in report.load_peers().items():
        assert set(entry["sha256"]) == {"train", "valid", "test"}
        assert entry["users"] > 0
        assert entry["catalogue"] > 0
        figures = [peer["ndcg@10"] for peer in entry["peers"]]
        assert figures == sorted(figures, reverse=True), name
        for peer in entry["peers"]:
            assert set(peer) == {"name", "ndcg@10", "hr@10", "coverage@10", "cpu_seconds", "how"}
            assert peer["how"]
            assert 0 < peer["coverage@10"] <= 1


def test_cpu_seconds_take_a_refit_in() -> None:
    epochs = [{"cpu_seconds": 2.0}, {"cpu_seconds": 3.0}]
    assert report.cpu_seconds({"epochs": epochs}) == 5.0
    assert report.cpu_seconds({"epochs": epochs, "refit_epochs": [{"cpu_seconds": 4.0}]}) == 9.0
    assert report.cpu_seconds({"epochs": epochs, "refit_epochs": None}) == 5.0


def test_live_to_frozen_is_there_or_not() -> None:
    ratio = {"value": 1.5, "lo": 1.2, "hi": 1.8}
    assert report.live_to_frozen({"prequential": {"all": {"ratios": {"live/frozen": ratio}}}}) == ratio
    for nothing in ({}, {"prequential": None}, {"prequential": {"all": {"ratios": {"history/frozen": ratio}}}}):
        assert report.live_to_frozen(nothing) is None


def test_several_seeds_against_the_best_peer() -> None:
    found = report.summarise([a_run(0, 0.24), a_run(1, 0.26)], PEERS)
    assert found["ndcg@10"]["value"] == pytest.approx(0.25)
    assert found["ndcg@10"]["spread"] == pytest.approx(0.02 / 2**0.5)
    assert found["ratio_to_peer"] == {
        "value": pytest.approx(1.25), "lo": pytest.approx(1.0), "hi": pytest.approx(1.5), "paired": False
    }  # fmt: skip
    assert found["own_best"]["ratio"]["value"] == pytest.approx(1.25)
    assert report.mean_ratio({"one": found, "two": {**found, "peer": None, "ratio_to_peer": None}}) == pytest.approx(
        1.25
    )


@pytest.mark.parametrize("other", [{"split": {**HASHES, "test": "d"}}, {"catalogue": 21}, {"users": 9}])
def test_another_split_is_not_compared(other: dict[str, Any]) -> None:
    found = report.summarise([a_run(**other)], PEERS)
    assert found["peer"] is None
    assert found["ratio_to_peer"] is None
    assert report.mean_ratio({"one": found}) is None
    assert "another log or split" in report.render({"one": found}, {}, {"one": "One"})


def test_a_ratio_is_paired_with_the_best_peer_where_that_is_the_one_made_again() -> None:
    pair = {"name": "strong", "ndcg@10": 0.2, "ratio": {"value": 1.25, "lo": 1.1, "hi": 1.4}}
    found = report.summarise([a_run(paired_peer=pair)], PEERS)
    assert found["ratio_to_peer"] == {**pair["ratio"], "paired": True}
    assert found["paired_peer"] == pair
    text = report.render({"one": found}, {}, {"one": "One"})
    assert "1.25 [1.10, 1.40]*" in text and report.PAIRED in text
    weak = report.summarise([a_run(paired_peer={**pair, "name": "weak"}), a_run(1)], PEERS)
    assert weak["paired_peer"] is None  # not of every seed
    weak = report.summarise([a_run(paired_peer={**pair, "name": "weak"})], PEERS)
    assert weak["ratio_to_peer"]["paired"] is False and weak["paired_peer"]["name"] == "weak"


# ---------------------------------------------------------------- tables
def test_the_table_says_what_it_should() -> None:
    live = {"value": 2.0, "lo": 1.5, "hi": 2.5}
    found = report.summarise([a_run(0, live_to_frozen=live), a_run(1, 0.27, live_to_frozen=live)], PEERS)
    text = report.render({"one": found}, {}, {"one": "One"})
    row = next(line for line in text.splitlines() if line.startswith("One"))
    assert row.split("  ")[1].strip() == "0.2600 ± 0.0141"
    for said in ("strong 0.2000", "1.30 [1.05, 1.55]", "item knn 0.2000", "1.30 [1.00, 2.00]", "1,234", "60"):
        assert said in row
    for note in (report.BEST, report.OWN, report.SEEDS, "over 1 log: 1.300", "2.00 [1.50, 2.50]"):
        assert note in text
    assert "differ by" not in text
    found = report.summarise([a_run(0, chance_between_seeds=0.04), a_run(1, 0.27, chance_between_seeds=0.04)], PEERS)
    text = report.render({"one": found}, {}, {"one": "One"})
    assert "one, seeds: standard deviation 5.4% of the mean; two equally good models would differ by 4.0%" in text


def test_markdown_has_as_many_cells_in_every_row() -> None:
    found = report.summarise([a_run()], PEERS)
    page = report.render({"one": found}, {}, {"one": "One | Two"}, as_markdown=True)
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert {line.count("|") for line in lines} == {len(report.HEADER) + 1}
    assert lines[2].startswith("| One / Two | 0.2500 | 1 |")
    assert report.SEEDS not in page


def test_ablations_are_differences_to_the_first() -> None:
    rows = report.ablation_rows({"defaults": a_run(ndcg=0.25), "model.memory=false": a_run(ndcg=0.2)})
    assert rows == [["defaults", "0.2600", ""], ["model.memory=false", "0.2100", "-0.0500 (-19.2%)"]]


def test_a_run_cut_short_keeps_the_best_of_the_epochs_it_had() -> None:
    run = {**a_run(), "validation": [[0.3, 0.2], [0.5, 0.1], [0.4, 0.4], [0.6, 0.3]]}
    assert [report.shortened(run, epochs)["valid_ndcg@10"] for epochs in (1, 2, 3, 4, None)] == [
        0.2,
        0.1,
        0.1,
        0.3,
        0.3,
    ]


# ---------------------------------------------------------------- what is run
@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "ml-latest-small"
    folder.mkdir(parents=True)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,10,4.0,5\n")
    (folder / "movies.csv").write_text("movieId,title,genres\n10,A,x\n")
    return folder.parent


Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the variants that were run; the jobs are replaced by what writes their run.json."""
    names: list[str] = []

    def measure(
        bench: quality.Bench, log: Log, variant: quality.Variant, facts: Mapping[str, Any], env: Any
    ) -> dict[str, Any]:
        names.append(variant.name)
        run = {**a_run(variant.seed), **facts}
        folder = bench.run_folder(log, variant)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(run))
        return run

    @contextmanager
    def no_cluster() -> Iterator[Any]:
        yield type("Cluster", (), {"environment": {}})()

    monkeypatch.setattr(quality, "measure", measure)
    monkeypatch.setattr(quality, "prepare", lambda bench, log, env: HASHES)
    monkeypatch.setattr(quality, "local_cluster", no_cluster)
    monkeypatch.setattr(quality.signal, "signal", lambda *_: None)
    return names


def run(data: Path, *arguments: str) -> None:
    quality.main([str(data), "--work", str(data.parent / "work"), "--logs", "ml-latest-small", *arguments])


def test_what_is_finished_is_not_run_again(data: Path, measured: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(data, "--seeds", "0")
    run(data, "--seeds", "0,1", "--ablate", "model.memory=false model.text_dim=0")
    assert len(measured) == 3
    assert measured[:2] == ["defaults-seed-0", "defaults-seed-1"]
    assert measured[2].startswith("model.memory-false-model.text-dim-0-")
    run(data, "--seeds", "0,1")
    assert len(measured) == 3
    run(data, "--seeds", "0", "--set", "train.epochs=1")  # other settings are another run
    run(data, "--seeds", "0", "--fresh")
    assert len(measured) == 5
    assert measured[4] == "defaults-seed-0"
    (data / "ml-latest-small" / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,10,4.0,5\n2,10,4.0,5\n")
    run(data, "--seeds", "0")  # and so is another log
    assert len(measured) == 6
    body = json.loads((data.parent / "work" / "quality.json").read_text())
    assert body["logs"]["ml-latest-small"]["seeds"] == [0]
    assert body["failures"] == []
    said = capsys.readouterr().out
    assert "model.memory=false model.text_dim=0" in said
    assert "NOT with the default settings but with train.epochs=1." in said


def test_ablations_of_other_lengths_are_not_compared(data: Path, measured: list[str]) -> None:
    ablate = ("--seeds", "0", "--ablate", "model.memory=false")
    run(data, *ablate, "--ablation-epochs", "3")
    run(data, *ablate, "--ablation-epochs", "3")
    assert len(measured) == 2
    run(data, *ablate, "--ablation-epochs", "5")
    run(data, *ablate)
    assert len(measured) == 4 and "defaults-seed-0" not in measured[1:]


def test_what_ran_while_the_code_changed_is_not_kept(tmp_path: Path) -> None:
    quality.keep({"code": quality.code_version()}, tmp_path / "same")
    assert json.loads((tmp_path / "same" / "run.json").read_text())["code"] == quality.code_version()
    with pytest.raises(SpringtideError, match="the code was changed"):
        quality.keep({"code": "of before"}, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_checkpoints_of_other_code_are_forgotten(tmp_path: Path) -> None:
    for version, kept in (("one", False), ("one", True), ("two", False)):
        checkpoint = tmp_path / "runs" / "train-1" / "checkpoint"
        checkpoint.mkdir(parents=True, exist_ok=True)
        quality.forget_other_code(tmp_path, version)
        assert checkpoint.exists() is kept


def test_half_a_run_is_none(data: Path, measured: list[str]) -> None:
    run(data, "--seeds", "0")
    (data.parent / "work" / "ml-latest-small" / "runs" / "defaults-seed-0" / "run.json").write_text('{"seed": ')
    run(data, "--seeds", "0")
    assert len(measured) == 2


def test_other_code_is_told(data: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run(data, "--seeds", "0")
    assert "ANOTHER VERSION" not in capsys.readouterr().out
    monkeypatch.setattr(quality, "code_version", lambda: "another")
    run(data, "--seeds", "0")
    assert len(measured) == 1
    assert "ANOTHER VERSION OF THE CODE: ml-latest-small" in capsys.readouterr().out


def test_a_failure_leaves_the_rest_running(
    data: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    measure: Measure = quality.measure

    def fail_once(bench: Any, log: Any, variant: quality.Variant, *rest: Any) -> dict[str, Any]:
        if variant.seed == 1:
            raise SystemExit("a job failed (1):\nits last words")
        return measure(bench, log, variant, *rest)

    monkeypatch.setattr(quality, "measure", fail_once)
    with pytest.raises(SystemExit, match=r"1 not measured: ml-latest-small, defaults-seed-1: its last words"):
        run(data)
    assert measured == ["defaults-seed-0", "defaults-seed-2"]
    assert "0.2500 ± 0.0000" in capsys.readouterr().out


def test_a_missing_log_makes_the_status_say_so(data: Path, measured: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit, match="1 not measured: amazon-sports skipped: there is no folder") as stopped:
        run(data, "amazon-sports", "--seeds", "0")
    assert stopped.value.code not in (0, None)
    assert measured == ["defaults-seed-0"]
    assert "amazon-sports skipped: there is no folder" in capsys.readouterr().out


def test_movielens_is_fetched_if_it_is_missing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(folder: Path) -> None:
        folder.mkdir(parents=True)
        for name in ("ml-100k.inter", "ml-100k.item"):
            (folder / name).write_text("x\n")

    monkeypatch.setattr(quality, "fetch_movielens", fetch)
    bench = quality.Bench(data.parent / "work", (), [], [0])
    section = quality.find(bench, load_logs()["ml-100k"], data)
    assert section is not None
    assert section["events"]["paths"] == str(data.parent / "work" / "fetched" / "ml-100k" / "ml-100k.inter")
    assert not (data / "ml-100k").exists()

    def refuse(folder: Path) -> NoReturn:
        raise SpringtideError("no network")

    monkeypatch.setattr(quality, "fetch_movielens", refuse)
    assert quality.find(bench, load_logs()["ml-100k"], data) is None
    assert bench.failures == ["ml-100k skipped: no network"]


def test_the_source_changes_with_its_files(data: Path, tmp_path: Path) -> None:
    log = load_logs()["ml-latest-small"]
    first = source_files(locate(log, data, tmp_path / "made"))
    assert source_files(locate(log, data, tmp_path / "made")) == first
    (data / "ml-latest-small" / "movies.csv").write_text("movieId,title,genres\n10,Abc,x\n")
    assert source_files(locate(log, data, tmp_path / "made")) != first


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "train.seed=3"], "the benchmark sets train.seed itself"),
        (["--ablate", "data.split=temporal"], "the variants share what prepare and embed wrote"),
        (["--set", "model.memry=false"], "did you mean model.memory"),
        (["--ablate", "train.epochs"], "section.key=value"),
    ],
)
def test_settings_are_checked_before_anything_runs(
    data: Path, measured: list[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit, match=sentence):
        run(data, *arguments)
    assert measured == []


@pytest.mark.parametrize("arguments", [["--seeds", "x"], ["--logs", "nowhere"]])
def test_a_wrong_command_line_is_refused(data: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        quality.parse([str(data), *arguments])
    assert stopped.value.code == 2
