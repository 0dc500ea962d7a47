"""Two processes under BackSlash train what one process trains: DDP, FSDP2, DeepSpeed ZeRO."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file


WORKER = Path(__file__).with_name("backslash_worker.py")
TOLERANCE = 2e-5


def launch(mode: str, folder: Path, output: str, world: int, how: str = "torchrun", shape: str = "tensor"):
    """Runs the worker; returns its weights and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", f"--master-port={port}"]
    # --multi_gpu names the launcher: with --cpu, accelerate starts several processes by mpirun only
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={world}"]
    accelerate += [f"--main_process_port={port}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = {"alone": alone, "torchrun": torchrun, "accelerate": accelerate}[how if world > 1 else "alone"]
    settings = {"OMP_NUM_THREADS": "1", "SHAPE": shape, "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | settings
    path = folder / output
    arguments = [*command, str(WORKER), mode, str(folder / "model"), str(path)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return load_file(f"{path}.safetensors"), json.loads(path.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose rows are odd, so that shards are of different sizes."""
    folder = tmp_path_factory.mktemp("backslash")
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=36,
        intermediate_size=49,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def trainer_alone(folder):
    return launch("trainer", folder, "one", 1)


def assert_same(found, wanted) -> float:
    """The weights, ν and bits of two runs."""
    (weights, log), (expected, expected_log) = found, wanted
    assert weights.keys() == expected.keys()
    apart = max(float((weights[name] - expected[name]).abs().max()) for name in expected)
    assert apart < TOLERANCE
    zeros = {name: float((w == 0).float().mean()) for name, w in expected.items() if w.ndim == 2}
    assert 0.02 < zeros["model.layers.0.mlp.up_proj.weight"] < 1
    for name, share in zeros.items():
        assert float((weights[name] == 0).float().mean()) == pytest.approx(share, abs=0.003)
    assert log["fits"].keys() == expected_log["fits"].keys()
    for name, fit in log["fits"].items():
        assert fit == pytest.approx(expected_log["fits"][name], rel=1e-4)
    assert log["log"]["backslash/bits"] == pytest.approx(expected_log["log"]["backslash/bits"], rel=1e-3)
    return apart


@pytest.mark.slow
def test_ddp(folder, trainer_alone):
    assert_same(launch("trainer", folder, "ddp", 2, "accelerate"), trainer_alone)


@pytest.mark.slow
def test_fsdp2(folder, trainer_alone):
    assert_same(launch("fsdp", folder, "fsdp", 2), trainer_alone)


@pytest.mark.slow
def test_fsdp2_global_shape(folder):
    assert_same(
        launch("fsdp", folder, "fsdp-global", 2, shape="global"),
        launch("trainer", folder, "global", 1, shape="global"),
    )


def test_fsdp2_stops_everywhere_at_a_weight_that_is_not_finite(folder):
    _, log = launch("nan", folder, "nan", 2)
    assert "up_proj.weight has weights that are NaN" in log["error"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["delta", "deepshape"])
def test_adapters_under_ddp(folder, kind):
    """ΔW under its penalty, and the factors of maps, both with a stock Trainer and no callback."""
    weights, log = launch(kind, folder, f"{kind}-ddp", 2, "accelerate")
    expected, alone = launch(kind, folder, f"{kind}-one", 1)
    assert (log["world"], alone["world"]) == (2, 1)
    assert weights.keys() == expected.keys() and len(weights) == 14
    assert all(bool(w.any()) for w in expected.values())
    assert max(float((weights[name] - w).abs().max()) for name, w in expected.items()) < TOLERANCE
    assert log["log"]["loss"] == pytest.approx(alone["log"]["loss"], rel=1e-4)
    if kind == "delta":
        zeros = {name: float((w == 0).float().mean()) for name, w in expected.items()}
        assert all(0.02 < share < 0.98 for share in zeros.values())
        for name, share in zeros.items():
            assert float((weights[name] == 0).float().mean()) == pytest.approx(share, abs=0.003)
        assert log["log"]["backslash/bits"] == pytest.approx(alone["log"]["backslash/bits"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["delta", "deepshape"])
def test_adapters_on_a_split_model_are_refused(folder, kind):
    _, log = launch(f"{kind}-fsdp", folder, f"{kind}-fsdp", 2)
    assert "is split over processes" in log["error"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(folder, stage):
    assert_same(launch(f"zero{stage}", folder, f"zero{stage}", 2), launch("loop", folder, "loop", 1))


def test_deepspeed_of_another_version():
    """A private attribute that is not there is told, not taken for a model that is not split."""
    pytest.importorskip("deepspeed")
    from hf_gg.integrations.zero import zero_parts

    for module, missing in (("stage3", "fp32_partitioned_groups_flat"), ("stage_1_and_2", "bit16_groups")):
        later = type("DeepSpeedZeroOptimizer", (), {"__module__": f"deepspeed.runtime.zero.{module}"})()
        with pytest.raises(ValueError, match=rf"DeepSpeed .* keeps its partitions otherwise.*{missing}"):
            zero_parts(later, {})
    assert zero_parts(torch.optim.SGD([torch.zeros(1)], lr=0.1), {}) is None
