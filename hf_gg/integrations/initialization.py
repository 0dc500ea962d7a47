"""GG initialization of Transformers models, by their own initializers.

    with gg_init(shape=1.0):
        model = AutoModelForCausalLM.from_config(config)

A model's `_init_weights` decides which parameter is drawn, zeroed or set to one, and with which standard deviation.
All of its draws go through the table `transformers.initialization.TORCH_INIT_FUNCTIONS`, behind the check that a
loaded tensor is not touched. Inside the context the entries of that table draw weight matrices from the generalized
Gaussian.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ..ggd.sampling import gg_
from ..training import initialization as plain
from ..training.initialization import GGInit


# Of this thread (or task) only: what the innermost context asks for, and the module whose initializer runs.
_wanted: contextvars.ContextVar[GGInit | None] = contextvars.ContextVar("hf_gg_init", default=None)
_module: contextvars.ContextVar[nn.Module | None] = contextvars.ContextVar("hf_gg_init_module", default=None)


def gg_init(
    shape: float = 2.0, std: str | float = "model", gain: str | float = "linear"
) -> AbstractContextManager[GGInit | None]:
    """Within this context Transformers draws new weight matrices from a generalized Gaussian.

    `from_config` draws all of them, `from_pretrained` those that the checkpoint has not (a new classification head, a
    tensor of another size with `ignore_mismatched_sizes=True`), `resize_token_embeddings` the new rows. What is loaded
    stays as it is, bit for bit. Norms, biases, class tokens, and what an initializer sets to a constant, draws around
    another mean than zero or makes orthogonal is left to the model.

    Contexts may be nested: the innermost one holds. A context is of the thread that entered it.

    Args:
        shape, std, gain: see `GGInit`.

    Raises:
        ValueError: a value out of range; in the context, `std="fan_in"` or `"fan_out"` and a parameter whose layout is
            not known.
    """
    return drawing(GGInit(shape, std, gain))


@contextmanager
def drawing(init: GGInit | None) -> Iterator[GGInit | None]:
    """`gg_init` of a `GGInit`; None changes nothing."""
    if init is None:
        yield None
        return
    with _patches:
        token = _wanted.set(init)
        try:
            yield init
        finally:
            _wanted.reset(token)


def gg_init_(
    model: nn.Module, shape: float = 2.0, std: str | float = "model", gain: str | float = "linear"
) -> nn.Module:
    """Initialize a model anew, in place, its weight matrices with generalized Gaussian draws.

    A Transformers model runs its own initializer on all parameters, loaded ones too: norms, biases and buffers get
    what it gives them. Of plain torch modules only the matrices are redrawn, see
    `hf_gg.training.initialization.gg_init_`; a part of a Transformers model that has no `_init_weights`, such as one
    layer, counts as plain. Tied weights stay tied. On the meta device nothing happens: call this after `to_empty`. The
    processes of a sharded model must call this together.

    Args:
        model: a Transformers model, or a module of others, which may hold one.
        shape, std, gain: see `GGInit`.

    Returns:
        The model.

    Raises:
        ValueError: a value out of range, a parameter whose standard deviation is not known (it is named), a model that
            is partly on the meta device.
        TypeError: `model` is no module; a matrix that is not floating point, as in a quantized model. Nothing is drawn
            then.
    """
    init = GGInit(shape, std, gain)
    plain.check_module(model)
    own = list(_with_initializer(model))
    if not own:
        return plain.gg_init_(model, shape, std, gain)
    if not plain.check_matrices(model):
        return model
    inside = {id(parameter) for part in own for parameter in part.parameters()}
    rest = [target for target in plain.matrices(model) if id(target[2]) not in inside]
    deviations = [plain.deviation(init, *target) for target in rest]
    if init.std in plain.FANS:
        for part in own:
            for target in plain.matrices(part):
                plain.deviation(init, *target)  # raises before anything is drawn
    with torch.no_grad():
        for (_, module, parameter), value in zip(rest, deviations):
            gg_(parameter, value, init.shape)
            plain.zero_padding_(module)
        for part in own:
            _initialize_again(part, init)
    return model


def _with_initializer(module: nn.Module) -> Iterator[Any]:
    """The outermost Transformers models in a module."""
    if hasattr(module, "_init_weights") and hasattr(module, "initialize_weights"):
        yield module
    else:
        for child in module.children():
            yield from _with_initializer(child)


def _initialize_again(model: Any, init: GGInit) -> None:
    """Run a model's own initializer on everything in it."""
    for thing in (*model.modules(), *model.parameters(), *model.buffers()):
        thing.__dict__.pop("_is_hf_initialized", None)
    # as when the model was built: each of the tied weights is drawn, and the source's draws stay
    for name in getattr(model, "all_tied_weights_keys", None) or {}:
        owner, _, weight = name.rpartition(".")
        module = model.get_submodule(owner)
        if module._parameters.get(weight) is not None:
            module._parameters[weight] = nn.Parameter(
                torch.empty_like(module._parameters[weight]), module._parameters[weight].requires_grad
            )
    with drawing(init):
        model.initialize_weights()
    model.tie_weights()


# --- the table of Transformers ---


def _uniform(tensor: torch.Tensor, a: float, b: float, **_: Any) -> float | None:
    return (b - a) / math.sqrt(12) if a == -b else None


def _normal(tensor: torch.Tensor, mean: float, std: float, **_: Any) -> float | None:
    return std if mean == 0 else None


def _truncated(tensor: torch.Tensor, mean: float, std: float, a: float, b: float, **_: Any) -> float | None:
    if mean != 0 or a != -b or not std > 0 or not b > 0:
        return None
    edge = b / std
    density = math.exp(-edge * edge / 2) / math.sqrt(2 * math.pi)
    return std * math.sqrt(1 - 2 * edge * density / math.erf(edge / math.sqrt(2)))


