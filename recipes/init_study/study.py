"""Does the shape of the initial weights matter? The same small models trained from scratch, with one thing changed.

    python recipes/init_study/study.py                                   # what study.yaml says
    python recipes/init_study/study.py --config my.yaml --max_steps 50   # other values

Texts: the State of the Union addresses (package `sotu`), the last ones held out. Tokenizer: byte-level BPE, trained on
the training texts. Models: GPT-2 and Llama of Transformers, trained by its `Trainer`. An arm is one way to initialize:

- `own`: by the model's own initializer (GPT-2: N(0, 0.02) with smaller residual projections; Llama: N(0, 0.02)),
- `normal-S`: all matrices by N(0, S),
- `gg-V`: generalized Gaussian of shape V, every matrix with the standard deviation that the own initializer gives it.

The seed sets initial weights and the order of the data, so arms of one seed see the same batches. Finished runs stand
in `curves.csv` in the output folder and are not run again, so a study that was stopped goes on where it was. Arms with
the same initial weights, bit for bit, are one run. `report.py` makes the plot and the table.
"""

import csv
import hashlib
import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers as tf
import yaml
from tokenizers import ByteLevelBPETokenizer

import hf_gg
from hf_gg.data import sotu_texts


HERE = Path(__file__).parent
COLUMNS = ("model", "arm", "seed", "step", "tokens", "train_loss", "eval_loss", "init", "seconds")


