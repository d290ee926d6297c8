"""A bundle comes back as it was written, or is refused with the name of what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import springtide
from springtide.bundle import FILES, FORMAT, load_bundle
from springtide.errors import SpringtideError
from springtide.files import write_manifest
from springtide.model.batch import History
from springtide.model.fusion import FusionModel
from toy import ITEMS_IN_TOY, toy_bundle

PAST = History(np.arange(7), np.ones(7, np.int64), np.full(7, 4, np.float32), np.arange(7) * 10**6)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return toy_bundle(tmp_path)


def rewrite_json(file: Path, **values: Any) -> None:
    """Change a JSON file and make the manifest agree with it."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    write_manifest(file.parent)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model__memory": False},
        {"model__text_dim": 0},
        {"model__id_embeddings": False},
        {"model__popularity": False},
    ],
    ids=str,
)
def test_a_bundle_scores_like_the_model_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    written: list[FusionModel] = []
    original = FusionModel.__init__

    def remember(self: FusionModel, *arguments: Any) -> None:
        original(self, *arguments)
        written.append(self)

    monkeypatch.setattr(FusionModel, "__init__", remember)
    bundle = load_bundle(toy_bundle(tmp_path, seed=3, **values))
    before, after = written
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    for name, value in before.named_buffers():
        assert torch.equal(value, dict(after.named_buffers())[name]), name
    again = load_bundle(bundle.path)
    first, second = (one.recommender.score([PAST, PAST.before(2)]) for one in (bundle, again))
    np.testing.assert_array_equal(first.logits, second.logits)
    assert np.isfinite(first.logits).all()


def test_what_is_in_a_bundle(path: Path) -> None:
    bundle = load_bundle(str(path))
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "manifest.json"])
    assert bundle.recommender.item_ids[:2] == ["i00", "i01"] and len(bundle.recommender.item_ids) == ITEMS_IN_TOY
    assert bundle.metrics == {"validation": {"ndcg@10": 0.1}}
    assert bundle.settings.name == "toy" and bundle.recommender.actions[0] == "<unknown>"
    assert len(bundle.version) == 12 and int(bundle.version, 16) >= 0


def test_equal_files_have_equal_versions(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = load_bundle(toy_bundle(tmp_path / "a"))
    shutil.copytree(first.path, tmp_path / "copy")
    assert load_bundle(tmp_path / "copy").version == first.version
    rewrite_json(tmp_path / "copy" / "metrics.json", more=1)
    assert load_bundle(tmp_path / "copy").version != first.version


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0], ids=["first byte", "in the middle", "last byte"])
def test_one_flipped_byte_is_refused_by_name(path: Path, name: str, where: float) -> None:
    data = bytearray((path / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(SpringtideError, match=name):
        load_bundle(path)


def test_a_damaged_manifest_is_refused(path: Path) -> None:
    data = (path / "manifest.json").read_bytes()
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 1
        (path / "manifest.json").write_bytes(damaged)
        with pytest.raises(SpringtideError, match="manifest|missing|differs"):
            load_bundle(path)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(SpringtideError, match=name):
        load_bundle(path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_checksum_is_not_trusted(path: Path, name: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SpringtideError, match=name):
        load_bundle(path)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(SpringtideError, match="no bundle at"):
        load_bundle(tmp_path / "nowhere")


def test_another_format_is_refused(path: Path) -> None:
    rewrite_json(path / "config.json", format=1)
    with pytest.raises(SpringtideError, match=f"format 1, this version reads {FORMAT}"):
        load_bundle(path)


@pytest.mark.parametrize(
    "values",
    [{"settings": {}}, {"actions": None}, {"actions": ["only"]}, {"rating_stats": [1]}],
    ids=["settings", "actions", "too few actions", "rating_stats"],
)
def test_a_whole_bundle_that_makes_no_sense_is_refused(path: Path, values: dict[str, Any]) -> None:
    rewrite_json(path / "config.json", **values)
    with pytest.raises(SpringtideError, match="cannot load the bundle"):
        load_bundle(path)


def test_weights_of_another_shape_are_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    shutil.copy(toy_bundle(tmp_path / "b", model__dim=32) / "model.safetensors", path / "model.safetensors")
    write_manifest(path)
    with pytest.raises(SpringtideError, match="cannot load the bundle"):
        load_bundle(path)


def test_nothing_is_ever_unpickled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for place in ("pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(place, refuse)
    load_bundle(path)
    sources = Path(springtide.__file__).parent.rglob("*.py")
    used = [
        s.name
        for s in sources
        if any(word in s.read_text("utf-8") for word in ("import pickle", "torch.load(", "torch.save("))
    ]
    assert used == []