def _xavier(tensor: torch.Tensor, gain: float, **_: Any) -> float:
    return gain * math.sqrt(2 / sum(nn.init._calculate_fan_in_and_fan_out(tensor)))


def _kaiming(tensor: torch.Tensor, a: float, mode: str, nonlinearity: str, **_: Any) -> float:
    gain = nn.init.calculate_gain(nonlinearity, a)  # type: ignore[arg-type]
    return gain / math.sqrt(nn.init._calculate_correct_fan(tensor, mode))  # type: ignore[arg-type]


# For each of torch's initializers that draws, the standard deviation of its draws; None where they are not about zero.
# `orthogonal_` and `sparse_` give a matrix a structure that independent draws have not: they are left alone.
_DEVIATIONS: dict[str, Callable[..., float | None]] = {
    "uniform_": _uniform,
    "normal_": _normal,
    "trunc_normal_": _truncated,
    "xavier_uniform_": _xavier,
    "xavier_normal_": _xavier,
    "kaiming_uniform_": _kaiming,
    "kaiming_normal_": _kaiming,
}


def _drawn_by(original: Callable, own_deviation: Callable[..., float | None]) -> Callable:
    """One of torch's initializers that draws from the generalized Gaussian where it should."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def initializer(*args, **kwargs):
        init = _wanted.get()
        if init is None:
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        tensor, generator = bound.arguments["tensor"], bound.arguments.get("generator")
        if not isinstance(tensor, nn.Parameter) or not plain.is_matrix(tensor) or not tensor.is_floating_point():
            return original(*args, **kwargs)
        base = own_deviation(**bound.arguments)
        if not base:
            return original(*args, **kwargs)
        deviation = init.factor * base if init.std == "model" else _by_fans(init, tensor)
        return gg_(tensor, deviation, init.shape, generator)

    return initializer


def _by_fans(init: GGInit, parameter: torch.Tensor) -> float:
    name, module = _owner(parameter)
    return plain.fan_deviation(init, plain.fans(module, parameter, name), name, parameter)


def _owner(parameter: torch.Tensor) -> tuple[str, nn.Module | None]:
    """The module that holds a parameter, and its name there: some initializers draw the weights of their children."""
    module = _module.get()
    for candidate in module.modules() if module is not None else ():
        for name, value in candidate._parameters.items():
            if value is parameter:
                return name, candidate
    return "a new weight", None


def _initialize_weights(original: Callable) -> Callable:
    """`PreTrainedModel._initialize_weights` that notes the module and zeroes the padding row of sharded embeddings."""

    @functools.wraps(original)
    def wrapper(self, module, *args, **kwargs):
        if _wanted.get() is None or getattr(module, "_is_hf_initialized", False):
            return original(self, module, *args, **kwargs)
        token = _module.set(module)
        try:
            result = original(self, module, *args, **kwargs)
        finally:
            _module.reset(token)
        weight = module._parameters.get("weight")
        if hasattr(weight, "placements") and not getattr(weight, "_is_hf_initialized", False):
            plain.zero_padding_(module)  # Transformers zeroes a copy of it
        return result

    return wrapper


def _init_added_rows(original: Callable) -> Callable:
    """`PreTrainedModel._init_added_embeddings_weights_with_mean`: new rows near the mean of the old ones.

    Transformers draws them from a normal distribution with a billionth of the old rows' covariance, so that the
    model's output hardly changes. Here every column keeps that standard deviation with `std="model"`; else it is the
    one asked for. The centre is the mean of the old rows in any case.
    """

    @functools.wraps(original)
    def wrapper(self, old_embeddings, new_embeddings, old_num_tokens, added_num_tokens):
        init = _wanted.get()
        if init is None:
            return original(self, old_embeddings, new_embeddings, old_num_tokens, added_num_tokens)
        old, new = old_embeddings.weight.data.float(), new_embeddings.weight.data
        rows = torch.empty(added_num_tokens, old.shape[1], dtype=torch.float32, device=old.device)
        gg_(rows, 1.0, init.shape)
        if init.std == "model":
            rows *= init.factor * math.sqrt(1e-9) * old.std(0, correction=0)
        else:
            known = plain.fans(None, new_embeddings.weight)
            rows *= plain.fan_deviation(init, known, "the embeddings", new_embeddings.weight)
        new[-added_num_tokens:] = (rows + old.mean(0)).to(new.dtype)

    return wrapper


class _Patches:
    """Transformers' functions are exchanged while a context is open in any thread; in others they do what they did."""

    def __init__(self) -> None:
        self._lock, self._open = threading.Lock(), 0
        self._originals: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._open:
                self._install()
            self._open += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._remove()

    def _install(self) -> None:
        from transformers import PreTrainedModel
        from transformers.initialization import TORCH_INIT_FUNCTIONS

        table: dict[str, Any] = TORCH_INIT_FUNCTIONS
        for name, deviation in _DEVIATIONS.items():
            original = table[name]
            table[name] = _drawn_by(original, deviation)
            self._originals.append(functools.partial(table.__setitem__, name, original))
        for name, wrap in (
            ("_initialize_weights", _initialize_weights),
            ("_init_added_embeddings_weights_with_mean", _init_added_rows),
        ):
            original = getattr(PreTrainedModel, name)
            setattr(PreTrainedModel, name, wrap(original))
            self._originals.append(functools.partial(setattr, PreTrainedModel, name, original))

    def _remove(self) -> None:
        while self._originals:
            self._originals.pop()()


_patches = _Patches()
