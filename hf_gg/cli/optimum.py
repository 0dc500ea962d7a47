"""Commands of `hf-gg` under `optimum-cli gg`: the same arguments, the same work, the same errors in one line.

This module is imported whenever `optimum-cli` starts: what a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from types import ModuleType

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)


class _Forwarded(BaseOptimumCLICommand):
    """A command whose arguments and work are those of a module of `hf_gg.cli`."""

    MODULE: str

    @classmethod
    def _module(cls) -> ModuleType | None:
        try:
            return import_module(cls.MODULE)
        except ModuleNotFoundError as error:
            if error.name != cls.MODULE:
                raise
            return None

    @classmethod
    def parse_args(cls, parser: argparse.ArgumentParser) -> None:  # type: ignore[override]  # static there
        module = cls._module()
        if module is None:  # said when it is run
            parser.add_argument("arguments", nargs=argparse.REMAINDER)
            return
        parser.description = module.__doc__
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(parser)

    def run(self) -> None:
        name, module = self.COMMAND.name, self._module()
        try:
            if module is None:
                raise ImportError(f"this hf_gg has no command {name!r}: pip install -U hf-gg.")
            code = module.run(self.args) or 0
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
