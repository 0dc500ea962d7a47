"""Finds the command, runs it, and turns errors into one line and an exit code.

A command is a module with `add_arguments(parser)` and `run(args) -> int | None`; only the one that was asked for is
imported. Exit codes: 0 done, 1 an error (one line on standard error; the traceback with `--debug`), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__


# Name: (module, one line of help).
COMMANDS: dict[str, tuple[str, str]] = {
    "bench": ("hf_gg.cli.bench", "measure layers, a model and its loading against others"),
    "compress": ("hf_gg.cli.compress", "write a checkpoint of entropy-coded weights"),
    "inspect": ("hf_gg.cli.inspect", "show the statistics of a checkpoint's weights"),
}

DESCRIPTION = "Statistics, quantization and compression of Hugging Face models."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; `sys.argv` if `argv` is None.

    Returns:
        The exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(load=command)
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # --help, --version and wrong usage
        return end.code if isinstance(end.code, int) else 2
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("hf-gg: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hf-gg … | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (what is buffered must not be written at exit)
        return 0
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if args.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"hf-gg {args.command}: error: {message}", file=sys.stderr)
        return 1


def build_parser(load: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        load: the command whose module is imported and whose arguments are added; the others are only listed.
    """
    parser = argparse.ArgumentParser(prog="hf-gg", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"hf-gg {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, help) in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == load:
            loaded = import_module(module)
            sub.description = loaded.__doc__
            sub.formatter_class = argparse.RawDescriptionHelpFormatter
            loaded.add_arguments(sub)
            sub.set_defaults(run=loaded.run)
    return parser
