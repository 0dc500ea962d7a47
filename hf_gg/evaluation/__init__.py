"""How good a model is, and how far it is from the one that it was made from.

    documents = read_documents(["texts.jsonl"])
    evaluate_texts(model, tokenizer, documents, base)   # perplexity, KL, flips, with intervals
    evaluate_tasks(model, tokenizer, ["arc_easy"])      # lm-evaluation-harness
    evaluate.load(metric_path("flip_rate"))             # our modules for the `evaluate` library

`hf-gg eval` is these on a command line.
"""

from .bootstrap import Estimate, interval
from .documents import Document, read_documents
from .local_tasks import write_mmlu_dev
from .measures import Figures, token_figures
from .metrics import METRICS, metric_path
from .tasks import evaluate_tasks, task_manager
from .texts import TextResult, evaluate_texts
from .windows import strided


__all__ = [
    "METRICS",
    "Document",
    "Estimate",
    "Figures",
    "TextResult",
    "evaluate_tasks",
    "evaluate_texts",
    "interval",
    "metric_path",
    "read_documents",
    "strided",
    "task_manager",
    "token_figures",
    "write_mmlu_dev",
]
