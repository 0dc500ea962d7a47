"""`RoMATrainer`: which parameters move, by which loss, and that a training can be cut in two."""

import importlib.util
import json
import math

import pytest
import torch
import transformers as tf
from moe import CONFIGS, TEXT, embedder, moe, rows, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

import hf_gg
from hf_gg.integrations.transformers import GGConfig, quantize_
from hf_gg.posttraining.roma import (
    Collator,
    RoMAConfig,
    RoMATrainer,
    Samples,
    capture,
    choose_routers,
    describe,
    diagnose,
    find_routers,
    manifold_loss,
    neighbourhood,
    picture,
    routing,
)
from hf_gg.posttraining.samples import INDEX, LAST, PROMPT


def config(folder, **changes) -> RoMAConfig:
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "moe_layers": 2,
        "max_grad_norm": 0.0,
    }
    return RoMAConfig(str(folder), **{**settings, **changes})


def trainer_of(model, folder, data=None, side="right", **changes) -> RoMATrainer:
    data = rows() if data is None else data
    own = RoMATrainer(
        model, config(folder, **changes), train_dataset=data, processing_class=tokenizer(side), embedder=embedder
    )
    own.remove_callback(tf.PrinterCallback)
    return own


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("family", "weight"), [*((family, 0.8) for family in CONFIGS), ("mixtral", 0.0)])
def test_only_chosen_routers_move(family, weight, tmp_path):
    model = moe(family)
    before = weights(model)
    trainer = trainer_of(model, tmp_path, manifold_weight=weight, max_steps=1)
    chosen = {router.name for router in choose_routers(model, 2)}
    seen = {}
    trainer.add_callback(Gradients(model, seen))
    trainer.train()
    assert set(seen) == set(before)
    for name, p in model.named_parameters():
        own = name.rpartition(".")[0] in chosen
        assert bool(seen[name] is not None and seen[name].any()) == own, name
        assert torch.equal(p, before[name]) != own, name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Gradients(tf.TrainerCallback):
    def __init__(self, model, seen):
        self.model, self.seen = model, seen

    def on_pre_optimizer_step(self, *args, **kwargs):
        for name, p in self.model.named_parameters():
            self.seen[name] = None if p.grad is None else p.grad.clone()


def by_hand(model, data, batch_rows, weight, k=3, sigma=0.4):
    """The step's gradients from the equations: task tokens together, manifold term over the samples."""
    model.requires_grad_(False)
    routers = choose_routers(model, 2)
    for router in routers:
        router.module.requires_grad_(True)
    encode = tokenizer()
    samples, collate = Samples(data, encode), Collator(encode)
    index, w = neighbourhood(
        embedder([row["prompt"] for row in data]), torch.tensor([r["success"] for r in data]), k, sigma
    )
    base = describe(model, samples, routers, batch_size=1).r
    task, tokens, terms = 0.0, 0, 0.0
    for i in batch_rows:
        batch = collate([samples[i]])
        labels, last, prompt = batch.pop("labels"), batch.pop(LAST), batch.pop(PROMPT)
        batch.pop(INDEX)
        with capture(routers) as captured:
            logits = model(**batch).logits
        task = task + torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
        )
        tokens += int((labels[0, 1:] != -100).sum())
        r = routing(captured, routers, last, prompt.shape[1])
        near = base[index[i].clamp(min=0)][None]
        terms = terms + manifold_loss(r, near, w[i][None])
    task, terms = task / tokens, terms / len(batch_rows)
    (task + weight * terms).backward()
    return float(task.detach()), float(terms.detach())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("batch_norm", "side"), [(True, "right"), (True, "left"), (False, "left")])
def test_loss_and_gradient_are_those_of_the_equations(accumulation, batch_norm, side, tmp_path):
    """Samples of unequal answers, with some that the base answers wrong; in one batch or two."""
    data = [{**row, "answer": row["answer"] + "x" * (i % 3), "success": i % 4 != 0} for i, row in enumerate(rows(8))]
    reference = moe("olmoe")
    task, terms = by_hand(reference, data, range(8), 0.8)
    wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert terms > 1e-4
    model, seen = moe("olmoe"), {}
    if not batch_norm:
        model.accepts_loss_kwargs = False  # such a model's loss is the mean of its batch
    size = 8 // accumulation
    trainer = trainer_of(
        model,
        tmp_path,
        data,
        side=side,
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
    )
    trainer.add_callback(Gradients(model, seen))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["manifold_loss"] == pytest.approx(terms, rel=1e-4)
    if batch_norm or accumulation == 1:
        assert log["task_loss"] == pytest.approx(task, rel=1e-4)
        assert log["loss"] == pytest.approx(task + 0.8 * terms, abs=2e-4)
        for name, gradient in wanted.items():
            assert torch.allclose(seen[name], gradient, atol=1e-6), name


