"""A model's weights rounded for the least error of each layer's outputs on a text, one after the other.

The model runs on the text, all sequences in lockstep (see `lockstep`). Where the runs wait at a module, the second
moments of its inputs are formed and its weight is rounded (see `hf_gg.calibration`); then they go on with what was
rounded, so that the inputs of every module hold the errors of all modules before it. The model itself is not changed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from .. import ops
from ..calibration import Metric, SecondMoments, metric_of, round_weight
from ..formats import get_format
from ..nn import RF8Experts
from ..nn.experts import quantize_experts, stack_experts
from ..nn.linear import is_conv1d
from . import allocation, calibration, outliers
from .calibration import Calibration, CalibrationRecord
from .finished import Coded, Finished, contents, fingerprint
from .lockstep import Call, Lockstep
from .selection import Selection


# Tokens that an expert must see for each of its inputs, or its moments say more of them than of the text.
TOKENS_PER_INPUT = 0.25


@dataclass
class Calibrated:
    """What a calibration gives.

    Attributes:
        coded: codes, scale and outliers, as the quantized modules hold them, by module name and the weight's name in
            the module.
        plain: modules or experts that were rounded without calibration, with the reason.
        errors: by parameter name, the squared error of the outputs, and that of plain rounding.
    """

    coded: dict[str, dict[str, Coded]] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


def calibrate_by_config(
    model: nn.Module, chosen: Selection, config: Any, tokenizer: Any = None, gguf_file: str | None = None
) -> tuple[Calibrated, CalibrationRecord]:
    """Round the weights of a model's selected modules as `config.calibration` says.

    Args:
        model: a Transformers model in memory, which stays as it is.
        chosen: the modules.
        config: a `GGConfig` with a `Calibration`.
        tokenizer: of the model; that of the place where it was loaded from if None.
        gguf_file: the file there, for a GGUF model.

    Raises:
        ValueError: no tokenizer, a text that cannot be used, a model that does not run on tokens, NaN or infinity in a
            module's inputs, work of another run in the folder. OSError: the text cannot be read, or the work not kept.
    """
    given = config.calibration
    if not isinstance(given, Calibration):
        raise ValueError(
            "The config is that of a checkpoint that was calibrated, and has no text: give one with a Calibration."
        )
    if outliers.is_distributed(model):
        raise ValueError(
            "calibration does not run on a model that is split over processes, none of which sees a whole weight: "
            "calibrate and save it in one process, and load that checkpoint."
        )
    tokenizer = calibration.tokenizer_of(model, tokenizer, gguf_file)
    tokens = calibration.windows(given, tokenizer, calibration.window_limit(model))
    batches = calibration.batches(model, tokens)
    record = CalibrationRecord(calibration.digest(tokens), tokens.shape[1], tokens.shape[0], given.damping)
    finished = None
    if given.folder is not None:
        options = json.dumps({**config.to_dict(), "calibration": dataclasses.asdict(record)}, sort_keys=True)
        finished = Finished(Path(given.folder), fingerprint([("options", options.encode()), *contents(model)]))
    scales: dict[str, Any] = {}
    if config.weight_format == "grid":
        make = functools.partial(allocation.steps_of_model, model, chosen, config)
        scales = make() if finished is None else finished.steps(make)
    return calibrate(model, chosen, config, batches, given.damping, scales, finished), record


@torch.no_grad()
def calibrate(
    model: nn.Module,
    chosen: Selection,
    config: Any,
    batches: Sequence[Mapping[str, torch.Tensor]],
    damping: float = 0.2,
    scales: Mapping[str, Any] | None = None,
    finished: Finished | None = None,
) -> Calibrated:
    """Round the weights of selected linear layers and experts for the least error of their outputs.

    Args:
        model: a Transformers model in memory; it runs once, all batches at the same time, and is left as it was.
        chosen: the modules.
        config: a `GGConfig`: format, scale and rounding.
        batches: keyword arguments of the model's runs.
        damping: see `metric_of`.
        scales: steps of a grid by module name, of experts by the weight's name in it.
        finished: where modules are kept that are done, for a later attempt.

    Raises:
        ValueError: NaN or infinity in a module's inputs; the module is named.
    """
    training = model.training
    model.eval()
    try:
        return _Walk(model, chosen, config, damping, scales or {}, finished).run(batches)
    finally:
        model.train(training)


class _Walk:
    """See `calibrate`."""

    def __init__(self, model, chosen: Selection, config, damping: float, scales: Mapping, finished: Finished | None):
        self.model, self.chosen, self.damping, self.scales, self.finished = model, chosen, damping, scales, finished
        self.config, self.format = config, get_format(config.weight_format)
        self.keep_bits = config.weight_format == "grid" and config.target_bits is not None
        self.result = Calibrated()
        wanted = {*chosen.embeddings, *chosen.linears, *chosen.experts}
        self.modules = {name: module for name, module in model.named_modules() if name in wanted}
        self._inputs: tuple[list[torch.Tensor], int, Metric | None] | None = None
        self._decoded: tuple[str, dict[str, torch.Tensor]] | None = None

    def run(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> Calibrated:
        lockstep = Lockstep(self.model, list(self.modules))
        for name in self.modules:
            if name in self.chosen.embeddings:
                self._round_plainly(name, "its inputs are tokens")
            elif self.finished is not None:
                self._restore(name)
            if name in self.result.coded:
                lockstep.weights[name] = self._decoder(name)
        with logging.tqdm(total=len(self.modules), desc="Calibrating", disable=None) as bar:
            bar.update(len(lockstep.weights))
            for name, calls in lockstep.stages(batches):
                bar.set_postfix_str(name, refresh=False)
                try:
                    self._round(name, calls)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                lockstep.weights[name] = self._decoder(name)
                if self.finished is not None:
                    self._keep(name)
                bar.update()
            for name in self.modules:
                if name not in self.result.coded:
                    self._round_plainly(name, "the model does not use it on these inputs")
                    bar.update()
        return self.result

    def _round(self, name: str, calls: list[Call]) -> None:
        module = self.modules[name]
        if name in self.chosen.experts:
            self._round_experts(name, module, calls)
            return
        other = next((n for n, coded in self.result.coded.items() if _same_weight(self.modules[n], module)), None)
        if other is not None:
            self.result.coded[name] = self.result.coded[other]
            self.result.plain[name] = f"shares its weight with {other}"
            return
        inputs = [call.args[0] if call.args else next(iter(call.kwargs.values())) for call in calls]
        metric = self._metric_of(inputs)
        if metric is None:
            self._round_plainly(name, "all its inputs are zero")
        else:
            matrix = _matrix(module.weight, is_conv1d(module))
            coded = self._calibrated(f"{name}.weight", matrix, metric, self.scales.get(name))
            self.result.coded[name] = {"weight": coded}

    def _metric_of(self, inputs: list[torch.Tensor]) -> Metric | None:
        """The metric of inputs; that of the module before if it had the very same tensors, as queries and keys do."""
        version = sum(x._version for x in inputs)
        if self._inputs is not None:
            before, known, metric = self._inputs
            if version == known and len(inputs) == len(before) and all(a is b for a, b in zip(before, inputs)):
                return metric
        self._inputs = None  # before new ones take memory
        metric = _metric(inputs, self.damping)
        self._inputs = inputs, version, metric
        return metric

    def _calibrated(self, name: str, matrix: torch.Tensor, metric: Metric, steps: torch.Tensor | None) -> Coded:
        scale, rounding = self.config.scale_rule(), self.config.rounding
        found = round_weight(matrix, metric, self.format, scale, rounding, steps, self.keep_bits)
        self.result.errors[name] = (found.error, found.plain_error)
        return found.codes, found.scale, found.outliers

    def _round_experts(self, name: str, module: nn.Module, calls: list[Call]) -> None:
        states, routes = zip(*(_routed(module, call) for call in calls))
        names = RF8Experts.weight_names(module)
        parts: dict[str, list[Coded]] = {weight: [] for weight in names}
        for expert in range(module.num_experts):
            x = torch.cat([state[(route == expert).any(-1)] for state, route in zip(states, routes)])
            for weight in names:
                matrix = _matrix(module._parameters[weight][expert], module.is_transposed)
                steps = self.scales[name][weight][expert] if name in self.scales else None
                parts[weight].append(self._round_expert(f"{name}.{weight}[{expert}]", matrix, x, steps))
                if weight == names[0]:
                    bias = module._parameters[f"{weight}_bias"][expert] if module.has_bias else None
                    x = F.linear(x, self._decode(parts[weight][-1], x.dtype), bias)
                    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        self.result.coded[name] = {weight: stack_experts(parts[weight], module.is_transposed) for weight in names}

    def _round_expert(self, name: str, matrix: torch.Tensor, x: torch.Tensor, steps: torch.Tensor | None) -> Coded:
        metric, reason = None, f"{len(x)} tokens reach it, too few for its {matrix.shape[1]} inputs"
        if len(x) >= TOKENS_PER_INPUT * matrix.shape[1]:
            metric, reason = _metric([x], self.damping), "all its inputs are zero"
        if metric is not None:
            return self._calibrated(name, matrix, metric, steps)
        self.result.plain[name] = reason
        scale = self.config.scale_rule() if steps is None else steps
        codes, scale, apart = ops.quantize_with_outliers(matrix, self.format, scale, self.config.rounding)
        return codes, scale.expand(len(codes), 1), apart

    def _round_plainly(self, name: str, reason: str) -> None:
        module = self.modules[name]
        scale = self.scales.get(name, self.config.scale_rule())
        options = self.format, self.config.rounding
        coded: dict[str, Coded] = {}
        if name in self.chosen.experts:
            for weight in RF8Experts.weight_names(module):
                own = scale[weight] if isinstance(scale, Mapping) else scale
                stack = module._parameters[weight].detach()
                coded[weight] = quantize_experts(stack, options[0], own, options[1], module.is_transposed)
        else:
            matrix = _matrix(module.weight, is_conv1d(module))
            codes, scales, apart = ops.quantize_with_outliers(matrix, options[0], scale, options[1])
            coded["weight"] = codes, scales.expand(len(codes), 1).contiguous(), apart
        self.result.coded[name], self.result.plain[name] = coded, reason

    # --- what the runs compute with, and what is kept of them ---

    def _decoder(self, name: str) -> Callable[[], dict[str, torch.Tensor]]:
        """Gives the decoded parameters of a module that is done; those of one module are kept between calls."""
        module = self.modules[name]

        def decoded() -> dict[str, torch.Tensor]:
            if self._decoded is None or self._decoded[0] != name:
                self._decoded = None
                found = {}
                for weight, coded in self.result.coded[name].items():
                    numbers = self._decode(coded, module._parameters[weight].dtype)
                    found[weight] = numbers.T if is_conv1d(module) else numbers
                self._decoded = name, found
            return self._decoded[1]

        return decoded

    def _decode(self, coded: Coded, dtype: torch.dtype) -> torch.Tensor:
        codes, scale, apart = coded
        numbers = ops.dequantize(codes, scale, self.format.name, dtype, self.config.backend)
        return numbers if apart is None else ops.put_outliers(numbers, *apart)

    def _keep(self, name: str) -> None:
        notes = {
            "plain": {key: value for key, value in self.result.plain.items() if _is_of(key, name)},
            "errors": {key: value for key, value in self.result.errors.items() if _is_of(key, name)},
        }
        self.finished.put(name, self.result.coded[name], notes)  # type: ignore[union-attr]  # asked before

    def _restore(self, name: str) -> None:
        module = self.modules[name]
        weights = RF8Experts.weight_names(module) or ("weight",)
        found = self.finished.get(name, weights)  # type: ignore[union-attr]  # asked before
        if found is None:
            return
        device = module._parameters[weights[0]].device
        self.result.coded[name] = {weight: _to(device, coded) for weight, coded in found[0].items()}
        self.result.plain.update(found[1].get("plain", {}))
        self.result.errors.update({key: (a, b) for key, (a, b) in found[1].get("errors", {}).items()})


def _metric(inputs: Sequence[torch.Tensor], damping: float) -> Metric | None:
    moments = SecondMoments(inputs[0].shape[-1], inputs[0].device)
    for x in inputs:
        moments.add(x)
    return metric_of(moments.matrix, damping)


def _matrix(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """A weight as [out, in]."""
    return weight.detach().T if transposed else weight.detach()


def _same_weight(a: nn.Module, b: nn.Module) -> bool:
    return a is not b and a._parameters.get("weight", a) is b._parameters.get("weight", b)


def _routed(module: nn.Module, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The states [tokens, width] and the numbers of their experts [tokens, k] of a call of fused experts."""
    bound = inspect.signature(type(module).forward).bind(module, *call.args, **call.kwargs)
    _, states, routes = list(bound.arguments.values())[:3]
    return states.reshape(-1, states.shape[-1]), routes.reshape(-1, routes.shape[-1])


def _is_of(key: str, name: str) -> bool:
    return key == name or key.startswith((f"{name}.", f"{name}["))


def _to(device: torch.device, coded: Coded) -> Coded:
    codes, scale, apart = coded
    moved = None if apart is None else (apart[0].to(device), apart[1].to(device))
    return codes.to(device), scale.to(device), moved
