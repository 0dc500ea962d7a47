"""A command line that does again what was done."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence


# What changes nothing of what comes out.
_LEFT_OUT = ("debug", "json", "output", "overwrite", "work")


def command_line(args: argparse.Namespace, positional: Sequence[str]) -> str:
    """The command line of parsed arguments, those with their default left out.

    Args:
        args: with the command's own parser as `parser`.
        positional: names of the positional arguments, in order.
    """
    words = [*args.parser.prog.split(), *(str(getattr(args, name)) for name in positional)]
    own = {action.dest for action in args.parser._actions}
    for name, value in vars(args).items():
        if name not in own or name in (*_LEFT_OUT, *positional) or value == args.parser.get_default(name):
            continue
        words.append(f"--{name.replace('_', '-')}")
        words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)
