"""The evaluate job on a small prepared log, and the page and table that it makes."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from springtide.config import Settings, parse_settings
from springtide.errors import SpringtideError
from springtide.evaluation import job, report, series
from springtide.files import write_json
from springtide.model.batch import History
from springtide.schemas import ITEMS, SEQUENCES

ITEM_COUNT, USERS, END = 25, 60, 1_000_000
PREPARED = {
    "totals": {"rows": 700, "kept": 600, "quarantined": 77, "deduplicated": 23},
    "users": USERS,
    "items": ITEM_COUNT,
    "ties": {"events": 41, "share": 0.07, "users_whose_last_two_tie": 5},
}


def settings_for(workspace: Path, **data: Any) -> Settings:
    tree = {"name": "Ring <b>&", "workspace": str(workspace), "data": {"events": {"paths": "log.csv"}, **data}}
    return parse_settings({**tree, "evaluate": {"bootstrap": 100}})


def write_prepared(workspace: Path, last_parts: Sequence[int] = (1, 2)) -> None:
    """Users who walk round a ring of items: the next item is always the one after. All end at the same two moments."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, USERS)
    items = [((rng.integers(ITEM_COUNT) + np.arange(n)) % ITEM_COUNT).tolist() for n in lengths]
    sequences = pa.table(
        {
            "user_id": [f"u{n}" for n in range(USERS)],
            "items": items,
            "actions": [[1] * len(row) for row in items],
            "ratings": [[float("nan")] * len(row) for row in items],
            "timestamps": [[10 * (END - n) for n in range(len(row), 0, -1)] for row in items],
            "parts": [[0] * (len(row) - 2) + list(last_parts) for row in items],
            "targets": [[True] * len(row) for row in items],
        },
        schema=SEQUENCES,
    )
    ids = [f"i{n:02}" for n in range(ITEM_COUNT)]
    catalogue = pa.table(
        {"item": range(ITEM_COUNT), "item_id": ids, "title": ids, "categories": [[]] * ITEM_COUNT, "text": ids,
         "events": [9] * ITEM_COUNT}, schema=ITEMS,
    )  # fmt: skip
    root = workspace / "prepared"
    for name, table in (("sequences", sequences), ("items", catalogue)):
        (root / name).mkdir(parents=True)
        pq.write_table(table, root / name / "part-0.parquet")
    write_json(root / "vocabulary.json", {"actions": ["<unknown>", "view"]})
    write_json(root / "report.json", PREPARED)
    write_json(root / "manifest.json", {"content_hash": "abc", "files": {}})


class RingRecommender:
    """Knows the ring; or, if `clueless`, nothing."""

    def __init__(self, clueless: bool = False, items: int = ITEM_COUNT) -> None:
        self.item_ids = [f"i{n:02}" for n in range(items)]
        self.clueless = clueless
        self.log_end = None

    def score(self, histories: Sequence[History], now: np.ndarray | None = None) -> Any:
        distance = [(np.arange(ITEM_COUNT) - h.items[-1] - 1) % ITEM_COUNT for h in histories]
        logits = np.stack(distance).astype(np.float32) * (1 if self.clueless else -1)
        return SimpleNamespace(logits=logits, gate_short=np.linspace(0.2, 0.9, len(histories)))


def with_bundle(
    monkeypatch: pytest.MonkeyPatch,
    recommender: RingRecommender,
    settings: Settings,
    log: str = "abc",
    refit: bool = False,
) -> None:
    epochs = [{"epoch": e, "loss": 3 / e, "ndcg@10": 0.1 * e} for e in (1, 2, 3)]
    bundle = SimpleNamespace(
        recommender=recommender,
        settings=settings,
        version="0123456789ab",
        metrics={"epochs": epochs, "refit": refit},
        log=log,
    )
    monkeypatch.setattr(job, "load_bundle", lambda path: bundle)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], str]:
    root = tmp_path_factory.mktemp("evaluated")
    settings = settings_for(root)
    write_prepared(root)
    with pytest.MonkeyPatch.context() as patch:
        with_bundle(patch, RingRecommender(), settings)
        result = job.run(settings)
    return result, json.loads((root / "metrics.json").read_text()), (root / "report.html").read_text()


