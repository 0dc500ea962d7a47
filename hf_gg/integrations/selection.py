"""Which modules of a model are quantized, which stay as they are, and why; and the exchange itself."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from ..nn import RF8Embedding, RF8Experts, RF8Linear
from ..nn.base import QuantizedWeight
from ..nn.linear import is_conv1d
from . import fsdp


@dataclass
class Selection:
    """Module names with what becomes of them.

    Attributes:
        linears: `nn.Linear` and `Conv1D` to replace.
        experts: modules of fused experts to convert.
        embeddings: embeddings to replace.
        skipped: modules that hold matrices and stay as they are, with the reason.
    """

    linears: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.linears) + len(self.experts) + len(self.embeddings)


def select(model: nn.Module, config, from_checkpoint: bool) -> Selection:
    """Decide for every module that holds a weight matrix.

    Args:
        model: a Transformers model, its own modules still in place.
        config: a `GGConfig`.
        from_checkpoint: the config was saved with quantized weights: it lists every module that was not converted, so
            only it decides. Otherwise the defaults and what the model's code needs are added.
    """
    selection = Selection()
    patterns = list(config.modules_to_not_convert or [])
    reasons = {} if from_checkpoint else _reasons_to_skip(model, config)
    prefix = getattr(model, "base_model_prefix", "")
    if not from_checkpoint:
        names = [name for name, _ in model.named_modules()]
        idle = [pattern for pattern in patterns if not any(matches(name, [pattern], prefix) for name in names)]
        if idle:
            warnings.warn(
                f"modules_to_not_convert: {', '.join(map(repr, idle))} matches no module of {type(model).__name__}. "
                "Give a module's whole name, its end or its beginning, or a regular expression such as "
                "'.*self_attn.*'.",
                stacklevel=2,
            )
    (input_embeddings, _), ties = embedding_modules(model), _tied_modules(model)
    inputs = {name for name, module in model.named_modules() if module is input_embeddings}
    inputs.update(*(ties.get(name, ()) for name in inputs))
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is None:
            continue
        if kind == "embeddings" and not (config.quantize_embeddings and name in inputs):
            selection.skipped[name] = "embedding"
        elif kind == "other":
            what = "an embedding" if isinstance(module, nn.Embedding) else "a layer"
            selection.skipped[name] = f"{type(module).__name__}: {what} that computes with its matrices in its own way"
        elif name in reasons:
            selection.skipped[name] = reasons[name]
        elif matches(name, patterns, prefix):
            selection.skipped[name] = "modules_to_not_convert"
        elif kind == "experts" and not config.experts:
            selection.skipped[name] = "experts=False"
        else:
            getattr(selection, kind).append(name)
    chosen = {*selection.linears, *selection.embeddings}
    for names in (selection.linears, selection.embeddings):
        for name in list(names):
            plain = ties.get(name, set()) - chosen
            if plain:  # they would share codes, and read them as numbers
                names.remove(name)
                selection.skipped[name] = f"tied to {min(plain)}, which is not quantized"
    return selection


def leave_out(selection: Selection, reasons: dict[str, str]) -> None:
    """Take modules out of a selection; the reasons are noted."""
    for names in (selection.linears, selection.experts, selection.embeddings):
        names[:] = [name for name in names if name not in reasons]
    selection.skipped.update(reasons)


def convert_on_meta(model: nn.Module, selection: Selection, config) -> None:
    """Exchange the selected modules of a model on the meta device for empty quantized ones."""
    options = config.module_options()
    for name in selection.linears:
        replace_module(model, name, RF8Linear.like(model.get_submodule(name), **options))
    for name in selection.embeddings:
        replace_module(model, name, RF8Embedding.like(model.get_submodule(name), **options))
    for name in selection.experts:
        RF8Experts.convert_(model.get_submodule(name), **options)
    mark_quantized(model)


def convert(
    model: nn.Module, selection: Selection, config, scales: Mapping, coded: dict[str, dict[str, tuple]]
) -> None:
    """Exchange the selected modules of a model in memory for quantized ones.

    Args:
        model: in full precision.
        selection: the modules.
        config: a `GGConfig`.
        scales: steps of a grid by module name, of experts by the weight's name in it.
        coded: codes, scale and outliers by module name and the weight's name in it, of what is rounded already;
            emptied on the way, so that only one of the two is in memory.
    """
    options = config.module_options()
    for name in (*selection.linears, *selection.embeddings):
        module, own = model.get_submodule(name), {**options, "scale": scales.get(name, config.scale)}
        new: nn.Module
        if name in coded:
            kind = RF8Linear if name in selection.linears else RF8Embedding
            new = kind.from_codes(module, *coded.pop(name)["weight"], **options)  # type: ignore[arg-type]
        elif name in selection.linears:
            new = RF8Linear.from_linear(module, name=name, **own)
        else:
            new = RF8Embedding.from_embedding(module, **own)  # type: ignore[arg-type]  # by its kind
        replace_module(model, name, new)
    for name in selection.experts:
        own = {**options, "scale": scales.get(name, config.scale), "coded": coded.pop(name, None)}
        RF8Experts.convert_(model.get_submodule(name), **own)
    for _, module in quantized_modules(model):
        module.scale_mode = options["scale"]


def mark_quantized(model: nn.Module) -> None:
    """Tell Transformers and FSDP what they must know of quantized modules."""
    fsdp.keep_scales_in_float32()
    for _, module in quantized_modules(model):
        # their operators take local tensors; an embedding must know which part of the vocabulary is its own
        module._hf_quantized_needs_local_tp = not isinstance(module, RF8Embedding)
        module._is_hf_initialized = True  # no initializer may draw into codes
    tied = getattr(model, "all_tied_weights_keys", None)
    if not tied:
        return
    # where codes are tied, so are their scales
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for target, source in list(tied.items()):
        if {f"{target}_scale", f"{source}_scale"} <= parameters:
            tied[f"{target}_scale"] = f"{source}_scale"


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module at the place of another one."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def quantized_modules(model: nn.Module):
    """Yield (name, module) of the quantized modules of a model."""
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedWeight, RF8Experts)):
            yield name, module


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a quantized module that hold codes."""
    return module.quantized_names if isinstance(module, RF8Experts) else ("weight",)


