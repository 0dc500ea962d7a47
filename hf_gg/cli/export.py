"""Writes a quantized model in a format of other runtimes.

    hf-gg export MODEL -o DIR                      ONNX: 8 bits a weight in the file, and in memory
    hf-gg export MODEL -o DIR --decode load        onnxruntime decodes all weights once: float32 in memory, faster
    hf-gg export MODEL -o DIR --no-cache           without keys and values of past tokens

MODEL is a checkpoint of hf_gg (RF8 or grid, plain or entropy-coded). DIR appears when all of it is written. Needs
pip install 'hf-gg[onnx]'.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


FORMATS = ("onnx",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name on the hub, or folder")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="format (default: onnx)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of what is no code")
    parser.add_argument(
        "--decode", choices=("run", "load"), default="run", help="when onnxruntime decodes a weight (default: run)"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="version of ONNX's operators, at least 18")
    parser.add_argument("--no-cache", action="store_true", help="a graph without keys and values of past tokens")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is there")
    parser.add_argument("--json", action="store_true", help="print the sizes as JSON")


def run(args: argparse.Namespace) -> int | None:
    import torch
    import transformers

    from ..integrations import folders, onnx
    from ..integrations.compression import load, quantization_of

    folders.check_new(args.output, args.overwrite)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    source = folders.find(args.model)
    given = quantization_of(source)
    if given is None or given.get("quant_method") != "gg":
        raise ValueError(f"{args.model} has no weights quantized by hf_gg: quantize it first, with `hf-gg quantize`.")
    with folders.new_folder(args.output, args.overwrite) as target:
        model = load(source).to(getattr(torch, args.dtype))
        cache = False if args.no_cache else None
        onnx.write(model, target, cache=cache, decode=args.decode, opset=args.opset)  # type: ignore[arg-type]
        folders.copy_others(source, target)
    sizes = {
        str(file.relative_to(args.output)): file.stat().st_size
        for file in sorted(args.output.rglob("*"))
        if file.is_file()
    }
    if args.json:
        print(
            json.dumps({"model": args.model, "out": str(args.output), "format": args.format, "files": sizes}, indent=2)
        )
    else:
        for name, size in sizes.items():
            print(f"{name:32} {size / 1e6:10.2f} MB")
    return None
