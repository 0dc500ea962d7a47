"""Signal to quantization noise and order-0 entropy of the codes on real float32 weights, beside FP8 E4M3 and INT8 by
row. The 32 bits a row of a scale or step are not counted, nor are outliers.

Weights: every linear layer of all-MiniLM-L6-v2 and of the MGM GPT-2. No timing; the figures are the same on any
    machine.
"""

from __future__ import annotations

import argparse
import math

import torch
from _common import write_csv
from torch import nn

from hf_gg import data
from hf_gg.formats import StepRule, get_format
from hf_gg.formats.steps import steps_of
from hf_gg.nn.linear import is_conv1d


def linear_weights(model: nn.Module) -> list[torch.Tensor]:
    """Weights [out, in] of the linear layers."""
    found = []
    for name, module in model.named_modules():
        if is_conv1d(module):
            found.append(module.weight.detach().T.contiguous())
        elif isinstance(module, nn.Linear) and "lm_head" not in name:
            found.append(module.weight.detach())
    return found


def models() -> dict[str, list[torch.Tensor]]:
    from transformers import AutoModel, GPT2LMHeadModel

    return {
        "all-MiniLM-L6-v2": linear_weights(AutoModel.from_pretrained(data.minilm(), dtype=torch.float32)),
        "MGM GPT-2": linear_weights(GPT2LMHeadModel.from_pretrained(data.mgm_gpt2(), dtype=torch.float32)),
    }


def entropy(codes: list[torch.Tensor]) -> float:
    """Bits a code, order 0, over all tensors together."""
    counts = sum(torch.bincount(c.reshape(-1).int(), minlength=256) for c in codes).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log2()).sum())


def quantizers():
    """Yield (name, function from a weight to (codes, decoded weight))."""
    for name in ("rf8", "rf8x", "rf8-e5"):
        fmt = get_format(name)
        for scale in ("row", "absmax", "pow2", "tensor", "tensor-pow2", "unit"):
            for rounding in ("nearest", "reference"):
                if rounding == "reference" and scale not in ("row", "unit"):
                    continue

                def quantize(w, fmt=fmt, scale=scale, rounding=rounding):
                    codes, scales = fmt.quantize(w, scale=scale, rounding=rounding)
                    return codes, fmt.decode(codes) * scales

                yield f"{name}, {scale}, {rounding}", quantize

    grid = get_format("grid")
    for per in ("row", "tensor"):
        for parts in (2, 4, 8, 16, 32):

            def on_grid(w, per=per, parts=parts):
                steps = steps_of(w, StepRule(per)) * (8 / parts)
                codes, steps = grid.quantize(w, steps)
                outliers = grid.take_outliers_(codes, steps, w)
                value = grid.decode(codes) * steps
                if outliers is not None:
                    value.view(-1)[outliers[0].long()] = outliers[1]
                return codes, value

            yield f"grid, {per}, rms/{parts}", on_grid

    def fp8(w):
        scale = w.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
        codes = (w / scale).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8), codes.float() * scale

    def int8(w):
        scale = w.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        codes = (w / scale).round()
        return (codes + 128).to(torch.uint8), codes * scale

    yield "FP8 E4M3, absmax, nearest", fp8
    yield "INT8, absmax, nearest", int8


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = []
    for model, weights in models().items():
        signal = sum(float(w.double().square().sum()) for w in weights)
        for name, quantize in quantizers():
            results = [quantize(w) for w in weights]
            noise = sum(float((v.double() - w.double()).square().sum()) for w, (_, v) in zip(weights, results))
            snr, bits = 10 * math.log10(signal / noise), entropy([codes for codes, _ in results])
            rows.append({"model": model, "quantizer": name, "snr_db": round(snr, 2), "entropy_bits": round(bits, 2)})
            print(f"{model:>18}  {name:32} {snr:6.2f} dB  {bits:5.2f} bits")
    print(f"written: {write_csv('snr', rows)}")


if __name__ == "__main__":
    main()
