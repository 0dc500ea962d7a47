"""A whole model: tokens a second of prefill and decoding, in turns, after its logits were checked."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .contenders import OURS, CannotRun, WrongResult
from .peers import with_peer
from .timing import in_turns, median_ratio, waiting


# Options of GGConfig by the name in the table.
CONFIGS: dict[str, dict] = {
    **{name: {"weight_format": name} for name in OURS},
    "rf8, embeddings": {"quantize_embeddings": True, "quantize_lm_head": True},
}
# Largest error of the logits against the same weights in float32, in units of the error of the plain model.
MOST_NOISE = 3.0
# Of a peer's logits against the plain model in float32: 4 bits may be far from it, and its layers were checked.
MOST_PEER_ERROR = 0.6


def find(name: str | None) -> None:
    """Raise if `open_model` would not find the model: as `folders.find`, `AutoConfig`, or `data.smollm2_gguf`."""
    if name is None:
        from ..data import smollm2_gguf

        smollm2_gguf()
        return
    from transformers import AutoConfig

    from ..integrations import folders

    AutoConfig.from_pretrained(folders.find(name))


def open_model(name: str | None, device: torch.device):
    """A causal language model in bfloat16: a name or folder, or SmolLM2-135M from its GGUF file for None."""
    import transformers
    from transformers import AutoModelForCausalLM, GgufConfig

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if name is not None:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
        return model.to(device).eval()  # type: ignore[arg-type]
    from ..data import smollm2_gguf

    file = smollm2_gguf()
    options = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    return model.to(device).eval()  # type: ignore[arg-type]


def measure(
    plain,
    device: torch.device,
    names: tuple[str, ...] = tuple(CONFIGS),
    prompt: int = 512,
    tokens: int = 64,
    rounds: int = 5,
    say: Callable[[str], None] = print,
    peers: tuple[str, ...] = (),
    most_seconds: float = 60.0,
) -> Iterator[dict]:
    """Rows of the table: the plain model, the same by each config, and with the layers of other packages.

    Args:
        plain: the model in bfloat16.
        device: of the model.
        names: of `CONFIGS`.
        prompt: tokens of the prefill.
        tokens: that are generated one by one after a prompt of 16.
        rounds: turns.
        say: told of every row.
        peers: contenders of other packages.
        most_seconds: a peer whose prefill or decoding takes longer is only listed.

    Yields:
        `model`, `what` ("prefill" or "decode"), and either `tokens_s` (median), `speedup` (against bfloat16, median of
        the turns' ratios), `mib` (of the weights), `error` (relative, of the logits: of ours against their own weights
        in float32, of a peer against the plain model in float32); or `reason`, why it was not timed.
    """
    from ..integrations.config import GGConfig
    from ..integrations.transformers import quantize_

    ids = torch.randint(5, plain.config.vocab_size - 5, (1, prompt), device=device)
    models, errors = {"bfloat16": plain}, {"bfloat16": _check("bfloat16", plain, ids[:, :64], float("inf"))}
    for name in names:
        models[name] = quantize_(copy.deepcopy(plain), GGConfig(**CONFIGS[name])).eval()
        errors[name] = _check(name, models[name], ids[:, :64], errors["bfloat16"])
    sizes = {name: model.get_memory_footprint() for name, model in models.items()}
    reasons = {}
    ours = next((models[name] for name in names), None) or quantize_(copy.deepcopy(plain), GGConfig())
    for name in peers:
        try:
            models[name], sizes[name] = with_peer(name, plain, ours)
            errors[name] = _distance(name, models[name], copy.deepcopy(plain).float(), ids[:, :64], MOST_PEER_ERROR)
        except (CannotRun, WrongResult) as error:
            models.pop(name, None)
            reasons[name] = str(error)
    works = {
        "prefill": lambda model: _prefill(model, ids),
        "decode": lambda model: _decode(model, ids[:, :16], tokens),
    }
    for what, work in works.items():
        count = prompt if what == "prefill" else tokens
        functions = {name: waiting(functools.partial(work, model), device) for name, model in models.items()}
        slow = {}
        with torch.no_grad():
            for name in [name for name in peers if name in functions]:
                start = time.perf_counter()
                functions[name]()
                took = time.perf_counter() - start
                if took > most_seconds:
                    slow[name] = f"it takes {took:.0f} s, over {most_seconds} s"
                    functions.pop(name)
            seconds = in_turns(functions, rounds, warmup=1)
        for name, reason in {**reasons, **slow}.items():
            say(f"{what:>8} {name:<17} not timed: {reason}")
            yield {"model": name, "what": what, "reason": reason}
        for name, times in seconds.items():
            row = {
                "model": name,
                "what": what,
                "tokens_s": round(count / statistics.median(times), 1),
                "speedup": round(median_ratio(seconds["bfloat16"], times), 3),
                "mib": round(sizes[name] / 2**20),
                "error": round(errors[name], 5),
            }
            say(
                f"{what:>8} {name:<17} {row['tokens_s']:9.1f} tokens/s  {row['speedup']:6.2f} times bfloat16  "
                f"{row['mib']:6d} MiB"
            )
            yield row


def _prefill(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, logits_to_keep=1).logits


def _decode(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count, max_new_tokens=count
    )


def _check(name: str, model, ids: torch.Tensor, noise: float) -> float:
    """Relative error of the logits against the decoded model in float32.

    Raises:
        WrongResult: it is more than `MOST_NOISE` times that of the plain model (`noise`), which rounds as often.
    """
    decoded = copy.deepcopy(model)
    if name != "bfloat16":
        decoded.dequantize()
    return _distance(name, model, decoded.float(), ids, MOST_NOISE * noise + 0.01)


def _distance(name: str, model, reference, ids: torch.Tensor, most: float) -> float:
    """Relative error of the logits, for one row and for many; `WrongResult` if it is more than `most`."""
    worst = 0.0
    with torch.no_grad():
        for part in (ids, ids[:, :1]):
            expected, found = (m(part).logits.double() for m in (reference, model))
            worst = max(worst, float((found - expected).norm() / expected.norm()))
            if not worst <= most:  # NaN is not
                raise WrongResult(
                    f"the model in {name} is wrong: relative error of its logits {worst:.3g}, at most {most:.3g}."
                )
    return worst


def with_loads(plain, rounds: int, names: list[str]) -> list[dict]:
    """Rows of `loading.measure` for a model and contenders' names, through a temporary folder."""
    import tempfile

    from . import loading

    with tempfile.TemporaryDirectory() as folder:
        loading.save(plain, Path(folder))
        modes = [mode for mode in loading.MODES if mode in names or mode in loading.FROM_PLAIN]
        return loading.measure(Path(folder), rounds, tuple(modes))