@dataclass
class StudyArguments:
    models: list[str] = field(default_factory=lambda: ["gpt2", "llama"], metadata={"help": "gpt2 and llama"})
    arms: list[str] = field(default_factory=lambda: ["own", "gg-1"], metadata={"help": "own, normal-STD or gg-SHAPE"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of weights and data order"})
    hidden_size: int = field(default=128, metadata={"help": "width of the models"})
    layers: int = field(default=6, metadata={"help": "depth of the models"})
    heads: int = field(default=4, metadata={"help": "attention heads"})
    vocabulary: int = field(default=2048, metadata={"help": "size of the tokenizer's vocabulary"})
    window: int = field(default=128, metadata={"help": "tokens in a training example"})
    since: int = field(default=1790, metadata={"help": "year of the first text"})
    eval_windows: int = field(default=128, metadata={"help": "examples that are held out"})


def main(arguments: list[str] | None = None) -> Path:
    """Run what is not in the results yet; returns the CSV file."""
    study, training = read_arguments(sys.argv[1:] if arguments is None else arguments)
    tf.utils.logging.set_verbosity_error()
    train, held_out = windows(study)
    results = Path(training.output_dir) / "curves.csv"
    results.parent.mkdir(parents=True, exist_ok=True)
    check_settings(results.with_name("settings.json"), study, training)
    for seed in study.seeds:
        for name in study.models:
            for arm in study.arms:
                rows = read_rows(results)
                key = {"model": name, "arm": arm, "seed": str(seed)}
                if any(row["step"] == str(training.max_steps) and key.items() <= row.items() for row in rows):
                    continue
                model = build(study, name, arm, seed)
                init = fingerprint(model)
                twin = [
                    row for row in rows if row["init"] == init and row["model"] == name and row["seed"] == str(seed)
                ]
                if twin:
                    new = [{**row, "arm": arm} for row in twin if row["arm"] == twin[0]["arm"]]
                else:
                    new = [{**key, **row, "init": init} for row in train_once(model, training, seed, train, held_out)]
                append_rows(results, new)
                last = new[-1]
                also = f" (the same as {twin[0]['arm']})" if twin else ""
                print(f"{name} {arm} seed {seed}: eval loss {float(last['eval_loss']):.4f}, {last['seconds']} s{also}")
    return results


def read_arguments(arguments: list[str]) -> tuple[StudyArguments, tf.TrainingArguments]:
    """The flat YAML file, and over it the command line.

    Raises:
        ValueError: an unknown key in the file, an unknown model or arm.
    """
    parser = tf.HfArgumentParser((StudyArguments, tf.TrainingArguments))  # type: ignore[arg-type]
    parser.add_argument("--config", type=Path, default=HERE / "study.yaml", help="flat YAML file of all arguments")
    file = parser.parse_known_args(arguments)[0].config
    values = yaml.safe_load(file.read_text())
    unknown = values.keys() - {action.dest for action in parser._actions}
    if unknown:
        raise ValueError(f"{file}: unknown key {', '.join(sorted(unknown))}.")
    parser.set_defaults(**values)
    study, training, _ = parser.parse_args_into_dataclasses(arguments)
    for name in study.models:
        if name not in ("gpt2", "llama"):
            raise ValueError(f"models: {name!r} is neither gpt2 nor llama.")
    for arm in study.arms:
        initialized_by(arm)
    if training.max_steps < 1:
        raise ValueError("max_steps must be given: the arms are compared after as many steps.")
    training.report_to, training.dataloader_pin_memory = [], False
    training.save_strategy = tf.trainer_utils.SaveStrategy.NO
    training.disable_tqdm, training.eval_on_start, training.use_cpu = True, True, not torch.cuda.is_available()
    return study, training


def check_settings(path: Path, study: StudyArguments, training: tf.TrainingArguments) -> None:
    """Write what all runs in a folder have in common, or compare with what stands there.

    Raises:
        ValueError: the folder holds results of other settings.
    """
    common = {key: value for key, value in asdict(study).items() if key not in ("models", "arms", "seeds")}
    for key in ("max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps"):
        common[key] = getattr(training, key)
    for key in ("weight_decay", "max_grad_norm", "gradient_accumulation_steps", "eval_steps"):
        common[key] = getattr(training, key)
    common = json.loads(json.dumps(common))
    if not path.exists():
        path.write_text(json.dumps(common, indent=2) + "\n")
    elif (found := json.loads(path.read_text())) != common:
        other = [key for key in common if found.get(key) != common[key]]
        raise ValueError(
            f"{path.parent} holds results of other settings ({', '.join(other)}): give another output_dir."
        )


def windows(study: StudyArguments) -> tuple[list[dict], list[dict]]:
    """Training and held-out examples, `window` tokens each; the held-out ones are of the latest texts."""
    texts = sotu_texts(since=study.since)
    late = max(1, len(texts) // 20)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[:-late], vocab_size=study.vocabulary, min_frequency=2, show_progress=False)

    def cut(part: list[str]) -> list[dict]:
        ids = torch.tensor([token for text in part for token in tokenizer.encode(text).ids])
        rows = ids[: len(ids) // study.window * study.window].view(-1, study.window)
        return [{"input_ids": row, "labels": row} for row in rows]

    held_out = cut(texts[-late:])
    return cut(texts[:-late]), held_out[:: max(1, len(held_out) // study.eval_windows)][: study.eval_windows]


def initialized_by(arm: str):
    """The context in which an arm's model is built.

    Raises:
        ValueError: an unknown arm.
    """
    kind, _, value = arm.partition("-")
    if arm == "own":
        return nullcontext()
    if kind == "normal" and value:
        return hf_gg.gg_init(shape=2, std=float(value))
    if kind == "gg" and value:
        return hf_gg.gg_init(shape=float(value))
    raise ValueError(f"arms: {arm!r} is not own, normal-STD or gg-SHAPE.")


def build(study: StudyArguments, name: str, arm: str, seed: int) -> tf.PreTrainedModel:
    """A new model of an arm."""
    common = {"vocab_size": study.vocabulary, "bos_token_id": None, "eos_token_id": None, "use_cache": False}
    if name == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        size = {"n_embd": study.hidden_size, "n_layer": study.layers, "n_head": study.heads}
        config = tf.GPT2Config(**common, **size, **no_dropout, n_positions=study.window)
    else:
        config = tf.LlamaConfig(
            **common,
            hidden_size=study.hidden_size,
            num_hidden_layers=study.layers,
            num_attention_heads=study.heads,
            intermediate_size=study.hidden_size * 8 // 3 // 8 * 8,
            max_position_embeddings=study.window,
            tie_word_embeddings=True,
        )
    tf.set_seed(seed)
    with initialized_by(arm):
        return tf.AutoModelForCausalLM.from_config(config)


def fingerprint(model: torch.nn.Module) -> str:
    """The same for models with the same initial weights."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()[:12]


def train_once(
    model, training: tf.TrainingArguments, seed: int, train: list[dict], held_out: list[dict]
) -> list[dict]:
    """Train a model; a row for each evaluation."""
    training.seed = training.data_seed = seed
    trainer = tf.Trainer(model=model, args=training, train_dataset=train, eval_dataset=held_out)
    trainer.remove_callback(tf.trainer_callback.PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - start, 1)
    rows, train_loss = [], ""
    for entry in trainer.state.log_history:
        train_loss = entry.get("loss", train_loss)
        if "eval_loss" in entry:
            tokens = entry["step"] * training.per_device_train_batch_size * len(train[0]["input_ids"])
            row = {"step": entry["step"], "tokens": tokens, "train_loss": train_loss, "eval_loss": entry["eval_loss"]}
            rows.append({**row, "seconds": seconds})
    return rows


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add rows to the results, all or none."""
    whole = [*read_rows(path), *rows]
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(whole)
    new.replace(path)


if __name__ == "__main__":
    main()
