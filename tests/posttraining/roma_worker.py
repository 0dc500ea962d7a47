"""A RoMA training as one of several processes: python roma_worker.py MODE MODEL OUTPUT.

MODE: `trainer` (alone, or under DDP by `accelerate launch`) or `fsdp` (parts of the model in each process). Writes the
router weights to OUTPUT, and what was found and logged to OUTPUT.json.
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
from moe import embedder, rows, tokenizer

from hf_gg.posttraining.roma import RoMAConfig, RoMATrainer


MODE, MODEL, OUTPUT = sys.argv[1], sys.argv[2], Path(sys.argv[3])
WORLD = int(os.environ.get("WORLD_SIZE", 1))

torch.set_num_threads(1)
tf.logging.set_verbosity_error()
parallel = None
if MODE == "fsdp":
    from transformers.distributed import DistributedConfig

    parallel = DistributedConfig(fsdp_size=WORLD)
model = tf.AutoModelForCausalLM.from_pretrained(MODEL, distributed_config=parallel)
arguments = RoMAConfig(
    str(OUTPUT),
    per_device_train_batch_size=4 // WORLD,
    per_device_eval_batch_size=3,
    gradient_accumulation_steps=2,
    max_steps=4,
    learning_rate=1e-2,
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
    save_strategy="no" if MODE == "fsdp" else "steps",  # Transformers cannot resume a model that is sharded at load
    save_steps=2,
    logging_steps=2,
    moe_layers=2,
    refresh_steps=3,
)
# answers of unequal lengths, so that tokens are not shared alike
data = [{**row, "answer": row["answer"] + "x" * (i % 3), "success": i % 4 != 0} for i, row in enumerate(rows(16))]
trainer = RoMATrainer(model, arguments, data, processing_class=tokenizer("left"), embedder=embedder)
trainer.train(resume_from_checkpoint=os.environ.get("RESUME") or None)
trainer.save_model(str(OUTPUT / "adapter"))
found = trainer.describe(rows(7))
if int(os.environ.get("RANK", 0)) == 0:
    logs = [entry for entry in trainer.state.log_history if "manifold_loss" in entry]
    about = {"logs": logs, "index": trainer.index.tolist(), "loss": found.loss.tolist(), "r": found.r.tolist()}
    about["load"] = [share.tolist() for share in found.load.values()]
    Path(f"{OUTPUT}.json").write_text(json.dumps(about))
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
