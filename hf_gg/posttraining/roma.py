"""RoMA, routing manifold alignment (arXiv 2511.07419), in Transformers' `Trainer`.

Only the routers of the last layers with experts are trained, on

    L(i) = L_task(i) + λ Σ_{j ∈ N(i)} W_ij ‖r_i − r_j‖²

N(i) are the samples nearest to i in the space of sentence embeddings, of those that the base model answers right; r
are routing weights at the last token of the prompt (see `routers.py`, `neighbourhood.py`). r_i is that of the model as
it trains, so that both terms have a gradient; r_j is a snapshot of the base model's.

    trainer = RoMATrainer(model, RoMAConfig("out"), train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model("adapter")  # a RouterAdapter

A row has `prompt` and `answer`; with `choices` it is judged among candidates, and `success` says that the base answers
it right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .adapter import RouterAdapter, probe, router_parameters, write
from .config import RoMAConfig
from .describe import Description, describe, diagnose, neighbour_overlap, picture
from .embedding import SentenceEmbedder, default_cache, embed
from .freezing import Frozen, as_adapter, unsupported
from .neighbourhood import manifold_loss, manifold_terms, neighbourhood, random_neighbours
from .precision import keep_in_float32, round_back
from .routers import capture, choose_routers, find_routers, last_positions, register_router, routing
from .samples import INDEX, LAST, PROMPT, Collator, Samples


__all__ = [
    "Collator",
    "Description",
    "RoMAConfig",
    "RoMATrainer",
    "RouterAdapter",
    "Samples",
    "SentenceEmbedder",
    "capture",
    "choose_routers",
    "describe",
    "diagnose",
    "embed",
    "find_routers",
    "last_positions",
    "manifold_loss",
    "neighbour_overlap",
    "neighbourhood",
    "picture",
    "random_neighbours",
    "register_router",
    "routing",
]

STATE = "roma_state.safetensors"


class RoMATrainer(Trainer):
    """A `Trainer` that trains the chosen routers of a model and nothing else, which is frozen until `train` ends.

    When a training begins, it asks the base model for the answers, embeds the prompts, looks for neighbours and takes
    the snapshot of their routing; without a manifold weight, it does not. A checkpoint holds the router weights and
    these, so that it resumes to the bit.

    Args:
        model: a causal language model with experts; all but the chosen routers is frozen, so it may be quantized.
        args: a `RoMAConfig`.
        train_dataset: rows with `prompt` and `answer`, see `Samples`.
        eval_dataset: such rows, or a dictionary of sets of them; their loss is that of the task.
        processing_class: the tokenizer.
        embedder: a callable that gives embeddings [texts, dimensions]; None for the one that `args.embedder` names.
        **others: for `Trainer`.

    Raises:
        TypeError: `args` is no `RoMAConfig`.
        ValueError: a dense model, samples without an answer, a way of training that is not supported.
    """

    args: RoMAConfig
    train_dataset: Any
    processing_class: Any

    def __init__(
        self,
        model: nn.Module,
        args: RoMAConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        embedder: Callable[[Sequence[str]], torch.Tensor] | None = None,
        **others: Any,
    ) -> None:
        if not isinstance(args, RoMAConfig):
            raise TypeError(f"args must be a RoMAConfig, got {type(args).__name__}.")
        if processing_class is None:
            raise ValueError("processing_class must be the model's tokenizer: prompts and answers are text.")
        if args.n_gpu > 1 or args.torch_compile:
            raise unsupported("torch_compile" if args.torch_compile else "DataParallel")
        self.routers = choose_routers(model, args.layers or args.moe_layers)
        router_parameters(self.routers)
        self._probe = probe(model)
        self.embedder = embedder
        self.ready = False
        self.index = self.weight = self.success = self.snapshot = self.slots = torch.empty(0)
        self.before: Description | None = None
        self._count: Any = 0
        self._terms: list[Any] = [0.0, 0.0, 0.0]
        self._logged = 0
        sets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        wrapped = {
            name: None if rows is None else _samples(rows, processing_class, args.max_length, name)
            for name, rows in sets.items()
        }
        own = train_dataset
        if train_dataset is not None:
            own = _samples(train_dataset, processing_class, args.max_length, "train_dataset")
        self._frozen = Frozen(model, self.routers)
        with self._frozen.on_errors(), as_adapter(model):
            self._frozen.freeze()
            super().__init__(
                model=model,
                args=args,
                data_collator=Collator(processing_class, model),
                train_dataset=own,
                eval_dataset=wrapped if isinstance(eval_dataset, dict) else wrapped["eval_dataset"],
                processing_class=processing_class,
                **others,
            )
            if self.is_deepspeed_enabled:
                raise unsupported("DeepSpeed")
        self.add_callback(_Steps(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; router weights of less than 32 bits are trained as rounded float32 ones.

        Whether the model is in training mode, and which parameters want gradients, is afterwards as it was before.
        """
        model: Any = self.model
        mode = model.training
        self._frozen.freeze()
        precise = [] if self.is_fsdp_enabled else keep_in_float32(self.routers)
        try:
            return super().train(*args, **kwargs)
        finally:
            round_back(precise)
            self._frozen.undo()
            model.train(mode)

    def prepare(self) -> None:
        """Find successes, neighbours and the snapshot of their routing, unless they are there already.

        `train` does so when it begins. In several processes, each must call it.

        Raises:
            ValueError: no sample is answered right, or fewer than k; embeddings that are not finite.
        """
        if self.ready:
            return
        samples, args = self.train_dataset, self.args
        if not isinstance(samples, Samples):
            raise ValueError("train_dataset is missing: give rows with prompt and answer.")
        self.before = self.describe(samples)
        self.success = self._judged(samples, self.before.success)
        if args.neighbours == "base":
            self.index = torch.arange(len(samples))[:, None]
            self.weight = torch.ones(len(samples), 1)
        elif args.neighbours == "random":
            self.index, self.weight = random_neighbours(self.success, args.k, args.seed)
        else:
            embeddings = self._embeddings(samples)
            index, weight = neighbourhood(
                embeddings.to(args.device), self.success, args.k, args.sigma, args.similarity, args.radius
            )
            self.index, self.weight = index.cpu(), weight.cpu()
        if not bool((self.index >= 0).any()):
            raise ValueError(
                f"no sample has a neighbour: {int(self.success.sum())} of {len(samples)} are answered right, "
                f"radius={args.radius}. Give more samples, or a larger radius."
            )
        self._take(self.before.r)

    def describe(self, rows: Any) -> Description:
        """What the model, as it is now, makes of samples. In several processes, each must call it."""
        samples = _samples(rows, self.processing_class, self.args.max_length, "rows")
        size, args = self.args.per_device_eval_batch_size, self.args
        return describe(self.model, samples, self.routers, size, args.tokens, args.mask_top_k, device=args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The task's loss, and in training the manifold term: its mean over the samples of the step."""
        inputs = dict(inputs)
        rows, last, prompt = inputs.pop(INDEX).cpu(), inputs.pop(LAST), inputs.pop(PROMPT)
        if getattr(getattr(self.model, "config", None), "output_router_logits", False):
            inputs["output_router_logits"] = False  # it adds a loss for balance
        with capture(self.routers) as captured:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not (model.training and self.ready):
            return (loss, outputs) if return_outputs else loss
        args, task = self.args, loss.detach()
        r = routing(
            captured, self.routers, last if args.tokens == "last" else prompt, prompt.shape[1], args.mask_top_k
        )
        if not r.requires_grad:
            raise ValueError(
                "the routing has no gradient: with gradient_checkpointing, set gradient_checkpointing_kwargs="
                "{'use_reentrant': False}."
            )
        neighbours = self.snapshot[self.slots[rows].clamp(min=0)].to(r.device)
        terms = manifold_terms(r, neighbours, self.weight[rows].to(r.device))
        # the task's loss is either its share of the whole step's, over all processes, or the mean of this batch
        scaled = (
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        ) or self.compute_loss_func is not None
        shared = self.accelerator.num_processes if args.average_tokens_across_devices else 1
        scale = shared / self._count if scaled else 1 / len(rows)
        if args.manifold_weight:
            loss = loss + (args.manifold_weight * scale * terms.sum()).to(loss.device)
        part = 1 if scaled else 1 / self.current_gradient_accumulation_steps
        new = (task * part, terms.detach().sum().to(task.device), len(rows))
        self._terms = [old + more for old, more in zip(self._terms, new)]
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As `Trainer` does; counts the samples of the step too."""
        found, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(float(sum(len(batch[INDEX]) for batch in found)), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        self._count = count
        return found, items

    def log(self, logs, *args, **kwargs):
        """Logs of training get `task_loss` and `manifold_loss`, means since the last log."""
        if "loss" in logs and self.ready:
            steps = self.state.global_step - self._logged
            own = torch.tensor([float(x) for x in self._terms], device=self.args.device)
            task, terms, count = self.accelerator.reduce(own, "sum").tolist()
            if count and steps:
                logs["task_loss"] = task / self.accelerator.num_processes / steps
                logs["manifold_loss"] = terms / count
            self._terms, self._logged = [0.0, 0.0, 0.0], self.state.global_step
        return super().log(logs, *args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        """Save a `RouterAdapter` of the routers, the tokenizer and, in checkpoints, what resuming needs."""
        folder = Path(output_dir or str(self.args.output_dir))
        settings = {**self.args.settings(), "base_probe": self._probe}
        adapter = RouterAdapter.from_model(self.model, self.routers, settings)  # gathers, in each process
        if self.args.should_save:
            adapter.save_pretrained(folder)
            if self.ready and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
                aside = folder / f".{STATE}"
                save_file(self._state(), aside, metadata={"of": self._of()})
                aside.replace(folder / STATE)
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args, **kwargs):
        """None: `Trainer`'s speaks of a whole model."""

    def get_eval_dataloader(self, eval_dataset=None):
        """As `Trainer`'s, for rows with prompts and answers."""
        return super().get_eval_dataloader(self._wrapped(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset):
        """As `Trainer`'s, for rows with prompts and answers."""
        return super().get_test_dataloader(self._wrapped(test_dataset, "test_dataset"))

    def _wrapped(self, rows: Any, name: str) -> Any:
        if rows is None or isinstance(rows, str):
            return rows
        return _samples(rows, self.processing_class, self.args.max_length, name)

    def _judged(self, samples: Samples, found: torch.Tensor) -> torch.Tensor:
        """Which samples the base answers right; their column `success`, if they have it, decides."""
        given = samples.column("success")
        if all(value is None for value in given):
            return found
        for i, value in enumerate(given):
            if not isinstance(value, bool):
                raise ValueError(
                    f"{samples.name}[{i}]: success must be True or False in all rows or none, got {value!r}."
                )
        return torch.tensor(given)

    def _embeddings(self, samples: Samples) -> torch.Tensor:
        args = self.args
        embedder = self.embedder or SentenceEmbedder(args.embedder, args.device)
        cache: Any = None
        if args.embedding_cache != "none" and (args.embedding_cache or hasattr(embedder, "key")):
            cache = args.embedding_cache or default_cache()
        with args.main_process_first(desc="embeddings"):  # the others find them in the cache
            found = embed(samples.column("prompt"), embedder, cache)
        norms = found.norm(dim=1, keepdim=True)
        if not bool((norms > 0).all()):
            text = samples.column("prompt")[int((norms[:, 0] == 0).nonzero()[0])]
            raise ValueError(f"embedder gives zero for the text {text[:80]!r}, which has no direction: leave it out.")
        # σ and radius are for unit vectors, which a callable may not give
        return torch.where((norms - 1).abs() > 1e-4, found / norms, found)

    def _take(self, r: torch.Tensor) -> None:
        """Keep the routing of all that are neighbours."""
        used = self.index[self.index >= 0].unique()
        places = torch.full((len(self.index),), -1)
        places[used] = torch.arange(len(used))
        self.slots = places[self.index.clamp(min=0)].masked_fill(self.index < 0, -1)
        self.snapshot = r[used].clone()
        self.ready = True

    def _refresh(self) -> None:
        """Take the snapshot of the model as it is now."""
        used, args = self.index[self.index >= 0].unique().tolist(), self.args
        size = args.per_device_eval_batch_size
        self.snapshot = describe(
            self.model, self.train_dataset, self.routers, size, args.tokens, args.mask_top_k, used, args.device
        ).r

    def _state(self) -> dict[str, torch.Tensor]:
        names = ("index", "weight", "success", "slots", "snapshot")
        return {name: getattr(self, name).contiguous() for name in names}

    def _of(self) -> str:
        """What neighbours and snapshot are made of: a digest of the samples, and the settings."""
        digest = hashlib.sha256()
        for key in ("prompt", "answer", "success"):
            digest.update(json.dumps(self.train_dataset.column(key)).encode())
        names = ("k", "sigma", "similarity", "radius", "neighbours", "tokens", "mask_top_k")
        return json.dumps({name: getattr(self.args, name) for name in names} | {"samples": digest.hexdigest()})

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Router weights, neighbours and snapshot of a checkpoint."""
        folder = Path(resume_from_checkpoint)
        self._load_routers(folder)
        if not self.args.manifold_weight and not (folder / STATE).exists():
            return
        try:
            state = load_file(folder / STATE)
            with safe_open(folder / STATE, "pt") as file:
                made = json.loads((file.metadata() or {}).get("of", "{}"))
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder / STATE} is missing or damaged ({error}): resume from another one.") from error
        own = json.loads(self._of())
        if set(state) != set(self._state()) or made.get("samples") != own["samples"]:
            raise ValueError(f"{folder} is a checkpoint of a training on other samples: give the same train_dataset.")
        for name, value in own.items():
            if made.get(name) != value:
                raise ValueError(f"{folder} was made with {name}={made.get(name)!r}, not {value!r}: give the same.")
        for name, value in state.items():
            setattr(self, name, value)
        self.ready = True

    def _load_best_model(self):
        self._load_routers(Path(str(self.state.best_model_checkpoint)))

    def _load_routers(self, folder: Path) -> None:
        adapter, parameters = RouterAdapter.from_pretrained(folder), router_parameters(self.routers)
        shapes = {name: tuple(value.shape) for name, value in adapter.weights.items()}
        if shapes != {name: tuple(p.shape) for name, p in parameters.items()}:
            raise ValueError(f"{folder} is a checkpoint of other routers: give the same model and layers.")
        adapter.check_base(self.model)
        for name, value in adapter.weights.items():
            write(parameters[name], value)


class _Steps(TrainerCallback):
    """What the trainer does between steps."""

    def __init__(self, trainer: RoMATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._logged = state.global_step
        if args.manifold_weight:
            self.trainer.prepare()

    def on_step_end(self, args, state, control, **kwargs):
        if args.refresh_steps and self.trainer.ready and state.global_step % args.refresh_steps == 0:
            self.trainer._refresh()


def _samples(rows: Any, tokenizer: Any, max_length: int | None, name: str) -> Samples:
    return rows if isinstance(rows, Samples) else Samples(rows, tokenizer, max_length, name)
