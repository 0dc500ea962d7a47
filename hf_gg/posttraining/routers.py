"""The routers of a mixture of experts: where they are, what they say, how their weights are exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


# Classes of routers, whose forward returns the logits over all experts first, and how logits become weights.
ROUTERS = {
    "OlmoeTopKRouter": "softmax",
    "Qwen2MoeTopKRouter": "softmax",
    "Qwen3MoeTopKRouter": "softmax",
    "MixtralTopKRouter": "softmax",
    "DeepseekV2TopkRouter": "softmax",
    "DeepseekV3TopkRouter": "sigmoid",
    "GptOssTopKRouter": "softmax",
}


@dataclass(frozen=True)
class Router:
    """A router of a model.

    Attributes:
        name: its module's name.
        module: the module.
        scores: `"softmax"` or `"sigmoid"`.
    """

    name: str
    module: nn.Module
    scores: str


def register_router(class_name: str, scores: str = "softmax") -> None:
    """Make routers of another class known.

    Args:
        class_name: its name; its forward must return the logits, [tokens, experts], first, then weights and indices
            of the chosen experts.
        scores: how logits become weights, `"softmax"` or `"sigmoid"`.

    Raises:
        ValueError: other scores.
    """
    if scores not in ("softmax", "sigmoid"):
        raise ValueError(f"scores must be 'softmax' or 'sigmoid', got {scores!r}.")
    ROUTERS[class_name] = scores


def find_routers(model: nn.Module) -> list[Router]:
    """All routers of a model, in the order of its layers.

    Raises:
        ValueError: there is none, because the model is dense or its routers are of an unknown class.
    """
    found, like = [], set()
    for name, module in model.named_modules():
        # FSDP and parametrizations put a class of their own on top
        names = [base.__name__ for base in type(module).__mro__]
        scores = next((ROUTERS[base] for base in names if base in ROUTERS), None)
        if scores is not None:
            found.append(Router(name, module, scores))
        elif names[0].endswith(("Router", "Gate")):
            like.add(names[0])
    if not found:
        about = (
            f"its routers are of the class {', '.join(sorted(like))}: see hf_gg.posttraining.roma.register_router"
            if like
            else "it is a dense model, or its routers are part of other modules"
        )
        raise ValueError(f"{type(model).__name__} has no router that can be trained; {about}.")
    return found


def choose_routers(model: nn.Module, layers: int | Sequence[int] = 5) -> list[Router]:
    """The routers of some layers.

    Args:
        layers: so many layers with experts, counted from the last (all if there are fewer), or the numbers of layers.

    Raises:
        ValueError: no router at all, or none in one of the layers.
    """
    routers = find_routers(model)
    if isinstance(layers, int):
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}.")
        return routers[-layers:]
    numbers = {_layer(router.name): router for router in routers}
    for layer in layers:
        if layer not in numbers:
            known = ", ".join(map(str, numbers))
            raise ValueError(f"layers: layer {layer} has no router; those with one are {known}.")
    if not layers:
        raise ValueError("layers is empty: give at least one layer.")
    return [numbers[layer] for layer in sorted(set(layers))]


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


class Captured:
    """What routers said in the last forward pass.

    Attributes:
        logits: of each router, [tokens, experts], part of the graph.
        experts: the experts that were chosen, [tokens, top_k].
    """

    def __init__(self) -> None:
        self.logits: dict[str, torch.Tensor] = {}
        self.experts: dict[str, torch.Tensor] = {}


@contextmanager
def capture(routers: Sequence[Router]) -> Iterator[Captured]:
    """Keep what routers say inside the block, by forward hooks. The model itself stays as it is.

    A router that runs again, such as in the recomputation of gradient checkpointing, must do so outside of the block.
    """
    captured = Captured()

    def keep(name: str):
        def hook(module: nn.Module, arguments: tuple, output: object) -> None:
            if not (isinstance(output, tuple) and len(output) == 3 and isinstance(output[0], torch.Tensor)):
                raise ValueError(
                    f"{name} ({type(module).__name__}) does not return logits, weights and indices: this release of "
                    "Transformers is not known here."
                )
            captured.logits[name], captured.experts[name] = output[0], output[2].detach()

        return hook

    handles = [router.module.register_forward_hook(keep(router.name)) for router in routers]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def routing(
    captured: Captured,
    routers: Sequence[Router],
    positions: torch.Tensor,
    length: int,
    mask_top_k: bool = False,
) -> torch.Tensor:
    """Routing weights r: scores over all experts in float32, the layers side by side.

    Softmax of the logits, or sigmoid scores that are divided by their sum.

    Args:
        captured: from `capture`.
        routers: the layers to take.
        positions: which tokens, int64 [batch] (one of each row), or bool [batch, length] (their mean).
        length: tokens in a row, padding included.
        mask_top_k: set the entries of experts that the token does not go to to zero.

    Returns:
        float32, [batch, sum of experts over the layers], part of the graph.

    Raises:
        ValueError: a router was not called, or not once for each token.
    """
    layers = []
    for router in routers:
        logits = captured.logits.get(router.name)
        if logits is None:
            raise ValueError(f"{router.name} was not called in the forward pass, so its routing cannot be seen.")
        tokens = logits.numel() // logits.shape[-1]
        if tokens != len(positions) * length:
            raise ValueError(f"{router.name} saw {tokens} tokens, not {len(positions)} rows of {length}.")
        logits = logits.view(len(positions), length, -1)
        experts = captured.experts[router.name].view(len(positions), length, -1) if mask_top_k else None
        if positions.dtype == torch.bool:
            scores = _scores(logits, router, experts)
            share = positions / positions.sum(1, keepdim=True)
            layers.append((scores * share[..., None]).sum(1))
        else:
            rows = torch.arange(len(positions), device=logits.device)
            places = rows, positions.to(logits.device)
            layers.append(_scores(logits[places], router, experts[places] if experts is not None else None))
    device = layers[0].device  # a model may be spread over several
    return torch.cat([layer.to(device) for layer in layers], -1)


def _scores(logits: torch.Tensor, router: Router, experts: torch.Tensor | None) -> torch.Tensor:
    if router.scores == "softmax":
        scores = logits.float().softmax(-1)
    else:
        scores = logits.float().sigmoid()
        scores = scores / scores.sum(-1, keepdim=True)
    if experts is not None:
        scores = scores * torch.zeros_like(scores).scatter_(-1, experts, 1)
    return scores


def last_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """The last token of each row that is not padding, int64 [batch], whichever side the padding is on.

    Raises:
        ValueError: a row of padding alone.
    """
    if not bool(attention_mask.any(1).all()):
        raise ValueError("attention_mask has a row without any token: leave empty prompts out.")
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask.bool() * places).argmax(1)