@pytest.mark.parametrize("neighbours", ["nearest", "random", "base"])
def test_baselines_and_what_the_loss_does(neighbours, tmp_path):
    """Trained on the manifold term alone, it falls; the routing of neighbours comes together."""
    model = moe("olmoe")
    trainer = trainer_of(model, tmp_path, neighbours=neighbours, manifold_weight=100.0, max_steps=30, side="left")
    trainer.train()
    losses = [entry["manifold_loss"] for entry in trainer.state.log_history if "manifold_loss" in entry]
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3  # a round through the samples
    if neighbours == "base":
        assert losses[0] == pytest.approx(0, abs=1e-9) and torch.equal(trainer.index[:, 0], torch.arange(12))
    else:
        assert last < (0.85 if neighbours == "nearest" else 1.0) * first
    if neighbours == "random":
        assert trainer.success[trainer.index].all() and torch.allclose(trainer.weight, torch.full((12, 3), 1 / 3))
    if neighbours == "nearest":
        index, weight = neighbourhood(embedder([row["prompt"] for row in rows()]), trainer.success)
        assert torch.equal(trainer.index, index) and torch.equal(trainer.weight, weight)
        after = diagnose(trainer.describe(rows()), index, weight, trainer.success)
        before = diagnose(trainer.before, index, weight, trainer.success)
        assert set(after) == {"accuracy", "loss", "overlap", "manifold", "balance"}
        assert after["manifold"] < before["manifold"]
        assert 0 <= before["overlap"] <= 1 and 0 < before["balance"] <= 1


