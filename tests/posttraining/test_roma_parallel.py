"""Two processes train what one process trains: DDP and FSDP2."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe import moe
from safetensors.torch import load_file


WORKER = Path(__file__).with_name("roma_worker.py")


def launch(mode: str, folder: Path, output: str, world: int, how: str = "torchrun", resume: str = ""):
    """Runs the worker; returns its router weights and what it wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", f"--master-port={port}"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={world}"]
    accelerate += [f"--main_process_port={port}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = {"alone": [sys.executable], "torchrun": torchrun, "accelerate": accelerate}[
        how if world > 1 else "alone"
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RESUME": resume}
    path = folder / output
    arguments = [*command, str(WORKER), mode, str(folder / "model"), str(path)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    weights = load_file(path / "adapter" / "router_adapter.safetensors")
    return weights, json.loads(Path(f"{path}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("roma")
    moe("olmoe").save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return launch("trainer", folder, "one", 1)


def assert_same(found, wanted) -> None:
    (weights, about), (expected, about_one) = found, wanted
    assert weights.keys() == expected.keys()
    assert max(float((weights[name] - w).abs().max()) for name, w in expected.items()) < 2e-5
    assert about["index"] == about_one["index"]
    for key in ("loss", "r", "load"):
        assert torch.allclose(torch.tensor(about[key]), torch.tensor(about_one[key]), atol=2e-5), key
    for own, one in zip(about["logs"], about_one["logs"], strict=True):
        for key in ("task_loss", "manifold_loss"):
            assert own[key] == pytest.approx(one[key], rel=1e-4), key


@pytest.mark.slow
def test_ddp(folder, alone):
    assert_same(launch("trainer", folder, "ddp", 2, "accelerate"), alone)
    checkpoint = str(folder / "ddp" / "checkpoint-2")
    assert_same_weights(launch("trainer", folder, "ddp-resumed", 2, "accelerate", checkpoint), alone)


def test_fsdp2(folder, alone):
    assert_same(launch("fsdp", folder, "fsdp", 2), alone)


def assert_same_weights(found, wanted) -> None:
    for name, w in wanted[0].items():
        assert float((found[0][name] - w).abs().max()) < 2e-5, name