def test_the_job_writes_figures_with_intervals(evaluated: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    result, metrics, _ = evaluated
    assert metrics["model"]["ndcg@10"]["value"] == 1 and metrics["model"]["precision@10"]["value"] == pytest.approx(0.1)
    counting = {"popularity", "recent_popularity", "item_knn", "item_knn_recency", "ease", "transitions"}
    assert set(metrics["baselines"]) == counting
    for values in (metrics["model"], *metrics["baselines"].values()):
        assert {"hr@5", "ndcg@10", "mrr@20", "recall@20", "coverage@10"} <= set(values)
        assert values["ndcg@10"]["lo"] <= values["ndcg@10"]["value"] <= values["ndcg@10"]["hi"]
    best = max(metrics["baselines"], key=lambda n: metrics["baselines"][n]["ndcg@10"]["value"])
    assert metrics["best_baseline"] == result["best_baseline"] == best
    expected = 1 / metrics["baselines"][best]["ndcg@10"]["value"]
    assert metrics["ratio_to_best"]["ndcg@10"]["value"] == pytest.approx(expected)
    assert (metrics["users"], metrics["catalogue"]) == (USERS, ITEM_COUNT)
    assert (metrics["split"], metrics["part"]) == ("leave_one_out", "test")
    assert sum(metrics["gate"]["counts"]) == USERS and len(metrics["curves"]["model"]) == 20
    assert sum(group["users"] for group in metrics["by_history_length"]) == USERS
    assert len(json.dumps(result)) < 4000


def test_the_page_is_self_contained_safe_and_accessible(evaluated: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    _, _, page = evaluated
    for outside in ("<script", "<link", "<img", "@import", "src="):
        assert outside not in page
    links = page.replace("http://www.w3.org/", "")
    assert "http://" not in links and "https://" not in links
    assert "Ring &lt;b&gt;&amp;" in page and "Ring <b>" not in page
    for fact in ("Quarantined rows", "77", "Events tied in time", "41", "0123456789ab", "training part alone"):
        assert fact in page
    drawings = [f"<svg{part.split('</svg>')[0]}</svg>" for part in page.split("<svg")[1:]]
    assert len(drawings) == 6
    name = "{http://www.w3.org/2000/svg}"
    ids: list[str] = []
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert root.get("role") == "img" and root.find(f"{name}title") is not None
        assert (root.find(f"{name}desc") or root.findall(f"{name}desc")[0]).text
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    assert "#0102" not in page  # every placeholder colour became a theme colour


def test_epochs_count_from_one(evaluated: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    _, metrics, page = evaluated
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2, 3]
    assert "3 epochs. Best validation NDCG@10 0.3000 in epoch 3." in page


def test_the_same_figures_make_the_same_page(evaluated: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    _, metrics, page = evaluated
    assert report.render(metrics, PREPARED) == page


def test_the_table_is_aligned_and_model_first(evaluated: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    lines = job.table(evaluated[1]).splitlines()
    assert len(lines) == 9 and lines[2].startswith("Springtide model") and "1.0000" in lines[2]
    assert len({len(line) for line in lines}) == 1


def test_a_clueless_model_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path)
    write_prepared(tmp_path)
    with_bundle(monkeypatch, RingRecommender(clueless=True), settings)
    assert "loses to the best counting baseline" in job.run(settings)["verdict"]
    assert "verdict worse" in (tmp_path / "report.html").read_text()


def test_temporal_reports_all_targets_and_its_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path, split="temporal")
    write_prepared(tmp_path, last_parts=(2, 2))
    path = tmp_path / "prepared" / "sequences" / "part-0.parquet"
    cold = pa.table(
        {"user_id": ["z"], "items": [[3, 4]], "actions": [[1, 1]], "ratings": [[1.0, 1.0]],
         "timestamps": [[10 * END - 25, 10 * END]], "parts": [[1, 2]], "targets": [[True, True]]}, schema=SEQUENCES,
    )  # fmt: skip
    pq.write_table(pa.concat_tables([pq.read_table(path), cold]), path)
    with_bundle(monkeypatch, RingRecommender(), settings)
    job.run(settings)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["headline"] == "warm" and metrics["users"] == USERS
    assert metrics["model"]["recall_all@10"]["value"] == 1 and metrics["model"]["ndcg_all@10"]["value"] == 1
    slice_ = metrics["slices"]["cold_user"]
    assert slice_["users"] == 1 and slice_["model"]["hr@10"]["value"] == 1
    assert "Cold users and cold items" in (tmp_path / "report.html").read_text()


class LearningRecommender(RingRecommender):
    """Goes one too far round the ring until it has been told of an event."""

    told: list[int] = []

    def score(self, histories: Sequence[History], now: np.ndarray | None = None) -> Any:
        scores = super().score(histories, now)
        scores.logits = scores.logits if self.told else -np.abs(scores.logits + 1)
        return scores

    def observe(self, histories: Sequence[History], events: Sequence[History]) -> None:
        self.told = [*self.told, *(len(e) for e in events)]


def test_temporal_is_replayed_in_time_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path, split="temporal")
    write_prepared(tmp_path, last_parts=(2, 2))
    recommender = LearningRecommender()
    with_bundle(monkeypatch, recommender, settings)
    monkeypatch.setattr(job.prequential, "CHUNK", 60)
    job.run(settings)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    replay = metrics["prequential"]
    assert (replay["events"], replay["users"], replay["eligible_events"]) == (2 * USERS, USERS, 2 * USERS)
    assert set(replay["all"]["ratios"]) == {"history/frozen", "live/frozen", "live/history"}
    figures = {mode: values["ndcg@10"]["value"] for mode, values in replay["all"]["modes"].items()}
    assert figures["live"] > figures["history"] and recommender.told == []  # what learnt was a copy
    assert replay["against_baseline"]["name"] == metrics["best_baseline"]
    assert set(replay["against_baseline"]["modes"]) == {"frozen", "history"}
    page = (tmp_path / "report.html").read_text()
    for words in ("Replayed in time order", "Everybody&#39;s events counted", "Every training event of every user is",
                  "nowing what happened since the cut"):  # fmt: skip
        assert words in page
    off = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"prequential": False})})
    job.run(off)
    assert json.loads((tmp_path / "metrics.json").read_text())["prequential"] is None
    assert "Replayed in time order" not in (tmp_path / "report.html").read_text()


