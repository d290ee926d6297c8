"""Figures as the text that tables and plots show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Estimate = Mapping[str, float]  # {"value"} or {"value", "lo", "hi"}
Cell = dict[str, str]  # {"value", "interval"}: the second in small type below the first

_BITS = ("novelty",)
_HEADS = {"hr": "HR", "ndcg": "NDCG", "mrr": "MRR", "recall": "Recall", "precision": "Precision",
          "coverage": "Coverage", "recall_all": "Recall, all targets", "ndcg_all": "NDCG, all targets",
          "novelty": "Novelty", "diversity": "Diversity", "gini": "Gini"}  # fmt: skip


def figure_of(value: float) -> str:
    return f"{value:.4f}"


def ratio_of(value: float) -> str:
    return f"{value:.2f}" if value < 100 else "over 100"


def whole_of(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def share_of(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"


def column_of(name: str) -> str:
    """The heading of a metric: `ndcg@10` as NDCG@10."""
    head, _, k = name.partition("@")
    return f"{_HEADS.get(head, head)}@{k}"


def metric_cell(name: str, estimate: Estimate | None) -> Cell:
    """The value of a metric with its interval. Novelty is in bits, which have fewer digits worth reading."""
    if estimate is None:
        return text_cell("–")
    if name.partition("@")[0] in _BITS:
        return text_cell(f"{estimate['value']:.2f}")
    return text_cell(figure_of(estimate["value"]), _interval(estimate, "{:.3f}"))


def ratio_cell(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return text_cell("–")
    return text_cell(ratio_of(estimate["value"]), f"{ratio_of(estimate['lo'])}–{ratio_of(estimate['hi'])}")


def text_cell(value: str, interval: str = "") -> Cell:
    return {"value": value, "interval": interval}


def span_of(group: Mapping[str, Any]) -> str:
    """A group's range, whole or with two decimals."""
    low, high = (f"{end:,}" if isinstance(end, int) else f"{end:.2f}" for end in (group["from"], group["to"]))
    return low if low == high else f"{low}–{high}"


def _interval(estimate: Estimate, form: str) -> str:
    return f"{form.format(estimate['lo'])}–{form.format(estimate['hi'])}" if "lo" in estimate else ""
