"""Measures linear layers, a whole model and its loading: RF8, rf8x, grid, bfloat16, float32 and other packages.

    hf-gg bench                                  everything, SmolLM2-135M as the model; some minutes
    hf-gg bench linear --rows 1 4 --shapes 4096x4096
    hf-gg bench model --contenders rf8           without other packages
    hf-gg bench model --model MODEL              prefill and decoding, tokens a second
    hf-gg bench load                             seconds and memory of loading
    hf-gg bench linear --csv linear.csv --plot roofline.png

Each result is checked against a reference before it is timed. Contenders take turns (A B A B …); ratios are medians of
the turns' ratios. What does not run here is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from ..bench import contenders, linear
from .files import check_writable


PARTS = ("linear", "model", "load")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=list(linear.SHAPES),
        choices=list(linear.SHAPES),
        metavar="SHAPE",
        help=f"layers: {', '.join(linear.SHAPES)} (default: all)",
    )
    parser.add_argument(
        "--rows", nargs="+", type=_positive, default=list(linear.ROWS), metavar="N", help="of the input"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=list(contenders.CONTENDERS),
        choices=list(contenders.CONTENDERS),
        metavar="NAME",
        help=f"of {', '.join(contenders.CONTENDERS)} (default: all)",
    )
    parser.add_argument("--rounds", type=_positive, default=100, help="turns of a layer, at most (default: 100)")
    parser.add_argument(
        "--seconds", type=_seconds, default=1.0, help="for the turns of one contender in one shape (default: 1)"
    )
    parser.add_argument("--model", metavar="MODEL", help="name on the hub or folder (default: SmolLM2-135M)")
    parser.add_argument("--prompt", type=_positive, default=512, help="tokens of the prefill (default: 512)")
    parser.add_argument("--tokens", type=_positive, default=64, help="that are generated (default: 64)")
    parser.add_argument("--turns", type=_positive, default=5, help="of a model or a load (default: 5)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default: cpu)")
    parser.add_argument("--threads", type=_positive, help="of the CPU (default: torch's number)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the layers; models and loads beside it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the layers and the roofline")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int | None:
    import torch

    from ..bench import models, plot, timing

    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        raise ValueError(f"PART must be of {', '.join(PARTS)}, got {unknown[0]!r}.")
    device = _device(args.device)
    parts = args.parts or list(PARTS)
    # whatever is wrong shows now, and not after minutes of measuring
    if args.plot and "linear" not in parts:
        raise ValueError(f"--plot draws layers, and PART is {', '.join(parts)}: add linear or leave --plot out.")
    if args.plot:
        plot.check(args.plot)
    for path in filter(None, (args.csv, args.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
    if "model" in parts or "load" in parts:
        models.find(args.model)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    say = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    about = timing.machine(device)
    result: dict[str, object] = {"machine": about}
    if "linear" in parts:
        # a CPU may multiply either of the two faster
        kinds = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
        rates = timing.copy_rate(device), max(timing.peak_rate(device, kind) for kind in kinds)
        say(f"{about['cpu']}, {about['threads']} threads: a copy of {rates[0] / 1e9:.1f} GB/s")
        rows = list(
            linear.measure(args.shapes, args.rows, args.contenders, device, args.rounds, args.seconds, rates[0], say)
        )
        result |= {"copy_gb_s": round(rates[0] / 1e9, 2), "peak_gflop_s": round(rates[1] / 1e9, 1), "linear": rows}
        _write(args.csv, "", rows, about, say)
        if args.plot:
            plot.draw(rows, *rates, args.plot, f"Linear layers, {about.get('gpu', about['cpu'])}")
            say(f"written: {args.plot}")
    if "model" in parts or "load" in parts:
        plain = models.open_model(args.model, device)
        if "model" in parts:
            names = tuple(name for name in models.CONFIGS if name.split(",")[0] in args.contenders)
            peers = tuple(name for name in args.contenders if name not in ("bfloat16", *contenders.OURS))
            rows = list(models.measure(plain, device, names, args.prompt, args.tokens, args.turns, say, peers))
            result["model"] = rows
            _write(args.csv, "_model", rows, about, say)
        if "load" in parts:
            rows = models.with_loads(plain, args.turns, args.contenders)
            for row in rows:
                timed = "reason" not in row and f"{row['seconds']:8.3f} s  {row['peak_mib']:6d} MiB at the peak"
                say(f"{row['load']:>18} {timed or 'not timed: ' + row['reason']}")
            result["load"] = rows
            _write(args.csv, "_load", rows, about, say)
    if args.json:
        print(json.dumps(result, indent=1))
    return None


def _write(path: Path | None, suffix: str, rows: list[dict], about: dict[str, str], say) -> None:
    if path is not None:
        from ..bench.timing import write_rows

        say(f"written: {write_rows(path.with_name(f'{path.stem}{suffix}{path.suffix}'), rows, about)}")


def _device(text: str):
    """`torch.device` of a place that can be measured here."""
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {text!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {text}: there is no CUDA device here.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {text}: there are {torch.cuda.device_count()} CUDA devices here.")
    return device


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:  # NaN is not
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
