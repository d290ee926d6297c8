"""Approximate maximum inner product search in a large catalogue: FAISS, an inverted file over 4-bit product codes.

Keys go to the nearest of about sqrt(I) centroids, so that a query may read only some of the lists; in a list a key is
one 4-bit code for every 4 dimensions, 26 bytes for the 204 of a default model, compared in registers (Andre et al.,
arXiv 1812.09162). So little is read that even all lists cost a fraction of an exact product, and what the codes blur is
made up for by whoever asks: take many rows, score them exactly, keep the best. HNSW would hold the keys themselves and
is far slower to build; see "Serving" in the README for what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import faiss

GROUP = 4  # dimensions of a code; each part of the keys begins a new one, so that no scalar shares its code
TRAINED_ON = 64  # keys per centroid that k-means reads
ROUNDS = 10  # of k-means
BLOCK = 65_536  # keys laid out at once while an index is made
SELECT_FROM = 256  # excluded rows from which on the search skips them itself instead of finding that many more


@dataclass(frozen=True)
class Ann:
    """An index over I keys. Its rows are the keys' places, from 0."""

    index: faiss.IndexIVFPQFastScan
    widths: tuple[int, ...]  # of the parts of a key, which a query must have too
    probes: int  # lists that a query reads

    @property
    def lists(self) -> int:
        return int(self.index.nlist)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def with_probes(self, probes: int) -> Ann:
        return replace(self, probes=min(probes, self.lists))


def build(parts: Sequence[np.ndarray], seed: int = 0) -> Ann:
    """An index that reads all of its lists. parts: [I, width] float32 each, together the keys. The same keys and seed
    give the same index on the same machine.
    """
    import faiss

    count = len(parts[0])
    lists = max(1, min(round(count**0.5), count // 39))  # k-means warns below 39 keys each
    widths = tuple(part.shape[1] for part in parts)
    width = sum(_padded(one) for one in widths)
    index = faiss.IndexIVFPQFastScan(
        faiss.IndexFlatIP(width), width, lists, width // GROUP, 4, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.seed, index.cp.niter, index.cp.max_points_per_centroid = seed, ROUNDS, TRAINED_ON
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # or a small catalogue warns on stderr
    rng = np.random.default_rng(seed)
    wanted = max(lists * TRAINED_ON, 16_384)
    some = np.sort(rng.choice(count, wanted, replace=False)) if count > wanted else np.arange(count)
    _match_threads()
    index.train(_lay_out([part[some] for part in parts]))
    for start in range(0, count, BLOCK):
        index.add(_lay_out([part[start : start + BLOCK] for part in parts]))
    return Ann(index, widths, lists)


def search(ann: Ann, query: Sequence[np.ndarray], count: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """About the `count` rows with the greatest inner product, none twice and in no order: [n] int64, n <= count.

    query: [width] float32 for each part of the keys; allowed: [I] bool, absent = all. With all lists read, n < count
    only if fewer rows are allowed.
    """
    import faiss

    count = min(count, len(ann))
    options: dict[str, Any] = {"nprobe": ann.probes}
    barred = 0 if allowed is None else len(ann) - int(np.count_nonzero(allowed[: len(ann)]))
    if allowed is not None and barred > SELECT_FROM:
        # The allowed lie anywhere: read as many of them as without a filter.
        options["nprobe"] = min(ann.lists, -(-ann.probes * len(ann) // max(1, len(ann) - barred)))
        bits = np.packbits(allowed[: len(ann)], bitorder="little")
        options["sel"] = faiss.IDSelectorBitmap(bits)
        barred = 0
    _match_threads()
    laid_out, params = _lay_out([part[None] for part in query]), faiss.SearchParametersIVF(**options)
    _, rows = ann.index.search(laid_out, min(count + barred, len(ann)), params=params)
    found = rows[0][rows[0] >= 0]
    return (found if allowed is None else found[allowed[found]])[:count]


def pack(ann: Ann) -> dict[str, np.ndarray]:
    """Plain arrays, for a file."""
    import faiss

    return {
        "index": faiss.serialize_index(ann.index),
        "widths": np.array(ann.widths, np.int64),
        "probes": np.array([ann.probes], np.int64),
    }


def unpack(arrays: dict[str, np.ndarray], count: int) -> Ann:
    """The index that `arrays` came from, over `count` keys. Raises ValueError if it is no such index."""
    import faiss

    try:
        index = faiss.deserialize_index(np.ascontiguousarray(arrays["index"], np.uint8))
    except RuntimeError as error:
        raise ValueError(f"FAISS cannot read the index ({str(error)[-120:]})") from None
    widths = tuple(arrays["widths"].tolist())
    if not isinstance(index, faiss.IndexIVFPQFastScan) or index.d != sum(map(_padded, widths)):
        raise ValueError(f"the index is not the expected one over keys of {sum(widths)} dimensions")
    if index.ntotal != count:
        raise ValueError(f"the index holds {index.ntotal} items, the catalogue {count}")
    return Ann(index, widths, int(arrays["probes"][0]))


def _padded(width: int) -> int:
    return -(-width // GROUP) * GROUP


def _lay_out(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Parts [n, width] side by side, each filled up with zeros to whole groups: [n, d] float32."""
    out = np.zeros((len(parts[0]), sum(_padded(part.shape[1]) for part in parts)), np.float32)
    start = 0
    for part in parts:
        out[:, start : start + part.shape[1]] = part
        start += _padded(part.shape[1])
    return out


def _match_threads() -> None:
    """As many threads as torch has: FAISS would take every core, and a replica is given some of them."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
