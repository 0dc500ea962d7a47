"""Compiles the C kernels at first use and loads them.

The library goes to `cpu/` in `$HF_GG_CACHE`, else in `$XDG_CACHE_HOME/hf_gg`, else in `~/.cache/hf_gg`; where no
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
from pathlib import Path


HEADERS = ("rf8.h",)
SOURCES = ("rf8.c", "portable.c", "avx2.c", "avx512.c")
# No contraction: quantization is bit for bit that of torch, which rounds every product.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno")
# Tried in turn: an old compiler may lack OpenMP or the newest instructions.
VARIANTS = (("-fopenmp",), (), ("-fopenmp", "-DHF_GG_PORTABLE"), ("-DHF_GG_PORTABLE",))
TIMEOUT = 300  # seconds for one call of the compiler

_SIZE = ctypes.c_int64
_POINTER = ctypes.c_void_p
# Of the functions in rf8.c: result, and arguments as letters, p for a pointer and n for a number.
_SIGNATURES = {
    "hf_gg_rf8_isa": (_SIZE, ""),
    "hf_gg_rf8_format_size": (_SIZE, ""),
    "hf_gg_rf8_format_init": (_SIZE, "pppn"),
    "hf_gg_rf8_linear": (_SIZE, "pnnpnnpnpnpnpnnnn"),
    "hf_gg_rf8_dequantize": (None, "pnnpnpnnnpnnnn"),
    "hf_gg_rf8_quantize": (_SIZE, "pnnnpnnnnpnpnpp"),
}


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def load() -> ctypes.CDLL:
    """Return the library, compiled before if the cache does not hold it.

    Raises:
        BuildError: there is no compiler, it fails, its result does not load, or another user owns the cached file.
    """
    try:
        compiler = find_compiler()
        path = cache_directory() / library_name(compiler)
        if not path.exists():
            compile_library(compiler, path)
        check_owner(path)
        try:
            return _open(path)
        except OSError:  # damaged
            compile_library(compiler, path)
        return _open(path)
    except OSError as error:
        raise BuildError(f"the kernels cannot be compiled or loaded: {error}") from error


def find_compiler() -> tuple[str, ...]:
    """The C compiler's command: `$CC`, or else the first of cc, gcc and clang on the path."""
    asked = os.environ.get("CC", "").strip()
    for command in [shlex.split(asked)] if asked else [["cc"], ["gcc"], ["clang"]]:
        program = shutil.which(command[0])
        if program:
            return (program, *command[1:])
    raise BuildError(f"no C compiler on the path, looked for {asked or 'cc, gcc and clang'}")


def library_name(compiler: tuple[str, ...]) -> str:
    """File name of the library: a hash of the sources, the flags, the compiler and the machine."""
    version = _run([*compiler, "--version"])
    if version.returncode:
        raise BuildError(f"{compiler[0]} --version fails with status {version.returncode}")
    digest = hashlib.sha256(repr((compiler, FLAGS, VARIANTS, platform.machine(), sys.platform)).encode())
    digest.update(version.stdout)
    for name in (*HEADERS, *SOURCES):
        digest.update((Path(__file__).parent / name).read_bytes())
    return f"rf8-{digest.hexdigest()[:24]}.so"


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


def compile_library(compiler: tuple[str, ...], path: Path) -> None:
    """Compile the sources to `path`, which appears complete or not at all."""
    sources = [str(Path(__file__).parent / name) for name in SOURCES]
    first_error = ""
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as build:
        output = Path(build) / path.name
        for variant in VARIANTS:
            done = _run([*compiler, *FLAGS, *variant, *sources, "-o", str(output), "-lm"])
            error = done.stderr.decode(errors="replace").strip()
            if done.returncode == 0:
                try:
                    _open(output)  # an OpenMP library may be missing only now
                    output.chmod(0o600)
                    os.replace(output, path)
                    return
                except OSError as problem:
                    error = str(problem)
            first_error = first_error or error
    raise BuildError(f"{compiler[0]} cannot compile the kernels: {first_error[:500]}")


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


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise OSError(f"{path} lacks {name}") from error
        function.restype = result
        function.argtypes = [_POINTER if letter == "p" else _SIZE for letter in arguments]
    return library