def test_leave_one_out_tells_of_new_items_and_ties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path)
    write_prepared(tmp_path)
    path = tmp_path / "prepared" / "sequences" / "part-0.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows[:7]:  # whose last two are at one moment,
        row["timestamps"][-2] = row["timestamps"][-1]
    for row in rows:  # and item 24 is never in the training part
        keep = [n for n, item in enumerate(row["items"]) if item != 24 or n >= len(row["items"]) - 2]
        row.update({name: [row[name][n] for n in keep] for name in row if name != "user_id"})
    pq.write_table(pa.Table.from_pylist(rows, SEQUENCES), path)
    with_bundle(monkeypatch, RingRecommender(), settings)
    job.run(settings)
    metrics, page = json.loads((tmp_path / "metrics.json").read_text()), (tmp_path / "report.html").read_text()
    targets = sum(row["items"][-1] == 24 for row in rows)
    assert targets and metrics["new_items"]["targets"] == targets == metrics["new_item_targets"]
    assert metrics["new_items"]["candidates"] == 1 and metrics["by_target_popularity"][0]["users"] == targets
    assert metrics["new_items"]["scorers"]["model"]["new_only"]["ndcg@10"]["value"] == 1
    assert metrics["prequential"] is None and metrics["by_disagreement"] == []
    ties = metrics["ties"]
    assert (ties["events_tied"], ties["targets_with_history"], ties["orders"]) == (14, 7, 5)
    assert ties["swapped_with_validation"] and 0 < ties["changed_targets"] < 7 / USERS
    assert set(ties["scorers"]) == {"model", metrics["best_baseline"]}
    assert (
        ties["scorers"]["model"]["min"] < ties["scorers"]["model"]["log"] == metrics["model"]["ndcg@10"]["value"] == 1
    )
    for words in ("Cold items", "Events with equal times", "Mean of 5 random orders", "Leakage checks", "shuffled"):
        assert words in page
    assert "Replayed" not in page and "Cold users" not in page

    job.run(settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"tie_orders": 0})}))
    counted = json.loads((tmp_path / "metrics.json").read_text())["ties"]
    assert counted["events_tied"] == 14 and "scorers" not in counted
    page = (tmp_path / "report.html").read_text()
    assert "Events with equal times" in page and "random orders" not in page


