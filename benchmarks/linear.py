"""One RF8 linear layer against `F.linear` in bfloat16 and torch's int8 product, in turns, for 1 to 512 rows.

The result of each is checked before it is timed. Inputs are random, never zeros; the weights of the layers that are
timed one after the other are larger than the cache together.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from _common import in_turns, median_ratio, write_csv

from hf_gg import ops
from hf_gg.formats import get_format


SHAPES = {"4096x4096": (4096, 4096), "llama3-8b.up": (14336, 4096), "smollm2.up": (1536, 576), "smollm2.q": (576, 576)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for shape in args.shapes:
        out_features, in_features = SHAPES[shape]
        weight = torch.randn(out_features, in_features) * 0.02
        codes, scale = ops.quantize(weight, get_format("rf8"))
        dense = ops.dequantize(codes, scale, dtype=torch.bfloat16)
        int8_scale = (weight.abs().amax(1) / 127).bfloat16()
        int8 = (weight / int8_scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        for count in args.rows:
            x = torch.randn(count, in_features).bfloat16()
            functions = {
                "bfloat16": lambda x=x: F.linear(x, dense),
                "rf8": lambda x=x: ops.linear(x, codes, scale),
                "int8pack": lambda x=x: torch._weight_int8pack_mm(x, int8, int8_scale),
            }
            expected = x.double() @ (get_format("rf8").decode(codes).double() * scale.double()).T
            for name in ("bfloat16", "rf8"):
                noise = (functions[name]().double() - expected).norm() / expected.norm()
                if not noise < 0.01:
                    raise RuntimeError(f"{name} is wrong for {shape}, {count} rows: relative error {noise:.3g}")
            seconds = in_turns(functions, args.rounds)
            for name, times in seconds.items():
                ratio = median_ratio(times, seconds["bfloat16"])
                milliseconds = statistics.median(times) * 1e3
                rows.append(
                    {
                        "shape": shape,
                        "rows": count,
                        "kernel": name,
                        "ms": round(milliseconds, 4),
                        "ratio_to_bfloat16": round(ratio, 3),
                    }
                )
                print(
                    f"{shape:>14} rows {count:4d} {name:>10} {milliseconds:9.3f} ms  {ratio:6.2f} × bfloat16",
                    flush=True,
                )
    print(f"written: {write_csv('linear', rows)}")


if __name__ == "__main__":
    main()
