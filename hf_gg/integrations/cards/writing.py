"""Facts as the text of a card."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCardData

from ... import __version__
from ...formats import FORMATS
from .facts import Facts
from .marker import read_marker, read_metadata, sign


_TEMPLATE = Path(__file__).with_name("template.md")
_NOT_SHOWN = ("quant_method", "format_version")
_CODED = "entropy-coded"


def write_card(facts: Facts, title: str, existing: Sequence[str] = ()) -> str:
    """The card of a checkpoint: metadata, comment, text.

    Args:
        facts: of `collect`.
        title: the model's name.
        existing: cards that this one replaces; of their metadata stays what ours does not say. Where they differ, the
            last one's.
    """
    marker = replace(facts.marker, commands=list(map(_command, facts.marker.commands)))
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_line(title),
        summary=_summary(facts),
        use=_use(facts, title),
        made=_made(facts),
        size=_size(facts),
        quality=_quality(facts),
        limits=_limits(facts),
        versions=_versions(facts),
    )
    values: dict[str, Any] = {}
    tags: list[str] = []
    for card in existing:
        kept = _kept(card)
        tags += kept.pop("tags", None) or []
        values |= kept
    values = {**values, **_metadata(facts), "tags": list(dict.fromkeys([*tags, *_tags(facts)]))}
    data = ModelCardData(ignore_metadata_errors=True, **values)
    return f"---\n{data.to_yaml()}\n---\n{sign(text, marker)}"


def _kept(card: str) -> dict[str, Any]:
    """The metadata of a card but for what we had written there, which may no longer be so."""
    values, marker = read_metadata(card) or {}, read_marker(card)
    if marker is None:
        return values
    for key, value in {"base_model": marker.base, **marker.license}.items():
        if value is not None and values.get(key) == value:
            del values[key]
            if key == "base_model":
                values.pop("base_model_relation", None)
    values["tags"] = [tag for tag in values.get("tags") or [] if tag not in (*FORMATS, _CODED)]
    return values


def _metadata(facts: Facts) -> dict[str, Any]:
    values: dict[str, Any] = {"library_name": "transformers", **facts.marker.license}
    if facts.marker.base is not None:
        values |= {"base_model": facts.marker.base, "base_model_relation": "quantized"}
    if "ForCausalLM" in _architecture(facts) or "LMHead" in _architecture(facts):
        values["pipeline_tag"] = "text-generation"
    return values


def _tags(facts: Facts) -> list[str]:
    coded = facts.quantization.get("coding", "none") != "none"
    return ["hf_gg", *([_format(facts)] if _format(facts) != "none" else []), *([_CODED] if coded else [])]


def _architecture(facts: Facts) -> str:
    names = facts.config.get("architectures")
    return _line(str(names[0])) if isinstance(names, list) and names else "AutoModel"


def _format(facts: Facts) -> str:
    return _line(str(facts.quantization.get("weight_format")))


def _command(text: str) -> str:
    """A command as a card shows it: one line, absolute paths without the folders of the machine it ran on."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/'\",=]+/)+", "", " ".join(text.split()))


def _line(text: str) -> str:
    """One line, that ends no code and no cell of a table."""
    return " ".join(text.split()).replace("`", "'").replace("|", "/")


def _summary(facts: Facts) -> str:
    base = facts.marker.base
    of = f"[{base}](https://huggingface.co/{base})" if base else "a model whose name on the hub was not recorded"
    coded = facts.quantization.get("coding", "none")
    how = f", entropy-coded (`{_line(str(coded))}`)" if coded != "none" else ""
    if _format(facts) == "none":
        told = "what the files hold was coded without loss."
        if facts.marker.commands:
            rounded = any("--round" in command.split() for command in facts.marker.commands)
            told = "weights off the grid were rounded to it." if rounded else "they decode to the same floats."
        return f"The weights of {of}, on a grid and entropy-coded by `hf_gg`: {told}"
    bits = 8 * facts.size.quantized_bytes / max(facts.size.quantized_weights, 1)
    return (
        f"This is {of} with weights in the format `{_format(facts)}` of `hf_gg`{how}: {bits:.3f} bits a quantized "
        "weight on disk, scales counted."
    )


