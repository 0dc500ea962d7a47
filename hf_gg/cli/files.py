"""Files that a command writes for the user."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_writable(path: Path) -> None:
    """Raise a `ValueError` if a file cannot be written, before any work is done for it."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} to write {path.name} to: make it first.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to: give another place.")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file at once, so that a reader finds the old one or the whole new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}-")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
