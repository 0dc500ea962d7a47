"""The Triton kernels compile to machine code without a GPU; in a process of their own, where no interpreter is on.

Registers, spills and instructions of each are in `tests/data/triton_kernels.json`, which this file writes when run:

    python tests/ops/test_triton_compile.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hf_gg.formats import FORMATS
from hf_gg.ops.triton import compile as ahead


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# Shared memory that one block may use on the smallest of the devices meant (8.6 and 8.9 have 99 KiB, 8.0 163 KiB).
SHARED_LIMIT = 99 * 1024
# Integer instructions a weight in the inner loop of few rows: what a GPU can run while a byte comes from its memory.
MOST_INTEGER = 4.0
TARGETS = ("sm_80", "sm_90", "gfx942")
TABLE = Path(__file__).parents[1] / "data" / "triton_kernels.json"
FACTS = ("registers", "spill_bytes", "shared_bytes", "weights", "integer", "moves", "loop")
# Formats, dtypes and rows that are compiled by the fast test, and all that the table holds.
FAST = [(["rf8"], ["bfloat16"], [1])]
CHOICE = [
    (["rf8"], ["bfloat16"], [1, 16, 64, 4096]),
    (["rf8x"], ["bfloat16"], [1]),
    (["rf8-e5"], ["float16"], [64]),
    (["grid"], ["bfloat16"], [1]),
    (["rf8"], ["float32"], [64]),
]
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


def compile_in_process(target: str, choice: list, folder: Path) -> dict[str, dict]:
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
    """What must hold of every kernel, with any release of Triton."""
    for name, facts in found.items():
        assert facts.get("spill_bytes", 0) == 0, (name, facts["spill_bytes"])
        if target.startswith("gfx"):
            assert facts["hsaco_bytes"] > 0, name
            continue
        ptx = facts["ptx"]
        assert f".target {target}" in ptx, name
        assert facts["cubin_bytes"] > 0, name
        assert facts["ptx_bytes"] == len(ptx), name
        assert facts["shared_bytes"] <= SHARED_LIMIT, (name, facts["shared_bytes"])
        assert 0 < facts.get("registers", 1) <= 255, name
        if "/dequantize/" in name or "/add_parts/" in name:
            continue
        # products of 16-bit operands run on the matrix units, those of float32 not, as they round to TF32
        matrix_unit = "mma.sync" in ptx or "wgmma.mma_async" in ptx
        assert matrix_unit == ("float32" not in name), name
        if "/linear/" in name and "bfloat16-1" in name and "rf8-e5" not in name and not name.endswith("-16"):
            assert facts.get("integer", 0) / facts["weights"] <= MOST_INTEGER, (name, facts["integer"])


def compare(found: dict[str, dict]) -> None:
    """With the release of Triton that the table is from, every figure is the table's."""
    import triton

    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table is of Triton {table['triton']}, here is {triton.__version__}")
    for name, facts in found.items():
        assert facts_of(facts) == table["kernels"].get(name), name


def facts_of(facts: dict) -> dict:
    return {key: facts[key] for key in FACTS if key in facts}


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target, tmp_path):
    found = compile_in_process(target, FAST, tmp_path)
    kernels = [name.split("/")[1] for name in found]
    counts = {kernel: kernels.count(kernel) for kernel in kernels}
    assert counts == {"dequantize": 2, "linear": 3, "grad_input": 2, "grouped": 3, "add_parts": 1}
    check(found, target)
    compare(found)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_of_the_table(target, tmp_path):
    found = compile_in_process(target, CHOICE, tmp_path)
    check(found, target)
    if target == "sm_90":
        assert "wgmma.mma_async" in found["sm_90/linear/rf8-bfloat16-4096"]["ptx"]
    compare(found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_every_variant_compiles(target, tmp_path):
    dtypes = ["float32", "bfloat16", "float16"]
    found = compile_in_process(target, [(None, dtypes, [1, 16, 64, 4096])], tmp_path)
    assert len(found) > len(FORMATS) * len(dtypes) * 20
    check(found, target)


def test_malformed_target():
    with pytest.raises(ValueError, match="'h100' is not a compute capability"):
        ahead.compile_all(["h100"])


def test_unknown_format():
    with pytest.raises(ValueError, match="Unknown weight format 'rf9'"):
        ahead.compile_all(formats=["rf9"])


def write_table() -> None:
    import triton

    kernels = {}
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            found = compile_in_process(target, CHOICE, Path(folder))
        check(found, target)
        kernels.update({name: facts_of(facts) for name, facts in found.items()})
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(facts)}" for name, facts in kernels.items())
    TABLE.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{lines}\n }}\n}}\n')


if __name__ == "__main__":
    write_table()
