"""What was quantized, how well, and what was not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..formats import WeightFormat, get_format
from ..formats.steps import entropy
from ..nn import RF8Experts
from ..nn.base import outliers_of
from .selection import code_parameters, quantized_modules, select


@dataclass(frozen=True)
class ReportRow:
    """One quantized weight.

    Attributes:
        name: of the parameter.
        shape: of the codes.
        format: of the codes.
        bits: bits a weight in memory, scales and outliers counted.
        snr: signal to quantization noise, dB; NaN where the codes are offloaded.
        exact: measured against the reference; otherwise estimated from the codes.
        entropy: order-0 entropy of the codes, bits: what they can be stored in; NaN where they are offloaded.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bits: float
    snr: float
    exact: bool
    entropy: float = math.nan


@dataclass(frozen=True)
class QuantizationReport:
    """Rows of a quantized model and the modules that stayed as they are, with reasons. `str()` gives a table.

    `uncalibrated` lists what a calibration in this process left to plain rounding, with reasons.
    """

    rows: list[ReportRow]
    skipped: dict[str, str]
    quantized_parameters: int
    other_parameters: int
    bytes: int
    uncalibrated: dict[str, str] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Bits a quantized weight in memory, scales and outliers counted, over the model."""
        total = sum(math.prod(row.shape) for row in self.rows)
        return sum(row.bits * math.prod(row.shape) for row in self.rows) / total if total else 0.0

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=6)
        lines = [f"{'weight':{width}}  {'shape':>18}  {'format':>7}  {'bits':>6}  {'entropy':>7}  {'SNR dB':>7}"]
        for row in self.rows:
            shape = "×".join(map(str, row.shape))
            snr = f"{'' if row.exact else '≈'}{row.snr:.1f}"
            lines.append(
                f"{row.name:{width}}  {shape:>18}  {row.format:>7}  {row.bits:6.3f}  {row.entropy:7.3f}  {snr:>7}"
            )
        lines.append(
            f"{len(self.rows)} weights of {self.quantized_parameters:,} parameters at {self.bits:.3f} bits; "
            f"{self.other_parameters:,} parameters as they were; {self.bytes / 2**20:.1f} MiB in memory."
        )
        for name, reason in self.skipped.items():
            lines.append(f"not quantized: {name} ({reason})")
        for name, reason in self.uncalibrated.items():
            lines.append(f"rounded without calibration: {name} ({reason})")
        return "\n".join(lines)


@torch.no_grad()
def quantization_report(
    model: nn.Module, reference: nn.Module | Mapping[str, torch.Tensor] | None = None
) -> QuantizationReport:
    """Report each quantized weight of a model: format, bits a weight, signal to noise; and what was skipped, and why.

    Args:
        model: a model loaded or quantized with `GGConfig`.
        reference: the full-precision model, or its parameters by name, to measure the noise against. Without it the
            noise is estimated from the codes, as if the weights lay evenly between the midpoints around each code's
            value (printed with ≈).

    Of a model that is split over processes every process must call it; each gets the report of the whole.

    Raises:
        ValueError: the model was not loaded or quantized with `GGConfig`.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not any(True for _ in quantized_modules(model)) and not hasattr(quantizer, "skipped"):
        raise ValueError("The model has no quantized module: load it with quantization_config=GGConfig().")
    if isinstance(reference, nn.Module):
        reference = dict(reference.named_parameters(remove_duplicate=False))
    originals = reference or {}
    rows, quantized, beside, seen = [], 0, 0, set()
    for name, module, weight in code_parameters(model):
        codes, scale = module._parameters[weight], module._parameters[f"{weight}_scale"]
        if id(codes) in seen:
            continue  # tied
        seen.add(id(codes))
        outliers = outliers_of(module, weight)
        number = 0 if outliers is None else outliers[0].numel()
        quantized, beside = quantized + codes.numel(), beside + scale.numel() + 2 * number
        original = originals.get(name)
        if codes.is_meta:
            snr = math.nan
        elif original is not None:
            snr = _measured_snr(module, weight, original.detach())
        else:
            snr = _estimated_snr(get_format(module.format), _whole(codes), _whole(scale), outliers)
        stored = sum(8 * p.element_size() * p.numel() for p in outliers or ())
        bits = 8 + (32 * scale.numel() + stored) / max(codes.numel(), 1)
        coded = math.nan if codes.is_meta else entropy(_whole(codes))
        rows.append(ReportRow(name, tuple(codes.shape), module.format, bits, snr, original is not None, coded))
    parameters = list(model.parameters())
    return QuantizationReport(
        rows=rows,
        skipped=_skipped(model),
        quantized_parameters=quantized,
        other_parameters=sum(p.numel() for p in parameters) - quantized - beside,
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        uncalibrated=dict(getattr(quantizer, "uncalibrated", {})),
    )


def _skipped(model: nn.Module) -> dict[str, str]:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        return dict(quantizer.skipped)
    return select(model, model.config.quantization_config, from_checkpoint=True).skipped


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be split over processes, put together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _measured_snr(module: nn.Module, weight: str, original: torch.Tensor) -> float:
    if isinstance(module, RF8Experts):
        decoded = module.dequantize(weight)
    else:
        decoded = module.dequantize().T if getattr(module, "fan_in_fan_out", False) else module.dequantize()
    decoded, original = _whole(decoded), _whole(original)
    noise = (decoded - original.to(decoded)).square().sum(dtype=torch.float64)
    return _decibel(float(original.float().square().sum(dtype=torch.float64)), float(noise))


def _estimated_snr(
    fmt: WeightFormat, codes: torch.Tensor, scale: torch.Tensor, outliers: tuple[torch.Tensor, torch.Tensor] | None
) -> float:
    power, variance = fmt.table(device=codes.device).square().nan_to_num(), _cell_variance(fmt).to(codes.device)
    dim = -1 if scale.shape[-1] == 1 else -2
    noise = 0.0
    signal = 0.0 if outliers is None else float(outliers[1].double().square().sum())  # theirs has none
    scales = scale.reshape(-1, *scale.shape[-2:])
    for matrix, matrix_scale in zip(codes.reshape(-1, *codes.shape[-2:]), scales):
        square = matrix_scale.double().square().squeeze(dim)
        index = matrix.int().reshape(-1)
        signal += float((power.index_select(0, index).view(matrix.shape).sum(dim).double() * square).sum())
        noise += float((variance.index_select(0, index).view(matrix.shape).sum(dim).double() * square).sum())
    return _decibel(signal, noise)


def _cell_variance(fmt: WeightFormat) -> torch.Tensor:
    """Mean squared distance to each code's value, float32 [256], of numbers spread evenly over its rounding cell."""
    values = fmt.table(torch.float64)
    order = [code for code in torch.argsort(values).tolist() if code not in fmt.reserved and code != 0x80]
    result = torch.zeros(256)
    for below, code, above in zip(order, order[1:], order[2:]):
        low, high = float(values[code] - values[below]) / 2, float(values[above] - values[code]) / 2
        result[code] = (low**3 + high**3) / (3 * (low + high))
    for end, neighbour in ((order[0], order[1]), (order[-1], order[-2])):
        # beyond the largest value lies nothing: the scale clips nothing
        result[end] = float(values[end] - values[neighbour]) ** 2 / 12
    return result


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
