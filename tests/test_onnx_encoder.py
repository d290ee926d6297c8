"""ONNX Runtime against PyTorch: equal vectors in float, near ones in int8; the cache of exported graphs; fallbacks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from springtide.errors import SpringtideError
from springtide.serving.options import EncoderOptions
from springtide.text import encoder as module
from springtide.text import onnx_graph
from springtide.text.encoder import Encoder, OnnxEncoder, load_encoder
from springtide.text.onnx_graph import MIN_COSINE, PROBES, cosines

torch.set_num_threads(1)
TEXTS = ["heat wave", "", "a", "heat " * 30, "wave a heat", "heat waves"]


def tiny_bert(folder: Path, seed: int = 0, spread: float = 0.2) -> str:
    """A made-up BERT of two layers over a few words, as transformers saves one."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "heat", "wave", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=12, initializer_range=spread,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder, safe_serialization=True)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert") / "tiny")


def never(*_: Any) -> None:
    raise SpringtideError("this must not be exported")


def test_float_gives_the_vectors_of_pytorch(tiny: str, tmp_path: Path) -> None:
    expected = Encoder(tiny, 64).encode(TEXTS)
    encoder = OnnxEncoder(tiny, 64, int8=False, cache=tmp_path)
    for batch_size in (1, 2, 6):
        np.testing.assert_allclose(encoder.encode(TEXTS, batch_size), expected, atol=1e-5)
    assert encoder.dim == 32 and encoder.max_tokens == 12
    assert encoder.encode([]).shape == (0, 32)


def test_int8_keeps_its_promise_on_the_probes(tiny: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the processor makes of int8: where that is too far off, the encoder stays in float and says so."""
    encoder = OnnxEncoder(tiny, 64, int8=True, cache=tmp_path)
    found = encoder.encode(list(PROBES), batch_size=4)
    near = cosines(found, Encoder(tiny, 64).encode(list(PROBES)))
    assert near.min() >= MIN_COSINE
    is_float = np.abs(found - Encoder(tiny, 64).encode(list(PROBES))).max() < 1e-6
    assert is_float == ("stays in float" in caplog.text)


def test_a_model_that_int8_would_change_stays_in_float(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnx_graph, "MIN_COSINE", 1.1)
    encoder = OnnxEncoder(tiny, 64, int8=True, cache=tmp_path)
    np.testing.assert_allclose(encoder.encode(TEXTS), Encoder(tiny, 64).encode(TEXTS), atol=1e-5)
    assert "stays in float" in caplog.text
    assert not [record for record in caplog.records if record.name == "root"]  # the quantiser's own lines


def test_the_second_load_exports_nothing(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = OnnxEncoder(tiny, 64, int8=True, cache=tmp_path / "cache").encode(TEXTS)
    monkeypatch.setattr(onnx_graph, "_export", never)
    np.testing.assert_array_equal(OnnxEncoder(tiny, 64, int8=True, cache=tmp_path / "cache").encode(TEXTS), first)
    with pytest.raises(SpringtideError, match="must not"):  # float is another graph
        OnnxEncoder(tiny, 64, int8=False, cache=tmp_path / "cache")
    with pytest.raises(SpringtideError, match="must not"):  # and so are other weights
        OnnxEncoder(tiny_bert(tmp_path / "other", seed=1), 64, int8=True, cache=tmp_path / "cache")


def test_a_damaged_cache_is_made_again(tiny: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = OnnxEncoder(tiny, 64, int8=False, cache=tmp_path).encode(TEXTS)
    (graph,) = tmp_path.glob("*/encoder.onnx")
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-7])
    np.testing.assert_array_equal(OnnxEncoder(tiny, 64, int8=False, cache=tmp_path).encode(TEXTS), first)
    assert "differs from its checksum" in caplog.text
    assert graph.stat().st_size == len(whole)


def test_a_cache_that_cannot_be_written_costs_the_next_start_only(
    tiny: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    encoder = OnnxEncoder(tiny, 64, int8=False, cache=tmp_path / "file")
    np.testing.assert_allclose(encoder.encode(TEXTS), Encoder(tiny, 64).encode(TEXTS), atol=1e-5)
    assert "is not kept" in caplog.text


def test_auto_goes_on_with_pytorch_where_a_model_cannot_be_exported(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(onnx_graph.torch.onnx, "export", refuse)
    with caplog.at_level(logging.WARNING):
        encoder = load_encoder(tiny, 64)
    assert type(encoder) is Encoder
    assert "cannot be exported to ONNX: no such operator; set runtime: torch" in caplog.text
    with pytest.raises(SpringtideError, match="cannot be exported"):
        load_encoder(tiny, 64, runtime="onnx")


def test_the_runtime_chooses_the_encoder(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert type(load_encoder(tiny, 64, runtime="torch")) is Encoder
    for runtime in ("auto", "onnx"):
        assert type(load_encoder(tiny, 64, runtime=runtime)) is OnnxEncoder  # type: ignore[arg-type]
    assert (tmp_path / "springtide" / "encoders").is_dir()
    with pytest.raises(SpringtideError, match="cannot load the text encoder"):
        load_encoder(str(tmp_path / "absent"), 64)
    assert module.Runtime.__args__ == ("auto", "torch", "onnx", "onnx-int8")  # type: ignore[attr-defined]


def test_onnx_is_refused_on_a_gpu() -> None:
    assert EncoderOptions(device="cuda").runtime == "auto"
    assert EncoderOptions().same_encoder(EncoderOptions(max_batch_tokens=512, batch_wait_ms=9))
    assert not EncoderOptions().same_encoder(EncoderOptions(max_tokens=32))
    with pytest.raises(ValidationError, match="needs device: cpu"):
        EncoderOptions(device="cuda", runtime="onnx")


def test_the_default_encoder_in_int8_is_near_the_one_that_read_the_items() -> None:
    texts = [*PROBES, "GREEN VINTAGE SPOT BEAKER", "Heat (1995)", "a film for a rainy sunday"]
    near = cosines(load_encoder("default", 64).encode(texts, batch_size=4), Encoder("default", 64).encode(texts))
    assert near.min() > 0.985 and near.mean() > 0.99
