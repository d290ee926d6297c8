"""A bundle: everything one trained model needs to be used, in one directory, checked by checksums, without pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from springtide import parity
from springtide.config import Settings
from springtide.errors import SpringtideError
from springtide.files import publish_directory, verify_manifest, write_json, write_manifest
from springtide.model.batch import History
from springtide.model.fusion import FusionModel
from springtide.model.indexing import make_index
from springtide.model.question import part_names
from springtide.model.recommender import Recommender
from springtide.model.retrieval import Index
from springtide.model.retrieval import from_arrays as index_from_arrays
from springtide.model.tables import Tables, from_arrays
from springtide.schemas import ITEMS, check_schema
from springtide.text.features import TextFeatures
from springtide.text.features import from_arrays as features_from_arrays

FORMAT = 6
FILES = (
    "model.safetensors",
    "config.json",
    "items.parquet",
    "vectors.safetensors",
    "memory.safetensors",
    "metrics.json",
    "parity.json",
    "text.safetensors",
)
INDEX = "index.safetensors"  # only of a large catalogue, see train.ann_items


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle."""

    path: Path
    version: str  # first 12 hex digits of the manifest's sha256: equal files, equal version
    settings: Settings
    metrics: dict[str, Any]
    recommender: Recommender
    parity: dict[str, Any]  # scores at the time of writing, see parity.py
    features: TextFeatures  # how the model knows the text of an item that was not there in training
    log: str | None = None  # content hash of the prepared log that it was trained on


def write_bundle(
    path: Path,
    model: FusionModel,
    settings: Settings,
    items: pa.Table,
    actions: list[str],
    tables: Tables,
    text_vectors: np.ndarray | None,
    metrics: dict[str, Any],
    log: str | None = None,
    features: TextFeatures | None = None,
    histories: Sequence[History] = (),
) -> None:
    """Write a bundle beside `path` and rename it into place.

    items: schemas.ITEMS; tables: the counts in it; text_vectors: [I, D] float32 normalised, zero row = no text;
    log: content hash of the prepared log; features: what made the model's text features of them; histories: of users,
    by which an index is measured, too few: random ones too. Raises SpringtideError if the disk refuses.
    """
    with publish_directory(path) as out:
        save_tensors({k: v.contiguous() for k, v in model.state_dict().items()}, out / "model.safetensors")
        save_arrays(tables.arrays(), out / "memory.safetensors")
        vectors = np.zeros((len(items), 0), np.float32) if text_vectors is None else text_vectors.astype(np.float32)
        save_arrays({"text": vectors}, out / "vectors.safetensors")
        save_arrays((features or TextFeatures(None, None)).arrays(), out / "text.safetensors")
        counted = items.set_column(
            items.schema.get_field_index("events"), ITEMS.field("events"), pa.array(tables.popularity, pa.int64())
        )
        pq.write_table(check_schema(counted, ITEMS, "items"), out / "items.parquet")
        write_json(
            out / "config.json",
            {
                "format": FORMAT,
                "log": log,
                "actions": actions,
                "rating_stats": model.rating_stats.tolist(),
                "settings": settings.model_dump(mode="json"),
            },
        )
        training = model.training
        recommender = _recommender(model, settings, counted, actions, tables, vectors)
        kept = parity.sample(recommender, tables.end)
        write_json(out / "parity.json", kept)
        if len(items) >= settings.train.ann_items:
            asked = [history for history in histories if len(history)]
            if len(asked) < parity.CASES:
                asked += [recommender.history(case["events"])[0] for case in kept["cases"]]
            retrieval, figures = make_index(recommender, asked, settings.train.ann_recall)
            save_arrays(retrieval.index.arrays(), out / INDEX)
            metrics = {**metrics, "index": figures}
        write_json(out / "metrics.json", metrics)
        model.train(training)
        write_manifest(out)


def load_bundle(path: str | Path, verify: bool = True) -> Bundle:
    """Load a bundle, after checking every file against the manifest.

    Raises SpringtideError naming the file that is missing, differs or cannot be read.
    """
    path = Path(path).absolute()
    if verify:
        listed = verify_manifest(path, "bundle")["files"]
        expected = (*FILES, *([INDEX] if (path / INDEX).exists() else []))
        if unlisted := [name for name in expected if name not in listed]:
            raise SpringtideError(
                f"bundle {path}: manifest.json has no checksum of {unlisted[0]}; write the bundle again"
            )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise SpringtideError(
                f"bundle {path} has format {config['format']}, this version reads {FORMAT}; train it again"
            )
        kept = json.loads((path / "parity.json").read_text(encoding="utf-8"))
        settings = Settings.model_validate(config["settings"])
        items = check_schema(pq.read_table(path / "items.parquet"), ITEMS, str(path / "items.parquet"))
        state = {"channels.newness": torch.zeros(()), **load_tensors(path / "model.safetensors")}  # older have none
        tables = from_arrays(load_arrays(path / "memory.safetensors"))
        vectors = load_arrays(path / "vectors.safetensors")["text"]
        features = features_from_arrays(load_arrays(path / "text.safetensors"))
        model = FusionModel(
            settings.model,
            len(config["actions"]),
            state["item_vectors.text"],
            state["item_vectors.known"],
            torch.from_numpy(items["events"].to_numpy().copy()),
            tuple(config["rating_stats"]),
            settings.train.heads,
        )
        model.load_state_dict(state)
        tables.fill(model)
        index = _load_index(path, metrics, model, len(items))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, pa.ArrowException) as error:
        raise SpringtideError(
            f"cannot load the bundle {path}: {' '.join(str(error).split())[:300]}; train it again"
        ) from None
    recommender = _recommender(model, settings, items, config["actions"], tables, vectors)
    recommender.use_index(index)
    version = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()[:12]
    return Bundle(path, version, settings, metrics, recommender, kept, features, config.get("log"))


def check_parity(bundle: Bundle) -> float:
    """Whether the model, on the device where it now is, scores as it did when it was written; see parity.check.

    Returns the greatest relative deviation. Raises SpringtideError if it does not.
    """
    apart = parity.check(bundle.recommender, bundle.parity, f"bundle {bundle.path}")
    if bundle.recommender.retrieval is not None:
        bundle.recommender.release()  # hardly ever needed again
    return apart


def _load_index(path: Path, metrics: dict[str, Any], model: FusionModel, items: int) -> Index | None:
    """The index that the metrics tell of. Raises OSError, ValueError or KeyError if it is not there or is another."""
    if "index" not in metrics:
        return None
    return index_from_arrays(load_arrays(path / INDEX), part_names(model), items)


def _recommender(
    model: FusionModel,
    settings: Settings,
    items: pa.Table,
    actions: list[str],
    tables: Tables,
    text_vectors: np.ndarray,
) -> Recommender:
    """The object that answers, of a whole model and its catalogue (schemas.ITEMS); text_vectors [I, 0]: no texts."""
    wanted = settings.data.target_actions
    return Recommender(
        model,
        items["item_id"].to_pylist(),
        items["title"].to_pylist(),
        items["categories"].to_pylist(),
        actions,
        items["events"].to_numpy(),
        text_vectors if text_vectors.shape[1] else None,
        tables,
        np.array([wanted is None or action in wanted for action in actions]),
        settings.data.timeless,
    )
