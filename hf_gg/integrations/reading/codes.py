"""Weights that are stored as codes: a decoder is a function in `DECODERS`; the first that knows a tensor gets it."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping

import torch

from ... import coding
from ...coding.levels import decode_levels, is_levels, read_levels_header
from ...formats import FORMATS, get_format
from ...nn.base import OUTLIERS
from ...ops.outliers import check_outliers, put_outliers
from .entry import Entry


# (entry, all entries by name, the weight format that the checkpoint names) -> the entry that decodes, or None.
Decoder = Callable[[Entry, Mapping[str, Entry], str | None], Entry | None]


def decode_entry(entry: Entry, entries: Mapping[str, Entry], weight_format: str | None) -> Entry:
    """The entry of the decoded weights if `entry` holds codes of this package, else the entry itself.

    Raises:
        ValueError: the header of coded weights is damaged.
    """
    for decoder in DECODERS:
        found = decoder(entry, entries, weight_format)
        if found is not None:
            return found
    return entry


def row_codes(entry: Entry, entries: Mapping[str, Entry], weight_format: str | None) -> Entry | None:
    """uint8 codes `[…, out, in, 1]` (version 1: `[…, out, in]`) with a float32 `<name>_scale`, plain or entropy-coded.

    Coded they are one 1-D payload of `hf_gg.coding`. Grids may have `<name>_outlier_index` and `_outlier_value`.
    """
    for suffix, what in ((("_scale",), "scales"), (OUTLIERS, "outliers")):
        own = next((end for end in suffix if entry.name.endswith(end)), None)
        codes = entries.get(entry.name.removesuffix(own)) if own else None
        if codes is not None and codes.stored == "uint8" and f"{codes.name}_scale" in entries:
            return dataclasses.replace(entry, reason=f"the {what} of the codes {codes.name}")
    scale = entries.get(f"{entry.name}_scale")
    if scale is None and entry.stored == "uint8" and weight_format in FORMATS and _are_codes(entry):
        raise ValueError(f"{entry.name}_scale is missing, and {_where(entry)} holds codes: download or save it again.")
    if entry.stored != "uint8" or scale is None or scale.stored != "float32":
        return None
    if weight_format not in FORMATS:
        known = (
            f"of the format {weight_format!r}" if weight_format else "of a format that neither file nor config names"
        )
        return dataclasses.replace(entry, reason=f"codes {known}, which this version cannot decode")
    shape, coded = entry.shape, len(entry.shape) == 1
    if coded:
        shape = tuple(coding.info(_read(entry), _where(entry)).shape)
    if len(shape) == len(scale.shape) + 1 and shape[-1] == 1:
        shape = shape[:-1]
    outliers = [entries[name] for name in (f"{entry.name}{suffix}" for suffix in OUTLIERS) if name in entries]
    return dataclasses.replace(
        entry,
        shape=shape,
        stored=weight_format,
        reason=None,
        nbytes=entry.nbytes + scale.nbytes,
        read=functools.partial(_decode_rows, entry, scale, outliers, shape, coded, weight_format),
    )


def _are_codes(entry: Entry) -> bool:
    """Whether uint8 numbers have one of the two forms in which codes are saved."""
    if len(entry.shape) == 1:
        return coding.is_coded(_read(entry))
    return len(entry.shape) > 2 and entry.shape[-1] == 1


def coded_floats(entry: Entry, entries: Mapping[str, Entry], weight_format: str | None) -> Entry | None:
    """Floats on a grid that are coded without loss: one 1-D payload of `hf_gg.coding.levels`."""
    if entry.stored != "uint8" or len(entry.shape) != 1:
        return None
    payload = _read(entry)
    if not is_levels(payload):
        return None
    dtype, shape = read_levels_header(payload, _where(entry))
    return dataclasses.replace(
        entry,
        shape=tuple(shape),
        stored=str(dtype).removeprefix("torch."),
        reason=None,
        read=functools.partial(_decode_floats, entry, tuple(shape)),
    )


def _decode_rows(
    entry: Entry, scale: Entry, outliers: list[Entry], shape: tuple[int, ...], coded: bool, weight_format: str
) -> torch.Tensor:
    codes, scales, fmt = _read(entry), _read(scale), get_format(weight_format)
    if coded:
        _check_size(shape, _where(entry))
        codes = coding.decode(codes, _where(entry))
    codes = codes.view(shape)
    fmt.validate(codes, _where(entry))
    if not bool(scales.isfinite().all()):
        raise ValueError(f"{scale.name} in {scale.file} holds NaN or infinity: the checkpoint is damaged.")
    lists = [_read(part) for part in outliers]
    if lists:
        if len(lists) == 1:
            raise ValueError(f"{_where(entry)} has {outliers[0].name} and not both lists of outliers: it is damaged.")
        check_outliers(_where(entry), codes, *lists)
    weight = fmt.decode(codes)
    try:
        weight = weight.mul_(scales)
    except RuntimeError as error:
        raise ValueError(
            f"{scale.name} in {scale.file} has the shape {list(scales.shape)}, which does not fit the codes "
            f"{list(shape)}: the checkpoint is damaged."
        ) from error
    return put_outliers(weight, *lists) if lists else weight


def _decode_floats(entry: Entry, shape: tuple[int, ...]) -> torch.Tensor:
    _check_size(shape, _where(entry))
    return decode_levels(_read(entry), _where(entry))


def _check_size(shape: tuple[int, ...], where: str) -> None:
    """Before memory is taken: a payload of some bytes may promise terabytes."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        return
    if 4 * math.prod(shape) > memory:
        raise ValueError(f"{where} is coded with the shape {list(shape)}, more than memory holds: it is damaged.")


def _read(entry: Entry) -> torch.Tensor:
    assert entry.read is not None
    return entry.read()


def _where(entry: Entry) -> str:
    return f"{entry.name} in {entry.file}"


DECODERS: tuple[Decoder, ...] = (row_codes, coded_floats)
