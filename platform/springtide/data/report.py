"""report.json: what became of every row of every file, and what is left."""

from __future__ import annotations

from collections import Counter
from typing import Any

import polars as pl

from springtide.config import DataConfig
from springtide.data.doubts import doubt_items, doubt_times
from springtide.data.items import RawItems
from springtide.data.partitions import DUPLICATE, Written
from springtide.data.sources import SourceFile


def build_report(
    config: DataConfig,
    files: list[SourceFile],
    skipped: list[str],
    written: list[Written],
    described: RawItems,
    catalogue: pl.DataFrame,
    rounds: int,
    cuts: tuple[int, int] | None,
) -> dict[str, Any]:
    """The whole report. skipped: files that were not read; catalogue: items with `item_id`, `text` and `alive`; rounds:
    of the k-core filter.
    """
    by_file: list[Counter[str]] = [Counter() for _ in files]
    for some in written:
        for file, fate, rows in zip(*(some.fates[name].to_pylist() for name in ("file", "fate", "rows")), strict=True):
            by_file[file][fate] += rows
    per_file = [_fates(counter, {"path": file.path}) for file, counter in zip(files, by_file, strict=True)]
    totals = _fates(sum(by_file, Counter()), {})
    parts = Counter[str]()
    for some in written:
        parts.update(some.parts)
    actions = Counter[str]()
    for some in written:
        actions.update(some.actions)
    tied, users = sum(w.tied for w in written), sum(w.users for w in written)
    text = catalogue.filter(pl.col("text") != "")
    dropped = described.items.join(catalogue, on="item_id", how="anti")
    sizes = {part: parts[part] for part in ("train", "valid", "test")}
    tied_last = sum(w.tied_last for w in written)
    doubts = [] if config.timeless else doubt_times([w.times for w in written], files)
    if config.items:
        doubts += doubt_items(catalogue.filter("alive")["item_id"], described.items["item_id"])
    core = {"min_user_events": config.min_user_events, "min_item_events": config.min_item_events, "rounds": rounds}
    return {
        "warnings": doubts,
        "totals": {name: totals[name] for name in ("rows", "kept", "quarantined", "deduplicated")},
        "reasons": totals["reasons"],
        "users": users,
        "items": len(catalogue),
        "actions": dict(sorted(actions.items())),
        "split": {"kind": config.split, **sizes, "cuts_ms": list(cuts or [])},
        "ties": {"events": tied, "share": tied / max(1, totals["kept"]), "users_whose_last_two_tie": tied_last},
        "made_up_times": config.timeless,
        "k_core": core,
        "catalogue": {
            "with_text": len(text),
            "without_text": len(catalogue) - len(text),
            "without_events": int((~catalogue["alive"]).sum()),
            "described_but_dropped": len(dropped),
        },
        "files": per_file,
        "item_files": described.files,
        "skipped_files": skipped,
        "settings": config.model_dump(mode="json"),
    }  # fmt: skip


def _fates(counter: Counter[str], head: dict[str, Any]) -> dict[str, Any]:
    reasons = {fate: rows for fate, rows in sorted(counter.items()) if fate not in ("kept", DUPLICATE)}
    return {
        **head,
        "rows": counter.total(),
        "kept": counter["kept"],
        "quarantined": sum(reasons.values()),
        "deduplicated": counter[DUPLICATE],
        "reasons": reasons,
    }
