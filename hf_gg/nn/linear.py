"""A linear layer whose weight is RF8 codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from ..formats import get_format
from .base import QuantizedWeight, outliers_of, set_outliers


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's `Conv1D`: a linear layer whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


class RF8Linear(QuantizedWeight, nn.Linear):  # type: ignore[misc]  # both say what `weight` is
    """`nn.Linear` with `weight` as uint8 codes [out, in] and `weight_scale` float32 [out, 1].

    A subclass of `nn.Linear`, so that adapters, tensor-parallel plans and `target_modules="all-linear"` take it for
    one. The product is differentiable in the input and the bias; codes and scale are frozen.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is one.
        format: weight format, `"rf8"`, `"rf8x"`, `"rf8-e5"` or `"grid"`.
        backend: `"auto"`, `"torch"`, `"cpu"` or `"triton"`.
        fan_in_fan_out: the module stands for a `Conv1D`, which stored its weight [in, out]. Codes are [out, in]
            anyway.
        scale: scale mode, or a `StepRule` of a grid, for `requantize_`.
        rounding: rounding for `requantize_`.
        device: of the parameters.
        dtype: of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str = "rf8",
        backend: str = "auto",
        fan_in_fan_out: bool = False,
        scale: Any = "row",
        rounding: str = "nearest",
        device=None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.nx, self.nf = in_features, out_features
        self._make_weight(out_features, in_features, device, format, backend, scale, rounding)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        format: str = "rf8",
        scale: Any = "row",
        rounding: str = "nearest",
        backend: str = "auto",
        name: str | None = None,
    ) -> RF8Linear:
        """Quantize an `nn.Linear` or a `Conv1D`; its bias is taken over as it is.

        Args:
            linear: the module.
            format: weight format.
            scale: scale mode.
            rounding: rounding.
            backend: backend of the operators.
            name: of the module in its model, for messages.

        Raises:
            ValueError: NaN or infinity in the weight, quantized already, unknown format, scale, rounding or backend.
            TypeError: another kind of module, or a weight that is not floating point of 16 bits or more.
        """
        where = f"{name}.weight" if name else "weight"
        if isinstance(linear, QuantizedWeight):
            raise ValueError(f"{where} is quantized already (format {linear.format!r}): dequantize the model first.")
        if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
            raise TypeError(f"{where}: RF8Linear is made from nn.Linear or Conv1D, got {type(linear).__name__}.")
        if not linear.weight.is_floating_point() or linear.weight.element_size() == 1:
            raise TypeError(f"{where}: needs a floating point weight of 16 bits or more, got {linear.weight.dtype}.")
        weight = linear.weight.detach()
        try:
            coded = ops.quantize_with_outliers(
                weight.T if is_conv1d(linear) else weight, get_format(format), scale, rounding
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return cls.from_codes(linear, *coded, format=format, backend=backend, scale=scale, rounding=rounding)

    @classmethod
    def from_codes(
        cls,
        linear: nn.Module,
        codes: torch.Tensor,
        row_scale: torch.Tensor,
        outliers: tuple[torch.Tensor, torch.Tensor] | None = None,
        **options: Any,
    ) -> RF8Linear:
        """A module for an `nn.Linear` or a `Conv1D` whose weight has been made codes; the bias is taken over.

        Args:
            linear: the module.
            codes: uint8 [out, in].
            row_scale: float32 [out, 1] or [1, 1].
            outliers: their indices and values, as in QuantizedWeight.
            **options: `format`, `backend`, `scale` and `rounding`.
        """
        module = cls.like(linear, **options)
        module.weight = nn.Parameter(codes, requires_grad=False)
        row_scale = row_scale.expand(module.out_features, 1).contiguous()
        module.weight_scale = nn.Parameter(row_scale, requires_grad=False)
        set_outliers(module, "weight", outliers)
        module.bias = linear.bias
        return module.train(linear.training)

    @classmethod
    def like(cls, linear: nn.Module, device="meta", **kwargs) -> RF8Linear:
        """An empty module of the shape of an `nn.Linear` or a `Conv1D`, on the meta device by default."""
        conv1d = is_conv1d(linear)
        return cls(
            linear.weight.shape[0] if conv1d else linear.in_features,
            linear.weight.shape[1] if conv1d else linear.out_features,
            bias=linear.bias is not None,
            fan_in_fan_out=conv1d,
            device=device,
            dtype=None if linear.bias is None else linear.bias.dtype,
            **kwargs,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = "cpu" if x.is_cpu else x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        own = self._parameters  # the attributes of a module are slow to look up, next to a small layer
        y = ops.linear(x, own["weight"], own["weight_scale"], own["bias"], self.format, self.backend)  # type: ignore
        if own["weight_outlier_index"] is None:
            return y
        outliers = outliers_of(self, "weight")
        if outliers is None:
            return y
        return (y + ops.outlier_linear(x, *outliers, self.out_features, self.in_features)).to(y.dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An `nn.Linear` with the decoded weight. The bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype))
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, format={self.format}"
