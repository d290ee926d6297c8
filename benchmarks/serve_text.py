"""Texts per CPU second: the TextEncoder's runtime against sentence-transformers, or plain PyTorch where that is absent.

    python benchmarks/serve_text.py [SECONDS]

One thread, texts of 16 and of 64 tokens, singly and 16 together, tokenising included. Prints one JSON line: for each
way of encoding its figures and the cosine of its vectors to PyTorch's in float.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

import numpy as np
import torch

from serve_requests import texts
from springtide.text.encoder import Encoder, default_model_path, load_encoder

TOKENS, TOGETHER, TEXTS = (16, 64), (1, 16), 64
Encode = Callable[[list[str]], np.ndarray]


def rate(encode: Encode, some: list[str], together: int, seconds: float) -> float:
    """Texts per CPU second of this process."""
    encode(some[:together])
    done, begin = 0, time.process_time()
    while time.process_time() - begin < seconds:
        encode([some[(done + n) % len(some)] for n in range(together)])
        done += together
    return done / (time.process_time() - begin)


def ways(tokens: int) -> dict[str, Encode]:
    """Every way of encoding, PyTorch in float first."""
    found: dict[str, Encode] = {
        "torch fp32": Encoder("default", tokens).encode,
        "TextEncoder": load_encoder("default", tokens).encode,
    }
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return found
    model = SentenceTransformer(str(default_model_path()), device="cpu")
    model.max_seq_length = tokens
    found["sentence-transformers"] = lambda some: np.asarray(
        model.encode(some, normalize_embeddings=True, show_progress_bar=False)
    )
    return found


def measure(seconds: float) -> dict[str, dict[str, Any]]:
    """Way -> `tokens x together` -> texts per CPU second, and the mean and the least cosine over all texts."""
    results: dict[str, dict[str, Any]] = {}
    cosines: dict[str, list[float]] = {}
    for tokens in TOKENS:
        some = texts(np.random.default_rng(tokens), TEXTS, words=tokens)  # cut to so many tokens by every way
        encoders = ways(tokens)
        exact = encoders["torch fp32"](some)
        for name, encode in encoders.items():
            cosines.setdefault(name, []).extend((encode(some) * exact).sum(1).tolist())
            for together in TOGETHER:
                figures = results.setdefault(name, {})
                figures[f"{tokens} x {together}"] = round(rate(encode, some, together, seconds), 1)
    for name, all_ in cosines.items():
        results[name] |= {"cosine_mean": round(float(np.mean(all_)), 4), "cosine_least": round(min(all_), 4)}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)))
