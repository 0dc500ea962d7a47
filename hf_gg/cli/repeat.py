"""A command line that does again what was done."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence


# What changes nothing of what comes out.
_LEFT_OUT = ("command", "run", "parser", "debug", "json", "output", "overwrite", "work")


def command_line(args: argparse.Namespace, positional: Sequence[str]) -> str:
    """The command line of parsed arguments, those with their default left out.

    Args:
        args: of `main`, with the command's own parser as `parser`.
        positional: names of the positional arguments, in order.
    """
    words = ["hf-gg", args.command, *(str(getattr(args, name)) for name in positional)]
    for name, value in vars(args).items():
        if name in (*_LEFT_OUT, *positional) or value == args.parser.get_default(name):
            continue
        words.append(f"--{name.replace('_', '-')}")
        words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)
