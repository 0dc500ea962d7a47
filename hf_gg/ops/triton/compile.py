"""Compile the Triton kernels ahead of time, on a machine without a GPU: do they compile, how large, do they spill?

    python -m hf_gg.ops.triton.compile sm_80 sm_90 gfx942

Not usable in a process that runs Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from ...formats import FORMATS, WeightFormat, get_format
from . import DTYPES
from .config import Tiles, coder_tiles, decoding, narrow, tiles_for
from .sass import dump, inner_loop


TARGETS = ("sm_80", "sm_90")
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# One number of rows for each set of tiles: decoding a token, some of them, a short prompt, a long one.
_ROWS = (1, 16, 64, 4096)
# Arguments that are multiples of 16 in real models; Triton compiles for that as it does at a launch.
_DIVISIBLE = (
    *("N", "K", "stride_x_m", "stride_grad_m", "stride_codes_batch", "stride_codes_n", "stride_scale_batch"),
    *("stride_codes_g", "stride_scale_g"),
)


@dataclass(frozen=True)
class Variant:
    """One kernel compiled for one use: what a launch would specialize on."""

    kernel: str
    label: str
    pointers: dict[str, str]
    tiles: Tiles
    constants: dict[str, object] = field(default_factory=dict)
    aligned: bool = True


def variants(
    formats: Iterable[str] | None = None, dtypes: Iterable[torch.dtype] = DTYPES, rows: Iterable[int] = _ROWS
) -> Iterator[Variant]:
    """Every kernel in every format, dtype and tile size asked for; `None` means all formats."""
    for name in FORMATS if formats is None else formats:
        fmt = get_format(name)
        for dtype in dtypes:
            yield from _variants(fmt, dtype, tuple(rows), f"{name}-{str(dtype).removeprefix('torch.')}")


def _variants(fmt: WeightFormat, dtype: torch.dtype, rows: tuple[int, ...], label: str) -> Iterator[Variant]:
    pointer = _POINTERS[dtype]
    codes = {"codes_ptr": "*u8", "scale_ptr": "*fp32"}
    constants: dict[str, object] = dict(decoding(fmt, torch.float32))
    del constants["UNSHIFT"], constants["PTX"]
    for per_column in (False, True):
        yield Variant(
            "dequantize_kernel",
            f"{label}-{'column' if per_column else 'row'}",
            {**codes, "out_ptr": pointer},
            tiles_for("dequantize", 1, dtype),
            {**constants, "SCALE_PER_COLUMN": per_column, "stride_codes_k": 1, "stride_scale": 1},
        )
    constants = {**decoding(fmt, dtype, packed=True), "UPCAST": False, "stride_codes_k": 1, "stride_scale": 1}
    of_linear = {**constants, "stride_x_k": 1, "EVEN": True, "SPLIT": 1}
    of_grad = {**constants, "stride_grad_n": 1}
    of_groups = {**constants, "stride_x_k": 1, "EVEN": True, "SCALE_PER_K": False, "GROUPS": 64}
    linear = {**codes, "x_ptr": pointer, "bias_ptr": pointer, "y_ptr": pointer}
    grad = {**codes, "grad_ptr": pointer, "out_ptr": pointer}
    groups = {**codes, "x_ptr": pointer, "ends_ptr": "*i32", "y_ptr": pointer}
    for count in rows:
        tiles = tiles_for("linear", count, dtype)
        yield Variant("linear_kernel", f"{label}-{count}", linear, tiles, of_linear)
        if tiles.programs:
            parts = {**linear, "y_ptr": "*fp32"}
            yield Variant("linear_kernel", f"{label}-{count}-split", parts, tiles, {**of_linear, "SPLIT": 4})
        yield Variant("grad_input_kernel", f"{label}-{count}", grad, tiles_for("grad_input", count, dtype), of_grad)
        yield Variant("grouped_kernel", f"{label}-{count}", groups, tiles_for("grouped", count, dtype), of_groups)
        turned = {**of_groups, "SCALE_PER_K": True, "stride_codes_k": None, "stride_codes_n": 1}
        del turned["stride_codes_k"]
        tiles = tiles_for("grouped_transposed", count, dtype)
        yield Variant("grouped_kernel", f"{label}-{count}-transposed", groups, tiles, turned)
    # odd sizes and no bias
    no_bias = {**of_linear, "bias_ptr": None, "EVEN": False}
    for kernel, pointers, settings in (
        ("linear", linear, no_bias),
        ("grad_input", grad, of_grad),
        ("grouped", groups, {**of_groups, "EVEN": False}),
    ):
        tiles = narrow(tiles_for(kernel, 64, dtype))
        yield Variant(f"{kernel}_kernel", f"{label}-odd", pointers, tiles, settings, False)
    added = {"parts_ptr": "*fp32", "scale_ptr": "*fp32", "bias_ptr": pointer, "y_ptr": pointer}
    constants = {"UNSHIFT": constants["UNSHIFT"], "SPLIT": 4, "stride_scale": 1}
    yield Variant("add_parts_kernel", label, added, Tiles(1, 256, 1, 4, 1), constants)


def compile_all(
    targets: Iterable[str] = TARGETS,
    formats: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] = DTYPES,
    rows: Iterable[int] = _ROWS,
) -> dict[str, dict[str, int | str]]:
    """Compile every kernel to PTX and machine code.

    Args:
        targets: compute capabilities, such as `"sm_80"`, and AMD's devices, such as `"gfx942"`.
        formats: weight formats, all by default.
        dtypes: dtypes of x and of the result.
        rows: numbers of rows of x; the tiles depend on them.

    Returns:
        By `"target/kernel/format-dtype-use"`: `ptx` (the text), `ptx_bytes`, `cubin_bytes`, `shared_bytes`, `warps`,
        and where the compiler's tools tell them `registers` a thread, `spill_bytes` a thread (its stack) and what
        `sass.inner_loop` counts, with `weights`, those that a thread decodes in a turn of that loop. For AMD:
        `amdgcn`, `hsaco_bytes`, `warps`, `registers`, `spill_bytes`.

    Raises:
        ValueError: a malformed target, an unknown format.
        RuntimeError: the process runs Triton's interpreter. Triton's own errors where a kernel does not compile.
    """
    places = {target: _place(target) for target in targets}
    wanted = tuple(variants(formats, tuple(dtypes), tuple(rows)))
    from . import kernels

    if kernels.INTERPRETED:
        raise RuntimeError("Triton's interpreter is on in this process: unset TRITON_INTERPRET to compile kernels.")
    return {
        f"{target}/{variant.kernel.removesuffix('_kernel')}/{variant.label}": _compile(
            getattr(kernels, variant.kernel), variant, place
        )
        for target, place in places.items()
        for variant in wanted
    }


def compile_coder(targets: Iterable[str] = TARGETS, bits: Iterable[int] = (14, 16)) -> dict[str, dict[str, int | str]]:
    """Compile the entropy decoder; targets, results and errors as for `compile_all`, and AMD's, such as `"gfx942"`."""
    from . import coder_kernels, kernels

    if kernels.INTERPRETED:
        raise RuntimeError("Triton's interpreter is on in this process: unset TRITON_INTERPRET to compile kernels.")
    pointers = {"states_ptr": "*i32", "words_ptr": "*i16", "ends_ptr": "*i64", "slots_ptr": "*u8", "table_ptr": "*i32"}
    pointers |= {"out_ptr": "*u8", "found_ptr": "*i32"}
    found = {}
    for target in targets:
        for precision in bits:
            constants: dict[str, object] = {"BITS": precision, "MOST_LANES": 32}
            variant = Variant("rans_decode_kernel", str(precision), pointers, coder_tiles(), constants, aligned=False)
            found[f"{target}/rans_decode/{precision}"] = _compile(
                coder_kernels.rans_decode_kernel, variant, _place(target)
            )
    return found


