"""Fully sharded data parallelism (`torch.distributed.fsdp.fully_shard`) over quantized modules.

Codes are uint8, which it shards and gathers as they are. Its mixed precision casts every floating point parameter,
scales and outliers too, and a scale in bfloat16 is another weight; PyTorch has no setting for a parameter to be left
alone.
"""

from __future__ import annotations

import functools
import importlib

from torch import nn

from ..nn import RF8Experts
from ..nn.base import OUTLIERS, QuantizedWeight


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module itself."""
    # by name: not every build of torch has the class
    return any(base.__name__ == "FSDPModule" for base in type(module).__bases__)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without the one that `fully_shard` puts in its place."""
    return type(module).__bases__[-1] if is_fully_sharded(module) else type(module)


@functools.cache
def keep_scales_in_float32() -> None:
    """Make mixed precision leave the scales of quantized modules alone, in this process; once is enough.

    Where PyTorch has changed inside, nothing happens here, and the operators refuse a scale that was cast.
    """
    try:
        parameters = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param")
        cls = parameters.FSDPParam
        original = cls.init_dtype_attrs
    except (ImportError, AttributeError):
        return

    @functools.wraps(original)
    def init_dtype_attrs(self, *args, **kwargs):
        original(self, *args, **kwargs)
        info = getattr(self, "_module_info", None)
        module, name = getattr(info, "module", None), getattr(info, "param_name", "")
        if isinstance(module, (QuantizedWeight, RF8Experts)) and name.endswith(("_scale", OUTLIERS[1])):
            self.param_dtype = None

    cls.init_dtype_attrs = init_dtype_attrs
