"""What entropy coding costs and saves: size of SmolLM2's files, time to load and to save them, memory at the peak.

Of each format there is a checkpoint with plain codes and a coded one. All loads run in one process, in turns, after
one load each that fills the page cache. Each peak of memory is measured in a process of its own: what it owns
(anonymous), sampled every millisecond, above what it owned before; mapped files do not count. A load is reported only
if its codes are those that were saved.
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
from _common import in_turns, median_ratio, write_csv
from load import anonymous_bytes, make


FORMATS = {"rf8": {"weight_format": "rf8"}, "grid": {"weight_format": "grid", "target_bits": 5.0}}
CODINGS = ("none", "rans", "eg0")


def load(folder: str | Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def peak_of(what: str, folder: str) -> dict[str, float]:
    """MiB at the peak of one load or one save in this process, and after it."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = load(folder)  # imports, tables, compiled kernels
    if what == "load":
        del model
    before, peak, running = anonymous_bytes(), [0], [True]

    def watch() -> None:
        while running[0]:
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.001)

    with tempfile.TemporaryDirectory() as target:
        watcher = threading.Thread(target=watch)
        watcher.start()
        if what == "load":
            model = load(folder)
        else:
            model.save_pretrained(target)
        running[0] = False
        watcher.join()
    codes = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    return {
        "peak": (peak[0] - before) / 2**20,
        "after": (anonymous_bytes() - before) / 2**20,
        "codes": codes / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(peak_of(*args.one)))
        return
    import transformers
    from transformers import AutoModelForCausalLM

    from hf_gg import GGConfig, coding, quantize_
    from hf_gg.integrations.selection import code_parameters

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make(folder, "smollm2", {})
        for name in args.formats:
            model = quantize_(load(Path(folder, "plain")), GGConfig(**FORMATS[name]))
            saves = {}
            for coder in CODINGS:
                model.config.quantization_config.coding = coder
                start = time.perf_counter()
                model.save_pretrained(Path(folder, f"{name}-{coder}"))
                saves[coder] = time.perf_counter() - start
            wanted = {key: module._parameters[weight] for key, module, weight in code_parameters(model)}
            for coder in CODINGS:
                found = AutoModelForCausalLM.from_pretrained(Path(folder, f"{name}-{coder}"))
                for key, module, weight in code_parameters(found):
                    if not torch.equal(module._parameters[weight], wanted[key]):
                        raise SystemExit(f"{name} {coder}: {key} came back as something else")
            count = sum(codes.numel() for codes in wanted.values())
            entropy = sum(coding.entropy(codes) * codes.numel() for codes in wanted.values()) / count
            seconds = in_turns(
                {coder: lambda path=Path(folder, f"{name}-{coder}"): load(path) for coder in CODINGS}, args.rounds
            )
            plain = sum(file.stat().st_size for file in Path(folder, f"{name}-none").glob("*.safetensors"))
            for coder in CODINGS:
                path = Path(folder, f"{name}-{coder}")
                size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
                memory = {
                    what: json.loads(
                        subprocess.run(
                            [sys.executable, __file__, "--one", what, path], check=True, capture_output=True, text=True
                        ).stdout.splitlines()[-1]
                    )
                    for what in ("load", "save")
                }
                row = {
                    "model": "smollm2",
                    "format": name,
                    "coding": coder,
                    "file_mb": round(size / 1e6, 1),
                    "bits_a_code": round(8 - 8 * (plain - size) / count, 3),
                    "entropy": round(entropy, 3),
                    "load_seconds": round(statistics.median(seconds[coder]), 3),
                    "load_ratio": round(median_ratio(seconds[coder], seconds["none"]), 2),
                    "load_peak_mib": round(memory["load"]["peak"]),
                    "loaded_mib": round(memory["load"]["after"]),
                    "codes_mib": round(memory["load"]["codes"]),
                    "save_seconds": round(saves[coder], 3),
                    "save_peak_mib": round(memory["save"]["peak"]),
                }
                rows.append(row)
                print(row, flush=True)
    print(f"written: {write_csv('coded_load', rows)}")


if __name__ == "__main__":
    main()