def _place(target: str) -> int | str:
    """A compute capability, or the name of an AMD device."""
    if re.fullmatch(r"gfx\w+", target):
        return target
    match = re.fullmatch(r"sm_(\d+)", target)
    if match is None:
        raise ValueError(f"targets: {target!r} is not a compute capability ('sm_90') or an AMD device ('gfx942').")
    return int(match.group(1))


def _compile(kernel, variant: Variant, place: int | str) -> dict[str, int | str]:
    """Compile for a compute capability, such as 90, or for an AMD device, such as "gfx942"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tiles, names = variant.tiles, kernel.arg_names
    blocks = {"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k}
    constants = {**variant.constants, **{name: size for name, size in blocks.items() if name in names}}
    if isinstance(place, str) and "PTX" in constants:
        constants["PTX"] = ""
    signature = {name: "constexpr" if name in constants else variant.pointers.get(name, "i32") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if variant.aligned and (signature[name].startswith("*") or (signature[name] == "i32" and name in _DIVISIBLE))
    }
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("hip", place, 64) if isinstance(place, str) else GPUTarget("cuda", place, 32)
    compiled = triton.compile(source, target=target, options=tiles.options)
    if isinstance(place, str):
        text = compiled.asm["amdgcn"]
        used = {key: re.search(rf"\.{key}:\s+(\d+)", text) for key in ("vgpr_count", "vgpr_spill_count")}
        registers, spilled = (0 if found is None else int(found.group(1)) for found in used.values())
        return {
            "amdgcn": text,
            "hsaco_bytes": len(compiled.asm["hsaco"]),
            "warps": tiles.warps,
            "registers": registers,
            "spill_bytes": 4 * spilled,
        }
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    return {
        "ptx": ptx,
        "ptx_bytes": len(ptx),
        "cubin_bytes": len(cubin),
        "shared_bytes": compiled.metadata.shared,
        "warps": tiles.warps,
        "weights": tiles.n * tiles.k // (32 * tiles.warps),
        **_resources(cubin),
        **inner_loop(cubin),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes a thread from the machine code, or nothing where Triton came without the tool."""
    text = dump("cuobjdump", cubin, "--dump-resource-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(match.group(1)), "spill_bytes": int(match.group(2))} if match else {}


def main(arguments: list[str]) -> int:
    """Print one line a kernel; the arguments are targets, sm_80 and sm_90 by default."""
    columns = ("ptx_bytes", "cubin_bytes", "shared_bytes", "warps", "registers", "spill_bytes")
    print(",".join(("kernel", *columns)))
    targets = tuple(arguments) or TARGETS
    for name, facts in {**compile_all(targets), **compile_coder(targets)}.items():
        print(",".join([name, *(str(facts.get(column, "")) for column in columns)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
