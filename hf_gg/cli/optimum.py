"""Commands of `hf-gg` under `optimum-cli gg`: the same arguments, the same work, the same errors in one line.

This module is imported whenever `optimum-cli` starts: what a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)


class _Forwarded(BaseOptimumCLICommand):
    """A command whose arguments and work are those of a module of `hf_gg.cli`."""

    MODULE: str

    @classmethod
    def parse_args(cls, parser: argparse.ArgumentParser) -> None:  # type: ignore[override]  # static there
        module = import_module(cls.MODULE)
        parser.description = module.__doc__
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(parser)

    def run(self) -> None:
        name = self.COMMAND.name
        try:
            code = import_module(self.MODULE).run(self.args) or 0
        except KeyboardInterrupt:
            print("optimum-cli: interrupted", file=sys.stderr)
            code = 130
        except _ERRORS as error:
            message = " ".join(str(error).split()) or type(error).__name__
            print(f"optimum-cli gg {name}: error: {message}", file=sys.stderr)
            code = 1
        if code:
            sys.exit(code)


class CompressCommand(_Forwarded):
    COMMAND = CommandInfo(name="compress", help="write a checkpoint of entropy-coded weights")
    MODULE = "hf_gg.cli.compress"


class QuantizeCommand(_Forwarded):
    COMMAND = CommandInfo(name="quantize", help="write a quantized checkpoint")
    MODULE = "hf_gg.cli.quantize"


class GGCommand(BaseOptimumCLICommand):
    """`optimum-cli gg`."""

    COMMAND = CommandInfo(name="gg", help="RF8, an 8-bit weight format, and coded checkpoints")
    SUBCOMMANDS = tuple(
        CommandInfo(name=command.COMMAND.name, help=command.COMMAND.help, subcommand_class=command)
        for command in (QuantizeCommand, CompressCommand)
    )
