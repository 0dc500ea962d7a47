"""What a step of RoMA costs over plain router tuning, and how long the search for neighbours takes.

    python benchmarks/roma.py            # both
    python benchmarks/roma.py --smoke    # tiny sizes, to see that it runs

Steps: an OLMoE of some size, whole steps (forward, backward, AdamW on the routers of the last five layers) of
`RoMATrainer` and, without anything of ours, of the stock `Trainer`, in turns. Memory: the most that tensors hold
above what there is before a step, counted by a dispatch mode (CPU) or the allocator (CUDA). A speed is only written
when the step's loss and neighbours were checked.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable

import torch
import transformers as tf
from _common import in_turns, median_ratio, write_csv
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gg.posttraining.roma import Collator, RoMAConfig, RoMATrainer, neighbourhood


class Words:
    """A tokenizer of numbers, which is all that `Samples` asks for."""

    pad_token_id = eos_token_id = bos_token_id = 0
    padding_side = "left"

    def __call__(self, text: str, **kwargs) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


class Memory(TorchDispatchMode):
    """The most bytes that storages made inside the block hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def trainer_of(model, rows: list[dict], batch: int, folder: str) -> RoMATrainer:
    arguments = RoMAConfig(
        folder,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        max_steps=1,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    generator = torch.Generator().manual_seed(0)
    points = {row["prompt"]: torch.randn(32, generator=generator) for row in rows}
    return RoMATrainer(
        model,
        arguments,
        rows,
        processing_class=Words(),
        embedder=lambda texts: torch.stack([points[text] for text in texts]),
    )


def step_of(trainer: tf.Trainer, batch: dict) -> Callable[[], torch.Tensor]:
    """A function that makes one step as `Trainer` does."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    items = (batch["labels"][:, 1:] != -100).sum()

    def step() -> torch.Tensor:
        loss = trainer.training_step(trainer.model, dict(batch), items)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss

    return step


def steps(hidden: int, layers: int, length: int, batch: int, rounds: int) -> list[dict]:
    tf.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = tf.OlmoeConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=2 * length,
    )
    model = tf.OlmoeForCausalLM(config)
    words = torch.randint(1, 4096, (4 * batch, length), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [
        {"prompt": " ".join(map(str, row[:-2])), "answer": " ".join(map(str, row[-2:])), "success": True}
        for row in words
    ]
    made: dict[str, Callable] = {}
    cpu = not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, rows, batch, folder)
        trainer.prepare()
        data = Collator(Words(), model)([trainer.train_dataset[i] for i in range(batch)])
        trainer._count = torch.tensor(float(batch))
        # the chosen routers are all that is not frozen
        plain = tf.Trainer(model, tf.TrainingArguments(folder, learning_rate=7e-5, report_to=[], use_cpu=cpu))
        made["routers"] = step_of(plain, {key: value for key, value in data.items() if not key.startswith("roma_")})
        made["roma"] = step_of(trainer, data)
        losses = {name: float(function()) for name, function in made.items()}
        assert losses["roma"] > losses["routers"] - 1e-3, losses  # the term is there, and not negative
        seconds = in_turns(made, rounds)
        most = {}
        for name, function in made.items():
            with Memory() as memory:
                function()
            most[name] = memory.most
    found = []
    for name in made:
        found.append(
            {
                "what": f"step {name}",
                "shape": f"hidden {hidden}, {layers} layers, {batch} x {length} tokens",
                "seconds": f"{statistics.median(seconds[name]):.4f}",
                "time_ratio": f"{median_ratio(seconds[name], seconds['routers']):.3f}",
                "megabytes": f"{most[name] / 2**20:.1f}",
                "memory_ratio": f"{most[name] / most['routers']:.3f}",
            }
        )
    return found


def search(samples: int, dimensions: int, share: float) -> dict:
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(samples, dimensions, generator=generator), dim=1)
    success = torch.rand(samples, generator=generator) < share
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    index, _ = neighbourhood(points, success)
    seconds = time.perf_counter() - start
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(0, samples, max(1, samples // 20)):  # some rows by brute force
        distance = (points - points[i]).double().square().sum(1)
        distance[~success] = torch.inf
        distance[i] = torch.inf
        assert torch.equal(distance[index[i]], distance.sort().values[:3]), i
    return {
        "what": "neighbourhood",
        "shape": f"{samples} x {dimensions}, {share:.0%} successes",
        "seconds": f"{seconds:.2f}",
        "megabytes": f"{(most - before) / 1024:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is written")
    smoke = parser.parse_args().smoke
    rows: list[dict] = []
    for part in (
        (lambda: steps(64, 6, 32, 4, 2), lambda: [search(2000, 32, 0.5)])
        if smoke
        else (
            lambda: steps(256, 8, 128, 8, 5),
            lambda: steps(512, 8, 64, 4, 5),
            lambda: [search(50_000, 384, 0.5)],
            lambda: [search(50_000, 384, 1.0)],
        )
    ):
        for row in part():
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if not smoke:
        print(write_csv("roma", rows))


if __name__ == "__main__":
    main()
