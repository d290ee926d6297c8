"""Several models in one Scorer: mixed batches, swaps that keep what is good, and refusals that are told."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from springtide.bundle import check_parity, load_bundle
from springtide.files import write_manifest
from springtide.serving.engine import Engine, Refusal, ScoreRequest
from springtide.serving.models import Failure, Models, load_models
from springtide.serving.options import ScorerOptions
from toy import toy_bundle

HISTORY = [{"item_id": "i03", "timestamp": 10**12}, {"item_id": "i07", "timestamp": 10**12 + 1000}]


class Loader:
    """Loads as the Scorer does, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def __call__(self, options: ScorerOptions) -> Engine:
        self.loaded.append(options.name)
        bundle = load_bundle(options.bundle)
        check_parity(bundle)
        engine = Engine(bundle, options.name)
        engine.warm_up()
        return engine


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {name: toy_bundle(folder / name, seed=seed) for seed, name in enumerate(("one", "two", "three"))}


@pytest.fixture
def paths(bundles: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies that a test may damage."""
    return {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in bundles.items()}


def options(paths: dict[str, Path], primary: str, *further: str, **values: Any) -> ScorerOptions:
    models = {name: {"bundle": str(paths[name]), "version": values.get("version")} for name in further}
    return ScorerOptions.model_validate({"name": primary, "bundle": str(paths[primary]), "models": models, **values})


def answer_of(models: Models, **values: Any) -> Any:
    return models.score([ScoreRequest(events=HISTORY, now=10**12 + 10**6, k=5, **values)])[0]


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def forge_a_score(path: Path) -> None:
    kept = json.loads((path / "parity.json").read_text())
    kept["cases"][5]["scores"][0] += 1
    (path / "parity.json").write_text(json.dumps(kept))
    write_manifest(path)


def test_a_batch_may_mix_models(paths: dict[str, Path]) -> None:
    models = load_models(options(paths, "one", "two", "three"), None, Loader())
    names = [None, "two", "three", "one", "two", models.engines["three"].label, "four"]
    batch = [ScoreRequest(events=HISTORY, now=10**12 + 10**6, model=name) for name in names]
    together = models.score(batch)
    for answer, request in zip(together[:-1], batch, strict=False):
        alone = models.score([request])[0]
        assert isinstance(answer, dict) and isinstance(alone, dict)
        assert answer["model"] == alone["model"]
        scores = [{item["item_id"]: item["score"] for item in one["items"]} for one in (answer, alone)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)  # sums in a batch may end in another digit
    assert [a["model"].split("@")[0] for a in together[:-1]] == ["one", "two", "three", "one", "two", "three"]  # type: ignore[index]
    refusal = together[-1]
    assert isinstance(refusal, Refusal) and refusal.status == 404
    assert all(engine.label in refusal.message for engine in models.engines.values())
    assert len({str(a["items"]) for a in together[:3]}) == 3  # type: ignore[index]


def test_a_model_that_fails_costs_the_others_of_its_batch_nothing(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models, text = load_models(options(paths, "one", "two"), None, Loader()), "i03\nof alice"

    def broken(requests: Any) -> Any:
        raise ValueError(text)

    monkeypatch.setattr(models.engines["two"], "score", broken)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    batch = [ScoreRequest(events=HISTORY, now=10**12 + 10**6, k=5, model=name) for name in ("two", None, "two", "one")]
    first, second, third, last = models.score(batch)
    assert isinstance(first, Failure) and first == third
    assert isinstance(second, dict) and second == last
    assert first.message.startswith(f"the model {models.engines['two'].label} failed: ValueError at models.py:")
    (told,) = set(caplog.messages)  # where it was raised, and not what was asked
    assert "raise ValueError" in told and "alice" not in first.message + told


def test_a_drawn_model_that_is_missing_is_stood_in_for(paths: dict[str, Path]) -> None:
    models = load_models(options(paths, "one"), None, Loader())
    assert answer_of(models, model="two", assigned=True) == answer_of(models)
    assert isinstance(answer_of(models, model="two"), Refusal)


def test_a_drawn_model_without_texts_is_stood_in_for_where_it_is_asked_in_words(paths: dict[str, Path]) -> None:
    models = load_models(options(paths, "one", "two"), None, Loader())
    models.engines["two"].bundle.recommender.text_vectors = None
    query = np.full(384, 384**-0.5, np.float32)
    assert answer_of(models, model="two", assigned=True, query=query) == answer_of(models, query=query)
    assert answer_of(models, model="two", assigned=True)["model"].startswith("two@")
    refused = answer_of(models, model="two", query=query)  # the caller's own wish
    assert isinstance(refused, Refusal) and refused.code == "no_text"


def test_only_what_changed_is_loaded(paths: dict[str, Path]) -> None:
    load = Loader()
    first = load_models(options(paths, "one", "two"), None, load)
    second = load_models(options(paths, "one", "two", "three", max_batch=8), first, load)
    assert load.loaded == ["one", "two", "three"]
    assert second.engines["two"] is first.engines["two"] and second.engine is first.engine
    promoted = load_models(options(paths, "two", "one"), second, load)
    assert load.loaded == ["one", "two", "three"]
    assert answer_of(promoted)["model"].startswith("two@")
    assert "three" not in promoted.engines and isinstance(answer_of(promoted, model="three"), Refusal)
    shutil.rmtree(paths["one"])
    shutil.copytree(paths["three"], paths["one"])  # another model at the same path
    last = load_models(options(paths, "two", "one"), promoted, load)
    assert load.loaded == ["one", "two", "three", "one"]
    assert last.engines["one"].bundle.version == second.engines["three"].bundle.version


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (flip_a_byte, "differs from its checksum"),
        (forge_a_score, "scores otherwise"),
        (shutil.rmtree, "there is no bu"),
    ],
)
def test_what_fails_its_checks_keeps_its_old_version(
    paths: dict[str, Path], damage: Callable[[Path], None], why: str
) -> None:
    old = load_models(options(paths, "one", "two"), None, Loader())
    for name in ("one", "two"):
        damage(paths[name])
    swapped = load_models(options(paths, "one", "two", version="new"), old, Loader())
    assert {name: engine.label for name, engine in swapped.engines.items()} == {
        name: engine.label for name, engine in old.engines.items()
    }
    assert answer_of(swapped) == answer_of(old)
    told = swapped.models()["models"]
    assert [model["name"] for model in told] == ["one", "two"]
    assert all(why in model["error"] for model in told)
    assert why in swapped.describe()["error"]


def test_a_new_model_that_fails_is_left_out_and_told(paths: dict[str, Path]) -> None:
    flip_a_byte(paths["two"])
    models = load_models(options(paths, "one", "two"), None, Loader())
    one, two = models.models()["models"]
    assert (one["name"], one["primary"], "error" in one) == ("one", True, False)
    assert (two["name"], two["primary"]) == ("two", False)
    assert "model.safetensors differs from its checksum" in two["error"]
    assert isinstance(answer_of(models, model="two"), Refusal)


def test_what_could_not_be_loaded_is_tried_once_more(paths: dict[str, Path]) -> None:
    """As where storage shows a new folder's files late."""
    tries, load = [0], Loader()

    def late(source: ScorerOptions) -> Engine:
        tries[0] += 1
        if tries[0] == 1:
            raise OSError("model.safetensors is missing")
        return load(source)

    assert load_models(options(paths, "one"), None, late).refused == {}
    assert tries == [2]


def test_a_first_primary_that_fails_is_an_error(paths: dict[str, Path]) -> None:
    flip_a_byte(paths["one"])
    with pytest.raises(Exception, match=r"model\.safetensors differs"):
        load_models(options(paths, "one", "two"), None, Loader())


def test_a_promotion_that_fails_keeps_the_old_primary(paths: dict[str, Path]) -> None:
    old = load_models(options(paths, "one"), None, Loader())
    flip_a_byte(paths["two"])
    after = load_models(options(paths, "two"), old, Loader())
    assert after.primary == "one" and answer_of(after) == answer_of(old)
    assert [model["name"] for model in after.models()["models"]] == ["one", "two"]
    recovered = load_models(options(paths, "one"), after, Loader())
    assert recovered.refused == {}
