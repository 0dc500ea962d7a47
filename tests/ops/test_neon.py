"""The NEON kernel, cross-compiled and run by qemu's emulator of 64-bit ARM (or natively on such a machine)."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hf_gg.formats import FORMATS, ResidualFloat, get_format
from hf_gg.ops.cpu import build


NATIVE = platform.machine() in ("aarch64", "arm64")
COMPILER = shutil.which("cc" if NATIVE else "aarch64-linux-gnu-gcc")
EMULATOR = [] if NATIVE else [shutil.which("qemu-aarch64"), "-L", "/usr/aarch64-linux-gnu"]
pytestmark = pytest.mark.skipif(
    COMPILER is None or None in EMULATOR,
    reason="needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user (Debian), or an ARM machine",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    sources = Path(build.__file__).parent
    out = tmp_path_factory.mktemp("neon") / "check"
    names = [sources / name for name in build.SOURCES if name != "boxed.c"]
    flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC", "-fvisibility=hidden")]
    check = Path(__file__).with_name("neon_check.c")
    subprocess.run(
        [COMPILER, *flags, f"-I{sources}", *names, check, "-o", out, "-lm"], check=True, capture_output=True
    )
    return out


@pytest.mark.parametrize("name", list(FORMATS))
def test_neon_agrees_with_plain_c(name, program):
    fmt = get_format(name)
    nearest = torch.zeros(8192, dtype=torch.uint8)
    if isinstance(fmt, ResidualFloat):
        nearest = fmt.encode(((torch.arange(8192, dtype=torch.int32) << 18) + 1).view(torch.float32))
    data = fmt.table(torch.float32).numpy().tobytes() + nearest.numpy().tobytes()
    done = subprocess.run([*EMULATOR, program, str(fmt.residual_bits)], input=data, capture_output=True, timeout=200)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
