"""Finds the command, runs it, and turns errors into one line and an exit code.

A command is a module with `add_arguments(parser)` and `run(args) -> int | None`; only the one that was asked for is
imported. Exit codes: 0 done, 1 an error (one line on standard error; the traceback with `--debug`), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module

from .. import __version__


# Name: (module, one line of help), in the order of use.
COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": ("hf_gg.cli.inspect", "show the statistics of a checkpoint's weights"),
    "quantize": ("hf_gg.cli.quantize", "write a quantized checkpoint, with calibrated rounding if wanted"),
    "compress": ("hf_gg.cli.compress", "write a checkpoint of entropy-coded weights"),
    "eval": ("hf_gg.cli.evaluate", "measure a model, and how far it is from its base"),
    "push": ("hf_gg.cli.push", "publish a quantized checkpoint with a card of measured facts"),
    "export": ("hf_gg.cli.export", "write a quantized model as ONNX"),
    "bench": ("hf_gg.cli.bench", "time layers, a model and its loading, beside other packages"),
    "completion": ("hf_gg.cli.completion", "print the completion script of a shell"),
}

DESCRIPTION = "Statistics, quantization and compression of Hugging Face models."

EPILOG = """\
examples:
  hf-gg quantize MODEL -o OUT                      RF8; the stock from_pretrained("OUT") opens it
  hf-gg quantize MODEL -o OUT --calibrate t.txt    rounded for the least error of the outputs on a text
  hf-gg eval OUT --against MODEL --output e.json   perplexity, KL, flips; with --tasks those of lm_eval
  hf-gg push OUT you/NAME --evaluation e.json      published with a card of what was measured
  hf-gg compress MODEL OUT --target-bits 5         entropy-coded, as few bits as wanted
  hf-gg inspect MODEL --html report.html           which law the weights follow, what coding them would cost
  eval "$(hf-gg completion bash)"                  complete commands and options in this shell

MODEL is a name on the hub or a folder. `hf-gg COMMAND --help` has more examples. Results go to standard output
(--json: as JSON), progress and errors to standard error; progress bars appear on terminals only.
exit codes: 0 done, 1 an error (one line; the traceback with --debug), 2 wrong usage, 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; `sys.argv` if `argv` is None.

    Returns:
        The exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(() if command is None else (command,))
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # --help, --version and wrong usage
        return end.code if isinstance(end.code, int) else 2
    if args.command is None:
        parser.print_help()
        return 0
    try:
        code = args.run(args) or 0
        sys.stdout.flush()  # a full disk is an error of the command, and not of Python's exit
        return code
    except KeyboardInterrupt:
        print("hf-gg: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hf-gg … | head`
        _leave_output()
        return 0
    except Exception as error:
        if args.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)):
            message = f"unexpected {type(error).__name__}: {message} (--debug shows where)"
        print(f"hf-gg {args.command}: error: {message}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _leave_output()
        return 1


def _leave_output() -> None:
    """What is buffered and cannot be written is not tried again at exit."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def build_parser(load: Collection[str] = ()) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        load: the commands whose modules are imported and whose arguments are added; the others are only listed.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="hf-gg", description=DESCRIPTION, epilog=EPILOG, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"hf-gg {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, help) in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=help)
        # before the command or after it: a default here would undo the former
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        if name in load:
            loaded = import_module(module)
            sub.description = loaded.__doc__
            sub.formatter_class = layout
            loaded.add_arguments(sub)
            sub.set_defaults(run=loaded.run)
    return parser
