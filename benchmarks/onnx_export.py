"""What an ONNX file of a quantized model costs in onnxruntime: its size, memory at load, and time.

Two parts. `operators`: one layer of 2048 by 2048, decoded by each way that ONNX offers. `models`: SmolLM2-135M (or a
tiny Llama with `--tiny`), exported with `decode="run"` and `decode="load"`, each loaded and run in a process of its
own, and the same model in PyTorch. Memory is what the process owns (anonymous), above what it had before: after
loading, and at the peak of loading and of the first run of the prompt.
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

import numpy as np
import torch
from _common import in_turns, write_csv


WIDTH, PROMPT = 2048, 256
MODES = ("run", "load", "torch")


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The largest `anonymous_bytes` while it runs, above those at the start."""

    def __enter__(self):
        self.start = self.top = anonymous_bytes()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._end.wait(0.002):
            self.top = max(self.top, anonymous_bytes())

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()
        self.bytes = max(self.top, anonymous_bytes()) - self.start


def session(model, threads: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(model, options)


def operators(rows: tuple[int, ...], rounds: int, threads: int) -> list[dict]:
    """Time of one layer, by the way its codes are decoded."""
    from onnx import TensorProto, helper, numpy_helper

    from hf_gg.formats import get_format
    from hf_gg.ops import quantize

    fmt, node = get_format("rf8"), helper.make_node
    codes, scale = quantize(torch.randn(WIDTH, WIDTH), fmt)
    table, weight = fmt.table().numpy(), (fmt.decode(codes) * scale).numpy()
    codes, scale = codes.numpy(), scale.numpy()
    keep = {"keep": np.array([0, -1])}
    gemm = [node("Gemm", ["x", "w"], ["y"], transB=1)]
    whole = [node("Reshape", ["codes", "keep"], ["c"]), node("Cast", ["c"], ["i"], to=TensorProto.INT32)]
    scaled = [node("Gather", ["table", "i"], ["v"]), node("Mul", ["v", "scale"], ["w"])]
    by_row = [
        node("Mul", ["row", "scale"], ["t"]),
        node("GatherElements", ["t", "i"], ["w"], axis=1),
    ]
    byte = {name: np.uint8(value) for name, value in (("3", 3), ("7", 7), ("one", 1), ("8", 8), ("4", 4), ("5", 5))}
    arithmetic = [
        node("BitwiseAnd", ["c", "m"], ["a"]),
        node("BitShift", ["a", "3"], ["e"], direction="RIGHT"),
        node("BitwiseAnd", ["a", "7"], ["r"]),
        # of 16 sixteenths and 0, 1, 2, 4, 8, 12, 14 more: powers of two up to 8, then 4 and 6 more
        node("BitShift", ["one", "r"], ["p"], direction="LEFT"),
        node("BitShift", ["p", "one"], ["q"], direction="RIGHT"),
        node("Min", ["q", "8"], ["q8"]),
        node("Max", ["r", "4"], ["r4"]),
        node("Sub", ["r4", "4"], ["u"]),
        node("Sub", ["5", "u"], ["d"]),
        node("Mul", ["u", "d"], ["more"]),
        node("Add", ["q8", "16"], ["m0"]),
        node("Add", ["m0", "more"], ["m1"]),
        node("Cast", ["m1"], ["m32"], to=TensorProto.UINT32),
        node("Cast", ["e"], ["e32"], to=TensorProto.UINT32),
        node("BitShift", ["m32", "e32"], ["whole"], direction="LEFT"),
        node("Cast", ["whole"], ["size"], to=TensorProto.FLOAT),
        node("Neg", ["size"], ["minus"]),
        node("BitwiseAnd", ["c", "80"], ["s"]),
        node("Cast", ["s"], ["negative"], to=TensorProto.BOOL),
        node("Where", ["negative", "minus", "size"], ["v"]),
        node("Mul", ["v", "small"], ["w"]),
    ]
    numbers = {"16": np.uint8(16), "80": np.uint8(128), "m": np.uint8(127), "small": scale * np.float32(2.0**-19)}
    ways = {
        "GatherElements, a row's table": (whole + by_row + gemm, {"codes": codes, "row": table[None], "scale": scale}),
        "Gather, one table": (whole + scaled + gemm, {"codes": codes, "table": table, "scale": scale}),
        "integer arithmetic": (whole[:1] + arithmetic + gemm, {"codes": codes, **byte, **numbers}),
        "float32 weight": (gemm, {"w": weight}),
    }
    sessions = {}
    for name, (nodes, values) in ways.items():
        kept = {} if "w" in values else keep
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])]
        inputs += [helper.make_tensor_value_info("keep", TensorProto.INT64, [2])] if kept else []
        constants = [numpy_helper.from_array(np.asarray(value), key) for key, value in {**values, **kept}.items()]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])]
        graph = helper.make_graph(nodes, "layer", inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        sessions[name] = session(model.SerializeToString(), threads)
    result = []
    for count in rows:
        x = np.random.default_rng(0).standard_normal((count, WIDTH)).astype(np.float32)
        for name, one in sessions.items():
            # zero, which arithmetic takes for 2^-15, and rounding
            np.testing.assert_allclose(one.run(None, {"x": x})[0], x @ weight.T, rtol=1e-3, atol=2e-2, err_msg=name)
        seconds = in_turns({name: lambda o=one: o.run(None, {"x": x}) for name, one in sessions.items()}, rounds)
        for name, values in seconds.items():
            ns = statistics.median(values) * 1e9 / WIDTH**2
            result.append({"part": "operator", "what": name, "rows": count, "ns_a_weight": round(ns, 3)})
            print(f"{name:32} {count:4} rows {ns:8.3f} ns a weight", flush=True)
    return result


def make(folder: Path, tiny: bool) -> None:
    """The model quantized, saved, and exported both ways."""
    from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM

    from hf_gg import GGConfig, data, quantize_
    from hf_gg.integrations.onnx import export_onnx

    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=2, **sizes))
    else:
        file = data.smollm2_gguf()
        options = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    model = quantize_(model, GGConfig())
    model.save_pretrained(folder / "torch")
    for mode in ("run", "load"):
        start = time.perf_counter()
        export_onnx(model, folder / mode, decode=mode)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in (folder / mode).glob("model.onnx*"))
        print(f"decode={mode!r}: exported in {seconds:.0f} s, {size / 1e6:.1f} MB", flush=True)
        (folder / f"{mode}.json").write_text(json.dumps({"export_s": round(seconds, 1), "file_mb": size / 1e6}))


