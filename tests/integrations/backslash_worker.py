"""A training under BackSlash as one of several processes: python backslash_worker.py MODE MODEL OUTPUT.

MODE: `trainer` (alone, or under DDP by `accelerate launch`), `fsdp` (parts of the model in each process),
`loop` (plain PyTorch), `zero1`, `zero2`, `zero3` (DeepSpeed's engine), `nan` (FSDP, with a weight that is not finite),
`delta`, `deepshape` (as `trainer`, with an adapter), `delta-fsdp`, `deepshape-fsdp` (an adapter on a split model).
Writes the trained weights to OUTPUT.safetensors and what was logged to OUTPUT.json.
"""

import json
import os
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ACCELERATE_USE_CPU", "1")

import torch
import torch.distributed as dist
import transformers as tf
from safetensors.torch import save_file

from hf_gg import BackSlash, BackSlashCallback
from hf_gg.integrations.zero import zero_parts
from hf_gg.training.rate import Rate
from hf_gg.training.selection import select_matrices


MODE, MODEL, OUTPUT = sys.argv[1], sys.argv[2], Path(sys.argv[3])
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SHAPE = os.environ.get("SHAPE", "tensor")
TOKENS = torch.randint(0, 64, (48, 16), generator=torch.Generator().manual_seed(0))
STEPS, BATCH, LR, LAMBDA = 8, 4, 5e-3, 1.0


def arguments() -> tf.TrainingArguments:
    return tf.TrainingArguments(
        str(OUTPUT),
        per_device_train_batch_size=BATCH // WORLD,
        max_steps=STEPS,
        learning_rate=LR,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=4,
    )


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in TOKENS]


def finish(weights: dict[str, torch.Tensor], log: dict) -> None:
    if RANK == 0:
        save_file({name: w.contiguous().clone() for name, w in weights.items()}, f"{OUTPUT}.safetensors")
        Path(f"{OUTPUT}.json").write_text(json.dumps(log))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def full(w: torch.Tensor) -> torch.Tensor:
    return w.full_tensor() if hasattr(w, "full_tensor") else w.detach()


def with_trainer() -> None:
    parallel = None
    if MODE in ("fsdp", "nan"):
        from transformers.distributed import DistributedConfig

        parallel = DistributedConfig(fsdp_size=WORLD)
    model = tf.AutoModelForCausalLM.from_pretrained(MODEL, distributed_config=parallel)
    if MODE == "nan" and RANK == 1:
        model.model.layers[1].mlp.up_proj.weight.to_local().data[-1, -1] = torch.nan
    schedule = {"every": 3, "warmup": 2, "cooldown": 2}
    callback = BackSlashCallback(LAMBDA, shape=SHAPE, grid=2**-7, **schedule)
    trainer = tf.Trainer(model, arguments(), train_dataset=rows(), callbacks=[callback])
    try:
        trainer.train()
    except ValueError as error:
        if MODE != "nan":
            raise
        print(f"rank {RANK}: {error}")
        finish({}, {"error": str(error)})
    fits = callback.saved["fits"]
    finish(
        {name: full(w) for name, w in trainer.model.state_dict().items()},
        {"fits": fits, "log": trainer.state.log_history[0]},
    )


def with_adapter() -> None:
    import peft

    from hf_gg import BackSlashConfig, DeepShapeConfig

    kind, _, split = MODE.partition("-")
    parallel = None
    if split:
        from transformers.distributed import DistributedConfig

        parallel = DistributedConfig(fsdp_size=WORLD)
    model = tf.AutoModelForCausalLM.from_pretrained(MODEL, distributed_config=parallel)
    config = DeepShapeConfig(shape_scale=0.9, task_type="CAUSAL_LM")
    if kind == "delta":
        schedule = {"every": 3, "warmup": 2, "cooldown": 2}
        config = BackSlashConfig(lambda_=0.5, shape=SHAPE, grid=None, task_type="CAUSAL_LM", **schedule)
    try:
        model = peft.get_peft_model(model, config)
    except ValueError as error:
        finish({}, {"error": str(error)})
    trainer = tf.Trainer(model, arguments(), train_dataset=rows())
    trainer.train()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    finish(weights, {"world": WORLD, "log": trainer.state.log_history[0]})


def batch(step: int) -> torch.Tensor:
    rows = TOKENS[step * BATCH : (step + 1) * BATCH]
    return rows[RANK * BATCH // WORLD : (RANK + 1) * BATCH // WORLD]


def groups(model: torch.nn.Module) -> list[dict]:
    """Two groups, so that ZeRO steps one after the other."""
    parameters = list(model.named_parameters())
    return [
        {"params": [p for name, p in parameters if "layers.0" in name], "weight_decay": 0.1},
        {"params": [p for name, p in parameters if "layers.0" not in name], "weight_decay": 0.0},
    ]


def with_loop() -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(MODEL)
    optimizer = torch.optim.AdamW(groups(model), lr=LR)
    penalty = BackSlash(model, LAMBDA, shape=SHAPE, every=3)
    penalty.attach(optimizer)
    for step in range(STEPS):
        penalty.strength, penalty.hold_support = (0.0, True) if step >= STEPS - 2 else (1.0, False)
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    bits = Rate.of(penalty.measure(2**-7).values()).bits
    finish(model.state_dict(), {"fits": penalty.state_dict()["fits"], "log": {"backslash/bits": bits}})


def with_zero() -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = tf.AutoModelForCausalLM.from_pretrained(MODEL)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // WORLD,
        "zero_optimization": {"stage": int(MODE[-1]), "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by default it clips at a norm of 1, which the loop does not
    }
    optimizer = torch.optim.AdamW(groups(model), lr=LR)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    chosen = select_matrices(model)
    penalty = BackSlash(zero_parts(optimizer, chosen), LAMBDA, shape=SHAPE, every=3)
    penalty.attach(optimizer)
    for step in range(STEPS):
        penalty.strength, penalty.hold_support = (0.0, True) if step >= STEPS - 2 else (1.0, False)
        loss = engine(input_ids=batch(step), labels=batch(step)).loss
        engine.backward(loss)
        engine.step()
    bits = Rate.of(penalty.measure(2**-7).values()).bits
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=MODE == "zero3"):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    finish(weights, {"fits": penalty.state_dict()["fits"], "log": {"backslash/bits": bits}})


torch.set_num_threads(1)
tf.logging.set_verbosity_error()
if MODE.startswith("zero"):
    with_zero()
elif MODE.startswith(("delta", "deepshape")):
    with_adapter()
else:
    {"trainer": with_trainer, "fsdp": with_trainer, "nan": with_trainer, "loop": with_loop}[MODE]()
