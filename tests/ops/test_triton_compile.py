"""The Triton kernels compile to machine code without a GPU; in a process of their own, where no interpreter is on."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from hf_gg.formats import FORMATS
from hf_gg.ops.triton import compile as ahead


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# Shared memory that one block may use on the smallest of the devices meant (8.6 and 8.9 have 99 KiB, 8.0 163 KiB).
SHARED_LIMIT = 99 * 1024
SCRIPT = """
import json, sys
import torch
from hf_gg.ops.triton.compile import compile_all

found = {}
for formats, dtypes, rows in json.loads(sys.argv[2]):
    dtypes = [getattr(torch, name) for name in dtypes]
    found.update(compile_all([sys.argv[1]], formats, dtypes, rows))
json.dump(found, open(sys.argv[3], "w"))
"""


def compile_in_process(target: str, choice: list, folder) -> dict[str, dict]:
    result = folder / "result.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, target, json.dumps(choice), str(result)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(result.read_text())


def check(found: dict[str, dict], target: str) -> None:
    for name, facts in found.items():
        ptx = facts["ptx"]
        assert f".target {target}" in ptx, name
        assert facts["cubin_bytes"] > 0, name
        assert facts["ptx_bytes"] == len(ptx), name
        assert facts["shared_bytes"] <= SHARED_LIMIT, (name, facts["shared_bytes"])
        # odd widths are loaded byte by byte, which takes more registers than there are
        assert facts.get("spill_bytes", 0) <= (256 if name.endswith("-odd") else 0), (name, facts["spill_bytes"])
        assert 0 < facts.get("registers", 1) <= 255, name
        if "/dequantize/" in name:
            continue
        # products of 16-bit operands run on the matrix units, those of float32 not, as they round to TF32
        matrix_unit = "mma.sync" in ptx or "wgmma.mma_async" in ptx
        assert matrix_unit == ("float32" not in name), name


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernels_compile(target, tmp_path):
    choice = [
        (["rf8"], ["bfloat16"], [1, 4096]),
        (["rf8x"], ["float32"], [64]),
        (["rf8-e5"], ["float16"], [64]),
        (["grid"], ["bfloat16"], [4096]),
    ]
    found = compile_in_process(target, choice, tmp_path)
    kernels = [name.split("/")[1] for name in found]
    assert {kernel: kernels.count(kernel) for kernel in kernels} == {"dequantize": 8, "linear": 9, "grad_input": 9}
    check(found, target)
    if target == "sm_90":
        assert "wgmma.mma_async" in found["sm_90/linear/rf8-bfloat16-4096"]["ptx"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_every_variant_compiles(target, tmp_path):
    dtypes = ["float32", "bfloat16", "float16"]
    found = compile_in_process(target, [(None, dtypes, [1, 64, 4096])], tmp_path)
    assert len(found) == len(FORMATS) * len(dtypes) * (2 + 2 * 3 + 2)
    check(found, target)


def test_malformed_target():
    with pytest.raises(ValueError, match="'h100' is not a compute capability"):
        ahead.compile_all(["h100"])


def test_unknown_format():
    with pytest.raises(ValueError, match="Unknown weight format 'rf9'"):
        ahead.compile_all(formats=["rf9"])
