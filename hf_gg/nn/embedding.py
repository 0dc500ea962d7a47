"""An embedding whose table is RF8 codes: only the rows that are looked up are decoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from ..formats import get_format
from .base import QuantizedWeight, outliers_of, set_outliers


class RF8Embedding(QuantizedWeight, nn.Embedding):  # type: ignore[misc]  # both say what `weight` is
    """`nn.Embedding` with `weight` as uint8 codes [rows, width] and `weight_scale` float32 [rows, 1].

    Args:
        num_embeddings: rows of the table.
        embedding_dim: width of a row.
        padding_idx: kept for the field's interface; codes have no gradient.
        format: weight format.
        backend: backend of the operators.
        scale: scale mode.
        rounding: rounding.
        compute_dtype: dtype of the result.
        device: of the parameters.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        format: str = "rf8",
        backend: str = "auto",
        scale: Any = "row",
        rounding: str = "nearest",
        compute_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.compute_dtype = compute_dtype
        self._make_weight(num_embeddings, embedding_dim, device, format, backend, scale, rounding)

    @classmethod
    def like(cls, embedding: nn.Embedding, device="meta", **kwargs) -> RF8Embedding:
        """An empty module of the shape of an `nn.Embedding`, on the meta device by default."""
        return cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            padding_idx=embedding.padding_idx,
            compute_dtype=embedding.weight.dtype,
            device=device,
            **kwargs,
        )

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, format="rf8", scale="row", rounding="nearest", backend="auto"):
        """Quantize an `nn.Embedding`.

        Raises:
            ValueError: NaN or infinity in the table, unknown format, scale, rounding or backend.
        """
        coded = ops.quantize_with_outliers(embedding.weight.detach(), get_format(format), scale, rounding)
        return cls.from_codes(embedding, *coded, format=format, scale=scale, rounding=rounding, backend=backend)

    @classmethod
    def from_codes(
        cls,
        embedding: nn.Embedding,
        codes: torch.Tensor,
        row_scale: torch.Tensor,
        outliers: tuple[torch.Tensor, torch.Tensor] | None = None,
        **options: Any,
    ) -> RF8Embedding:
        """A module for an `nn.Embedding` whose table has been made codes; arguments as of `RF8Linear.from_codes`."""
        module = cls.like(embedding, embedding.weight.device, **options)
        module.weight.data.copy_(codes)
        module.weight_scale.data.copy_(row_scale)
        set_outliers(module, "weight", outliers)
        return module.train(embedding.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if hasattr(self.weight, "placements"):
            return self._look_up_part(input)
        return self._look_up(input, self.weight, self.weight_scale)

    def _look_up(self, input: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(-1)
        codes, scale = weight.index_select(0, rows), weight_scale.index_select(0, rows)
        values = ops.dequantize(codes, scale, self.format, self.compute_dtype, self.backend)
        outliers = outliers_of(self, "weight")
        if outliers is not None:
            values = ops.put_outlier_rows(values, rows, *outliers)
        return values.view(*input.shape, codes.shape[-1])

    def _look_up_part(self, input: torch.Tensor) -> torch.Tensor:
        """What this process adds where the table is split over processes (tensor parallelism).

        Split by rows: the whole width, zero for rows that others hold. Split by columns: this process's columns.
        """
        weight: Any = self.weight
        tensors: tuple[Any, Any] = (input, self.weight_scale)
        table, mesh, first = weight.to_local(), weight.device_mesh, 0
        rows, scale = (t.to_local() if hasattr(t, "placements") else t for t in tensors)
        for mesh_dim, placement in enumerate(weight.placements):
            if placement.is_shard(0):
                size, rank = mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim)
                first = placement.local_shard_size_and_offset(self.num_embeddings, size, rank)[1]
        rows = rows - first
        mine = (rows >= 0) & (rows < table.shape[0])
        values = self._look_up(rows.where(mine, 0), table, scale)
        return values.masked_fill(~mine.unsqueeze(-1), 0.0)

    def _apply(self, fn, recurse=True):
        # the table has no dtype of its own to cast: follow what a float table would have become
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """An `nn.Embedding` with the decoded table."""
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        embedding.weight = nn.Parameter(self.dequantize(dtype or self.compute_dtype))
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        return f"{nn.Embedding.extra_repr(self)}, format={self.format}"
