"""What is stored while a model is served: added items are in the next answer, events are counted once and in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from springtide.bundle import load_bundle
from springtide.errors import SpringtideError
from springtide.serving import live as live_module
from springtide.serving.engine import Engine, Refusal, ScoreRequest
from springtide.serving.live import Live, NoLogHere
from springtide.serving.sharing import SharedLock
from springtide.serving.store_sqlite import SQLiteStore
from toy import ITEMS_IN_TOY, toy_bundle

torch.set_num_threads(1)
NOW = 1_700_000_000_000  # after the end of the toy log


def engine_of(folder: Path, **values: Any) -> Engine:
    folder.mkdir(exist_ok=True)
    return Engine(load_bundle(toy_bundle(folder, **values)), "toy")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    opened = SQLiteStore(tmp_path / "log.sqlite3")
    yield opened
    opened.close()


def put(
    store: SQLiteStore,
    item_id: str,
    vector: np.ndarray,
    categories: list[str] | None = None,
    encoder: str | None = "default@1",
) -> None:
    item = {"item_id": item_id, "title": "New", "categories": categories or [], "text": "red", "encoder": encoder}
    store.put_item(item | {"vector": np.asarray(vector, "<f4").tobytes()})  # type: ignore[arg-type]


def take(store: SQLiteStore, user: str, *items: str, at: int = NOW) -> None:
    rows = [
        {"event_id": f"{user}-{at}-{n}", "user_id": user, "item_id": item, "timestamp": at + n, "action": "purchase"}
        for n, item in enumerate(items)
    ]
    store.append(rows)


def best(engine: Engine, **request: Any) -> list[str]:
    answer = engine.score([ScoreRequest(now=NOW, **request)])[0]
    assert not isinstance(answer, Refusal)
    return [item["item_id"] for item in answer["items"]]


# ---------------------------------------------------------------- items
def test_an_added_item_is_in_the_next_answer_of_every_engine(tmp_path: Path, store: SQLiteStore) -> None:
    engines = [engine_of(tmp_path / "a"), engine_of(tmp_path / "b", seed=1)]
    live = Live(lambda: store)
    query = np.zeros(384, np.float32)
    query[3] = 1
    put(store, "new", query, ["fresh"])
    live.add_items(engines)
    for engine in engines:
        assert best(engine, query=query, k=1) == ["new"]
        assert best(engine, query=query, categories=("fresh",), k=5) == ["new"]
        similar = engine.similar("new", 3)
        assert not isinstance(similar, Refusal) and len(similar["items"]) == 3
        assert live.told(engine)["items_revision"] == store.items_revision()
    put(store, "new", -query)  # put again: replaced
    live.add_items(engines)
    assert all(best(engine, query=query, k=1) != ["new"] for engine in engines)


def test_a_model_that_is_swapped_in_knows_everything_before_it_answers(tmp_path: Path, store: SQLiteStore) -> None:
    query = np.zeros(384, np.float32)
    query[3] = 1
    put(store, "new", query)
    take(store, "u", *["i07"] * 30)
    live, engine = Live(lambda: store), engine_of(tmp_path / "a")
    live.prepare(engine)
    assert best(engine, query=query, k=1) == ["new"]
    assert live.told(engine)["observed_events"] == 30


def test_items_are_added_page_by_page_and_none_twice(
    tmp_path: Path, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "ITEMS_PAGE", 3)
    monkeypatch.setattr(live_module, "REST_S", 0.0)
    for number in range(8):
        put(store, f"new{number}", np.random.default_rng(number).normal(size=384))
    engine, live, asked = engine_of(tmp_path / "a"), Live(lambda: store), list[tuple[int, int]]()
    real = store.items_since

    def since(revision: int = 0, limit: int = 1000) -> Any:
        asked.append((revision, limit))
        if len(asked) == 3:
            raise SpringtideError("Timeout reading from socket")
        return real(revision, limit)

    monkeypatch.setattr(store, "items_since", since)
    assert not live.add_items([engine])
    assert engine.bundle.recommender.item_ids[ITEMS_IN_TOY:] == [f"new{n}" for n in range(6)]
    assert live.add_items([engine])
    assert engine.bundle.recommender.item_ids[ITEMS_IN_TOY:] == [f"new{n}" for n in range(8)]
    assert asked == [(0, 3), (3, 3), (6, 3), (6, 3)]


def test_an_item_that_another_thread_adds_meanwhile_is_no_sign_of_a_lost_log(
    tmp_path: Path, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "first", np.ones(384))
    engine, live, asked = engine_of(tmp_path / "a"), Live(lambda: store), list[int]()
    assert live.add_items([engine])
    newest, since = store.items_revision, store.items_since
    another = threading.Thread(target=lambda: live.add_items([engine]))

    def slow() -> int:
        found = newest()
        if another.ident is None:
            put(store, "second", np.ones(384))
            another.start()
            another.join(1)
        return found

    monkeypatch.setattr(store, "items_revision", slow)
    monkeypatch.setattr(
        store, "items_since", lambda revision, limit: [asked.append(revision), since(revision, limit)][1]
    )
    assert live.add_items([engine])
    another.join()
    assert asked == [1] and live.told(engine)["items_revision"] == 2


def test_models_without_texts_and_vectors_of_another_width_are_left_as_they_are(
    tmp_path: Path, store: SQLiteStore
) -> None:
    put(store, "narrow", np.ones(7))
    engine, live = engine_of(tmp_path / "a"), Live(lambda: store)
    engine.bundle.recommender.text_vectors, kept = None, engine.bundle.recommender.text_vectors
    live.add_items([engine])
    assert "narrow" not in engine.bundle.recommender.index
    engine.bundle.recommender.text_vectors = kept
    other = Live(lambda: store)
    other.add_items([engine])
    assert "narrow" in engine.bundle.recommender.index
    assert "narrow" not in best(engine, k=ITEMS_IN_TOY + 1)  # known, but without a text it is like nothing


def test_a_vector_of_another_encoder_says_nothing(tmp_path: Path, store: SQLiteStore) -> None:
    query = np.zeros(384, np.float32)
    query[3] = 1
    for name, encoder in (("own", "default@2"), ("untold", None), ("others", "bert-base-chinese@1")):
        put(store, name, query, [name], encoder)
    engine, live = engine_of(tmp_path / "a"), Live(lambda: store)
    live.add_items([engine])
    assert sorted(best(engine, query=query, k=2)) == ["own", "untold"]
    assert best(engine, query=query, categories=("others",), k=1) == []


# ---------------------------------------------------------------- events
def test_events_are_counted_once_in_pages_and_with_what_came_before(
    tmp_path: Path, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a single call of `observe` had seen all of them."""
    monkeypatch.setattr(live_module, "PAGE", 7)
    live, followed, told = Live(lambda: store), engine_of(tmp_path / "a"), engine_of(tmp_path / "b")
    items = [f"i{n % 9:02d}" for n in range(40)]
    for n, item in enumerate(items):
        take(store, "u" if n % 2 else "v", item, at=NOW + 1000 * n)
        if n % 10 == 9:
            while live.observe([followed]):
                pass
    for user in (0, 1):
        new = [
            {"item_id": item, "timestamp": NOW + 1000 * n, "action": "purchase"}
            for n, item in enumerate(items)
            if n % 2 == user
        ]
        told.observe([([], new)])
    assert live.told(followed)["observed_events"] == 40
    first, second = (one.bundle.recommender for one in (followed, told))
    np.testing.assert_array_equal(first.popularity, second.popularity)
    pair = first._transitions, second._transitions
    assert pair[0] is not None and pair[1] is not None
    np.testing.assert_allclose(pair[0].toarray(), pair[1].toarray(), rtol=1e-5)
    again = Live(lambda: store)
    assert not again.observe([]) and live.observe([followed]) is False
    assert live.told(followed)["observed_events"] == 40


