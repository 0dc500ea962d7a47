"""Where DeepSpeed's ZeRO keeps the float32 values of each parameter: views into its flat partitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..training.parts import Part


# What is read of DeepSpeed's optimizers is private there; checked with this version.
KNOWN = "0.19.8"
_STAGE_3 = ("fp32_partitioned_groups_flat", "grad_position", "get_param_id", "dp_process_group")
_STAGE_1_AND_2 = ("bit16_groups", "single_partition_of_fp32_groups", "real_dp_process_group")


def zero_parts(optimizer: Any, parameters: Mapping[str, Any]) -> list[Part] | None:
    """The parts of parameters under ZeRO 1, 2 and 3, for `BackSlash`.

        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=AdamW(...), config=...)
        penalty = BackSlash(zero_parts(optimizer, select_matrices(model)), lambda_=0.1)
        penalty.attach(optimizer)

    Args:
        optimizer: DeepSpeed's optimizer, or a wrapper of it.
        parameters: parameters of the model by name.

    Returns:
        Parts with their names, or None if there is no ZeRO optimizer.

    Raises:
        ValueError: ZeRO does not hold a parameter, or has moved it to a disk.
    """
    zero = optimizer
    while zero is not None and not type(zero).__module__.startswith("deepspeed.runtime.zero"):
        zero = getattr(zero, "optimizer", None)
    if zero is None:
        return None
    third = "stage3" in type(zero).__module__
    for needed in _STAGE_3 if third else _STAGE_1_AND_2:
        if not hasattr(zero, needed):
            raise _unknown(f"{type(zero).__name__} has no {needed!r}")
    return (_stage_3 if third else _stage_1_and_2)(zero, parameters)


def _stage_1_and_2(zero: Any, parameters: Mapping[str, Any]) -> list[Part]:
    where = {id(p): index for index, group in enumerate(zero.bit16_groups) for p in group}
    parts = []
    for name, parameter in parameters.items():
        if id(parameter) not in where:
            raise _not_trained(name)
        if not hasattr(parameter, "_hp_mapping"):
            raise _unknown("its parameters have no '_hp_mapping'")
        index = where[id(parameter)]
        mapping = parameter._hp_mapping  # None where another process holds all of it
        view = mapping.hp_fragment if mapping is not None else None
        group = zero.real_dp_process_group[index]
        parts.append(Part(name, view, parameter.numel(), zero.single_partition_of_fp32_groups[index], (group,)))
    return parts


def _stage_3(zero: Any, parameters: Mapping[str, Any]) -> list[Part]:
    parts = []
    for name, parameter in parameters.items():
        place = zero.grad_position.get(zero.get_param_id(parameter))
        if place is None:
            raise _not_trained(name)
        index, offset, size = place
        owner = zero.fp32_partitioned_groups_flat[index]
        if owner is None or owner.numel() < offset + size:
            raise ValueError(f"DeepSpeed has moved {name} to a disk: the penalty needs it in memory.")
        # the last process's part is filled up with zeros, which stay zero and add nothing to any sum
        parts.append(Part(name, owner.narrow(0, offset, size), parameter.ds_numel, owner, (zero.dp_process_group,)))
    return parts


def _not_trained(name: str) -> ValueError:
    return ValueError(f"DeepSpeed does not train {name}, which the penalty is to act on: name modules without it.")


def _unknown(what: str) -> ValueError:
    import deepspeed

    return ValueError(
        f"DeepSpeed {deepspeed.__version__} keeps its partitions otherwise than version {KNOWN}, which BackSlash "
        f"knows ({what}): install deepspeed=={KNOWN}, or train with FSDP2 or DDP."
    )