def run(folder: Path, mode: str, rounds: int, threads: int) -> dict:
    """Loads and runs one of them in this process: the prompt, then one token."""
    torch.set_num_threads(threads)
    ids = np.random.default_rng(0).integers(3, 500, (1, PROMPT))
    if mode == "torch":
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(folder / "torch")  # what happens once in a process is no model's

        with Peak() as peak:
            model = AutoModelForCausalLM.from_pretrained(folder / "torch").eval()
            loaded = anonymous_bytes() - peak.start

            def call(tokens, past):
                with torch.no_grad():
                    return model(torch.tensor(tokens), past_key_values=past, use_cache=True)

            first = call(ids, None)
        import copy

        logits = first.logits[0, -1].numpy()
        one = in_turns({"one": lambda: call(ids[:, -1:], copy.deepcopy(first.past_key_values))}, rounds)["one"]
        whole = in_turns({"prompt": lambda: call(ids, None)}, max(1, rounds // 3), 1)["prompt"]
    else:
        import onnxruntime  # noqa: F401  (its own memory is no model's)

        with Peak() as peak:
            onnx = session(str(folder / mode / "model.onnx"), threads)
            loaded = anonymous_bytes() - peak.start
            names = [output.name for output in onnx.get_outputs()]

            def call(tokens, past):
                length = next(iter(past.values())).shape[2]
                feed = {
                    "input_ids": tokens,
                    "attention_mask": np.ones((1, length + tokens.shape[1]), np.int64),
                    "position_ids": np.arange(length, length + tokens.shape[1])[None],
                }
                wanted = {spec.name for spec in onnx.get_inputs()}
                return onnx.run(None, {**{key: value for key, value in feed.items() if key in wanted}, **past})

            empty = {
                spec.name: np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
                for spec in onnx.get_inputs()
                if "past_key_values" in spec.name
            }
            first = call(ids, empty)
        logits = first[0][0, -1]
        past = {name.replace("output.", "input."): value for name, value in zip(names[1:], first[1:])}
        one = in_turns({"one": lambda: call(ids[:, -1:], past)}, rounds)["one"]
        whole = in_turns({"prompt": lambda: call(ids, empty)}, max(1, rounds // 3), 1)["prompt"]
    np.save(folder / f"{mode}.npy", logits)
    return {
        "memory_loaded_mb": round(loaded / 1e6, 1),
        "memory_peak_mb": round(peak.bytes / 1e6, 1),
        "token_ms": round(1e3 * statistics.median(one), 2),
        "prompt_ms": round(1e3 * statistics.median(whole), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny Llama, and write no results")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=["operators", "models"], choices=("operators", "models"))
    parser.add_argument("--in-process", nargs=2, metavar=("FOLDER", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(run(Path(args.in_process[0]), args.in_process[1], args.rounds, args.threads)))
        return
    rows = []
    if "operators" in args.parts:
        rows += operators((1, 64), args.rounds, args.threads)
    if "models" in args.parts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make(folder, args.tiny)
            for mode in MODES:
                command = [sys.executable, __file__, "--in-process", name, mode, "--rounds", str(args.rounds)]
                command += ["--threads", str(args.threads)]
                text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                about = folder / f"{mode}.json"
                row = {
                    **(json.loads(about.read_text()) if about.exists() else {}),
                    **json.loads(text.splitlines()[-1]),
                }
                difference = np.abs(np.load(folder / f"{mode}.npy") - np.load(folder / "run.npy")).max()
                rows.append({"part": "model", "what": mode, **row, "logits_off_run": float(difference)})
                print(rows[-1], flush=True)
    if not args.tiny:
        print(write_csv("onnx_export", rows))


if __name__ == "__main__":
    main()