def _use(facts: Facts, title: str) -> str:
    architecture = _architecture(facts)
    heads = ("ForCausalLM", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification")
    head = next((head for head in heads if architecture.endswith(head)), "")
    name = f"AutoModel{head}" if head or architecture.endswith("Model") else architecture
    repository = json.dumps(_line(title), ensure_ascii=False)
    return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({repository})"


def _made(facts: Facts) -> str:
    commands = facts.marker.commands
    if commands:
        lines = "\n".join(map(_command, commands))
        made = f"```bash\n{lines}\n```"
    elif _format(facts) == "none":
        made = "By `hf-gg compress … --lossless-grid …`; the whole command was not recorded."
    else:
        base = facts.marker.base or "BASE"
        names = "Calibration, GGConfig" if facts.quantization.get("calibration") else "GGConfig"
        made = (
            "The command was not recorded. By the settings that the checkpoint holds, this makes such a one:\n\n"
            "```python\n"
            f"from transformers import {_architecture(facts)}\nfrom hf_gg import {names}\n\n"
            f"config = {_config_call(facts.quantization)}\n"
            f'model = {_architecture(facts)}.from_pretrained("{base}", quantization_config=config)\n'
            'model.save_pretrained("OUT")\n```'
        )
        if facts.quantization.get("calibration"):
            made += "\n\n`TEXTS` are the texts that it was calibrated on, of which the checkpoint holds only a hash."
    left = facts.quantization.get("modules_to_not_convert") or []
    if left and isinstance(left, list):
        made += (
            "\n\nLinear layers that stayed as they were: " + ", ".join(f"`{_line(str(name))}`" for name in left) + "."
        )
    return made


def _config_call(quantization: dict[str, Any]) -> str:
    """The `GGConfig(…)` that has these settings."""
    from ..config import GGConfig

    defaults = {name: parameter.default for name, parameter in inspect.signature(GGConfig).parameters.items()}
    # the format's default is "whatever the checkpoint says"
    given = {
        name: repr(value)
        for name, value in quantization.items()
        if name not in _NOT_SHOWN and name in defaults and value not in (defaults[name], "none", None)
    }
    record = quantization.get("calibration")
    if isinstance(record, dict):  # of the texts a checkpoint only has the hash
        numbers = ", ".join(f"{name}={record.get(name)!r}" for name in ("tokens", "sequences", "damping"))
        given["calibration"] = f"Calibration(TEXTS, {numbers})"
    return f"GGConfig({', '.join(f'{name}={value}' for name, value in given.items())})"


def _size(facts: Facts) -> str:
    lines = ["| weights, stored as | tensors | numbers | MB on disk | bits a number |", "|---|--:|--:|--:|--:|"]
    for part in facts.size.parts:
        lines.append(
            f"| {_line(part.kind)} | {part.tensors} | {part.weights:,} | {part.bytes / 1e6:.2f} | {part.bits:.3f} |"
        )
    size = facts.size
    tensors = sum(part.tensors for part in size.parts)
    bits = 8 * size.bytes / size.weights
    lines.append(f"| all | {tensors} | {size.weights:,} | {size.bytes / 1e6:.2f} | {bits:.3f} |")
    lines.append(f"\nWeight files: {facts.file_bytes / 1e6:.2f} MB (10⁶ bytes). Scales and outliers count with codes.")
    return "\n".join(lines)


def _quality(facts: Facts) -> str:
    found = facts.evaluation
    if found is None:
        return "Not measured: `hf-gg eval` was not run on these weights."
    parts = []
    if found.get("against"):
        name = _line(str(found["against"]))
        name = name if name.count("/") < 2 and not Path(name).is_absolute() else Path(name).name
        parts.append(f"The base in what follows is `{name}`.")
    try:
        if "texts" in found:
            parts.append(_texts(found))
        if "tasks" in found:
            parts.append(_tasks(found))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"The evaluation is not as `hf-gg eval` writes it ({error!r}): write it anew.") from error
    return "\n\n".join(parts)