def code_parameters(model: nn.Module):
    """Yield (parameter name, module, name in the module) of everything that holds codes."""
    for name, module in quantized_modules(model):
        for weight in weight_names(module):
            yield f"{name}.{weight}" if name else weight, module, weight


def with_skipped(names: list[str], skipped: list[str], converted: list[str]) -> list[str]:
    """The patterns of a config: `names`, and the skipped modules with `#` for the layer number where all layers
    are."""
    groups: dict[str, list[str]] = {}
    for name in skipped:
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".#", name), []).append(name)
    result = set(names)
    for pattern, members in groups.items():
        alone = len(members) == 1 or any(re.fullmatch(_regex(pattern), name) for name in converted)
        result.update(members if alone else [pattern])
    return sorted(result)


def check_patterns(patterns) -> None:
    """Raise a `ValueError` if `patterns` is no list of names and regular expressions."""
    if not isinstance(patterns, (list, tuple, set)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"modules_to_not_convert must be a list of names, got {patterns!r}.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"modules_to_not_convert: {pattern!r} is neither a name nor a regular expression ({error})."
            ) from error


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\#", r"\d+")


def matches(name: str, patterns: list[str], prefix: str) -> bool:
    """Whether a module is meant by one of the user's or the checkpoint's patterns.

    A pattern is a name, its end or its beginning up to a dot, a name with `#` for any number, or a regular expression
    in Transformers' sense. The base model's prefix may be there or not: a checkpoint of a model with a head also
    opens as the model without.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = {name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"} if prefix else {name}
    for pattern in patterns:
        if "#" in pattern:
            if any(re.fullmatch(_regex(pattern), candidate) for candidate in names):
                return True
        elif any(not should_convert_module(candidate, [pattern]) for candidate in names):
            return True
    return False


def kind_of(module: nn.Module) -> str | None:
    """`"linears"`, `"experts"`, `"embeddings"`, `"other"` for matrices in a layout of its own, or None."""
    cls = fsdp.own_class(module)
    if cls is nn.Linear or is_conv1d(module):
        return "linears"
    if cls is nn.Embedding:
        return "embeddings"
    if isinstance(module, (QuantizedWeight, RF8Experts)):
        return None
    if RF8Experts.weight_names(module):
        return "experts"
    matrices = any(p is not None and p.ndim >= 2 for p in module._parameters.values())
    return "other" if matrices and not isinstance(module, nn.modules.conv._ConvNd) else None


def embedding_modules(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The input and the output embeddings of a model, None where it has none."""
    found = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, method)())
        except (AttributeError, NotImplementedError):
            found.append(None)
    return found[0], found[1]


def _tied_modules(model: nn.Module) -> dict[str, set[str]]:
    """For the name of a module whose weight is tied, the names of all modules that share it."""
    groups: dict[str, set[str]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target.endswith(".weight") and source.endswith(".weight"):
            a, b = target.removesuffix(".weight"), source.removesuffix(".weight")
            group = groups.get(a, {a}) | groups.get(b, {b})
            groups.update(dict.fromkeys(group, group))
    return groups


def _reasons_to_skip(model: nn.Module, config) -> dict[str, str]:
    """Modules that stay in full precision by default, with the reason."""
    reasons: dict[str, str] = {}
    modules = dict(model.named_modules())
    keep = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    _, head = embedding_modules(model)
    for name, module in modules.items():
        for chain in _weights_read_directly(type(module)):  # type: ignore[arg-type]
            reasons[".".join((name, *chain) if name else chain)] = f"{type(module).__name__} reads its weight directly"
        if keep.intersection(name.split(".")):
            reasons[name] = "the model keeps it in float32"
        if head is not None and module is head and not config.quantize_lm_head:
            reasons[name] = "output embeddings (quantize_lm_head=False)"
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if not (config.quantize_embeddings and config.quantize_lm_head):
            reasons[target.rpartition(".")[0]] = f"tied to {source}"
            reasons[source.rpartition(".")[0]] = f"tied to {target}"
    return reasons


@functools.cache
def _weights_read_directly(cls: type) -> frozenset[tuple[str, ...]]:
    """Attribute chains `a.b` for which a class reads `self.a.b.weight` itself, other than to initialize or tie it.

    Such a read would get codes where it expects numbers (`hidden.to(self.wo.weight.dtype)`, `self.dt_proj.weight @
    x`).
    """
    found: set[tuple[str, ...]] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object) or base.__name__ == "PreTrainedModel":
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue  # no source at hand: the class is taken to call its modules
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and "init" not in function.name and "tie" not in function.name:
                found.update(_weight_chains(function))
    return frozenset(found)


def _weight_chains(function: ast.FunctionDef):
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    only_for_device = {id(node.value) for node in nodes if node.attr == "device"}
    for node in nodes:
        if node.attr != "weight" or id(node) in only_for_device:
            continue
        chain: list[str] = []
        value = node.value
        while isinstance(value, ast.Attribute):
            chain.insert(0, value.attr)
            value = value.value
        if chain and isinstance(value, ast.Name) and value.id == "self":
            yield tuple(chain)
