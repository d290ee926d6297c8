"""Text vectors come in catalogue order, and are refused when they are of other texts or another encoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from springtide.config import Settings, with_values
from springtide.errors import SpringtideError
from springtide.files import write_manifest
from springtide.schemas import VECTORS
from springtide.text.embed import load_vectors, made_from
from toy import toy_items, toy_settings


@pytest.fixture
def embedded(tmp_path: Path) -> Settings:
    """A workspace with vectors of the toy catalogue, item n at (n, 1), in another order."""
    settings, items = toy_settings(tmp_path), toy_items()
    rows = [{"item_id": f"i{n:02d}", "vector": [float(n), 1.0]} for n in reversed(range(len(items)))]
    (tmp_path / "vectors").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, VECTORS), tmp_path / "vectors" / "part-00000.parquet")
    write_manifest(tmp_path / "vectors", made_from(items, settings.text))
    return settings


def changed(items: pa.Table, name: str, values: list[str]) -> pa.Table:
    return items.set_column(items.schema.get_field_index(name), name, pa.array(values, pa.string()))


def test_vectors_come_in_catalogue_order(embedded: Settings, tmp_path: Path) -> None:
    vectors = load_vectors(embedded, toy_items())
    assert vectors is not None
    np.testing.assert_array_equal(vectors[:, 0], np.arange(len(toy_items())))
    assert load_vectors(toy_settings(tmp_path / "other"), toy_items()) is None


def test_vectors_of_other_texts_or_another_encoder_are_refused(embedded: Settings) -> None:
    items = toy_items()
    texts = items["text"].to_pylist()
    with pytest.raises(SpringtideError, match="the item texts changed after .* run the embed job again"):
        load_vectors(embedded, changed(items, "text", ["new", *texts[1:]]))
    with pytest.raises(SpringtideError, match="the item texts changed"):
        load_vectors(embedded, items.slice(1))
    for name, value in (("encoder", "some/model"), ("max_tokens", 16)):
        with pytest.raises(SpringtideError, match=rf"the text\.{name} changed"):
            load_vectors(with_values(embedded, {f"text.{name}": value}), items)
    assert load_vectors(embedded, changed(items, "text", [""] * len(items))) is None  # nothing to have vectors of


def test_vectors_of_other_weights_in_the_same_folder_are_refused(embedded: Settings, tmp_path: Path) -> None:
    items, encoder = toy_items(), tmp_path / "encoder"
    encoder.mkdir()
    settings = with_values(embedded, {"text.encoder": str(encoder)})
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (encoder / name).write_bytes(b"old")
    write_manifest(tmp_path / "vectors", made_from(items, settings.text))
    assert load_vectors(settings, items) is not None
    (encoder / "model-2.safetensors").write_bytes(b"new")
    with pytest.raises(SpringtideError, match=f"the weights in {encoder} changed after .* run the embed job again"):
        load_vectors(settings, items)
    shutil.rmtree(encoder)  # train may run where the encoder is not
    assert load_vectors(settings, items) is not None


def test_vectors_made_before_weights_were_told_are_accepted(embedded: Settings, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    settings = with_values(embedded, {"text.encoder": str(tmp_path)})
    made = made_from(toy_items(), settings.text)
    assert made.pop("weights")
    write_manifest(tmp_path / "vectors", made)
    assert load_vectors(settings, toy_items()) is not None


def test_a_damaged_file_is_named(embedded: Settings) -> None:
    file = Path(embedded.workspace) / "vectors" / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(SpringtideError, match="part-00000.parquet differs from its checksum"):
        load_vectors(embedded, toy_items())
