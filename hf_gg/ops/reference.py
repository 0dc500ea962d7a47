"""Decoding in plain torch: correct on every device, and what the other backends are tested against."""

from __future__ import annotations

import torch

from ..formats import WeightFormat
from ..formats.base import chunk_size


def dequantize(codes: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype) -> torch.Tensor:
    """`decode(codes) * scale`, the product in float32, rounded to `dtype`. Shapes as in `hf_gg.ops.dequantize`."""
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel() == 0:
        return weight
    table = fmt.table(torch.float32, codes.device)
    matrices = codes.reshape(-1, *codes.shape[-2:])
    scale = scale.expand(*codes.shape[:-2], *scale.shape[-2:]).reshape(-1, *scale.shape[-2:])
    rows = max(1, chunk_size(codes.device) // codes.shape[-1])
    for out, matrix, matrix_scale in zip(weight.view(matrices.shape), matrices, scale):
        for start in range(0, matrix.shape[0], rows):
            part = matrix[start : start + rows]
            values = table.index_select(0, part.reshape(-1).int()).view(part.shape)
            part_scale = matrix_scale if matrix_scale.shape[0] == 1 else matrix_scale[start : start + rows]
            out[start : start + rows] = values.mul_(part_scale)
    return weight
