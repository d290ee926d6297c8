"""A BERT-family model as an ONNX graph: exported once, quantised as far as its vectors stay the same, kept in a cache.

Dynamic int8 with one scale per column of weights is about four times as fast as PyTorch on a CPU. What it costs is in
the first layer, where a few activations dwarf the rest; so the leading matrix products stay in float until the vectors
of the probe texts are near enough to PyTorch's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from springtide.errors import SpringtideError
from springtide.files import publish_directory, verify_manifest, write_manifest

log = logging.getLogger(__name__)

FORMAT = 1  # of what is cached: other graphs from the same weights need another number
OPSET = 17
MIN_COSINE = 0.99  # of every probe text to PyTorch's vector; below it more of the graph stays in float
FLOAT_SHARES = (0.0, 1 / 6, 1 / 3, 1 / 2)  # of the matrix products, from the first one on, that stay in float
GRAPH_FILE = "encoder.onnx"
PROBES = (
    "Toy Story (1995) Adventure Animation Children Comedy Fantasy",
    "WHITE HANGING HEART T-LIGHT HOLDER",
    "SET OF 3 CAKE TINS PANTRY DESIGN. JUMBO BAG RED RETROSPOT. PARTY BUNTING. LUNCH BAG SPACEBOY DESIGN",
    "a quiet film about two sisters by the sea",
    "something like Alien, but funny",
    "cheap red bicycle for a child of six",
    "running shoes",
    "2001: A Space Odyssey",
    "Which book should I read after a long winter? Nothing sad, please; the shorter the better, and set in the north.",
    "春潮",
    "une lampe de bureau en métal noir",
    "heat",
    "The Godfather (1972) Crime Drama. Goodfellas (1990) Crime Drama. Casino (1995) Crime Drama. Heat (1995) Action "
    "Crime Thriller. Fargo (1996) Comedy Crime Drama Thriller. Se7en (1995) Mystery Thriller",
    "wireless noise-cancelling headphones, 40 hours battery, USB-C",
    "12 PENCILS SMALL TUBE SKULL",
)

Encode = Callable[[list[str]], np.ndarray]  # texts -> [n, D] float32 of unit length
Judge = Callable[[bytes], Encode]  # a graph -> how it encodes


def graph_of(model: Any, reference: Encode, judge: Judge, int8: bool, cache: Path | None = None) -> bytes:
    """The ONNX graph (input_ids, attention_mask -> last_hidden_state) of a Hugging Face model, from the cache if there.

    reference: how PyTorch encodes; judge: how a graph would. int8: quantise while every probe text keeps a cosine of
    MIN_COSINE; if no part of the graph allows it, the graph stays in float. A cache that cannot be written is only
    logged. Raises SpringtideError if the model cannot be exported.
    """
    folder = (cache or default_cache()) / _key(model, int8)
    if folder.exists():
        try:
            verify_manifest(folder, "exported encoder")
            return (folder / GRAPH_FILE).read_bytes()
        except (OSError, SpringtideError) as error:
            log.warning("exporting the text encoder again: %s", error)
    with tempfile.TemporaryDirectory(prefix="springtide-onnx-") as scratch:
        exported = Path(scratch) / "float.onnx"
        _export(model, exported)
        graph = _quantised(exported, reference(list(PROBES)), judge) if int8 else exported.read_bytes()
    try:
        with publish_directory(folder) as out:
            (out / GRAPH_FILE).write_bytes(graph)
            write_manifest(out)
    except SpringtideError as error:
        log.warning("the exported text encoder is not kept, so each start exports it again: %s", error)
    return graph


def default_cache() -> Path:
    """`springtide/encoders` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "springtide" / "encoders"


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[n] cosine of each row of `left` with that of `right`, both of unit length."""
    return (left * right).sum(1)


def _key(model: Any, int8: bool) -> str:
    """A name for the graph: by the weights and the configuration, so that other weights never find it."""
    digest = hashlib.sha256(f"{FORMAT} {int8} {MIN_COSINE} {model.config.to_json_string()}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.ndim else b"")
    return digest.hexdigest()[:32]


class _States(torch.nn.Module):
    """The model with its output as a plain tensor, which is what the exporter can name."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


def _export(model: Any, path: Path) -> None:
    ids = torch.ones(2, 8, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    free = {0: "texts", 1: "tokens"}
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused form has no ONNX operator that int8 can take apart
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")  # of the tracer: the probes check what it warns of
            torch.onnx.export(
                _States(model).eval(), (ids, mask), str(path), input_names=["input_ids", "attention_mask"],
                output_names=["last_hidden_state"], dynamic_axes={"input_ids": free, "attention_mask": free},
                opset_version=OPSET, dynamo=False,  # the tracing exporter needs 2 s where the other one needs 44
            )  # fmt: skip
    except Exception as error:  # whatever an architecture lets the tracer stumble over
        reason = " ".join(str(error).split())[:200]
        raise SpringtideError(
            f"this text encoder cannot be exported to ONNX: {reason}; set runtime: torch for TextEncoder"
        ) from None
    finally:
        model.set_attn_implementation(attention)


@contextmanager
def _silent_root_logger() -> Iterator[None]:
    """The quantiser tells hundreds of lines to the root logger itself; what others pass on to it still gets through."""
    root, mute = logging.getLogger(), _Mute()
    root.addFilter(mute)
    try:
        yield
    finally:
        root.removeFilter(mute)


class _Mute(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return False


def _quantised(exported: Path, expected: np.ndarray, judge: Judge) -> bytes:
    """The fastest of the tried graphs whose vectors of the probes keep the cosine to `expected`."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    products = [node.name for node in onnx.load(exported).graph.node if node.op_type == "MatMul"]
    quantised = exported.with_name("int8.onnx")
    for share in FLOAT_SHARES:
        with _silent_root_logger():
            quantize_dynamic(
                exported, quantised, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"],
                nodes_to_exclude=products[: round(share * len(products))],
            )  # fmt: skip
        graph = quantised.read_bytes()
        least = float(cosines(judge(graph)(list(PROBES)), expected).min())
        if least >= MIN_COSINE:
            log.info("text encoder in int8 but for %.0f %%: cosine at least %.4f", 100 * share, least)
            return graph
    log.warning("int8 changes this text encoder's vectors (cosine %.4f), so it stays in float", least)
    return exported.read_bytes()
