"""Updating a bundle: what it knew stays, whatever rows things have now; what is new is counted and learned from."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.bundle import Bundle, load_bundle
from springtide.config import Settings, with_values
from springtide.data.prepared import Prepared, load_prepared
from springtide.errors import SpringtideError
from springtide.files import write_json
from springtide.model.batch import History
from springtide.model.carry import carry_over, rows_in
from springtide.schemas import SEQUENCES, TEST, TRAIN, VALID
from springtide.training import reach, update
from springtide.training.cases import holdout_share, warn_of_repeats
from springtide.training.publish import publish
from springtide.training.sampling import Sampling, Since
from springtide.training.sequences import count_new, epoch_batches, from_table, validation_cases
from springtide.training.statistics import Statistics, collect
from springtide.training.tabulate import HalfLives, tabulate
from springtide.training.texts import feature_rows, fit_texts
from springtide.training.worker import build_model, write_inputs
from toy import ITEMS_IN_TOY, sequences_of, toy_settings
from write_workspace import grow_workspace, write_workspace

METRICS = {
    "newness": 0.5,
    "damping": 0.25,
    "reach": 0.0,
    "lifted": 0.0,
    "epochs": [],
    "new_events": 7,
}  # as of an update before
NEW = {"i40", "i41"}
HALF_LIVES = HalfLives(0.5, 0.2, 0.3)


def statistics_of(settings: Settings, prepared: Prepared) -> Statistics:
    return collect(from_table(prepared.sequences(), 0, refit=True), len(prepared.items), settings.model)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Settings, Bundle]:
    return bundled(tmp_path)


def bundled(tmp_path: Path, **values: Any) -> tuple[Settings, Bundle]:
    """A workspace with a bundle of its log, counts and all, whose weights are random."""
    workspace = write_workspace(tmp_path / "toy")
    chosen = toy_settings(workspace, train__rating_weight=0.1, **values)
    prepared = load_prepared(workspace)
    features = fit_texts(chosen, prepared, "both")
    text = feature_rows(chosen, prepared, features)
    inputs = tmp_path / "inputs.safetensors"
    write_inputs(inputs, tabulate(statistics_of(chosen, prepared), chosen.model, HALF_LIVES, text), text, features)
    torch.manual_seed(3)
    model, _ = build_model(chosen, len(prepared.actions), inputs)
    state = {
        name: value + 0.1 * torch.randn_like(value)
        if value.is_floating_point() and name in dict(model.named_parameters())
        else value
        for name, value in model.state_dict().items()
    }
    publish(chosen, prepared, inputs, state, METRICS, workspace / "bundle")
    return chosen, load_bundle(workspace / "bundle")


def updated(chosen: Settings, bundle: Bundle, folder: Path, share: float = 0.0) -> Bundle:
    """The bundle of the prepared log as it is now, without training."""
    prepared = load_prepared(chosen.workspace)
    inputs = update.write_update(chosen, prepared, bundle, statistics_of(chosen, prepared), folder / "run")
    state = build_model(chosen, len(prepared.actions), inputs)[0].state_dict()
    publish(chosen, prepared, inputs, state, METRICS | {"reach": share, "lifted": share}, folder / "bundle")
    return load_bundle(folder / "bundle")


def scores(bundle: Bundle, events: list[dict[str, Any]], items: list[str]) -> np.ndarray:
    recommender = bundle.recommender
    history, unknown = recommender.history(events)
    assert not unknown
    return recommender.score([history]).logits[0, [recommender.index[item] for item in items]]


EVENTS = [
    {"item_id": f"i{n:02d}", "timestamp": 1_600_000_000_000 + n, "action": action, "rating": 3.0}
    for n, action in ((3, "view"), (17, "purchase"), (4, "view"), (5, "view"))
]


@pytest.mark.parametrize("grown", [False, True])
def test_without_new_events_every_score_stays(trained: tuple[Settings, Bundle], tmp_path: Path, grown: bool) -> None:
    chosen, bundle = trained
    if grown:  # rows of items and numbers of actions are others now
        grow_workspace(Path(chosen.workspace), new_items=0, new_events=0)
    items = bundle.recommender.item_ids
    again = updated(chosen, bundle, tmp_path)
    assert np.allclose(scores(again, EVENTS, items), scores(bundle, EVENTS, items), atol=2e-4)
    assert (again.recommender.item_ids == items) is not grown
    assert float(again.recommender.model.channels.damping) == 0.25
    assert float(again.recommender.model.channels.newness) == 0.5


def test_items_that_no_list_holds_are_lifted_again(
    trained: tuple[Settings, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "WORK", 5 * (ITEMS_IN_TOY + len(NEW)))  # the lists of five users do not hold everything
    chosen, bundle = trained
    grow_workspace(Path(chosen.workspace))
    lifts = [
        updated(chosen, bundle, tmp_path / str(share), share).recommender.model.channels.lift for share in (0.0, 1.0)
    ]
    assert not lifts[0].any() and lifts[1].any() and len(lifts[1]) == ITEMS_IN_TOY + len(NEW)


def test_new_events_are_counted_and_new_items_known_by_text(trained: tuple[Settings, Bundle], tmp_path: Path) -> None:
    chosen, bundle = trained
    grow_workspace(Path(chosen.workspace))
    again = updated(chosen, bundle, tmp_path).recommender
    old = bundle.recommender
    # Eight users took three more: two of these are counted, and what was held back as their last two before.
    assert again.popularity.sum() == old.popularity.sum() + 8 * 3
    assert again.log_end is not None and old.log_end is not None and again.log_end > old.log_end
    vectors = again.model.item_vectors
    assert vectors.ids is not None and vectors.project is not None
    for item in NEW:
        row = again.index[item]
        assert torch.equal(vectors.ids.weight[row], torch.zeros(chosen.model.dim)) and vectors.known[row]
        assert np.allclose(again.item_vectors[row], vectors.project(vectors.text[row]).detach().numpy())
    kept = [again.index[item] for item in old.item_ids]
    assert np.allclose(again.item_vectors[kept], old.item_vectors, atol=1e-5)


def test_half_lives_stay_the_same_times_in_a_longer_log(trained: tuple[Settings, Bundle], tmp_path: Path) -> None:
    chosen, bundle = trained
    grow_workspace(Path(chosen.workspace))
    old, new = bundle.recommender, updated(chosen, bundle, tmp_path).recommender
    assert new.log_end is not None and old.log_end is not None and new.log_end > old.log_end
    recent = [each.model.channels.recent for each in (old, new)]
    assert recent[0] is not None and recent[1] is not None
    assert recent[1].latest.half_life == pytest.approx(recent[0].latest.half_life)
    assert new.popular.half_life == pytest.approx(old.popular.half_life) and 0 < old.popular.half_life < np.inf


def test_what_the_log_decided_is_the_bundles(trained: tuple[Settings, Bundle]) -> None:
    """A bundle of the time when it was a setting of 0.1 may be updated, and one may not ask for another time."""
    chosen, bundle = trained
    of_before = replace(bundle, settings=with_values(bundle.settings, {"model.recent_half_life": 0.1}))
    assert update.of_bundle(chosen, of_before).model.recent_half_life == 0.1
    with pytest.raises(SpringtideError, match=r"model.recent_half_life is 0.2 in the settings"):
        update.of_bundle(with_values(chosen, {"model.recent_half_life": 0.2}), of_before)


@pytest.mark.parametrize("dense", [12, ITEMS_IN_TOY])
def test_neighbours_of_a_long_tail_come_only_if_the_model_knew_some(dense: int, tmp_path: Path) -> None:
    """How far to trust them is learned, and an update may learn nothing."""
    chosen, bundle = bundled(tmp_path, model__neighbour_items=dense)
    grow_workspace(Path(chosen.workspace))
    again = updated(chosen, bundle, tmp_path).recommender
    assert len(again.item_ids) > dense
    before, after = (r.model.channels.neighbours for r in (bundle.recommender, again))
    assert before is not None and after is not None
    assert bool(len(after.cosines.items)) is bool(len(before.cosines.items)) is (dense == 12)


def test_weights_of_another_shape_are_refused(trained: tuple[Settings, Bundle], tmp_path: Path) -> None:
    chosen, bundle = trained
    prepared = load_prepared(chosen.workspace)
    wider = toy_settings(Path(chosen.workspace), model__dim=32, train__rating_weight=0.1)
    with pytest.raises(SpringtideError, match="does not fit this log"):
        update.write_update(wider, prepared, bundle, statistics_of(wider, prepared), tmp_path / "run")
    model = bundle.recommender.model
    state = model.state_dict()
    del state["log_temperature"]
    with pytest.raises(ValueError, match="no log_temperature"):
        carry_over(model, state, np.arange(ITEMS_IN_TOY), np.arange(3))


def test_rows_by_name() -> None:
    assert rows_in(["a", "b"], ["b", "c", "a"]).tolist() == [1, -1, 0]
    assert rows_in([], ["x"]).tolist() == [-1] and len(rows_in(["a"], [])) == 0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model__gate", "mean"),
        ("model__dim", 32),
        ("train__rating_weight", 0.5),
        ("text__encoder", "bert-base-chinese"),
    ],
)
def test_another_model_is_refused(trained: tuple[Settings, Bundle], setting: str, value: Any) -> None:
    chosen, bundle = trained
    other = toy_settings(Path(chosen.workspace), **({"train__rating_weight": 0.1} | {setting: value}))
    with pytest.raises(SpringtideError, match=f"{setting.replace('__', '.')} is .* an update keeps the model"):
        update.run(other)
    same = toy_settings(Path(chosen.workspace), train__rating_weight=0.1, model__dim=0, model__long_layers=0)
    assert update.of_bundle(same, bundle).model == bundle.settings.model


def test_a_known_log_changes_nothing_and_no_bundle_is_told(trained: tuple[Settings, Bundle], tmp_path: Path) -> None:
    chosen, bundle = trained
    path = Path(chosen.workspace) / "prepared" / "manifest.json"
    path.write_text(path.read_text().replace('"toy"', f'"{bundle.log}"'))
    assert update.run(chosen)["new_events"] == 0
    assert load_bundle(bundle.path).version == bundle.version
    with pytest.raises(SpringtideError, match="bundle"):
        update.run(toy_settings(write_workspace(tmp_path / "untrained")))


def test_users_are_held_out_where_the_validation_part_asks_nobody(tmp_path: Path) -> None:
    """As where each user is one session: the cut falls between sessions, and nobody asked has a past."""
    chosen = toy_settings(write_workspace(tmp_path))
    prepared = load_prepared(chosen.workspace)
    assert holdout_share(chosen, prepared) == 0
    for number, file in enumerate(prepared.sequence_files):
        table = pq.read_table(file)
        part = VALID if number == 3 else TRAIN
        parts = pa.array([[part] * len(row) for row in table["parts"].to_pylist()], SEQUENCES.field("parts").type)
        pq.write_table(table.set_column(table.column_names.index("parts"), "parts", parts), file)
    assert holdout_share(chosen, prepared) == chosen.train.validation_share
    held = [from_table(pq.read_table(file), 0.5) for file in prepared.sequence_files]
    assert sum(len(validation_cases(part, 100)) for part in held) > 0


def test_targets_that_are_left_out_as_seen_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """As where only purchases are predicted and each follows a view of the same item."""
    seen, new = 2, 3
    history = History(np.array([1, 2]), np.zeros(2, np.int64), np.full(2, np.nan, np.float32), np.arange(2))
    warn_of_repeats([(history, new)] * 19 + [(history, seen)])
    assert not caplog.records
    warn_of_repeats([(history, new)] * 18 + [(history, seen)] * 2)
    assert "2 of 20 validation targets" in caplog.text and "data.exclude_seen" in caplog.text


def test_a_bundle_that_saw_the_test_part_is_refused(trained: tuple[Settings, Bundle]) -> None:
    chosen, bundle = trained
    prepared = load_prepared(chosen.workspace)
    end = bundle.recommender.log_end
    assert end is not None
    for cut, refused in ((end - 1, True), (end, True), (end + 1, False)):
        report = prepared.report | {"split": {"valid": 1, "cuts_ms": [0, cut]}}
        write_json(prepared.path / "report.json", report)
        if refused:
            with pytest.raises(SpringtideError, match="after the log's cut"):
                update._since(load_prepared(chosen.workspace), bundle)
        else:
            assert update._since(load_prepared(chosen.workspace), bundle) == Since(end, 1)


@settings(max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=6),
    since=st.builds(Since, st.integers(-1, 14), st.integers(0, 2)),
    length=st.integers(1, 5),
)
def test_an_update_learns_every_new_event_and_whole_windows(rows: list[list[int]], since: Since, length: int) -> None:
    sequences = sequences_of(rows, timestamps=[list(range(len(row))) for row in rows])
    batches = epoch_batches(sequences, Sampling(length, 3, 20, since=since), (0,))
    learned = [
        int(time)
        for batch in batches
        for time in batch.timestamps[batch.targets >= 0] + 1  # events are 1 ms apart
    ]
    held = since.held_out

    def new(time: int, row: list[int]) -> bool:
        return min(time + held, len(row) - 1) > since.time

    fresh = [time for row in rows for time in range(1, len(row)) if new(time, row)]
    assert not Counter(fresh) - Counter(learned)
    assert len(learned) - len(fresh) <= (length - 1) * len(rows)  # no window is old as a whole


def test_what_was_held_out_is_new_once_there_is_something_later(trained: tuple[Settings, Bundle]) -> None:
    """Leaving one out, an event becomes one to learn from when its user comes back: at a time that is no news."""
    chosen, bundle = trained
    folder = Path(chosen.workspace)
    before = {
        row["user_id"]: (row["items"][-1], len(row["items"])) for row in load_prepared(folder).sequences().to_pylist()
    }
    grow_workspace(folder, new_items=0, new_events=1, users=8)
    prepared = load_prepared(folder)
    since = update._since(prepared, bundle)
    rows = prepared.sequences().to_pylist()
    came_back = {row["user_id"] for row in rows if len(row["items"]) > before[row["user_id"]][1]}
    # And, for all that times tell, those who were last there after the last event that was learned from.
    late = {row["user_id"] for row in rows if row["timestamps"][-1] > since.time}
    assert len(came_back) == 8 and came_back < late < before.keys()
    assert sum(count_new(file, since) for file in prepared.sequence_files) == len(late)
    sequences = from_table(prepared.sequences(), 0, refit=True)
    batches = list(epoch_batches(sequences, Sampling(50, 8, 1000, since=since), (0,)))
    assert sum(len(batch.items) for batch in batches) == len(late)  # the windows of those alone
    learned = Counter(int(row[row >= 0][-1]) for batch in batches for row in batch.targets)
    assert not Counter(ITEMS_IN_TOY - 1 - before[user][0] for user in came_back) - learned


def test_a_log_that_lost_its_texts_is_refused(trained: tuple[Settings, Bundle], tmp_path: Path) -> None:
    chosen, bundle = trained
    shutil.rmtree(Path(chosen.workspace) / "vectors")
    prepared = load_prepared(chosen.workspace)
    with pytest.raises(SpringtideError, match="reads items' texts, and this log has none"):
        update.write_update(chosen, prepared, bundle, statistics_of(chosen, prepared), tmp_path / "run")


def test_the_held_out_event_stays_out(trained: tuple[Settings, Bundle], tmp_path: Path) -> None:
    chosen, bundle = trained
    grow_workspace(Path(chosen.workspace))
    prepared = load_prepared(chosen.workspace)
    again = updated(chosen, bundle, tmp_path).recommender
    table = prepared.sequences().to_pylist()
    parts = np.concatenate([row["parts"] for row in table])
    assert again.popularity.sum() == np.count_nonzero(parts != TEST)
