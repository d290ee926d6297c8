"""Sums over a history that grow with every event: the features that counting models read, at all moments at once."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # longest stretch summed in one go: decay^-BLOCK must stay far inside float32


def running_sum(values: Tensor, decay: float = 1.0) -> Tensor:
    """s[t] = values[t] + decay * s[t - 1] along dimension 1. values: [B, L, ...] -> the same shape."""
    if decay == 1.0:
        return values.cumsum(1)
    shape = (1, -1) + (1,) * (values.dim() - 2)
    parts: list[Tensor] = []
    for block in values.split(BLOCK, 1):
        power = decay ** torch.arange(block.shape[1], dtype=values.dtype, device=values.device).view(shape)
        part = (block / power).cumsum(1) * power
        if parts:
            part = part + parts[-1][:, -1:] * power * decay
        parts.append(part)
    return torch.cat(parts, 1)
