"""Prints the script with which a shell completes commands, options and files of hf-gg.

    eval "$(hf-gg completion bash)"                             in this shell; in ~/.bashrc for all
    hf-gg completion zsh > ~/.zfunc/_hf-gg                      a folder in zsh's fpath
    hf-gg completion fish > ~/.config/fish/completions/hf-gg.fish

Needs shtab (pip install shtab).
"""

from __future__ import annotations

import argparse
import json


SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
# Arguments by the name of their place: what completes them.
_FOLDERS = {"out", "output_dir", "include_path", "work"}
_FILES = {
    *("model", "against", "tokenizer", "base"),
    *("text", "output", "plot", "html", "file", "evaluation", "calibrate"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.add_argument("--json", action="store_true", help="print the script as JSON")


def run(args: argparse.Namespace) -> None:
    script = render(args.shell)
    print(json.dumps({"shell": args.shell, "script": script}) if args.json else script)


def render(shell: str) -> str:
    """The completion script of a shell.

    Raises:
        ImportError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError("Completion scripts are written by shtab: pip install shtab.") from error
    from .main import COMMANDS, build_parser

    parser = build_parser(load=COMMANDS)
    for action in _arguments(parser):
        if action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell=shell)


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a parser's commands."""
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [action for sub in commands.choices.values() for action in sub._actions]
