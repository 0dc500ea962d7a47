"""What the filter costs: its rollouts against those of one epoch of stock GRPO on the same instances; SmolLM2, sums.

In turns, each first in every other round, after a warm-up of one batch, with as many rollouts an instance, as many new
tokens at most and the same temperature. Of GRPO only the calls of `generate` are timed, of the filter its whole work.
GRPO trains one norm, with a learning rate of 0: all rounds have the same policy, and no time goes into a backward pass
that is not timed. A ratio of 1 or less means that filtering costs no more than the rollouts of one epoch. A look at
whether it works, in a minute: `--instances 4 --prompts 2 --n 2 --new-tokens 6 --rounds 1 --name filter_cost_small`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

from _common import write_csv
from datasets import Dataset
from rollouts import prepare
from trl import GRPOConfig, GRPOTrainer

from hf_gg.posttraining.rif import number_match, roll_out
from hf_gg.posttraining.rollouts import Sampling


def epoch(model, words, dataset: Dataset, args: argparse.Namespace, seed: int) -> float:
    """Seconds in `generate` of one epoch of GRPO."""
    spent, made, generate = 0.0, 0, model.generate

    def timed(*given, **options):
        nonlocal spent, made
        start = time.perf_counter()
        found = generate(*given, **options)
        spent, made = spent + time.perf_counter() - start, made + len(found)
        return found

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder,
            num_train_epochs=1,
            learning_rate=0.0,
            per_device_train_batch_size=args.n * args.prompts,
            num_generations=args.n,
            max_completion_length=args.new_tokens,
            temperature=args.temperature,
            beta=0.0,
            seed=seed,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        model.generate = timed
        try:
            trainer = GRPOTrainer(model, number_match, settings, train_dataset=dataset, processing_class=words)
            trainer.train()
        finally:
            del model.generate
    if made != len(dataset) * args.n:
        raise RuntimeError(f"an epoch of GRPO made {made} completions, not {len(dataset) * args.n}")
    return spent


def filtering(model, words, dataset: Dataset, args: argparse.Namespace, seed: int) -> float:
    """Seconds of the filter's rollouts, all of its work in them."""
    sampling = Sampling(
        n=args.n,
        max_new_tokens=args.new_tokens,
        temperature=args.temperature,
        seed=seed,
        batch_tokens=args.batch_tokens,
    )
    start = time.perf_counter()
    roll_out(model, words, dataset, number_match, sampling, show_progress=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=16)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=4, help="instances a step of GRPO")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="filter_cost", help="of the file of results")
    args = parser.parse_args()
    if args.instances % args.prompts:
        parser.error("--instances must be a multiple of --prompts: an epoch of GRPO drops the rest.")
    model, prompts = prepare(args.instances)
    answers = [str(4 + k % 8 + k // 8 % 8) for k in range(args.instances)]
    dataset = Dataset.from_dict({"prompt": prompts.texts, "answer": answers})
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    ways = {"filter": filtering, "epoch": epoch}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(model, prompts.tokenizer, dataset.select(range(args.prompts)), args, 0)
    for seed in range(args.rounds):
        for name in [*ways][:: 1 if seed % 2 == 0 else -1]:
            seconds[name].append(ways[name](model, prompts.tokenizer, dataset, args, seed))
            print(f"round {seed}, {name}: {seconds[name][-1]:.1f} s", flush=True)
    ratios = [a / b for a, b in zip(seconds["filter"], seconds["epoch"])]
    row = {
        "filter_seconds": f"{statistics.median(seconds['filter']):.3g}",
        "epoch_rollouts_seconds": f"{statistics.median(seconds['epoch']):.3g}",
        "ratio": f"{statistics.median(ratios):.3g}",
        "ratio_of_each_round": " ".join(f"{ratio:.3g}" for ratio in ratios),
        "wanted": "<= 1",
    }
    print(row, flush=True)
    write_csv(args.name, [row | vars(args)])


if __name__ == "__main__":
    main()
