"""The short way of a linear layer of few rows on a CPU: from Python through PyTorch's dispatcher straight to C.

`hf_gg::linear` has its autograd in Python, and its errors; both cost more time than a small layer. Where no gradient
can be wanted and a C kernel is registered, `linear` calls an operator that has nothing in Python. It declines what it
does not take by returning None, and the caller goes the long way, which also finds what is wrong.
"""

from __future__ import annotations

import os

import torch

from .cpu.boxed import format_number


_library = torch.library.Library("hf_gg", "FRAGMENT")
_library.define(
    "few_rows(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int format) -> Tensor?",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# for other devices; C registers the kernel of main memory
_library.impl("few_rows", lambda x, codes, scale, bias, format: None, "CompositeExplicitAutograd")
# no gradient: `linear` below is only called where there is none
_library.impl("few_rows", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("hf_gg::few_rows")
def _(x, codes, scale, bias, format):
    return None  # a tensor among them has no memory: `hf_gg::linear` says what then


_few_rows = torch.ops.hf_gg.few_rows.default
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, format: str, backend: str
) -> torch.Tensor | None:
    """`hf_gg.ops.linear` where no gradient is recorded and nothing traced, or None: not a case for this way."""
    if backend == "auto":
        backend = os.environ.get("HF_GG_BACKEND") or "auto"
    if backend not in ("auto", "cpu") or type(x) not in _PLAIN or type(codes) not in _PLAIN:
        return None
    if torch._C._functorch.maybe_current_level() is not None:  # under vmap and the like a tensor hides its own kind
        return None
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
        return None  # what records the call must see the operator that takes any number of rows
    number = format_number(format) if x.is_cpu else None
    return None if number is None else _few_rows(x, codes, scale, bias, number)
