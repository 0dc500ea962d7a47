"""Weights that are stored as codes: a decoder is a function in `DECODERS`; the first that knows a tensor gets it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch

from ...formats import FORMATS, get_format
from .entry import Entry


# (entry, all entries by name, the weight format that the checkpoint names) -> the entry that decodes, or None.
Decoder = Callable[[Entry, Mapping[str, Entry], str | None], Entry | None]


def decode_entry(entry: Entry, entries: Mapping[str, Entry], weight_format: str | None) -> Entry:
    """The entry of the decoded weights if `entry` holds codes of this package, else the entry itself."""
    for decoder in DECODERS:
        found = decoder(entry, entries, weight_format)
        if found is not None:
            return found
    return entry


def row_codes(entry: Entry, entries: Mapping[str, Entry], weight_format: str | None) -> Entry | None:
    """uint8 codes `[…, out, in, 1]` (version 1: `[…, out, in]`) with a float32 `<name>_scale`: RF8 and its kin."""
    if entry.stored == "float32" and entry.name.endswith("_scale"):
        codes = entries.get(entry.name.removesuffix("_scale"))
        if codes is not None and codes.stored == "uint8":
            return dataclasses.replace(entry, reason=f"the scales of the codes {codes.name}")
        return None
    scale = entries.get(f"{entry.name}_scale")
    if entry.stored != "uint8" or scale is None or scale.stored != "float32":
        return None
    if weight_format not in FORMATS:
        known = (
            f"of the format {weight_format!r}" if weight_format else "of a format that neither file nor config names"
        )
        return dataclasses.replace(entry, reason=f"codes {known}, which this version cannot decode")
    shape = entry.shape
    if len(shape) == len(scale.shape) + 1 and shape[-1] == 1:
        shape = shape[:-1]
    return dataclasses.replace(
        entry,
        shape=shape,
        stored=weight_format,
        reason=None,
        nbytes=entry.nbytes + scale.nbytes,
        read=functools.partial(_decode_rows, entry, scale, shape, weight_format),
    )


def _decode_rows(entry: Entry, scale: Entry, shape: tuple[int, ...], weight_format: str) -> torch.Tensor:
    assert entry.read is not None and scale.read is not None
    codes, scales, fmt = entry.read().view(shape), scale.read(), get_format(weight_format)
    fmt.validate(codes, f"{entry.name} in {entry.file}")
    if not bool(scales.isfinite().all()):
        raise ValueError(f"{scale.name} in {scale.file} holds NaN or infinity: the checkpoint is damaged.")
    weight = fmt.decode(codes)
    try:
        return weight.mul_(scales)
    except RuntimeError as error:
        raise ValueError(
            f"{scale.name} in {scale.file} has the shape {list(scales.shape)}, which does not fit the codes "
            f"{list(shape)}: the checkpoint is damaged."
        ) from error


DECODERS: tuple[Decoder, ...] = (row_codes,)
