"""How much an error in each row of a model's weights costs, found without any data.

A squared error e² in a weight moves a language model's predictions by ½ F e² nats of KL divergence, F being the
diagonal of its Fisher information, the mean of the squared gradient of the log-probability of tokens drawn from the
model's own predictions. A text that the model writes itself, one token drawn after the other, is such a draw: the
gradients at its tokens are uncorrelated, so the squared gradient of the whole text's log-probability has that mean,
and no calibration data is needed.

Other models have no such predictions. For them the cost is the squared change of the outputs relative to their size,
on inputs of random tokens, and its second derivative (Gauss–Newton) is the mean of the squared gradient of the product
of the outputs with a random normal vector.

Only means over rows are kept, and only one weight has a gradient at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What share of a row's value is its tensor's: a row's is noisy after few texts.
_SHRINK = 0.2
_RUN_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError)


class _FloatProducts(TorchDispatchMode):
    """Matrix products of 16-bit floats on the CPU, computed in float32.

    Most processors lack instructions for them; the backward pass then takes 50 to 170 times as long as in float32.
    """

    _PRODUCTS = frozenset((torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket not in self._PRODUCTS or not _is_half_on_cpu(args[0]) or "out" in kwargs:
            return func(*args, **kwargs)
        wide = [arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return func(*wide, **kwargs).to(args[0].dtype)


def row_sensitivity(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    turned: frozenset[str] | set[str] = frozenset(),
    sequences: int = 16,
    length: int = 128,
    seed: int = 0,
) -> dict[str, torch.Tensor] | None:
    """Cost of a unit of squared error in a weight of each row, per token, by the name of its parameter.

    Args:
        model: a Transformers model in memory; it runs `sequences` times forwards and backwards, after writing the
            texts if it is a causal language model. It is left as it was.
        parameters: the weights, [..., rows, columns].
        turned: names of weights that are stored [..., columns, rows].
        sequences: texts, or random inputs.
        length: tokens of each.
        seed: of the draws. The global generator of random numbers is not touched.

    Returns:
        Half the mean over the columns, float32 [..., rows, 1], a fifth of it being the tensor's mean; zeros for a
        weight that the outputs do not depend on. None if the model cannot be run so; the reason is logged.
    """
    if sequences < 1 or length < 2:
        raise ValueError(f"sequences and length must be at least 1 and 2, got {sequences} and {length}.")
    if any(p.is_meta for p in model.parameters()):
        _refuse(model, "parts of it are not in memory")
        return None
    training = model.training
    required = {id(p): (p, p.requires_grad) for p in model.parameters()}
    sums = {name: torch.zeros(_shape(p, name in turned), dtype=torch.float64) for name, p in parameters.items()}
    handles = []
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(seed)
            model.eval()
            for p, _ in required.values():
                p.requires_grad_(False)
            inputs = _inputs(model, sequences, length)
            for name, p in parameters.items():
                p.requires_grad_(True)
                handles.append(p.register_post_accumulate_grad_hook(_collector(sums[name], name in turned)))
            for i in logging.tqdm(range(sequences), desc="Measuring sensitivity"):
                with _FloatProducts():
                    objective = _objective(model, {key: value[i : i + 1] for key, value in inputs.items()})
                    objective.backward()
    except _RUN_ERRORS as error:
        _refuse(model, f"{type(error).__name__}: {error}")
        return None
    finally:
        for handle in handles:
            handle.remove()
        for p, before in required.values():
            p.requires_grad_(before)
        for p in parameters.values():
            p.grad = None
        model.train(training)
    found = {}
    for name, total in sums.items():
        mean = total / (2 * sequences * length)
        if not bool(torch.isfinite(mean).all()):
            _refuse(model, f"the gradient of {name} is not finite")
            return None
        tensor = mean.mean(-2, keepdim=True)
        found[name] = ((1 - _SHRINK) * mean + _SHRINK * tensor).float()
    return found


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model writes text, so that its own predictions can be drawn from."""
    config = getattr(model, "config", None)
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    can_generate = getattr(model, "can_generate", None)
    return not encoder_decoder and can_generate is not None and bool(can_generate())


def _is_half_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)


def _shape(parameter: torch.Tensor, turned: bool) -> tuple[int, ...]:
    shape = parameter.shape
    return (*shape[:-2], shape[-1] if turned else shape[-2], 1)


def _collector(total: torch.Tensor, turned: bool) -> Callable[[torch.Tensor], None]:
    """A hook that adds the row means of a squared gradient to `total`, and frees the gradient."""

    def collect(parameter: torch.Tensor) -> None:
        gradient = parameter.grad.float()  # type: ignore[union-attr]  # the hook runs when there is one
        parameter.grad = None
        squares = gradient.square().mean(-2 if turned else -1, dtype=torch.float64)
        total.add_(squares.unsqueeze(-1).to(total.device))

    return collect


def _inputs(model, sequences: int, length: int) -> dict[str, torch.Tensor]:
    """Texts of the model's own, or random tokens: tensors whose first dimension is the sequences."""
    config = model.config.get_text_config()
    device = model.get_input_embeddings().weight.device
    limit = getattr(config, "max_position_embeddings", None)
    length = min(length, limit - 2 if isinstance(limit, int) and limit > 4 else length)
    if is_causal_lm(model):
        return {"input_ids": write_texts(model, sequences, length, device)}
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(f"its inputs are {model.main_input_name}, not tokens")
    shape = (sequences, length)
    inputs = {"input_ids": torch.randint(config.vocab_size, shape).to(device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(config.vocab_size, shape).to(device)
    return inputs


@torch.no_grad()
def write_texts(model, sequences: int, length: int, device=None) -> torch.Tensor:
    """Texts drawn from a model's own predictions after its first token (or random ones), int64 [sequences, length].

    Nothing but the predictions counts: no temperature, no top-k, no end of a text before its length.
    """
    config = model.config.get_text_config()
    first = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    first = first[0] if isinstance(first, (list, tuple)) else first
    if first is None or not 0 <= first < config.vocab_size:
        tokens = torch.randint(config.vocab_size, (sequences, 1)).to(device)
    else:
        tokens = torch.full((sequences, 1), first, dtype=torch.long, device=device)
    past: Any = None
    new = tokens
    for _ in logging.tqdm(range(1, length), desc="Writing texts"):
        output = model(input_ids=new, past_key_values=past, use_cache=True)
        past = getattr(output, "past_key_values", None)
        probabilities = output.logits[:, -1].float().softmax(-1)
        drawn = torch.multinomial(probabilities, 1)
        tokens = torch.cat([tokens, drawn], 1)
        new = tokens if past is None else drawn
    return tokens


def _objective(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The number whose squared gradient is the sensitivity of one sequence, times twice its tokens."""
    if is_causal_lm(model):
        tokens = inputs["input_ids"]
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        return F.cross_entropy(logits, tokens[0, 1:], reduction="sum")
    outputs = model(**inputs)
    output = next(
        (v for v in outputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.requires_grad),
        None,
    )
    if output is None:
        raise ValueError("no output depends on its weights")
    output = output.float()
    length = inputs["input_ids"].shape[1]
    scale = (length / output.detach().square().sum().clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
    return (output * torch.randn(output.shape).to(output.device)).sum() * scale


def _refuse(model: nn.Module, reason: str) -> None:
    logger.warning(
        f"{type(model).__name__} cannot be run to find out which weights matter ({reason}): bits are given by the "
        "weights alone."
    )
