"""Every model family: quantized at load and in place, saved, loaded again, and given back in full precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, Family, quiet, same_tensors, stored, weight_files

from hf_gg import GGConfig, RF8Experts, quantization_report, quantize_
from hf_gg.integrations.selection import code_parameters


# a config that is given beside a quantized checkpoint may change how it is loaded
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A family with its tiny model in full precision, the same quantized at load, and the checkpoints of both."""
    with quiet():
        yield Case(FAMILIES[request.param], tmp_path_factory.mktemp(request.param))


class Case:
    def __init__(self, family: Family, folder: Path):
        self.family, self.folder = family, folder
        self.plain, self.saved = folder / "plain", folder / "saved"
        self.original = family.model()
        self.original.save_pretrained(self.plain)
        self.model = self.load(self.plain, quantization_config=GGConfig())
        self.model.save_pretrained(self.saved, max_shard_size="60KB")
        self.logits = family.logits(self.model)

    def load(self, folder: Path, **kwargs):
        return self.family.auto.from_pretrained(folder, **kwargs)


def decoded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The numbers that each quantized weight stands for, as the plain module stores them."""
    weights = {}
    for name, module, weight in code_parameters(model):
        if isinstance(module, RF8Experts):
            weights[name] = module.dequantize(weight)
        else:
            weights[name] = module.dequantize().T if getattr(module, "fan_in_fan_out", False) else module.dequantize()
    return weights


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_quantizes_what_it_should(case):
    codes = {name: module._parameters[weight] for name, module, weight in code_parameters(case.model)}
    assert len(codes) == case.family.quantized
    assert all(value.dtype == torch.uint8 and not value.requires_grad for value in codes.values())
    parameters = dict(case.model.named_parameters())
    assert all(parameters[f"{name}_scale"].dtype == torch.float32 for name in codes)

    kept = {name for name, module in case.model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    assert {name.rpartition(".")[2] for name in kept} == set(case.family.kept)
    report = quantization_report(case.model)
    assert len(report.rows) == case.family.quantized
    assert kept <= set(report.skipped)


def test_weights_stay_close_to_full_precision(case):
    originals = dict(case.original.named_parameters())
    for name, weight in decoded(case.model).items():
        # 2.1 to 3.4 % in these models; zero would mean that nothing was quantized
        assert 0.01 < relative(weight, originals[name].detach()) < 0.04, name
    assert torch.isfinite(case.logits).all()
    assert not torch.equal(case.logits, case.family.logits(case.original))


def test_reload_gives_the_same_bits(case, tmp_path):
    assert len(weight_files(case.saved)) > 1
    model, info = case.load(case.saved, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(case.family.logits(model), case.logits)

    model.save_pretrained(tmp_path)
    assert same_tensors(stored(tmp_path), stored(case.saved))
    assert (tmp_path / "config.json").read_text() == (case.saved / "config.json").read_text()


def test_in_place_equals_quantizing_at_load(case, tmp_path):
    model = quantize_(case.family.model())
    assert torch.equal(case.family.logits(model), case.logits)
    model.save_pretrained(tmp_path)
    assert same_tensors(stored(tmp_path), stored(case.saved))
    assert torch.equal(case.family.logits(case.load(tmp_path)), case.logits)


def test_dequantize_gives_the_plain_model(case, tmp_path):
    weights = decoded(case.model)
    at_load = case.load(case.saved, quantization_config=GGConfig(dequantize=True))
    afterwards = case.load(case.saved)
    afterwards.dequantize()
    for model in (at_load, afterwards):
        assert not any(True for _ in code_parameters(model))
        assert not hasattr(model.config, "quantization_config")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        assert all(torch.equal(parameters[name], weights[name]) for name in weights)
        assert [type(m) for m in model.modules()] == [type(m) for m in case.original.modules()]
        # the products are summed in another order than over codes
        torch.testing.assert_close(case.family.logits(model), case.logits, rtol=1e-4, atol=1e-5)

    at_load.save_pretrained(tmp_path)
    assert stored(tmp_path).keys() == stored(case.plain).keys()
    again = case.load(tmp_path)
    assert torch.equal(case.family.logits(again), case.family.logits(at_load))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_experts_implementations_agree(name, implementation):
    family = FAMILIES[name]
    model = quantize_(family.model())
    plain = quantize_(family.model())
    plain.dequantize()
    plain.set_experts_implementation(implementation)
    expected = family.logits(plain)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(family.logits(model), expected, rtol=1e-4, atol=1e-5)


def test_files_hold_codes_with_a_trailing_dimension(case):
    tensors, parameters = stored(case.saved), dict(case.model.named_parameters())
    codes = {name: tensor for name, tensor in tensors.items() if tensor.dtype == torch.uint8}
    assert len(codes) == case.family.quantized
    assert all(tensor.shape[-1] == 1 and tensor.ndim in (3, 4) for tensor in codes.values())
    assert all(tensors[f"{name}_scale"].dtype == torch.float32 for name in codes)
    # some families store other names than they use
    in_memory = sorted(tuple(parameters[name].shape) for name, _, _ in code_parameters(case.model))
    assert sorted(tuple(tensor.shape[:-1]) for tensor in codes.values()) == in_memory
    config = json.loads((case.saved / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gg"
    assert config["weight_format"] == "rf8"
    assert config["format_version"] == 2
