"""Weights as torch's own 4-bit kernel for CPUs reads them, rounded to the nearest code of each group."""

from __future__ import annotations

import torch
from torch import Tensor


def int4_packed(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales for ``torch._weight_int4pack_mm_for_cpu``; weight: (out, in)."""
    groups = weight.view(len(weight), -1, group)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).view_as(weight)
    scales = torch.cat([scale, low + 8 * scale], dim=-1).transpose(0, 1).contiguous().bfloat16()  # (groups, out, 2)
    return torch._convert_weight_to_int4pack_for_cpu(codes, 1), scales
