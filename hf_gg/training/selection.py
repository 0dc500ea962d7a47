"""Which parameters of a model the penalty acts on."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn


# what PEFT puts into names
_WRAPPERS = ("base_layer", "backslash_delta", "modules_to_save")


def select_matrices(
    model: nn.Module,
    modules: str | Sequence[str] | None = None,
    embeddings: bool = False,
    trainable: bool = True,
) -> dict[str, nn.Parameter]:
    """The trainable matrices of a model: parameters of two dimensions or more, each once.

    Norms, biases, adapters' own matrices and, unless asked for, embeddings (with an output layer that is tied to them)
    are left alone.

    Args:
        model: any module.
        modules: names of modules to take with all that is in them, each a whole name or parts of one between dots
            (`"mlp"`, `"layers.3"`), or a regular expression for the whole name; None for all.
        embeddings: take `nn.Embedding` too.
        trainable: take only what is trained; else frozen matrices too, codes among them.

    Returns:
        Parameters by name, in the model's order.

    Raises:
        ValueError: a name matches no module, what it names is frozen, or nothing is left.
        TypeError: a name matches quantized weights.
    """
    patterns = [modules] if isinstance(modules, str) else None if modules is None else list(modules)
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    adapters = _adapter_modules(model)
    used: dict[str, list[str]] = {pattern: [] for pattern in patterns or ()}
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    frozen = 0
    for name, module in model.named_modules():
        hits = [pattern for pattern in patterns or () if _matches(name, pattern)]
        if name in adapters or (patterns is not None and not hits):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{own}" if name else own
            # ZeRO-3 keeps the true shape of what it has taken apart
            if len(getattr(parameter, "ds_shape", parameter.shape)) < 2 or (
                id(parameter) in tables and not embeddings
            ):
                continue
            if hits and not parameter.is_floating_point():
                raise TypeError(
                    f"modules={hits[0]!r} selects {full}, which is {parameter.dtype}: quantized codes cannot be "
                    "trained. Name other modules, or load the model without quantization."
                )
            if trainable and not parameter.requires_grad:
                frozen += 1
                continue
            for pattern in hits:
                used[pattern].append(full)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[full] = parameter
    for pattern, names in used.items():
        if not names:
            raise ValueError(_nothing_named(model, pattern))
    if not found:
        raise ValueError(
            f"no matrix of {type(model).__name__} is selected: {frozen} are frozen or quantized, and norms, biases, "
            f"adapters and{' ' if embeddings else ' (without embeddings=True) '}embeddings are left alone. Unfreeze "
            "some, or leave the penalty out."
        )
    return found


def kind_of(name: str) -> str:
    """The kind of layer of a parameter: its module's own name without layer numbers, such as `q_proj`."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    parts = [part for part in parts[:-1] if part not in (*_WRAPPERS, "default")] or parts
    # BERT's `output.dense` and `intermediate.dense` say little without the part before
    return ".".join(parts[-2:]) if parts[-1] in ("dense", "0") and len(parts) > 1 else parts[-1]


def _matches(name: str, pattern: str) -> bool:
    if f".{pattern}." in f".{name}.":
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"modules: {pattern!r} is neither a name nor a regular expression ({error}).") from error


def _adapter_modules(model: nn.Module) -> set[str]:
    """Names of modules inside a PEFT layer that are not its base layer: the adapters' own, but for BACKSLASH's."""
    found: set[str] = set()
    for name, module in model.named_modules():
        names = getattr(module, "adapter_layer_names", None)
        if not names or not hasattr(module, "base_layer"):
            continue
        ours = {"base_layer", *getattr(module, "penalized_names", ())}
        for child, _ in module.named_modules():
            if child and child.partition(".")[0] not in ours:
                found.add(f"{name}.{child}")
        # parameters of its own, as in a ParameterDict, are in children; the layer itself holds none to train
    return found


def _nothing_named(model: nn.Module, pattern: str) -> str:
    names = [name for name, _ in model.named_modules() if name and _matches(name, pattern)]
    if not names:
        example = next((name for name, module in model.named_modules() if isinstance(module, nn.Linear)), "")
        return (
            f"modules={pattern!r} matches no module of {type(model).__name__}. Give a module's whole name, parts "
            f"of it between dots, or a regular expression for the whole name, such as {example!r}."
        )
    return (
        f"modules={pattern!r} matches {names[0]!r} and {len(names) - 1} more, but none holds a trainable matrix: "
        "they are frozen, or hold norms, biases or embeddings only (embeddings=True takes those)."
    )


def check_number(name: str, value: object, low: float = 0.0, high: float = float("inf")) -> float:
    """`value` as a float, or a `TypeError` / `ValueError` that says what `name` may be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not (low <= value <= high) or value == float("inf"):
        limit = f" and at most {high:g}" if high < float("inf") else ""
        raise ValueError(f"{name} must be finite, at least {low:g}{limit}, got {value}.")
    return float(value)
