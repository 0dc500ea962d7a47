"""What quantizing at load costs: time against a plain load of the same checkpoint, and memory at the peak.

Each kind of load has processes of its own, in turns, and is warm there (files read, libraries loaded): a plain load
(which maps the file), a plain load whose weights are then read once (`touch`: what the first forward pass pays),
quantizing while loading, and a load of the RF8 checkpoint. Memory is what the process owns (anonymous), sampled every
millisecond; mapped files do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from _common import median_ratio, write_csv


MODES = ("plain", "plain, touched", "quantize", "quantize, absmax", "rf8")


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def load(mode: str, folder: str) -> dict:
    """Loads in this process: seconds, and bytes of memory at the peak and after, above those before."""
    import transformers
    from transformers import AutoModelForCausalLM

    from hf_gg import GGConfig

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = Path(folder, "rf8" if mode == "rf8" else "plain")
    kwargs = {}
    if mode.startswith("quantize"):
        kwargs["quantization_config"] = lambda: GGConfig(scale="absmax" if "absmax" in mode else "row")

    def run():
        options = {key: make() for key, make in kwargs.items()}
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


def make(folder: str, model: str, size: dict) -> None:
    """Save a model in bfloat16, and the same in RF8."""
    import transformers
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from hf_gg import GGConfig

    transformers.logging.set_verbosity_error()
    if model == "smollm2":
        from transformers import GgufConfig

        from hf_gg.data import smollm2_gguf

        file = smollm2_gguf()
        options = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
        plain = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    else:
        torch.manual_seed(0)
        plain = LlamaForCausalLM(LlamaConfig(**size)).bfloat16()
    plain.save_pretrained(Path(folder, "plain"))
    del plain
    quantized = AutoModelForCausalLM.from_pretrained(Path(folder, "plain"), quantization_config=GGConfig())
    quantized.save_pretrained(Path(folder, "rf8"))


SIZES = {
    "llama-0.5b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 9,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2", "llama-0.5b"], choices=["smollm2", *SIZES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("MODE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(load(*args.one)))
        return
    rows = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            make(folder, model, SIZES.get(model, {}))
            results: dict[str, list[dict]] = {mode: [] for mode in MODES}
            for turn in range(args.rounds + 1):
                for mode in MODES:
                    out = subprocess.run(
                        [sys.executable, __file__, "--one", mode, folder], check=True, capture_output=True, text=True
                    )
                    if turn:  # the first round fills the page cache and compiles the kernels
                        results[mode].append(json.loads(out.stdout.splitlines()[-1]))
        seconds = {mode: [r["seconds"] for r in found] for mode, found in results.items()}
        for mode, found in results.items():
            mib = {
                key: statistics.median(r[key] for r in found) / 2**20
                for key in ("peak", "after", "footprint", "largest")
            }
            row = {
                "model": model,
                "load": mode,
                "seconds": round(statistics.median(seconds[mode]), 3),
                "ratio_to_plain": round(median_ratio(seconds[mode], seconds["plain"]), 2),
                "ratio_to_plain_touched": round(median_ratio(seconds[mode], seconds["plain, touched"]), 2),
                "peak_mib": round(mib["peak"]),
                "after_mib": round(mib["after"]),
                "model_mib": round(mib["footprint"]),
                "largest_tensor_mib": round(mib["largest"]),
            }
            rows.append(row)
            print(row, flush=True)
    print(f"written: {write_csv('load', rows)}")


if __name__ == "__main__":
    main()