_LABELS = {
    "perplexity": ("perplexity", 1.0, ""),
    "base_perplexity": ("perplexity of the base", 1.0, ""),
    "perplexity_ratio": ("ratio of the two", 1.0, ""),
    "kl": ("KL from the base, nats a token", 1.0, ""),
    "flips": ("most likely token is another one", 100.0, " %"),
}


def _texts(found: dict[str, Any]) -> str:
    texts = found["texts"]
    lines = [f"| on text | value | {texts['confidence']:.0%} interval |", "|---|--:|--:|"]
    for name, estimate in texts["metrics"].items():
        label, factor, unit = _LABELS[name]
        between = "one document gives none"
        if estimate["low"] is not None:
            between = f"{factor * estimate['low']:.5g} to {factor * estimate['high']:.5g}{unit}"
        lines.append(f"| {label} | {factor * estimate['value']:.5g}{unit} | {between} |")
    source = ", ".join(_line(Path(str(name)).name) for name in texts["source"])
    about = (
        f"{texts['tokens']:,} tokens of {texts['documents']:,} documents ({source}), windows of {texts['window']:,} "
        f"tokens with stride {texts['stride']:,}; each document on its own, bootstrap over documents"
    )
    return "\n".join(lines) + f"\n\n{about}:\n\n```bash\n{_command(found['evaluated_with'])}\n```"


def _tasks(found: dict[str, Any]) -> str:
    tasks, base = found["tasks"], found["tasks"].get("base_results")
    lines = ["| task | metric | base | this model | ± | recovery | questions |", "|---|---|--:|--:|--:|--:|--:|"]
    for task, metrics in tasks["results"].items():
        for metric, entry in metrics.items():
            other = base[task][metric]["value"] if base else None
            recovery = "–"
            if other and entry.get("higher_is_better"):
                recovery = f"{entry['value'] / other:.1%}"
            cells = [
                _line(task),
                _line(metric),
                "–" if other is None else f"{other:.4f}",
                f"{entry['value']:.4f}",
                "–" if entry["stderr"] is None else f"{entry['stderr']:.4f}",
                recovery,
                str(tasks["samples"].get(task, "–")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    limit = tasks.get("limit")
    about = "± is lm_eval's standard error."
    if limit is not None:
        about += f" Only the first {limit} questions of each task were asked."
    command = _command(tasks["evaluated_with"])
    return "\n".join(lines) + f"\n\n{about} lm_eval {tasks['lm_eval']}:\n\n```bash\n{command}\n```"


def _limits(facts: Facts) -> str:
    found = facts.evaluation or {}
    metrics = found.get("texts", {}).get("metrics", {})
    lines = []
    if "kl" not in metrics:
        lines.append("How far its predictions are from the base model's was not measured.")
    if "perplexity" not in metrics:
        lines.append("Perplexity was not measured.")
    if "tasks" not in found:
        lines.append("No task was measured.")
    if found and str(found.get("device", "cpu")).startswith("cpu"):
        lines.append("The figures are from a CPU; other devices were not measured.")
    if any(".gguf" in command for command in facts.marker.commands):
        lines.append("It was made from a GGUF file, whose weights may have been quantized once before.")
    lines.append("Speed, long contexts, other languages and safety were not measured.")
    lines.append("What the base model cannot do, or was not made for, holds here as well: see its card.")
    if not facts.marker.license:
        lines.append("The licence of the base model could not be read: look it up before use; it holds here as well.")
    return "\n".join(f"- {line}" for line in lines)


def _versions(facts: Facts) -> str:
    written = f"Saved by Transformers {_line(str(facts.config.get('transformers_version', '(not recorded)')))}"
    card = f"card by hf_gg {__version__}"
    versions = (facts.evaluation or {}).get("versions") or {}
    measured = ", ".join(f"{_line(name)} {_line(str(version))}" for name, version in versions.items())
    more = f"; measured with {measured} on {facts.evaluation['date']}" if facts.evaluation and measured else ""
    if facts.evaluation and measured:
        more += f", {_line(str(facts.evaluation['dtype']))} arithmetic"
    return f"{written}; {card}{more}."