@pytest.mark.parametrize("padding", ["left", "right"])
def test_resume(padding, tmp_path):
    """Four steps at once, or two and two from a checkpoint, with a snapshot that was refreshed in between."""
    options = {"max_steps": 4, "refresh_steps": 2, "save_strategy": "steps", "save_steps": 2, "side": padding}
    whole = moe("olmoe")
    trainer_of(whole, tmp_path / "whole", **options).train()
    folder = tmp_path / "whole" / "checkpoint-2"
    files = {path.name for path in folder.iterdir()}
    assert {"router_adapter.safetensors", "router_adapter.json", "roma_state.safetensors"} <= files
    assert "model.safetensors" not in files
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 20_000
    resumed = moe("olmoe")
    trainer_of(resumed, tmp_path / "resumed", **options).train(resume_from_checkpoint=str(folder))
    for name, w in weights(whole).items():
        assert torch.equal(w, weights(resumed)[name]), name
    other = trainer_of(moe("olmoe"), tmp_path / "other", rows(5), **options)
    with pytest.raises(ValueError, match="training on other samples"):
        other.train(resume_from_checkpoint=str(folder))
    other = trainer_of(moe("olmoe"), tmp_path / "other", moe_layers=1, **options)
    with pytest.raises(ValueError, match="other routers"):
        other.train(resume_from_checkpoint=str(folder))
    (folder / "roma_state.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="missing or damaged"):
        trainer_of(moe("olmoe"), tmp_path / "other", **options).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (rows(), {"k": 2}, "was made with k=3, not 2"),
        (rows(), {"sigma": 0.5}, "was made with sigma=0.4, not 0.5"),
        (rows()[::-1], {}, "training on other samples"),
    ],
)
def test_resume_of_another_training(data, changes, message, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_of(moe("olmoe"), tmp_path, **options).train()
    with pytest.raises(ValueError, match=message):
        trainer_of(moe("olmoe"), tmp_path, data, **options, **changes).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )
    with pytest.raises(ValueError, match="another base model"):
        trainer_of(moe("olmoe", seed=8), tmp_path, **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


class Failing(tf.TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise RuntimeError("stopped")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_given_back_as_it_was(dtype, fails, tmp_path):
    """The same parameter objects with the same flags, no hook, the same mode; also after an error."""
    model = moe("gpt-oss").to(dtype)
    model.lm_head.weight.requires_grad_(False)
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="has no answer"):
        trainer_of(model, tmp_path, [{"prompt": "x"}])
    with pytest.raises(ValueError, match="torch_compile"):
        trainer_of(model, tmp_path, torch_compile=True)
    with pytest.raises(TypeError):
        trainer_of(model, tmp_path, unknown=1)
    assert all(p.requires_grad == before[name][1] for name, p in model.named_parameters())
    trainer = trainer_of(model, tmp_path)
    assert {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        router.name for router in choose_routers(model, 2)
    }
    if fails:
        trainer.add_callback(Failing())
        with pytest.raises(RuntimeError, match="stopped"):
            trainer.train()
    else:
        trainer.train()
        trainer.train()
    for name, p in model.named_parameters():
        assert p is before[name][0] and p.requires_grad == before[name][1] and p.dtype == dtype, name
    assert not model.training and not any(m._forward_hooks or hasattr(m, "parametrizations") for m in model.modules())


@pytest.mark.parametrize(("data", "changes"), [(rows(1), {"k": 1}), (rows(), {"radius": 1e-7})])
def test_no_neighbour_at_all(data, changes, tmp_path):
    with pytest.raises(ValueError, match=r"no sample has a neighbour: \d+ of \d+ are answered right"):
        trainer_of(moe("olmoe"), tmp_path, data, **changes).train()


def test_embeddings_of_any_length(tmp_path):
    """sigma is for unit vectors; a callable may give others, but not zero."""
    found = []
    for scale in (1.0, 50.0):
        trainer = RoMATrainer(
            moe("olmoe"),
            config(tmp_path),
            rows(),
            processing_class=tokenizer(),
            embedder=lambda texts, scale=scale: embedder(texts) * scale,
        )
        trainer.prepare()
        found.append((trainer.index, trainer.weight))
    assert torch.equal(found[0][0], found[1][0]) and torch.allclose(found[0][1], found[1][1], atol=1e-4)
    trainer.ready, trainer.embedder = False, lambda texts: embedder(texts) * 0
    with pytest.raises(ValueError, match="embedder gives zero for the text 'number 0:'"):
        trainer.prepare()


def test_a_failure_is_routed_as_its_like_that_succeeds(tmp_path):
    """Known geometry: each failing prompt has one success beside it, whose routing in the base it must take on."""
    prompts = ["one:", "two?", "3 + 4 =", "Four, said X."]
    data = [{"prompt": prompt, "answer": "x", "success": i < 2} for i, prompt in enumerate(prompts)]
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    places = {row["prompt"]: point for row, point in zip(data, points)}
    options = {"manifold_weight": 1e4, "k": 1, "radius": 0.5, "max_steps": 60, "lr_scheduler_type": "linear"}
    model = moe("olmoe")
    trainer = RoMATrainer(
        model,
        config(tmp_path, **options),
        data,
        processing_class=tokenizer(),
        embedder=lambda texts: torch.stack([places[text] for text in texts]),
    )
    trainer.train()
    assert trainer.index.tolist() == [[-1], [-1], [0], [1]]
    base = trainer.before.r
    first = (base[2:] - base[:2]).square().sum(1)
    last = (trainer.describe(data).r[2:] - base[:2]).square().sum(1)
    losses = [entry["manifold_loss"] for entry in trainer.state.log_history if "manifold_loss" in entry]
    assert losses[0] == pytest.approx(float(first.sum()) / 4, rel=1e-4)
    assert bool((last < 0.25 * first).all()), (first, last)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    found = []
    for on in (False, True):
        model = moe("qwen3-moe")
        trainer_of(model, tmp_path, gradient_checkpointing=on).train()
        found.append(weights(model))
    for name, w in found[0].items():
        assert torch.allclose(w, found[1][name], atol=1e-6), name
    trainer = trainer_of(
        moe("mixtral"), tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    with pytest.raises(ValueError, match="routing has no gradient"):
        trainer.train()


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3", "gpt-oss"])
def test_bfloat16_model_is_trained_in_float32(family, tmp_path):
    """Steps far below a bfloat16's spacing add up; the model is an ordinary one afterwards."""
    model = moe(family).bfloat16()
    names = [name for name, _ in model.named_parameters()]
    before = weights(model)
    trainer = trainer_of(model, tmp_path, max_steps=10, learning_rate=2e-4, save_strategy="steps", save_steps=10)
    trainer.train()
    assert [name for name, _ in model.named_parameters()] == names
    assert type(find_routers(model)[-1].module).__name__ in (
        "MixtralTopKRouter",
        "DeepseekV3TopkRouter",
        "GptOssTopKRouter",
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    moved = {n for n, w in weights(model).items() if not torch.equal(w, before[n])}
    assert {n.rpartition(".")[0] for n in moved} == {router.name for router in choose_routers(model, 2)}
    stored = hf_gg.RouterAdapter.from_pretrained(tmp_path / "checkpoint-10").weights
    assert {w.dtype for w in stored.values()} == {torch.float32}
    for name, w in stored.items():
        assert torch.equal(w.bfloat16(), weights(model)[name])


def test_bf16_autocast(tmp_path):
    model = moe("olmoe")
    before = weights(model)
    trainer = trainer_of(model, tmp_path, bf16=True)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    moved = {n for n, w in weights(model).items() if not torch.equal(w, before[n])}
    assert moved == {f"{router.name}.weight" for router in choose_routers(model, 2)}


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_quantized_base(family, tmp_path):
    """RF8 experts: codes stay, routers learn, the adapter fits the base that is not quantized as well."""
    moe(family).save_pretrained(tmp_path / "base")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=GGConfig())
    before = weights(model)
    assert any(p.dtype == torch.uint8 for p in model.parameters())
    trainer = trainer_of(model, tmp_path / "run")
    trainer.train()
    assert not getattr(model, "_hf_peft_config_loaded", False)
    moved = {n.rpartition(".")[0] for n, w in weights(model).items() if not torch.equal(w, before[n])}
    assert moved == {router.name for router in choose_routers(model, 2)}
    trainer.save_model(str(tmp_path / "adapter"))
    adapter = hf_gg.RouterAdapter.from_pretrained(tmp_path / "adapter")
    assert adapter.settings["manifold_weight"] == 0.8
    other = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=GGConfig())
    adapter.merge(other)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(other(ids).logits, model(ids).logits)
    plain = moe(family)
    adapter.merge(plain)
    assert all(torch.equal(weights(plain)[name], w) for name, w in adapter.weights.items())
    in_place = moe(family)
    quantize_(in_place, GGConfig())
    trainer_of(in_place, tmp_path / "run", max_steps=1).train()


def test_evaluation_is_of_the_task(tmp_path):
    model = moe("olmoe")
    trainer = trainer_of(model, tmp_path)
    trainer.prepare()
    wanted = describe(model, Samples(rows(5, None), tokenizer()), choose_routers(model, 2)).loss.mean()
    assert trainer.evaluate(rows(5, None))["eval_loss"] == pytest.approx(float(wanted), rel=1e-4)
    own = RoMATrainer(
        model,
        config(
            tmp_path,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            save_strategy="steps",
            save_steps=1,
        ),
        train_dataset=rows(),
        eval_dataset={"one": rows(4), "two": rows(6)},
        processing_class=tokenizer(),
        embedder=embedder,
    )
    own.args.metric_for_best_model = "eval_one_loss"
    own.train()
    losses = {e["step"]: e["eval_one_loss"] for e in own.state.log_history if "eval_one_loss" in e}
    assert own.evaluate(rows(4))["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-5)


class Operators(TorchDispatchMode):
    """What is computed, operator by operator with shapes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((str(function), [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]))
        return out


def test_inference_is_what_it_was(tmp_path):
    """The same modules, no hook, the same operators in the same order; and the logits of a model that was saved."""
    model, base = (moe("olmoe", _experts_implementation="batched_mm") for _ in range(2))
    trainer_of(model, tmp_path / "run").train()
    ids = torch.arange(3, 20)[None]
    calls = []
    for one in (base, model):
        one.eval()
        with torch.no_grad(), Operators() as seen:
            one(ids, use_cache=False)  # which a `Trainer` turns off in the config
        calls.append(seen.calls)
    assert len(calls[0]) > 50 and calls[0] == calls[1]
    assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    model.save_pretrained(tmp_path / "merged")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation="batched_mm")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_routers_without_the_term_need_no_success(tmp_path):
    """Plain router tuning, to be resumed as well."""
    data = [{**row, "success": False} for row in rows()]
    options = {"manifold_weight": 0.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = moe("olmoe"), moe("olmoe")
    trainer = trainer_of(whole, tmp_path / "whole", data, **options)
    trainer.train()
    assert not trainer.ready and "manifold_loss" not in trainer.state.log_history[0]
    folder = tmp_path / "whole" / "checkpoint-2"
    trainer_of(resumed, tmp_path / "resumed", data, **options).train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(whole).items())


def test_success_decides_who_is_a_neighbour(tmp_path):
    data = [{**row, "success": i < 6} for i, row in enumerate(rows())]
    trainer = trainer_of(moe(), tmp_path, data)
    trainer.prepare()
    assert trainer.index.max() < 6 and len(trainer.snapshot) <= 6


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ([{**row, "success": False} for row in rows()], {}, "no sample that the base model answers right"),
        ([{**row, "success": i < 2} for i, row in enumerate(rows())], {}, "2 samples, fewer than k=3"),
        ([{**row, "success": i < 2} for i, row in enumerate(rows())], {"neighbours": "random"}, "fewer than k=3"),
        ([*rows(3), *rows(3, None)], {}, r"train_dataset\[3\]: success must be True or False in all rows or none"),
    ],
)
def test_bad_successes(data, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(moe(), tmp_path, data, **changes).train()


def test_bad_models_and_arguments(tmp_path):
    with pytest.raises(ValueError, match="dense model"):
        trainer_of(tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)), tmp_path)
    with pytest.raises(ValueError, match=r"train_dataset\[0\] has no answer"):
        trainer_of(moe(), tmp_path, [{"prompt": "x"}])
    with pytest.raises(TypeError, match="args must be a RoMAConfig"):
        RoMATrainer(moe(), tf.TrainingArguments(str(tmp_path)), rows(), processing_class=tokenizer())
    with pytest.raises(ValueError, match="processing_class must be the model's tokenizer"):
        RoMATrainer(moe(), config(tmp_path), rows())
    with pytest.raises(ValueError, match="torch_compile is not supported"):
        trainer_of(moe(), tmp_path, torch_compile=True)
    trainer = RoMATrainer(moe(), config(tmp_path), None, processing_class=tokenizer(), embedder=embedder)
    with pytest.raises(ValueError, match="train_dataset is missing"):
        trainer.prepare()

    def broken(texts):
        return torch.full((len(texts), 4), torch.nan)

    trainer = RoMATrainer(moe(), config(tmp_path), rows(), processing_class=tokenizer(), embedder=broken)
    with pytest.raises(ValueError, match="embedder gives NaN or infinity for the text 'number 0:'"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k must be"),
        ({"sigma": -1}, "sigma must be positive"),
        ({"manifold_weight": math.nan}, "manifold_weight must be"),
        ({"similarity": "dot"}, "similarity must be one of"),
        ({"neighbours": "none"}, "neighbours must be one of"),
        ({"tokens": "all"}, "tokens must be one of"),
        ({"layers": []}, "layers is empty"),
        ({"moe_layers": 0}, "moe_layers must be"),
        ({"radius": 0.0}, "radius must be positive"),
        ({"refresh_steps": -1}, "refresh_steps must be"),
        ({"max_length": 1}, "max_length must be"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ],
)
def test_bad_settings(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_defaults_are_the_papers():
    own = RoMAConfig("out", use_cpu=True)
    assert (own.learning_rate, own.manifold_weight, own.k, own.sigma, own.moe_layers) == (7e-5, 0.8, 3, 0.4, 5)
    assert own.tokens == "last" and own.similarity == "gaussian" and own.neighbours == "nearest"
    assert own.optim.value.startswith("adamw") and own.refresh_steps == 0
    parsed = tf.HfArgumentParser(RoMAConfig).parse_args_into_dataclasses(["--output_dir", "x", "--layers", "3", "4"])[
        0
    ]
    assert parsed.layers == [3, 4] and json.dumps(parsed.settings())


def test_no_balance_loss(tmp_path):
    """A config that asks for router logits would add one."""
    logs = []
    for wanted in (False, True):
        model = moe("olmoe", output_router_logits=wanted)
        trainer = trainer_of(model, tmp_path, max_steps=2)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == logs[1]


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    r = torch.rand(30, 8)
    if importlib.util.find_spec("umap"):
        picture(tmp_path / "umap.png", {"before": r, "after": r * 0.5}, method="umap")
        assert (tmp_path / "umap.png").read_bytes().startswith(b"\x89PNG")
    else:
        with pytest.raises(ImportError, match="pip install umap-learn"):
            picture(tmp_path / "umap.png", {"before": r}, method="umap")
    picture(tmp_path / "two.png", {"before": r, "after": r * 0.5}, [f"{i % 3}" for i in range(30)])
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="method must be"):
        picture(tmp_path / "x.png", {"a": r}, method="tsne")
    with pytest.raises(ValueError, match="parts is empty"):
        picture(tmp_path / "x.png", {})


def test_lazy_names():
    assert hf_gg.RoMATrainer is RoMATrainer and hf_gg.RoMAConfig is RoMAConfig