def test_a_model_that_knows_the_validation_part_is_not_tested_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path)
    write_prepared(tmp_path)
    path = tmp_path / "prepared" / "sequences" / "part-0.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row["timestamps"][-2] = row["timestamps"][-1]
    pq.write_table(pa.Table.from_pylist(rows, SEQUENCES), path)
    recommender = RingRecommender()
    recommender.popularity = np.bincount(  # type: ignore[attr-defined]
        [item for row in rows for item in row["items"][:-1]], minlength=ITEM_COUNT
    )
    with_bundle(monkeypatch, recommender, settings)
    job.run(settings)
    ties = json.loads((tmp_path / "metrics.json").read_text())["ties"]
    assert not ties["swapped_with_validation"] and ties["changed_targets"] == 0


def test_baselines_are_fitted_on_what_the_model_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path)
    write_prepared(tmp_path)
    with_bundle(monkeypatch, RingRecommender(), settings, refit=True)
    fitted_on, fit = [], job.fit_baselines
    monkeypatch.setattr(job, "fit_baselines", lambda *args: fitted_on.append(args[3]) or fit(*args))
    job.run(settings)
    notes = json.loads((tmp_path / "metrics.json").read_text())["notes"]
    assert any("fitted on training and validation events, as the model is" in note for note in notes)
    assert fitted_on == [True]
    asked = parse_settings({**settings.model_dump(), "evaluate": {"part": "valid"}})
    with pytest.raises(SpringtideError, match="cannot be judged by them"):
        job.run(asked)
    with_bundle(monkeypatch, RingRecommender(), settings)
    job.run(asked)
    assert fitted_on == [True, False]


def test_a_leak_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path)
    write_prepared(tmp_path)
    path = tmp_path / "prepared" / "sequences" / "part-0.parquet"
    rows = pq.read_table(path).to_pylist()
    for name in ("items", "timestamps", "ratings", "actions"):  # the target is copied to the training part
        rows[0][name][-3] = rows[0][name][-2] = rows[0][name][-1]
    rows[0]["items"][-2] = 0
    pq.write_table(pa.Table.from_pylist(rows, SEQUENCES), path)
    with_bundle(monkeypatch, RingRecommender(), settings)
    with pytest.raises(SpringtideError, match="test event of user u0 .* is in the training part too"):
        job.run(settings)
    assert not (tmp_path / "metrics.json").exists()


