"""A model of which only the routers are trained, and which is given back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .adapter import router_parameters
from .routers import Router


class Frozen:
    """Which parameters of a model want gradients: those of some routers, and afterwards those that did before.

    Args:
        model: as it is now, so it is given back.
        routers: to be trained.
    """

    def __init__(self, model: nn.Module, routers: Sequence[Router]) -> None:
        self.model, self.routers = model, routers
        self.before = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def freeze(self) -> None:
        """Leave gradients to the routers alone."""
        self.model.requires_grad_(False)
        for parameter in router_parameters(self.routers).values():
            parameter.requires_grad_(True)

    def undo(self) -> None:
        """Give all parameters back what they had."""
        for parameter, wanted in self.before.items():
            parameter.requires_grad_(wanted)

    @contextlib.contextmanager
    def on_errors(self) -> Iterator[None]:
        """`undo` if the block fails."""
        try:
            yield
        except BaseException:
            self.undo()
            raise


@contextlib.contextmanager
def as_adapter(model: Any) -> Iterator[None]:
    """`Trainer` refuses a quantized model without adapters; the routers, in full precision, are what is trained."""
    before = getattr(model, "_hf_peft_config_loaded", None)
    if not getattr(model, "is_quantized", False) or before:
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = False


def unsupported(what: str) -> ValueError:
    """The error for a way of training that does not work with RoMA."""
    return ValueError(
        f"{what} is not supported: start one process for each device (torchrun), with DDP or FSDP 2, without "
        "compilation; the frozen part of the model needs neither gradients nor optimizer states."
    )
