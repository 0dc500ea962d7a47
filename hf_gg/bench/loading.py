"""What loading a checkpoint costs: seconds, and memory at the peak, each kind of load in processes of its own.

Kinds of load: a plain one (which maps the file), a plain one whose weights are then read once (`touched`: what the
first forward pass pays), quantizing while loading, a load of the quantized checkpoint, and other packages' ways, by
Transformers' own configs, which quantize while loading. Memory is what the process owns (anonymous), sampled every
millisecond; mapped files do not count.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .contenders import OURS
from .timing import median_ratio


FROM_PLAIN = ("plain", "plain, touched", "quantize", "quantize, absmax")
PEERS: dict[str, Callable[[], Any]] = {
    "bitsandbytes int8": lambda: _config("BitsAndBytesConfig", load_in_8bit=True),
    "bitsandbytes nf4": lambda: _config("BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao int8": lambda: _config("TorchAoConfig", _torchao().Int8WeightOnlyConfig()),
    "torchao float8": lambda: _config("TorchAoConfig", _torchao().Float8WeightOnlyConfig()),
    "quanto qint8": lambda: _config("QuantoConfig", weights="int8"),
    "quanto qfloat8": lambda: _config("QuantoConfig", weights="float8"),
    "HQQ 8": lambda: _config("HqqConfig", nbits=8, group_size=64),
}
MODES = (*FROM_PLAIN, *OURS, *PEERS)


def measure(folder: Path, rounds: int, modes: tuple[str, ...] = MODES) -> list[dict]:
    """A row a kind of load of the checkpoints that `save` left in a folder, in turns; the first does not count.

    Raises:
        RuntimeError: one of ours fails. A peer that fails is a row with its `reason`.
    """
    results: dict[str, list[dict]] = {mode: [] for mode in modes}
    reasons: dict[str, str] = {}
    for turn in range(rounds + 1):
        for mode in results:
            if mode in reasons:
                continue
            command = [sys.executable, "-m", "hf_gg.bench.loading", mode, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode and mode in PEERS:
                reasons[mode] = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
            elif done.returncode:
                raise RuntimeError(f"the load {mode!r} failed: {' '.join(done.stderr.split())[-500:]}")
            elif turn:  # the first fills the page cache and compiles the kernels
                results[mode].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {mode: [r["seconds"] for r in found] for mode, found in results.items()}
    rows = []
    for mode, found in results.items():
        if mode in reasons:
            rows.append({"load": mode, "reason": reasons[mode]})
            continue
        mib = {
            key: statistics.median(r[key] for r in found) / 2**20 for key in ("peak", "after", "footprint", "largest")
        }
        row = {"load": mode, "seconds": round(statistics.median(seconds[mode]), 3)}
        for other, key in (("plain", "ratio_to_plain"), ("plain, touched", "ratio_to_plain_touched")):
            if other in seconds:
                row[key] = round(median_ratio(seconds[mode], seconds[other]), 2)
        row |= {
            "peak_mib": round(mib["peak"]),
            "after_mib": round(mib["after"]),
            "model_mib": round(mib["footprint"]),
            "largest_tensor_mib": round(mib["largest"]),
        }
        rows.append(row)
    return rows


def save(plain, folder: Path) -> None:
    """Save a model as it is in `plain`, and in each format of `OURS` in a folder of that name."""
    from transformers import AutoModelForCausalLM

    from ..integrations.config import GGConfig

    plain.save_pretrained(folder / "plain")
    for name in OURS:
        config = GGConfig(weight_format=name)
        quantized = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config)
        quantized.save_pretrained(folder / name)


def _config(name: str, *arguments, **options):
    import transformers

    return getattr(transformers, name)(*arguments, **options)


def _torchao():
    import torchao.quantization

    return torchao.quantization


def load(mode: str, folder: Path) -> dict:
    """Loads in this process: seconds, and bytes of memory at the peak and after, above those before."""
    import transformers
    from transformers import AutoModelForCausalLM

    from ..integrations.config import GGConfig

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = folder / (mode if mode in OURS else "plain")

    def run():
        options: dict[str, Any] = {}
        if mode.startswith("quantize"):
            options["quantization_config"] = GGConfig(scale="absmax" if "absmax" in mode else "row")
        if mode in PEERS:
            options |= {"quantization_config": PEERS[mode](), "device_map": "cpu"}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)
        if mode == "plain, touched":
            for parameter in model.parameters():
                parameter.data.view(torch.int16).amax()
        return model

    run()  # what happens once in a process: imports, Transformers' table of conversions, the compiled kernels
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    before, peak, running = anonymous_bytes(), [0], [True]

    def watch() -> None:
        while running[0]:
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.001)

    # a load of its own: the watcher takes turns with the loader's Python, and would spoil its time
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = run()
    running[0] = False
    watcher.join()
    return {
        "seconds": seconds,
        "peak": peak[0] - before,
        "after": anonymous_bytes() - before,
        "footprint": model.get_memory_footprint(),
        "largest": max(p.numel() for p in model.parameters()) * 2,
    }


def anonymous_bytes() -> int:
    """Memory that this process owns; `RuntimeError` elsewhere than on Linux."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: memory of a load is measured on Linux only.")


if __name__ == "__main__":
    print(json.dumps(load(sys.argv[1], Path(sys.argv[2]))))
