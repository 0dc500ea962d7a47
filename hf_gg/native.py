"""Compiles C at first use and loads it, for every package that brings C sources.

A library goes to `cpu/` in `$HF_GG_CACHE`, else in `$XDG_CACHE_HOME/hf_gg`, else in `~/.cache/hf_gg`; where no
directory there is writable and private to the user, to one that lives as long as the process. Its name is a hash of
all that it is made from, and it appears by one rename, so that several processes can build it at once.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


TIMEOUT = 300  # seconds for one call of the compiler
TURNED_OFF = "turned off by HF_GG_CPU_KERNELS"

_SIZE = ctypes.c_int64
_POINTER = ctypes.c_void_p


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


@dataclass(frozen=True)
class Library:
    """A shared library and what it is made from.

    Attributes:
        name: the file's name begins with it.
        folder: of the sources.
        headers: files that the sources include.
        sources: files that are compiled.
        flags: of the compiler.
        variants: more flags, tried in turn: an old compiler may lack some.
        functions: by name, the result, `"n"` for a number or `""`, and the arguments, a letter each: p for a pointer
            and n for a 64-bit number.
    """

    name: str
    folder: Path
    headers: tuple[str, ...]
    sources: tuple[str, ...]
    flags: tuple[str, ...]
    variants: tuple[tuple[str, ...], ...]
    functions: dict[str, tuple[str, str]]

    def load(self) -> ctypes.CDLL:
        """Return the library, compiled before if the cache does not hold it.

        Raises:
            BuildError: there is no compiler, it fails, its result does not load, or another user owns the cached file.
        """
        try:
            compiler = find_compiler()
            path = cache_directory() / self.file_name(compiler)
            if not path.exists():
                self.compile(compiler, path)
            check_owner(path)
            try:
                return self._open(path)
            except OSError:  # damaged
                self.compile(compiler, path)
            return self._open(path)
        except OSError as error:
            raise BuildError(f"the kernels cannot be compiled or loaded: {error}") from error

    def file_name(self, compiler: tuple[str, ...]) -> str:
        """File name of the library: a hash of the sources, the flags, the compiler and the machine."""
        version = _run([*compiler, "--version"])
        if version.returncode:
            raise BuildError(f"{compiler[0]} --version fails with status {version.returncode}")
        digest = hashlib.sha256(repr((compiler, self.flags, self.variants, platform.machine(), sys.platform)).encode())
        digest.update(version.stdout)
        for name in (*self.headers, *self.sources):
            digest.update((self.folder / name).read_bytes())
        return f"{self.name}-{digest.hexdigest()[:24]}.so"

    def compile(self, compiler: tuple[str, ...], path: Path) -> None:
        """Compile the sources to `path`, which appears complete or not at all."""
        sources = [str(self.folder / name) for name in self.sources]
        first_error = ""
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as build:
            output = Path(build) / path.name
            for variant in self.variants:
                done = _run([*compiler, *self.flags, *variant, *sources, "-o", str(output), "-lm"])
                error = done.stderr.decode(errors="replace").strip()
                if done.returncode == 0:
                    try:
                        self._open(output)  # an OpenMP library may be missing only now
                        output.chmod(0o600)
                        os.replace(output, path)
                        return
                    except OSError as problem:
                        error = str(problem)
                first_error = first_error or error
        raise BuildError(f"{compiler[0]} cannot compile the kernels: {first_error[:500]}")

    def _open(self, path: Path) -> ctypes.CDLL:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in self.functions.items():
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise OSError(f"{path} lacks {name}") from error
            function.restype = _SIZE if result else None
            function.argtypes = [_POINTER if letter == "p" else _SIZE for letter in arguments]
        return library


class Lazy:
    """A library that is compiled and loaded when it is first asked for, by one thread.

    Args:
        load: returns it, or raises a `BuildError`.
        what: it is, for errors: "the CPU kernels are".
    """

    def __init__(self, load: Callable[[], ctypes.CDLL], what: str) -> None:
        self._load, self._what, self._lock = load, what, threading.Lock()
        self._found: tuple[ctypes.CDLL | None, str | None] | None = None

    def available(self) -> bool:
        """Whether it can run here. The first call may compile it: some seconds, once per machine."""
        return self._result()[0] is not None

    def why_not(self) -> str | None:
        """Why it cannot run here, or None."""
        return self._result()[1]

    def get(self) -> ctypes.CDLL:
        """The library; `RuntimeError` if it cannot run here."""
        library, reason = self._result()
        if library is None:
            raise RuntimeError(f"{self._what} not available: {reason}.")
        return library

    def forget(self) -> None:
        """Look again at the next call: for tests that change the environment."""
        self._found = None

    def _result(self) -> tuple[ctypes.CDLL | None, str | None]:
        if self._found is None:
            with self._lock:  # one thread compiles
                self._found = self._found or try_load(self._load)
        return self._found


def try_load(load: Callable[[], ctypes.CDLL]) -> tuple[ctypes.CDLL | None, str | None]:
    """The library that `load` returns, or None and the reason; `HF_GG_CPU_KERNELS=0` is one."""
    if os.environ.get("HF_GG_CPU_KERNELS", "1").strip().lower() in ("0", "false", "off", "no"):
        return None, TURNED_OFF
    try:
        return load(), None
    except BuildError as error:
        return None, str(error)


def find_compiler() -> tuple[str, ...]:
    """The C compiler's command: `$CC`, or else the first of cc, gcc and clang on the path."""
    asked = os.environ.get("CC", "").strip()
    try:
        words = shlex.split(asked)
    except ValueError as error:
        raise BuildError(f"CC, {asked}, is no command: {error}") from error
    for command in [words] if words else [["cc"], ["gcc"], ["clang"]]:
        program = shutil.which(command[0])
        if program:
            return (program, *command[1:])
    raise BuildError(f"no C compiler on the path, looked for {asked or 'cc, gcc and clang'}")


def cache_directory() -> Path:
    """The directory of compiled kernels, private to the user; made if there is none."""
    asked = os.environ.get("HF_GG_CACHE")
    try:
        base = Path(asked) if asked else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_gg"
        directory = base / "cpu"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _private(directory) and os.access(directory, os.W_OK | os.X_OK):
            return directory
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        pass
    return _process_directory()


def check_owner(path: Path) -> None:
    """Refuse a library that another user could have written: it would run as this user."""
    if not _private(path):
        raise BuildError(f"{path} belongs to another user or can be written by others: remove it")


def _private(path: Path) -> bool:
    status = path.lstat()
    mine = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return mine and not stat.S_ISLNK(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C compiler does not run: {error}") from error


def _process_directory() -> Path:
    directory, owner = Path(tempfile.mkdtemp(prefix="hf_gg-")), os.getpid()  # mode 0700

    def remove() -> None:
        if os.getpid() == owner:  # not in its forks
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
    return directory
