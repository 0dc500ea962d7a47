"""What the filter costs: its rollouts against those of one epoch of stock GRPO on the same instances; SmolLM2, sums.

In turns, with as many rollouts an instance, as many new tokens at most and the same temperature. Of GRPO only the
calls of `generate` are timed, of the filter its whole work. The epoch's learning rate is 0, so that all
rounds have the same policy. A ratio of 1 or less means that filtering costs no more than the rollouts of one epoch.
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


def epoch(model, words, dataset: Dataset, args: argparse.Namespace, seed: int) -> tuple[float, int, float]:
    """Seconds in `generate` of one epoch of GRPO, completions made, and seconds of the whole epoch."""
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
            start = time.perf_counter()
            trainer.train()
            whole = time.perf_counter() - start
        finally:
            del model.generate
    return spent, made, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=16)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=4, help="instances a step of GRPO")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.instances % args.prompts:
        parser.error("--instances must be a multiple of --prompts: an epoch of GRPO drops the rest.")
    model, prompts = prepare(args.instances)
    answers = [str(4 + k % 8 + k // 8 % 8) for k in range(args.instances)]
    dataset = Dataset.from_dict({"prompt": prompts.texts, "answer": answers})
    ratios, filters, epochs, wholes = [], [], [], []
    for seed in range(args.rounds):
        sampling = Sampling(
            n=args.n,
            max_new_tokens=args.new_tokens,
            temperature=args.temperature,
            seed=seed,
            batch_tokens=args.batch_tokens,
        )
        start = time.perf_counter()
        roll_out(model, prompts.tokenizer, dataset, number_match, sampling, show_progress=False)
        filters.append(time.perf_counter() - start)
        spent, made, whole = epoch(model, prompts.tokenizer, dataset, args, seed)
        if made != args.instances * args.n:
            raise RuntimeError(f"an epoch of GRPO made {made} completions, not {args.instances * args.n}")
        epochs.append(spent)
        wholes.append(whole)
        ratios.append(filters[-1] / spent)
    row = {
        "filter_seconds": f"{statistics.median(filters):.3g}",
        "epoch_rollouts_seconds": f"{statistics.median(epochs):.3g}",
        "epoch_seconds": f"{statistics.median(wholes):.3g}",
        "ratio": f"{statistics.median(ratios):.3g}",
        "ratio_of_each_round": " ".join(f"{ratio:.3g}" for ratio in ratios),
        "wanted": "<= 1",
    }
    print(row, flush=True)
    write_csv("filter_cost", [row | vars(args)])


if __name__ == "__main__":
    main()
