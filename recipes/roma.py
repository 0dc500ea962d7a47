"""RoMA on real tasks, against router tuning without its term and two other terms.

    python recipes/roma.py                      # what roma.yaml says
    python recipes/roma.py --model olmoe        # the small OLMoE instead of the upcycled SmolLM2
    python recipes/roma.py --runs 1             # one more run; finished ones stand in the CSV file

Tasks, mixed: the topic of a BBC news article from its beginning (five candidates), and, for SmolLM2, the questions of
MMLU's dev set (four letters). Half of the samples is for training, the rest held out. Methods:

- `base`: the model as it is,
- `routers`: the routers are tuned on the task alone (λ = 0),
- `random`: with the term, but random successes for neighbours,
- `l2`: with the distance to the base's own routing in its place,
- `roma`: as the paper says.

All other settings are the same. Measured on held-out samples: accuracy of each task and mean loss; on the training
samples, against the neighbours in the space of embeddings: the overlap with the neighbours in the space of routing,
the manifold loss with live routing on both sides, and how even the load of the experts is.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers as tf
import yaml
from roma_models import build_experts, check, olmoe, upcycled

from hf_gg.data import bbc_news, minilm, mmlu_dev
from hf_gg.posttraining.roma import (
    RoMAConfig,
    RoMATrainer,
    Samples,
    describe,
    diagnose,
    embed,
    neighbourhood,
    picture,
)


METHODS = {
    "base": {},
    "routers": {"manifold_weight": 0.0},
    "random": {"neighbours": "random"},
    "l2": {"neighbours": "base"},
    "roma": {},
}
FIGURES = ("accuracy", "news", "mmlu", "loss", "train_accuracy", "overlap", "manifold", "balance")
COLUMNS = ("model", "method", "seed", *FIGURES, "successes", "seconds")


@dataclass
class StudyArguments:
    model: str = field(default="upcycled", metadata={"help": "upcycled or olmoe"})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "which to run"})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "of samples, their order, and poor routers"}
    )
    train_samples: int = field(default=200, metadata={"help": "samples to train on"})
    test_samples: int = field(default=200, metadata={"help": "samples held out"})
    depth: int = field(default=5, metadata={"help": "layers with experts in the upcycled model"})
    router_std: float = field(default=0.1, metadata={"help": "of the poor routers' weights"})
    windows: int = field(default=128, metadata={"help": "texts on which an expert is tuned"})
    window: int = field(default=64, metadata={"help": "tokens of each"})
    expert_learning_rate: float = field(default=5e-4, metadata={"help": "with which an expert is tuned"})
    scratch_steps: int = field(default=400, metadata={"help": "steps of the OLMoE's own training"})
    runs: int = field(default=0, metadata={"help": "stop after so many new runs; 0 for all"})
    results: str = field(default="roma.csv", metadata={"help": "CSV file"})
    image: str = field(default="", metadata={"help": "PNG file of the first seed's routing"})
    work: str = field(default="build/roma", metadata={"help": "folder of what is kept between runs"})
    check: bool = field(default=False, metadata={"help": "compare with the whole upcycled model, and stop"})


def main(arguments: list[str] | None = None) -> Path:
    """Make the runs that are not in the CSV file yet, then print the table."""
    study, base = read_arguments(sys.argv[1:] if arguments is None else arguments)
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    path, work = Path(study.results), Path(study.work)
    path.parent.mkdir(parents=True, exist_ok=True)
    if study.model == "upcycled":
        build_experts(work, study.depth, study.window, study.windows, study.expert_learning_rate)
    if study.check:
        prompts = [row["prompt"] for row in tasks(study, 0)[0][:2]]
        print(f"largest difference of logits: {check(work, study.depth, study.router_std, prompts):.2e}")
        return path
    left = study.runs or -1
    for seed in study.seeds:
        for method in study.methods:
            key = {"model": study.model, "method": method, "seed": str(seed)}
            if left == 0 or any(key.items() <= row.items() for row in read_rows(path)):
                continue
            left -= 1
            row = {**key, **run(study, base, method, seed)}
            append(path, row)
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    rows = read_rows(path)
    if rows:
        print(table(rows))
    return path


def read_arguments(arguments: list[str]) -> tuple[StudyArguments, dict]:
    """The study's arguments, and those of `RoMAConfig` as keywords: the YAML file, and over it the command line."""
    parser = tf.HfArgumentParser(StudyArguments)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    file = parser.parse_known_args(arguments)[0].config
    values = yaml.safe_load(file.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold keys and values, such as `max_steps: 50`.")
    own = {action.dest for action in parser._actions}
    known = set(RoMAConfig.__dataclass_fields__)
    unknown = values.keys() - own - known
    if unknown:
        raise ValueError(f"{file}: unknown key {', '.join(map(str, unknown))}.")
    parser.set_defaults(**{key: value for key, value in values.items() if key in own})
    study, _, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    settings = {key: value for key, value in values.items() if key in known and key not in own}
    more = argparse.ArgumentParser()
    for key, value in settings.items():
        more.add_argument(f"--{key}", type=type(value), default=value)
    for method in study.methods:
        if method not in METHODS:
            raise ValueError(f"methods: {method!r} is none of {', '.join(METHODS)}.")
    if study.model not in ("upcycled", "olmoe"):
        raise ValueError(f"model must be upcycled or olmoe, got {study.model!r}.")
    return study, vars(more.parse_args(rest))


def tasks(study: StudyArguments, seed: int) -> tuple[list[dict], list[dict]]:
    """Samples to train on and held out; the pool is the same for all seeds."""
    rows = topic_questions(bbc_news()[::3])  # experts were tuned on others
    generator = torch.Generator().manual_seed(0)
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
    count = study.train_samples + study.test_samples
    if study.model == "upcycled":
        questions = []
        for row in mmlu_dev():
            choices = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"]))
            prompt = f"{row['question']}\n{choices}\nAnswer:"
            if len(prompt) < 250:  # about 60 tokens
                letters = [" A", " B", " C", " D"]
                questions.append({"prompt": prompt, "answer": f" {row['answer']}", "choices": letters, "task": "mmlu"})
        questions = [questions[i] for i in torch.randperm(len(questions), generator=generator)][: count * 2 // 5]
        rows = rows[: count - len(questions)] + questions
    rows = rows[:count]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order[: study.train_samples]], [rows[i] for i in order[study.train_samples :]]


def topic_questions(articles: list[tuple[str, str]]) -> list[dict]:
    """What an article is about, from its title and first words."""
    topics = [" business", " entertainment", " politics", " sports", " tech"]
    rows = []
    for text, label in articles:
        title, _, body = text.strip().partition("\n")
        words = body.split()[:20]
        prompt = f"{title.strip()}. {' '.join(words)} ...\nThe topic of this article is"
        rows.append({"prompt": prompt, "answer": f" {label}", "choices": topics, "task": "news"})
    return rows


def run(study: StudyArguments, settings: dict, method: str, seed: int) -> dict[str, str]:
    """One method with one seed: its row of the table."""
    train_rows, test_rows = tasks(study, seed)
    work = Path(study.work)
    if study.model == "upcycled":
        model, prefix, tokenizer = upcycled(work, study.depth, seed, study.router_std)
        if not (work / "prefix.safetensors").exists():
            for rows in (train_rows, test_rows):
                samples = Samples(rows, tokenizer, settings["max_length"])
                items = [samples[i] for i in range(len(samples))]
                prefix.compute([(*item["prompt"], *item["answer"]) for item in items])
            prefix.save(work / "prefix.safetensors")  # all seeds have the same samples
    else:
        others = topic_questions([*bbc_news()[1::3], *bbc_news()[2::3]])
        model, tokenizer = olmoe(others, 0, study.scratch_steps, work)  # the same for all seeds
    args = RoMAConfig(
        **{**settings, **METHODS[method]},
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        weight_decay=0.0,
        embedder=str(minilm()),
        embedding_cache=str(work / "embeddings"),
    )
    start = time.perf_counter()
    trainer = RoMATrainer(model, args, train_dataset=train_rows, processing_class=tokenizer)
    trainer.remove_callback(tf.PrinterCallback)
    trainer.prepare()
    before = trainer.before
    if method != "base":
        trainer.train()
    seconds = time.perf_counter() - start
    # neighbours in the space of embeddings, whatever the method takes
    embeddings = embed([row["prompt"] for row in train_rows], args.embedder, args.embedding_cache)
    index, weight = neighbourhood(embeddings, trainer.success, args.k, args.sigma)
    after = before if method == "base" else trainer.describe(train_rows)
    held_out = describe(model, Samples(test_rows, tokenizer, args.max_length), trainer.routers, 16)
    figures = diagnose(after, index, weight, trainer.success)
    found = {
        "accuracy": float(held_out.success.float().mean()),
        "loss": float(held_out.loss.mean()),
        "train_accuracy": figures["accuracy"],
        **{name: figures[name] for name in ("overlap", "manifold", "balance")},
    }
    for task in ("news", "mmlu"):
        own = torch.tensor([row["task"] == task for row in test_rows])
        found[task] = float(held_out.success[own].float().mean()) if bool(own.any()) else float("nan")
    if study.image and method == "roma" and seed == study.seeds[0]:
        labels = [row["answer"].strip() if row["task"] == "news" else "MMLU" for row in train_rows]
        Path(study.image).parent.mkdir(parents=True, exist_ok=True)
        picture(study.image, {"routing before": before.r, "routing after RoMA": after.r}, labels)
    row = {name: f"{found[name]:.5f}" for name in FIGURES}
    return {**row, "successes": str(int(trainer.success.sum())), "seconds": f"{seconds:.0f}"}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV file, none if there is none."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, str]) -> None:
    """Add the row of one run."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[dict[str, str]]) -> str:
    """Means over the seeds, with the standard deviation."""
    lines = [f"| model | method | seeds | {' | '.join(FIGURES)} |", "|---" * (len(FIGURES) + 3) + "|"]
    for model in ("upcycled", "olmoe"):
        for method in METHODS:
            mine = [row for row in rows if (row["model"], row["method"]) == (model, method)]
            if not mine:
                continue
            cells = []
            for name in FIGURES:
                values = [float(row[name]) for row in mine]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}")
            lines.append(f"| {model} | {method} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
