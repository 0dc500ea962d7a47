"""Runs the cases of the Triton decoder, and compiles it for devices that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CASES = Path(__file__).with_name("triton_coder_cases.py")
COMPILE = "import json, sys; from hf_gg.ops.triton.compile import compile_coder; "
COMPILE += "print(json.dumps(compile_coder([sys.argv[1]])))"


def run_python(*arguments: str, **variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


def test_under_the_interpreter():
    found = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES), TRITON_INTERPRET="1")
    assert "20 passed" in found and "skipped" not in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device():
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES), TRITON_INTERPRET="0")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_compiles_for_nvidia(target, tmp_path):
    found = json.loads(run_python("-W", "error::UserWarning", "-c", COMPILE, target, TRITON_CACHE_DIR=str(tmp_path)))
    assert len(found) == 2
    for facts in found.values():
        assert f".target {target}" in facts["ptx"] and facts["cubin_bytes"] > 0
        assert facts.get("spill_bytes", 0) == 0 and facts.get("registers", 1) <= 64


def test_compiles_for_amd(tmp_path):
    found = json.loads(run_python("-c", COMPILE, "gfx942", TRITON_CACHE_DIR=str(tmp_path)))
    assert all("gfx942" in facts["amdgcn"] and facts["hsaco_bytes"] > 0 for facts in found.values())
