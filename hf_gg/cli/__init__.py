"""The command line, `hf-gg COMMAND …`. A new command is one file here and one line in `main.COMMANDS`."""

from .main import main


__all__ = ["main"]