def test_a_long_log_read_at_once_keeps_what_followed_what(
    tmp_path: Path, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the time an old page is read, the store shows only what its users did long after."""
    monkeypatch.setattr(live_module, "PAGE", 7)
    monkeypatch.setattr(live_module, "PRECEDING", 12)
    live, followed, told = Live(lambda: store), engine_of(tmp_path / "a"), engine_of(tmp_path / "b")
    items = [f"i{n * n % 23:02d}" for n in range(120)]
    for n, item in enumerate(items):
        take(store, "uv"[n % 2], item, at=NOW + 1000 * n)
    while live.observe([followed]):
        pass
    rows = store.since(0, 1000)[0]
    told.observe([([], [row for row in rows if row["user_id"] == user]) for user in "uv"])
    pair = [one.bundle.recommender._transitions for one in (followed, told)]
    assert pair[0] is not None and pair[1] is not None
    np.testing.assert_allclose(pair[0].toarray(), pair[1].toarray(), rtol=1e-5)


def test_a_model_that_begins_counts_the_latest_events_alone(tmp_path: Path, store: SQLiteStore) -> None:
    engine, live = engine_of(tmp_path / "a"), Live(lambda: store)
    live.observe_at_most = 25
    before = engine.bundle.recommender.popularity.copy()
    take(store, "u", *["i01"] * 30, *["i02"] * 20)
    live.prepare(engine)
    added = engine.bundle.recommender.popularity - before
    assert (added[1], added[2]) == (5, 20)
    live.observe_at_most = 0
    take(store, "u", "i03", at=NOW + 1000)
    live.observe([engine])  # it has begun: nothing is left out any more
    told = live.told(engine)
    assert (told["observed_events"], told["cursor"]) == (26, store.since(0, 1000)[1]) and told["seconds_behind"] < 60


def test_seconds_behind_go_on_while_events_are_left(
    tmp_path: Path, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "PAGE", 3)
    engine, live = engine_of(tmp_path / "a"), Live(lambda: store)
    take(store, "u", "i01", "i02", "i03", "i04")
    assert live.observe([engine]) and "seconds_behind" not in live.told(engine)
    assert not live.observe([engine]) and live.told(engine)["seconds_behind"] >= 0


def test_events_of_before_the_end_of_the_trained_log_are_in_its_counts_already(
    tmp_path: Path, store: SQLiteStore
) -> None:
    engine, live = engine_of(tmp_path / "a"), Live(lambda: store)
    before = engine.bundle.recommender.popularity.copy()
    take(store, "u", "i01", "i02", at=engine.log_end - 10)
    take(store, "u", "unheard of")
    live.observe([engine])
    np.testing.assert_array_equal(engine.bundle.recommender.popularity, before)


def test_popularity_follows(tmp_path: Path, store: SQLiteStore) -> None:
    engine, live = engine_of(tmp_path / "a"), Live(lambda: store)
    last = best(engine, k=ITEMS_IN_TOY)[-1]
    for n in range(300):
        take(store, f"u{n}", last)
    live.observe([engine])
    assert best(engine, k=1) == [last]


def test_events_of_an_item_just_added_are_counted_by_every_replica(tmp_path: Path, store: SQLiteStore) -> None:
    engine, live = engine_of(tmp_path / "a"), Live(lambda: store)
    put(store, "new", np.ones(384))
    take(store, "u", *["new"] * 30)
    live.observe([engine])  # nobody has asked for a recommendation since
    recommender = engine.bundle.recommender
    assert recommender.popularity[recommender.index["new"]] == 30


def test_a_clock_that_is_years_ahead_is_not_counted(tmp_path: Path, store: SQLiteStore) -> None:
    engine, live = engine_of(tmp_path / "a"), Live(lambda: store)
    before = engine.bundle.recommender.popularity.copy()
    take(store, "u", "i05", at=int(time.time() * 1000) + 10**12)
    live.observe([engine])
    np.testing.assert_array_equal(engine.bundle.recommender.popularity, before)
    take(store, "u", "i09", at=int(time.time() * 1000))
    live.observe([engine])
    assert engine.bundle.recommender.popularity.sum() == before.sum() + 1


def test_added_items_do_not_wait_for_events_to_be_read(
    tmp_path: Path, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reading, go_on = engine_of(tmp_path / "a"), threading.Event(), threading.Event()
    real = store.history

    def slow(user: str, limit: int = 1000) -> list[dict[str, Any]]:
        reading.set()
        assert go_on.wait(20)
        return real(user, limit)

    monkeypatch.setattr(store, "history", slow)
    live = Live(lambda: store)
    take(store, "u", "i01")
    counting = threading.Thread(target=live.observe, args=([engine],), daemon=True)
    counting.start()
    assert reading.wait(20)
    put(store, "new", np.ones(384))
    live.add_items([engine])
    assert "new" in engine.bundle.recommender.index
    go_on.set()
    counting.join(20)
    assert live.told(engine)["observed_events"] == 1


# ---------------------------------------------------------------- another store at the same address
def test_another_log_is_followed_from_its_beginning(tmp_path: Path, store: SQLiteStore) -> None:
    engine, live, other = engine_of(tmp_path / "a"), Live(lambda: store), SQLiteStore(tmp_path / "other")
    take(store, "u", *["i01"] * 5)
    put(store, "old", np.ones(384))
    put(store, "old", np.ones(384))
    live.observe([engine])
    live._store = other
    put(other, "new", np.ones(384))
    take(other, "u", *["i02"] * 3)
    live.observe([engine])
    assert live.told(engine)["observed_events"] == 8
    assert live.told(engine)["cursor"] == 3 and live.told(engine)["items_revision"] == 1
    assert "new" in engine.bundle.recommender.index
    other.close()


def test_a_log_that_lost_its_end_is_followed_from_there(
    tmp_path: Path, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that takes over: the same log without its last events and items, whose numbers are given again."""
    engine, live, replica = engine_of(tmp_path / "a"), Live(lambda: store), SQLiteStore(tmp_path / "replica")
    monkeypatch.setattr(replica, "identity", store.identity)
    for log in (store, replica):
        take(log, "u", *["i01"] * 3)
        put(log, "both", np.ones(384))
    take(store, "u", *["i02"] * 4, at=NOW + 100)
    put(store, "lost", np.ones(384))
    live.observe([engine])
    assert live.told(engine)["observed_events"] == 7
    live._store = replica
    live.observe([engine])
    take(replica, "u", *["i03"] * 2, at=NOW + 200)
    live.observe([engine])
    assert live.told(engine)["observed_events"] == 9
    assert live.add_items([engine])
    put(replica, "again", np.ones(384))  # with the number of the one that was lost
    live.add_items([engine])
    assert "again" in engine.bundle.recommender.index
    replica.close()


# ---------------------------------------------------------------- a store that fails
def test_a_store_that_fails_costs_nothing_but_the_news(
    tmp_path: Path, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "REST_S", 0.05)
    opened: list[int] = []

    def open_late() -> SQLiteStore:
        opened.append(1)
        if len(opened) == 1:
            raise SpringtideError("the disk is away")
        return store

    engine, live = engine_of(tmp_path / "a"), Live(open_late)
    take(store, "u", "i01")
    assert not live.add_items([engine])
    assert not live.observe([engine]) and live.told(engine)["observed_events"] == 0
    assert len(opened) == 1  # it rests before it asks again
    assert len(best(engine, k=3)) == 3
    time.sleep(0.06)
    live.observe([engine])
    assert live.told(engine)["observed_events"] == 1
    assert live.add_items([engine])
    store.close()
    assert not live.add_items([engine])


def test_a_node_without_the_log_is_no_fault(
    tmp_path: Path, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers there are whole, and the log is not filled with it; the file may yet be made."""
    monkeypatch.setattr(live_module, "REST_S", 0.0)
    there = [False] * 5 + [True]

    def open_there() -> SQLiteStore:
        if not there.pop(0):
            raise NoLogHere("the event log is not on this node")
        return store

    engine, live = engine_of(tmp_path / "a"), Live(open_there)
    put(store, "new", np.ones(384))
    with caplog.at_level("INFO"):
        for _ in range(5):
            assert live.add_items([engine])
    assert [record.message for record in caplog.records] == ["the event log is not on this node"]
    assert live.add_items([engine]) and "new" in engine.bundle.recommender.index


# ---------------------------------------------------------------- the lock
def test_readers_together_and_a_writer_alone() -> None:
    lock, inside, errors = SharedLock(), [0, 0], list[str]()

    def read() -> None:
        for _ in range(200):
            with lock.reading():
                inside[0] += 1
                if inside[1]:
                    errors.append("a writer beside a reader")
                time.sleep(0.0001)
                inside[0] -= 1

    def write() -> None:
        for _ in range(50):
            with lock.writing():
                inside[1] += 1
                if inside != [0, 1]:
                    errors.append("not alone")
                time.sleep(0)
                inside[1] -= 1

    threads = [threading.Thread(target=work, daemon=True) for work in (read, read, write, read, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors and inside == [0, 0]


def test_readers_do_not_wait_for_each_other() -> None:
    lock, both = SharedLock(), threading.Barrier(2, timeout=10)

    def read() -> None:
        with lock.reading():
            both.wait()  # nobody passes unless both are inside

    threads = [threading.Thread(target=read, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads) and not both.broken


def test_scoring_goes_on_while_items_are_added_and_events_counted(tmp_path: Path, store: SQLiteStore) -> None:
    engine, live, failures = engine_of(tmp_path / "a"), Live(lambda: store), list[BaseException]()

    def ask() -> None:
        try:
            for n in range(60):
                assert len(best(engine, events=[{"item_id": f"i{n % 30:02d}"}], k=5)) == 5
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(15):
        put(store, f"new{n}", np.random.default_rng(n).normal(size=384))
        take(store, "u", f"new{n}", at=NOW + n * 1000)
        live.add_items([engine])
        live.observe([engine])
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)
    assert len(engine.bundle.recommender.item_ids) == ITEMS_IN_TOY + 15
    assert engine.bundle.recommender.popularity[-15:].tolist() == [1] * 15
