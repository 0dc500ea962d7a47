"""What works with which tuner: the table of `docs/peft.md`, checked by the tests, and what `rules` is made from."""

from __future__ import annotations

from typing import NamedTuple


class Support(NamedTuple):
    """How a tuner goes with quantized layers.

    Attributes:
        merge: what merging does; empty where PEFT itself offers none.
        reads: whether the forward pass decodes the base weight and keeps what autograd needs of it.
        note: what else there is to know.
    """

    merge: str = ""
    reads: bool = False
    note: str = ""


_ROUNDS = "rounds, exact unmerge"
_PROMPT = Support(note="trains a prompt; the layers are not touched")
_ADDS = Support(_ROUNDS)
_READS = Support(_ROUNDS, reads=True)

# by peft.PeftType, in PEFT 0.21
TUNERS: dict[str, Support] = {
    "ADALORA": _ADDS,
    "ADAMSS": _ADDS,
    "ADAPTION_PROMPT": Support(note="adds to the attention; the layers are not touched"),
    "BEFT": Support("exact, into the bias", note="PEFT refuses to merge where the layer has no bias"),
    "BOFT": _ADDS,
    "C3A": _ADDS,
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "DEFT": _ADDS,
    "DELORA": _ADDS,
    "FOURIERFT": _ADDS,
    "FROD": Support(_ROUNDS, note="`runtime_offload_base_weight=True` raises"),
    "GLORA": _READS,
    "GRALORA": _ADDS,
    "HIRA": _READS,
    "HRA": _READS,
    "IA3": _ADDS,
    "LILY": Support(note="PEFT cannot merge it"),
    "LN_TUNING": Support("exact", note="normalization layers only; on a quantized layer it raises"),
    "LOHA": Support(_ROUNDS, reads=True, note="reads only its shape"),
    "LOKR": Support(_ROUNDS, reads=True, note="reads only its shape"),
    "LORA": Support(_ROUNDS, note="experts, embeddings, variants and initializations: see below"),
    "MISS": Support(_ROUNDS, note='`init_weights="bat"` decodes in the forward pass'),
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "OFT": _ADDS,
    "OSF": Support("rounds; PEFT cannot unmerge it"),
    "PEANUT": _READS,
    "POLY": Support(note="PEFT cannot merge it"),
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": _ADDS,
    "PVERA": _ADDS,
    "P_TUNING": _PROMPT,
    "RANDLORA": _ADDS,
    "ROAD": _ADDS,
    "SHADOW": Support(note="wraps whole blocks; raises with `quantize_embeddings=True`"),
    "SHIRA": _READS,
    "SUPERTUNING": _READS,
    "TINYLORA": _ADDS,
    "TRAINABLE_TOKENS": Support(_ROUNDS, reads=True, note="embeddings; exact where they are not quantized"),
    "UNILORA": _ADDS,
    "VBLORA": _ADDS,
    "VERA": _ADDS,
    "WAVEFT": _ADDS,
    "XLORA": Support(_ROUNDS, note="PEFT merges its LoRAs without their gates"),
}


def markdown() -> str:
    """The table as Markdown."""
    lines = ["| Tuner | Trains | Merge | Decodes in forward | Note |", "|---|---|---|---|---|"]
    for name, support in TUNERS.items():
        reads = "yes" if support.reads else "no"
        lines.append(f"| {name} | yes | {support.merge or '–'} | {reads} | {support.note} |")
    return "\n".join(lines)
