"""A small log and a small untrained bundle for tests that need one but not its accuracy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from springtide.bundle import write_bundle
from springtide.config import ModelConfig, Settings, parse_settings
from springtide.model.batch import History
from springtide.model.decayed import DecayedCounts
from springtide.model.fusion import FusionModel
from springtide.model.tables import Tables
from springtide.schemas import ITEMS, SEQUENCES, TRAIN
from springtide.text.features import fit_features
from springtide.training.popularity import USUAL
from springtide.training.sequences import Sequences, from_table
from springtide.training.statistics import collect
from springtide.training.tabulate import HalfLives, tabulate

ITEMS_IN_TOY = 40
ACTIONS = ["<unknown>", "purchase", "view"]
DAY_MS = 86_400_000


def toy_log(users: int = 60, items: int = ITEMS_IN_TOY, seed: int = 0) -> list[dict[str, Any]]:
    """Events in log order. Item i is usually followed by i + 1, so there is something to learn."""
    rng = np.random.default_rng(seed)
    events = []
    for user in range(users):
        item, time = int(rng.integers(items)), 1_600_000_000_000 + int(rng.integers(DAY_MS))
        for _ in range(int(rng.integers(5, 15))):
            events.append(
                {
                    "user_id": f"u{user}",
                    "item_id": f"i{item:02d}",
                    "timestamp": time,
                    "action": "purchase" if rng.random() < 0.3 else "view",
                    "rating": float(rng.integers(1, 6)),
                }
            )
            item = (item + 1) % items if rng.random() < 0.8 else int(rng.integers(items))
            time += int(rng.integers(1000, DAY_MS))
    return events


def toy_settings(workspace: Path, **values: Any) -> Settings:
    """Settings over paths that need not exist, with a tiny model."""
    tree: dict[str, Any] = {
        "name": "toy",
        "workspace": str(workspace),
        "data": {
            "events": {"paths": str(workspace / "events.csv"), "columns": {"action": "action", "rating": "rating"}}
        },
        "model": {"dim": 16, "text_dim": 8, "short_window": 4, "long_window": 20, "memory_recent": 4},
        "train": {"epochs": 2, "workers": 1, "batch_size": 8},
    }
    for key, value in values.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return parse_settings(tree)


def toy_items(items: int = ITEMS_IN_TOY) -> pa.Table:
    """A catalogue in which every item has a title, a category and a text."""
    return pa.table(
        {
            "item": pa.array(range(items), pa.int32()),
            "item_id": [f"i{i:02d}" for i in range(items)],
            "title": [f"Item number {i}" for i in range(items)],
            "categories": [["even" if i % 2 == 0 else "odd"] for i in range(items)],
            "text": [f"Item number {i}" for i in range(items)],
            "events": pa.array([10 + i for i in range(items)], pa.int64()),
        },
        schema=ITEMS,
    )


def sequences_of(rows: list[list[int]], **columns: list[list[Any]]) -> Sequences:
    """Histories given as items, all of them training targets a second apart, unless `columns` say otherwise."""
    plain = {
        "user_id": [f"u{number:06d}" for number in range(len(rows))],
        "items": rows,
        "actions": [[1] * len(row) for row in rows],
        "ratings": [[3.0] * len(row) for row in rows],
        "timestamps": [[10**12 + 1000 * place for place in range(len(row))] for row in rows],
        "parts": [[TRAIN] * len(row) for row in rows],
        "targets": [[True] * len(row) for row in rows],
    }
    return from_table(pa.Table.from_pydict(plain | columns, SEQUENCES), 0)


def toy_sequences(seed: int = 0) -> Sequences:
    """The toy log as training histories."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for event in toy_log(seed=seed):
        rows.setdefault(event["user_id"], []).append(event)
    return sequences_of(
        [[int(event["item_id"][1:]) for event in row] for row in rows.values()],
        timestamps=[[event["timestamp"] for event in row] for row in rows.values()],
        ratings=[[event["rating"] for event in row] for row in rows.values()],
    )


def tables_of(
    sequences: Sequences, items: int, config: ModelConfig, share: float | None = None, text: np.ndarray | None = None
) -> Tables:
    """What is counted of a log before training."""
    half_lives = HalfLives(share, config.recent_half_life or USUAL)
    return tabulate(collect(sequences, items, config), config, half_lives, text)


def toy_bundle(folder: Path, seed: int = 0, **values: Any) -> Path:
    """Write a bundle with random weights below `folder` and return its path."""
    settings = toy_settings(folder, **values)
    items = toy_items()
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(len(items), 384)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    events = items["events"].to_numpy()
    made = fit_features("meaning", text, items["text"].to_pylist(), settings.model.text_dim)
    features = made.apply(text, items["text"].to_pylist())
    counted = tables_of(toy_sequences(seed), len(items), settings.model, text=features)
    popular = DecayedCounts(events.astype(np.float64), counted.end, float("inf"))
    tables = replace(counted, popularity=events, popular=popular)
    torch.manual_seed(seed)
    model = FusionModel(
        settings.model,
        len(ACTIONS),
        torch.from_numpy(features),
        torch.ones(len(items), dtype=torch.bool),
        torch.from_numpy(events.copy()),
        (3.0, 1.0),
        settings.train.heads,
    )
    tables.fill(model)
    with torch.no_grad():  # a trained model damps what is popular, and lifts what nobody's list holds
        model.channels.damping.fill_(0.1)
        model.channels.lift[::7] = 0.5
        model.channels.lift_from.fill_(3)
    path = folder / "bundle"
    write_bundle(path, model, settings, items, ACTIONS, tables, text, {"validation": {"ndcg@10": 0.1}}, "toy", made)
    return path


def popularity_model(**values: bool) -> FusionModel:
    """Scores are the item's popularity alone, and it is the lower the later its row."""
    off = dict.fromkeys(("memory", "neighbours", "borrowing", "text_neighbours", "recent_popularity"), False)
    settings = toy_settings(Path("none"), **{f"model__{name}": value for name, value in (off | values).items()})
    popularity = torch.arange(ITEMS_IN_TOY, 0, -1) * 10
    torch.manual_seed(0)
    model = FusionModel(settings.model, 2, torch.zeros(ITEMS_IN_TOY, 0), popularity > 0, popularity)
    for parameter in model.item_vectors.parameters():
        torch.nn.init.zeros_(parameter)
    if model.channels.weigh is not None:
        torch.nn.init.zeros_(model.channels.weigh.weight)
        torch.nn.init.constant_(model.channels.weigh.bias, 0.42)
    return model


def cases_of(*targets: int) -> list[tuple[History, int]]:
    """Users of one event, the last item, and what they took next."""
    n = np.zeros(1, np.int64)
    return [(History(n + ITEMS_IN_TOY - 1, n, n.astype(np.float32), n + 1), target) for target in targets]
