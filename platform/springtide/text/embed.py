"""The `embed` stage: a text vector for every catalogue item, from a BERT-family encoder in a Ray Data actor pool."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from springtide.cluster import connect
from springtide.config import Settings, TextConfig
from springtide.data.prepared import load_prepared
from springtide.errors import SpringtideError
from springtide.files import publish_directory, verify_manifest, write_manifest
from springtide.schemas import VECTORS, check_schema
from springtide.text.encoder import Encoder, weights_in

log = logging.getLogger(__name__)
LOOKED_AT = 1000  # texts in which unknown words are counted
MANY_UNKNOWN = 0.2  # share of them above which it is told


class EncodeBatch:
    """One actor of the pool: a loaded encoder that turns a block of items into vectors."""

    def __init__(self, config: TextConfig) -> None:
        import torch

        torch.set_num_threads(max(1, int(config.cpus_per_actor)))
        self.batch_size = config.batch_size
        device = "cuda" if config.gpus_per_actor else "cpu"
        self.encoder = Encoder(config.encoder, config.max_tokens, device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        vectors = self.encoder.encode(batch["text"].to_pylist(), self.batch_size)
        return pa.table({"item_id": batch["item_id"], "vector": pa.array(list(vectors), pa.list_(pa.float32()))})


def run(settings: Settings) -> dict[str, Any]:
    """Encode the item texts into `<workspace>/vectors`. Returns the body of results/embed.json.

    Raises SpringtideError if there is no prepared log, no item text or no such encoder.
    """
    prepared = load_prepared(settings.workspace)
    config = settings.text
    items = prepared.items.select(["item_id", "text"])
    described = items.filter(pc.not_equal(items["text"], ""))
    if not len(described):
        raise SpringtideError(
            "no item has a text to encode; set data.items.text, or model.text_dim=0 and skip this job"
        )
    encoder = Encoder(config.encoder, config.max_tokens)  # a wrong name fails here, in a sentence, and not in an actor
    warn_of_unknown(encoder, described["text"].to_pylist())
    made = made_from(items, config)  # before the weights are read: other ones put there meanwhile are not these
    connect()
    import ray

    blocks = max(1, min(config.actors * 4, len(described) // config.batch_size))
    rows = -(-len(described) // blocks)
    vectors = (
        ray.data.from_arrow([described.slice(first, rows) for first in range(0, len(described), rows)])
        .map_batches(
            EncodeBatch,
            fn_constructor_args=(config,),
            batch_size=config.batch_size * 8,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=config.actors),
            num_cpus=config.cpus_per_actor,
            num_gpus=config.gpus_per_actor or None,
        )
        .materialize()
    )
    tables = [check_schema(table.cast(VECTORS), VECTORS, "vectors") for table in ray.get(vectors.to_arrow_refs())]
    table = pa.concat_tables(tables)
    final = Path(settings.workspace) / "vectors"
    with publish_directory(final) as out:
        pq.write_table(table, out / "part-00000.parquet")
        write_manifest(out, made)
    width = len(table["vector"][0])
    log.info("%d of %d items have a text; vectors are %d wide", len(table), len(items), width)
    return {"vectors": str(final), "items": len(items), "encoded": len(table), "width": width}


def warn_of_unknown(encoder: Encoder, texts: list[str]) -> None:
    """Tell where the encoder does not know the language of the texts: queries in it would find little."""
    step = -(-len(texts) // LOOKED_AT)
    unknown = encoder.unknown_share(texts[::step])
    if unknown > MANY_UNKNOWN:
        log.warning(
            "%.0f %% of the words in the items' texts are unknown to the encoder, so queries in their language find "
            "little; set text.encoder to a model that knows it",
            100 * unknown,
        )


def made_from(items: pa.Table, config: TextConfig) -> dict[str, Any]:
    """What text vectors depend on: the catalogue's ids and texts, and the encoder, with its weights where told."""
    digest = hashlib.sha256()
    for name in ("item_id", "text"):
        digest.update(json.dumps(items[name].to_pylist()).encode())
    return {
        "texts": digest.hexdigest(),
        "encoder": config.encoder,
        "max_tokens": config.max_tokens,
        "weights": weights_in(config.encoder),
    }


def load_vectors(settings: Settings, items: pa.Table) -> np.ndarray | None:
    """[I, D] float32 in catalogue order, a zero row for an item without text; None without texts or before `embed`.

    items: schemas.ITEMS. Raises SpringtideError if the vectors are damaged, or of other texts or another encoder.
    """
    path = Path(settings.workspace).absolute() / "vectors"
    if not path.exists() or not pc.any(pc.not_equal(items["text"], "")).as_py():
        return None
    manifest = verify_manifest(path, "text vectors")
    made = made_from(items, settings.text)
    changed = [name for name in ("texts", "encoder", "max_tokens") if manifest.get(name) != made[name]]
    if None not in (told := (manifest.get("weights"), made["weights"])) and told[0] != told[1]:
        changed.append("weights")
    if changed:
        what = {"texts": "item texts", "weights": f"weights in {settings.text.encoder}"}.get(
            changed[0], f"text.{changed[0]}"
        )
        raise SpringtideError(f"the {what} changed after the vectors in {path} were made; run the embed job again")
    item_ids = items["item_id"].to_pylist()
    table = check_schema(pq.ParquetFile(path / "part-00000.parquet").read(), VECTORS, str(path))
    rows = {item_id: row for row, item_id in enumerate(item_ids)}
    values = np.stack(table["vector"].to_numpy())
    out = np.zeros((len(item_ids), values.shape[1]), np.float32)
    kept = [
        (rows[item_id], position) for position, item_id in enumerate(table["item_id"].to_pylist()) if item_id in rows
    ]
    if kept:
        target, source = map(list, zip(*kept, strict=True))
        out[target] = values[source]
    return out
