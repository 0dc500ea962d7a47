"""`GGConfig`: how a model is quantized, as a quantization config of Transformers."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import ops
from ..formats import StepRule, get_format
from ..training.initialization import GGInit
from . import allocation, coded, selection
from .calibration import Calibration, CalibrationRecord


METHOD = "gg"
# 1: codes [out, in]; 2: codes [out, in, 1], refused by a Transformers without this package
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
_TARGETS = ("target_bits", "target_snr", "target_error", "step")


class GGConfig(QuantizationConfigMixin):
    """How a model is quantized.

    Args:
        weight_format: `"rf8"` (default), `"rf8x"`, `"rf8-e5"` or `"grid"`. (`"none"` is that of a checkpoint
            of `hf-gg compress --lossless-grid`: coded in its files, a plain model once it is loaded.)
        scale: `"row"` (default), `"absmax"`, `"pow2"`, `"tensor"`, `"tensor-pow2"` or `"unit"`; of a grid, `"row"`
            (steps in proportion to the rows' root mean squares) or `"tensor"` (one step a tensor).
        rounding: `"nearest"` (default) or `"reference"` (the authors', not of a grid).
        target_bits: of a grid: wanted bits a weight after entropy coding, steps and outliers counted, at most 8.
        target_snr: of a grid: wanted signal-to-noise ratio, dB.
        target_error: of a grid: wanted share of the squared error in the squared weights, weighed by what it costs
            (see `sensitivity`).
        step: of a grid: the step itself, the same for every weight. Without any of these four a step is an eighth of
            the root mean square, about 5 bits and 29 dB.
        sensitivity: of a grid with `target_bits` or `target_error`: `"self"` (default: texts that the model writes
            itself tell where errors cost most, which takes some passes; where the model cannot run, as while it is
            loaded, the weights decide) or `"weights"`.
        modules_to_not_convert: names, beginnings or ends of names, or regular expressions of modules to leave as they
            are, added to the defaults: output embeddings, embeddings, what is tied to them, and what the model's own
            code needs in full precision.
        quantize_embeddings: quantize the input embeddings as well.
        quantize_lm_head: quantize the output embeddings as well; where they are tied, both must be asked for.
        experts: quantize fused experts of mixture-of-experts models.
        backend: `"auto"`, `"torch"`, `"cpu"` or `"triton"`. Not a property of the checkpoint: may be given at any
            load.
        dequantize: when loading a quantized checkpoint, give the plain model in full precision.
        init: a `GGInit`, or its keys as a dict: how weights are drawn that the checkpoint has not (a new
            classification head). Kept in `config.json`; may be given at any load. Without it the model's own
            initializer draws.
        coding: how codes are saved: `"none"` (default), one byte each, or entropy-coded by `"rans"` or `"eg0"`
            (exp-Golomb codes), and decoded while loading. A checkpoint keeps its coding when it is loaded and saved
            again, unless a config given at load, or `model.config.quantization_config.coding`, says otherwise.
        calibration: rounds every weight for the least error of its layer's outputs on a text: a `Calibration`, or its
            texts (a file, or a list), or a dict of its keys. A checkpoint only keeps how many tokens there were, and
            their hash.
        format_version: of the checkpoint; set by the library.

    Raises:
        ValueError: an unknown value or an unknown key.
    """

    def __init__(
        self,
        weight_format: str | None = None,
        scale: str = "row",
        rounding: str = "nearest",
        modules_to_not_convert: list[str] | None = None,
        quantize_embeddings: bool = False,
        quantize_lm_head: bool = False,
        experts: bool = True,
        backend: str = "auto",
        dequantize: bool = False,
        init: GGInit | dict[str, Any] | None = None,
        coding: str | None = None,
        target_bits: float | None = None,
        target_snr: float | None = None,
        step: float | None = None,
        target_error: float | None = None,
        sensitivity: str = "self",
        calibration: Any = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ):
        method = kwargs.pop("quant_method", METHOD)
        if method != METHOD:
            raise ValueError(f"GGConfig is the config of quant_method {METHOD!r}, got {method!r}.")
        if kwargs:
            known = [name for name in inspect.signature(GGConfig).parameters if name != "kwargs"]
            unknown = ", ".join(map(repr, sorted(kwargs)))
            raise ValueError(f"Unknown GGConfig key {unknown}: the keys are {', '.join(known)}.")
        self.quant_method = METHOD  # type: ignore[assignment]  # the field's enum is closed, its use is a string's
        # asked for, or only the default: decides whether a checkpoint of another format is a contradiction
        self._format_given = weight_format is not None
        self.weight_format = coded.FLOATS if weight_format == coded.FLOATS else get_format(weight_format or "rf8").name
        targets = {"target_bits": target_bits, "target_snr": target_snr, "target_error": target_error, "step": step}
        _check_targets(targets, self.weight_format)
        self.target_bits, self.target_snr, self.target_error, self.step = target_bits, target_snr, target_error, step
        allocation.check_sensitivity(sensitivity)
        self.sensitivity = sensitivity
        if self.weight_format != coded.FLOATS:
            get_format(self.weight_format).check_options(scale, rounding)
        ops.check_backend(backend)
        self.scale, self.rounding, self.backend = scale, rounding, backend
        self._coding_given = coding is not None
        self.coding = coded.check_coding("none" if coding is None else coding)
        if modules_to_not_convert is not None:
            selection.check_patterns(modules_to_not_convert)
            modules_to_not_convert = list(modules_to_not_convert)
        self.modules_to_not_convert = modules_to_not_convert
        flags = {
            "quantize_embeddings": quantize_embeddings,
            "quantize_lm_head": quantize_lm_head,
            "experts": experts,
            "dequantize": dequantize,
        }
        for key, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"{key} must be True or False, got {value!r}.")
        self.quantize_embeddings, self.quantize_lm_head = quantize_embeddings, quantize_lm_head
        self.experts, self.dequantize = experts, dequantize
        if isinstance(init, dict):
            init = GGInit.from_dict(init)
        if init is not None and not isinstance(init, GGInit):
            raise ValueError(f"init must be a GGInit or a dict of its keys, got {init!r}.")
        self.init = init
        self.calibration = Calibration.of(calibration)
        if isinstance(format_version, bool) or format_version not in READABLE_VERSIONS:
            raise ValueError(
                f"format_version {format_version!r} is not one that this hf_gg reads "
                f"({', '.join(map(str, READABLE_VERSIONS))}): the checkpoint was written by a later release; upgrade "
                "with `pip install -U hf-gg`."
            )
        self.format_version = format_version

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config given at load may change about a quantized checkpoint."""
        attributes: dict[str, Any] = {"backend": self.backend, "dequantize": self.dequantize}
        if self._format_given:
            attributes["_format_wanted"] = self.weight_format
        if self.init is not None:
            attributes["init"] = self.init
        if self._coding_given:
            attributes["coding"] = self.coding
        targets = {key: getattr(self, key) for key in _TARGETS if getattr(self, key) is not None}
        if isinstance(self.calibration, Calibration):
            targets["calibration"] = self.calibration
        if targets:
            attributes["_targets_wanted"] = targets
        return attributes

    def to_dict(self) -> dict[str, Any]:
        """What is written into `config.json`: the properties of the checkpoint."""
        values = {key: value for key, value in super().to_dict().items() if not key.startswith("_")}
        # what is not used stays away, so that earlier releases read the checkpoint
        unused = dict.fromkeys((*_TARGETS, "init", "calibration")) | {"coding": "none"}
        if self.weight_format != "grid":
            del values["sensitivity"]
        if self.init is not None:
            values["init"] = dataclasses.asdict(self.init)
        if self.calibration is not None:
            # texts belong to whoever calibrated, not to the checkpoint
            done = isinstance(self.calibration, CalibrationRecord)
            values["calibration"] = dataclasses.asdict(self.calibration) if done else None
        return {key: value for key, value in values.items() if key not in unused or value != unused[key]}

    def scale_rule(self) -> str | StepRule:
        """The scale mode, or for a grid the rule of its steps."""
        if self.weight_format != "grid":
            return self.scale
        # alone, a weight's share of error is its signal to noise
        snr = self.target_snr if self.target_error is None else -10 * math.log10(self.target_error)
        return StepRule(self.scale, bits=self.target_bits, snr=snr, step=self.step)

    def module_options(self) -> dict[str, Any]:
        """Keyword arguments of the quantized modules."""
        return {
            "format": self.weight_format,
            "backend": self.backend,
            "scale": self.scale_rule(),
            "rounding": self.rounding,
        }


def _check_targets(targets: dict[str, float | None], weight_format: str) -> None:
    """Raise a `ValueError` for targets that make no sense, or that the format does not have."""
    given = {name: value for name, value in targets.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}.")
        if name == "target_bits" and value > 8:
            raise ValueError(f"target_bits must be at most 8, which codes have in memory, got {value!r}.")
        if name == "target_error" and value >= 1:
            raise ValueError(f"target_error must be less than 1, the error of no weights at all, got {value!r}.")
    if given and weight_format != "grid":
        raise ValueError(
            f"{next(iter(given))} is of the grid, and weight_format is {weight_format!r}: use weight_format='grid'."
        )
    if len(given) > 1:
        raise ValueError(f"The steps of a grid follow from one target, got {' and '.join(given)}: leave one out.")