def test_a_page_with_many_baselines_stays_readable(evaluated: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    metrics = copy.deepcopy(evaluated[1])
    like = metrics["best_baseline"]
    more = ["recent_popularity", "item_knn_recency", "ease", "somebody_elses"]
    for name in more:
        for table in (metrics["baselines"], metrics["paired"], metrics["curves"]):
            table[name] = table[like]
        for group in (g for key in ("by_history_length", "by_target_popularity") for g in metrics[key]):
            group["ndcg@10"][name] = group["ndcg@10"][like]
    page = report.render(metrics, PREPARED)
    for label in (*(series.label_of(name) for name in more), "Item-KNN, recency", "somebody elses"):
        assert label in page
    curve = next(part for part in page.split("<section>") if "Hit rate by list length" in part)
    lines = {colour for colour in re.findall(r"stroke: var\((--[\w-]+)\)", curve)} - {"--grid", "--soft"}
    assert "--model" in lines and len(lines) == 4 and "The best 3 baselines are shown." in curve
    assert "#0103" not in page and "var(--other)" in page


def test_every_scorer_can_be_told_apart_also_by_colour_blind_readers() -> None:
    """Distances in CIELAB after simulated dichromacy (Machado et al. 2009), and contrast with the page."""
    blindness = {
        "none": np.eye(3),
        "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
        "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def linear(colours: Sequence[str]) -> np.ndarray:
        parts = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)

    def lab(light: np.ndarray) -> np.ndarray:
        xyz = light @ to_xyz.T / [0.9505, 1, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)

    for theme, card in (("light", "#ffffff"), ("dark", "#1a1f28")):
        light = linear([getattr(style, theme) for style in series.SERIES.values()])
        y, page = light @ to_xyz[1], float(linear([card])[0] @ to_xyz[1])
        assert ((np.maximum(y, page) + 0.05) / (np.minimum(y, page) + 0.05)).min() >= 3, theme
        for name, matrix in blindness.items():
            seen = lab(np.clip(light @ np.array(matrix).T, 0, 1))
            apart = np.linalg.norm(seen[:, None] - seen, axis=-1) + 1e9 * np.eye(len(seen))
            assert apart.min() > 20, (theme, name)  # a just noticeable difference is about 2
    assert len({str(style.dash) for style in series.SERIES.values()}) == len(series.SERIES)


def test_what_cannot_be_judged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpringtideError, match="split: none has nothing to test on"):
        job.run(settings_for(tmp_path, split="none"))
    write_prepared(tmp_path, last_parts=(0, 0))
    settings = settings_for(tmp_path)
    with_bundle(monkeypatch, RingRecommender(), settings)
    with pytest.raises(SpringtideError, match="the test part holds no event"):
        job.run(settings)
    with_bundle(monkeypatch, RingRecommender(items=3), settings)
    with pytest.raises(SpringtideError, match="another catalogue"):
        job.run(settings)
    with_bundle(monkeypatch, RingRecommender(), settings_for(tmp_path, split="none"))
    with pytest.raises(SpringtideError, match="may have seen the test events"):
        job.run(settings)
    with_bundle(monkeypatch, RingRecommender(), settings, log="another")
    with pytest.raises(SpringtideError, match="another prepared log"):
        job.run(settings)
    assert not (tmp_path / "metrics.json").exists() and not (tmp_path / "report.html").exists()


def verdict_of(model: float, base: float, ratio: dict[str, float] | None) -> dict[str, str]:
    return report.verdict(
        {"users": 900, "best_baseline": "item_knn_recency", "ratio_to_best": {"ndcg@10": ratio},
         "model": {"ndcg@10": {"value": model}}, "baselines": {"item_knn_recency": {"ndcg@10": {"value": base}}}}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "low", "high", "kind", "words"),
    [
        (1.2, 1.1, 1.3, "better", "beats the best counting baseline, item-KNN with recency, by 20.0 %"),
        (0.8, 0.7, 0.9, "worse", "loses to the best counting baseline"),
        (1.05, 0.95, 1.2, "even", "5.0 % ahead of the best counting baseline, item-KNN with recency, a"),
        (0.95, 0.9, 1.01, "even", "5.0 % behind"),
        (1.0, 0.9, 1.1, "even", "The model is level with"),
    ],
)
def test_the_verdict_follows_the_interval(value: float, low: float, high: float, kind: str, words: str) -> None:
    found = verdict_of(value / 10, 0.1, {"value": value, "lo": low, "hi": high})
    assert found["kind"] == kind and words in found["sentence"]


def test_a_baseline_without_hits_has_no_ratio() -> None:
    assert verdict_of(0.1, 0, None)["kind"] == "better" and verdict_of(0, 0, None)["kind"] == "even"
    few = verdict_of(0.1, 0.001, None)
    assert few["kind"] == "even" and "too few targets" in few["sentence"]
