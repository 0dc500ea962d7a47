"""Runs the cases of the Triton kernels, and what a machine without Triton or without a GPU sees."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from hf_gg import ops
from hf_gg.formats import get_format
from hf_gg.ops import triton


CASES = Path(__file__).with_name("triton_cases.py")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    # a worker of pytest-xdist must not make its child believe that it is one, too
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    kept = {**kept, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, *arguments], env=kept, capture_output=True, text=True, timeout=280)


def run_cases(**variables: str) -> str:
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES), **variables)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 100
    return done.stdout


@needs_triton
def test_under_the_interpreter():
    # chosen by the environment before Triton is imported, so in a process of its own
    assert "skipped" not in run_cases(TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device():
    run_cases(TRITON_INTERPRET="0")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_cuda_graphs(rows):
    weight, x = torch.randn(4, 512, 4096).cuda(), torch.zeros(rows, 4096, dtype=torch.bfloat16).cuda()
    codes, scale = ops.quantize(weight, get_format("rf8"))
    ends = torch.tensor([0, rows // 2, rows, rows], dtype=torch.int32).cuda()

    def run():
        one = ops.linear(x, codes[0], scale[0], backend="triton")
        return one, ops.grouped_linear(x, codes, scale, ends, backend="triton")

    with torch.no_grad():
        run()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        x.copy_(torch.randn(rows, 4096))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter needs no device")
@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "compute capability 7.5"), ((8, 0), None)])
def test_devices_that_are_too_old(capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability if device else (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    found = triton.why_not.__wrapped__()
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("case", "reason"),
    [("missing", "cannot be imported"), pytest.param("no device", "no CUDA device", marks=needs_triton)],
)
def test_without_triton_or_a_device(case, reason):
    script = """
        import sys
        import torch
        from hf_gg.ops import triton as backend

        assert "hf_gg.ops.triton.kernels" not in sys.modules
        if sys.argv[1] == "missing":
            sys.modules["triton"] = None
        assert not backend.available()
        print(backend.why_not())
        try:
            backend.dequantize(torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1), "rf8", torch.float32)
        except ValueError as error:
            assert backend.why_not() in str(error)
        else:
            raise SystemExit("no error")
    """
    done = run_python("-c", textwrap.dedent(script), case, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout


@needs_triton
@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler."), OSError("no ptxas"), "triton"])
def test_whatever_a_launch_raises_names_the_kernel_and_what_is_supported(error):
    from triton.errors import TritonError

    raised = TritonError("out of resource") if error == "triton" else error

    class Kernel:
        __name__ = "linear_kernel"

        def __getitem__(self, programs):
            def launch(*arguments, **options):
                raise raised

            return launch

    with pytest.raises(triton.KernelError, match="kernel linear_kernel cannot be compiled or launched.*8.0 and newer"):
        triton._launch(Kernel(), (1,), triton.Tiles(1, 1, 32, 1, 1), (torch.ones(1),))
