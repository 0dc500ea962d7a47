"""Writes a model as a quantized checkpoint, which `from_pretrained` opens.

    hf-gg quantize MODEL -o OUT                                      RF8
    hf-gg quantize MODEL -o OUT --calibrate text.jsonl               RF8, rounded for the outputs on a text
    hf-gg quantize MODEL -o OUT --weight-format grid --target-bits 5 --calibrate text.jsonl --coding rans

The text is a file of plain text, or .jsonl: a string or an object with `text` a line. Calibration goes on where it
stopped if it was killed: modules that are done are kept beside OUT until OUT is there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from .compress import add_common_arguments, show, summary, write


_OF_CALIBRATION = ("tokens", "sequences", "damping", "seed", "work")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(parser=parser)
    parser.add_argument("model", metavar="MODEL", help="name on the hub, folder, GGUF file")
    parser.add_argument("-o", "--out", metavar="OUT", type=Path, required=True, help="folder to write")
    parser.add_argument("--weight-format", help="rf8 (default), rf8x, rf8-e5, grid (default with a target)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--target-bits", type=float, metavar="B", help="of a grid: bits a quantized weight on average")
    how.add_argument("--target-snr", type=float, metavar="DB", help="of a grid: signal to quantization noise")
    parser.add_argument(
        "--calibrate", metavar="TEXT", type=Path, help="round for the least error of outputs on a text"
    )
    parser.add_argument("--tokens", type=int, default=1024, help="of a window of the text (default: 1024)")
    parser.add_argument("--sequences", type=int, default=16, help="windows of the text (default: 16)")
    parser.add_argument("--damping", type=float, default=0.2, help="more trusts the text less (default: 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of windows (default: 0)")
    parser.add_argument("--work", metavar="DIR", type=Path, help="keeps finished modules (default: beside OUT)")
    parser.add_argument(
        "--coding", choices=("none", "rans", "eg0"), default="none", help="entropy coder of the files (default: none)"
    )
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int | None:
    from ..integrations.calibration import Calibration, read_texts
    from ..integrations.compression import compress, quantization_of
    from ..integrations.transformers import GGConfig

    given = [name for name in _OF_CALIBRATION if getattr(args, name) != args.parser.get_default(name)]
    if given and args.calibrate is None:
        raise ValueError(f"--{given[0]} is of a calibration: name its text with --calibrate.")
    targets = {"target_bits": args.target_bits, "target_snr": args.target_snr}
    options: dict[str, Any] = {key: value for key, value in targets.items() if value is not None}
    out = args.out.absolute()
    work = args.work or out.parent / f".{out.name}.calibration"
    if args.calibrate is not None:
        options["calibration"] = Calibration(
            args.calibrate, args.tokens, args.sequences, args.damping, args.seed, folder=work
        )
        read_texts(args.calibrate)  # before a large model is loaded
    config = GGConfig(
        weight_format=args.weight_format or ("grid" if targets.keys() & options.keys() else None),
        coding=args.coding,
        modules_to_not_convert=args.keep or None,
        quantize_embeddings=args.quantize_embeddings,
        quantize_lm_head=args.quantize_lm_head,
        **options,
    )
    plain: dict[str, str] = {}

    def make(source: Path, target: Path):
        given = quantization_of(source)
        if given is not None:
            raise ValueError(
                f"{source} is quantized already, by {given.get('quant_method')!r}: quantizing twice loses twice. "
                "Start from the full-precision model."
            )
        return compress(source, target, config, args.max_shard_size, plain)

    rows = write(args, make, ["model"])
    if args.calibrate is not None and args.work is None:
        shutil.rmtree(work, ignore_errors=True)
    for name, reason in plain.items():
        print(f"rounded without calibration: {name} ({reason})", file=sys.stderr)
    more: dict[str, Any] = {"weight_format": config.weight_format}
    if args.calibrate is not None:
        more["uncalibrated"] = plain
    show(args, summary(rows), **more)
    return None
