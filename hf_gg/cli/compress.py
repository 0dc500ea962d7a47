"""Writes a model as a checkpoint of entropy-coded weights, which `from_pretrained` opens.

    hf-gg compress MODEL OUT --target-bits 5         the grid format, 5 bits a weight on average
    hf-gg compress MODEL OUT --target-snr 35         the grid format, 35 dB of signal to noise
    hf-gg compress MODEL OUT --format rf8            RF8
    hf-gg compress RF8_MODEL OUT                     what is quantized already: its codes are only coded
    hf-gg compress MODEL OUT --lossless-grid 2^-13   floats on a grid of this step: nothing is lost, and loading gives
                                                     the float model

OUT appears when all of it is written. Tokenizer and other files are copied; optimizer states are not.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(parser=parser)
    parser.add_argument("model", metavar="MODEL", help="name on the hub, folder, GGUF file; bare weights for a grid")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--target-bits", type=float, metavar="B", help="bits a quantized weight on average: entropy, steps, outliers"
    )
    how.add_argument("--target-snr", type=float, metavar="DB", help="signal to quantization noise")
    how.add_argument("--lossless-grid", type=step, metavar="STEP", help="2^-13, 1/8192 or 0.0001220703125")
    parser.add_argument("--format", help="weight format: rf8 (default), rf8x, rf8-e5, grid (default with a target)")
    parser.add_argument("--coding", choices=("rans", "eg0"), default="rans", help="coder (default: rans)")
    parser.add_argument(
        "--round",
        action="store_true",
        help="with --lossless-grid: round what is off the grid, and take the sign from zeros",
    )
    add_common_arguments(parser)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What the commands share that write a quantized model."""
    parser.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="NAME",
        help="leave as they are: modules as in modules_to_not_convert; with --lossless-grid, patterns of tensors",
    )
    parser.add_argument("--quantize-embeddings", action="store_true", help="quantize the input embeddings as well")
    parser.add_argument("--quantize-lm-head", action="store_true", help="quantize the output embeddings as well")
    parser.add_argument("--max-shard-size", default="5GB", help="of the files, in coded bytes (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(args: argparse.Namespace) -> int | None:
    if args.lossless_grid is not None and (args.format or args.quantize_embeddings or args.quantize_lm_head):
        raise ValueError("--lossless-grid codes floats as they are: --format and --quantize-… do not go with it.")
    if args.round and args.lossless_grid is None:
        raise ValueError("--round goes with --lossless-grid.")
    rounded: dict[str, float] = {}

    def make(source: Path, target: Path):
        if args.lossless_grid is None:
            return _quantized(args, source, target)
        rows, changes = _on_grid(args, source, target)
        rounded.update(changes)
        return rows

    rows = write(args, make)
    for name in sorted(rounded, key=lambda key: -rounded[key])[:5]:
        print(f"{name} was rounded to the grid: changed by {rounded[name]:.3g} at most.", file=sys.stderr)
    show(args, summary(rows))
    return None


def write(
    args: argparse.Namespace, make: Callable[[Path, Path], list], positional: Sequence[str] = ("model", "out")
) -> list:
    """Have a folder written that is there as a whole or not at all, with progress bars on terminals only.

    Args:
        args: of the command line: `model`, `out` and `overwrite`.
        make: is given the model's path and an empty folder to fill, and returns what it stored.
        positional: names of the command's positional arguments, in order, for the card.
    """
    import transformers
    from safetensors import SafetensorError

    from ..integrations import folders

    folders.check_new(args.out, args.overwrite)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    source = folders.find(args.model)
    try:
        with folders.new_folder(args.out, args.overwrite) as target:
            rows = make(source, target)
            if (target / "config.json").exists():
                _write_card(args, positional, source, target)
            return rows
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{args.out} was not written, and what was there is as it was: {error}.") from error


def show(args: argparse.Namespace, table: dict, **more: object) -> None:
    """Print a table as text, or as JSON with what else there is to say."""
    if args.json:
        about = {"model": args.model, "out": str(args.out), "coding": args.coding, **more}
        print(json.dumps({**about, **table}, indent=2))
    else:
        print(as_text(table))


def _write_card(args: argparse.Namespace, positional: Sequence[str], source: Path, target: Path) -> None:
    """A card of what was made, in the place of the source's, which describes another model."""
    from ..integrations.cards import Marker, base_of, collect, marker_of, read_license, write_card
    from .repeat import command_line

    known = marker_of(source) or Marker(base_of(args.model), read_license(str(source)))
    commands = [*known.commands, command_line(args, positional)]
    try:
        facts = collect(target, Marker(known.base, known.license, commands))
        card = write_card(facts, args.out.absolute().name)
    except ValueError as error:  # a checkpoint is worth more than its card
        print(f"{args.out} has no card: {error}", file=sys.stderr)
        return
    (target / "README.md").write_text(card, encoding="utf-8")


def _on_grid(args: argparse.Namespace, source: Path, target: Path):
    from tqdm import tqdm

    from ..integrations.compression import compress_on_grid

    with tqdm(desc="Coding", disable=not sys.stderr.isatty()) as bar:

        def progress(total: int):
            bar.reset(total)
            return bar.update

        return compress_on_grid(source, target, args.lossless_grid, args.coding, args.round, args.keep, progress)


def _quantized(args: argparse.Namespace, source: Path, target: Path):
    from ..integrations.compression import compress
    from ..integrations.transformers import GGConfig

    targets = {"target_bits": args.target_bits, "target_snr": args.target_snr}
    options = {key: value for key, value in targets.items() if value is not None}
    config = GGConfig(
        weight_format=args.format or ("grid" if options else None),
        coding=args.coding,
        modules_to_not_convert=args.keep or None,
        quantize_embeddings=args.quantize_embeddings,
        quantize_lm_head=args.quantize_lm_head,
        **options,
    )
    return compress(source, target, config, args.max_shard_size)


def step(text: str) -> float:
    """The step of a grid: `2^-13`, `1/8192` or a decimal number.

    Raises:
        argparse.ArgumentTypeError: something else, or not positive.
    """
    number = r"[0-9.]+(?:[eE][-+]?[0-9]+)?"
    power, ratio = re.fullmatch(r"2(?:\^|\*\*)(-?\d+)", text), re.fullmatch(f"({number})/({number})", text)
    try:
        whole = 2.0 ** int(power[1]) if power else float(ratio[1] if ratio else text)
        value = whole / float(ratio[2]) if ratio else whole
    except (ValueError, OverflowError, ZeroDivisionError):
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a step is a positive number such as 2^-13 or 0.001, got {text!r}")
    return value


def summary(rows: Sequence) -> dict:
    """Rows of `StoredTensor` by the kind of tensor, and all together.

    Returns:
        `kinds`, a list, and `total`: for each the tensors, their numbers, bytes before and after; for coded ones the
        bits a number, the order-0 entropy in bits, and the SNR in dB (None where unknown).
    """
    kinds: dict[str, list] = {}
    for row in rows:
        kinds.setdefault(_kind(row.name) if not math.isnan(row.entropy) else "not coded", []).append(row)
    groups = [_group(kind, members) for kind, members in kinds.items()]
    groups.sort(key=lambda group: (group["kind"] == "not coded", -group["bytes_before"]))
    coded = [row for row in rows if not math.isnan(row.entropy)]
    total = _group("total", list(rows))
    figures = _group("", coded) if coded else {}
    total.update({key: figures.get(key) for key in ("bits", "entropy", "snr")})
    return {"kinds": groups, "total": total}


def _group(kind: str, rows: list) -> dict:
    numbers = sum(row.count for row in rows)
    after = sum(row.after for row in rows)
    coded = bool(rows) and not any(math.isnan(row.entropy) for row in rows)
    signal, noise = sum(row.signal for row in rows), sum(row.noise for row in rows)
    return {
        "kind": kind,
        "tensors": len(rows),
        "numbers": numbers,
        "bytes_before": sum(row.before for row in rows),
        "bytes_after": after,
        "bits": 8 * after / max(numbers, 1) if coded else None,
        "entropy": sum(row.entropy * row.count for row in rows) / max(numbers, 1) if coded else None,
        "snr": 10 * math.log10(signal / noise) if coded and noise > 0 and signal > 0 else None,
        "exact": coded and noise == 0,
    }


def as_text(table: dict) -> str:
    """The table for people."""
    lines = [
        f"{'kind':28} {'tensors':>7} {'numbers':>13} {'MB before':>10} {'MB after':>9} {'bits':>6} {'entropy':>7} "
        f"{'SNR dB':>6}"
    ]
    for group in [*table["kinds"], table["total"]]:
        bits, entropy, snr = (group[key] for key in ("bits", "entropy", "snr"))
        columns = [
            f"{bits:6.3f}" if bits is not None else f"{'':6}",
            f"{entropy:7.3f}" if entropy is not None else f"{'':7}",
            "exact" if group["exact"] else f"{snr:.1f}" if snr is not None else "",
        ]
        lines.append(
            f"{group['kind']:28} {group['tensors']:7} {group['numbers']:13,} {group['bytes_before'] / 1e6:10.2f} "
            f"{group['bytes_after'] / 1e6:9.2f} {columns[0]} {columns[1]} {columns[2]:>6}"
        )
    total = table["total"]
    share = total["bytes_after"] / max(total["bytes_before"], 1)
    lines.append(f"{total['bytes_before'] / 1e6:.1f} MB became {total['bytes_after'] / 1e6:.1f} MB ({share:.1%}).")
    return "\n".join(lines)


def _kind(name: str) -> str:
    """A tensor's name without what says in which layer it is."""
    parts = [part for part in name.removesuffix(".weight").split(".") if not part.isdigit()]
    return ".".join(parts[-2:])
