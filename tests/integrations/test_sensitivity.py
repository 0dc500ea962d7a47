import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from hf_gg import GGConfig
from hf_gg.formats.allocation import allocate as allocate_weights
from hf_gg.integrations import allocation, sensitivity
from hf_gg.integrations.sensitivity import row_sensitivity, write_texts
from hf_gg.integrations.transformers import quantize_


def llama(vocabulary=5, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def linears(model):
    return {f"{n}.weight": m.weight for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"}


def test_causal_lm_against_all_texts():
    """The exact Fisher information of texts of three tokens: all 25, each with its probability."""
    model, length = llama(), 3
    parameters = linears(model)
    exact = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for rest in itertools.product(range(5), repeat=length - 1):
        tokens = torch.tensor([[1, *rest]])
        log_p = F.log_softmax(model(tokens).logits[0, :-1], -1).gather(1, tokens[0, 1:, None]).sum()
        gradients = torch.autograd.grad(log_p, list(parameters.values()))
        for name, gradient in zip(parameters, gradients):
            exact[name] += log_p.exp().detach() * gradient.square()
    found = row_sensitivity(model, parameters, sequences=500, length=length, seed=1)
    for name, fisher in exact.items():
        rows = fisher.mean(1, keepdim=True) / (2 * length)
        expected = 0.8 * rows + 0.2 * rows.mean()
        assert found[name].shape == expected.shape and found[name].dtype == torch.float32
        assert float((found[name] - expected).norm() / expected.norm()) < 0.3, name
        assert float(found[name].mean() / expected.mean()) == pytest.approx(1, abs=0.15), name


def test_encoder_against_its_jacobian(monkeypatch):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    tokens = torch.tensor([[3, 7, 1, 12]])
    parameters = {f"{n}.weight": m.weight for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    output = model(tokens).last_hidden_state
    exact = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for value in output.reshape(-1):
        for name, gradient in zip(
            parameters, torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        ):
            exact[name] += gradient.square()
    monkeypatch.setattr(sensitivity, "_inputs", lambda model, n, length: {"input_ids": tokens.repeat(n, 1)})
    found = row_sensitivity(model, parameters, sequences=200, length=4)
    for name, squares in exact.items():
        rows = squares.mean(1, keepdim=True) / (2 * float(output.detach().square().sum()))
        expected = 0.8 * rows + 0.2 * rows.mean()
        assert float((found[name] - expected).norm() / expected.norm()) < 0.3, name


def test_texts_are_drawn_from_the_predictions():
    model = llama(vocabulary=4)
    torch.manual_seed(3)
    texts = write_texts(model, 4000, 3)
    assert bool((texts[:, 0] == 1).all())
    first = F.softmax(model(torch.tensor([[1]])).logits[0, -1], -1)
    counts = torch.bincount(texts[:, 1], minlength=4) / len(texts)
    assert float((counts - first.detach()).abs().max()) < 0.03
    most = int(first.argmax())
    second = F.softmax(model(torch.tensor([[1, most]])).logits[0, -1], -1)
    after = texts[texts[:, 1] == most, 2]
    assert float((torch.bincount(after, minlength=4) / len(after) - second.detach()).abs().max()) < 0.05


def test_leaves_the_model_and_the_generator_alone():
    model = llama(vocabulary=30)
    model.train()
    parameters = linears(model)
    frozen = next(iter(parameters.values()))
    frozen.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    with torch.no_grad():
        first = row_sensitivity(model, parameters, sequences=3, length=12)
        second = row_sensitivity(model, parameters, sequences=3, length=12)
        third = row_sensitivity(model, parameters, sequences=3, length=12, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and not frozen.requires_grad
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in parameters)
    assert not all(torch.equal(first[name], third[name]) for name in parameters)
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()  # no hook is left behind
    assert all(p.grad is not None for name, p in parameters.items() if p is not frozen)


def test_one_gradient_at_a_time(monkeypatch):
    model = llama(vocabulary=30)
    parameters = linears(model)
    alive = []
    collector = sensitivity._collector

    def spy(total, turned):
        collect = collector(total, turned)

        def run(parameter):
            alive.append(sum(p.grad is not None for p in model.parameters()))
            collect(parameter)

        return run

    monkeypatch.setattr(sensitivity, "_collector", spy)
    row_sensitivity(model, parameters, sequences=2, length=8)
    assert len(alive) == 2 * len(parameters) and max(alive) == 1


def test_conv1d_rows_are_outputs():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    name = "transformer.h.0.mlp.c_fc.weight"
    parameter = model.get_parameter(name)
    found = row_sensitivity(model, {name: parameter}, {name}, sequences=4, length=12)[name]
    assert found.shape == (64, 1)
    steps = allocation.allocate(model, target_bits=5.0)
    assert steps[name].shape == (64, 1)


def test_experts_and_encoder_decoders():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    steps = allocation.allocate(MixtralForCausalLM(config).eval(), target_bits=6.5)
    experts = {name: step.shape for name, step in steps.items() if "experts" in name}
    assert experts and all(shape[0] == 3 and shape[-1] == 1 and len(shape) == 3 for shape in experts.values())
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).eval()
    assert all(bool((step > 0).all()) for step in allocation.allocate(t5, target_bits=6.5).values())


def refuses(model, caplog):
    parameters = {f"{n}.weight": m.weight for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    with caplog.at_level("WARNING", logger="hf_gg"):
        result = row_sensitivity(model, parameters, sequences=1, length=8)
    assert all(p.requires_grad for p in model.parameters())
    return result is None


def test_models_that_cannot_run(caplog):
    image = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    vit = ViTModel(image).eval()
    assert refuses(vit, caplog)
    with torch.device("meta"):
        assert refuses(llama(), caplog)
    broken = llama()
    broken.model.layers[0].mlp.up_proj.forward = lambda x: (_ for _ in ()).throw(RuntimeError("no kernel"))
    assert refuses(broken, caplog)
    not_finite = llama()
    not_finite.model.norm.weight.data.fill_(float("nan"))
    assert refuses(not_finite, caplog)
    # the weights decide instead
    alone = allocation.allocate(vit, target_bits=6.5, sensitivity="weights")
    steps = allocation.allocate(vit, target_bits=6.5)
    assert all(torch.equal(steps[name], alone[name]) for name in steps)


def test_given_sensitivities_and_targets():
    model = llama(vocabulary=30)
    weights = {name: p.detach() for name, p in linears(model).items()}
    costs = {name: torch.rand(len(w), 1) + 0.1 for name, w in weights.items()}
    for target in ({"target_bits": 6.0}, {"target_error": 0.01}):
        found = allocation.allocate(model, sensitivity=costs, **target)
        expected = allocate_weights(weights, sensitivity=costs, **target).steps
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    for name, step in allocation.allocate(model, target_snr=25.0).items():
        noise = weights[name] - (weights[name] / step).round() * step
        assert 10 * float((weights[name].norm() ** 2 / noise.norm() ** 2).log10()) == pytest.approx(25, abs=0.2)
    for bad in ({}, {"target_bits": 4.0, "target_snr": 20.0}):
        with pytest.raises(ValueError, match="give one of"):
            allocation.allocate(model, **bad)
    with pytest.raises(ValueError, match="Unknown sensitivity 'hessian'"):
        allocation.allocate(model, target_bits=4.0, sensitivity="hessian")


def test_quantize_gives_bits_to_the_model(tmp_path):
    model = llama(vocabulary=30)
    weights = {name: p.detach().clone() for name, p in linears(model).items()}
    costs = row_sensitivity(model, linears(model))
    expected = allocate_weights(weights, target_bits=6.0, sensitivity=costs).steps
    quantize_(model, GGConfig(weight_format="grid", target_bits=6.0))
    for name, steps in expected.items():
        assert torch.equal(model.get_parameter(f"{name}_scale"), steps), name
    model.save_pretrained(tmp_path)
    tokens = torch.tensor([[1, 5, 7]])
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_config_keys():
    config = GGConfig(weight_format="grid", target_error=0.01, sensitivity="weights")
    assert config.scale_rule().snr == pytest.approx(20.0)
    assert GGConfig(**config.to_dict()).sensitivity == "weights"
    assert "sensitivity" not in GGConfig().to_dict()
    for bad, message in (
        ({"sensitivity": "hessian"}, "Unknown sensitivity"),
        ({"target_error": 1.5}, "target_error must be less than 1"),
        ({"target_error": 0.1, "target_bits": 4.0}, "one target"),
    ):
        with pytest.raises(ValueError, match=message):
            GGConfig(weight_format="grid", **bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_as_wide_ones(dtype, monkeypatch):
    """Their products are computed in float32, forwards and backwards, and only there."""
    exact, model = llama(), llama().to(dtype)
    exact.load_state_dict(model.state_dict())
    texts = write_texts(exact, 8, 6)
    monkeypatch.setattr(sensitivity, "write_texts", lambda *args, **kwargs: texts)
    products = []
    original = sensitivity._FloatProducts.__torch_dispatch__

    def watch(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.mm:
            products.append(args[0].dtype)
        return original(self, func, types, args, kwargs)

    monkeypatch.setattr(sensitivity._FloatProducts, "__torch_dispatch__", watch)
    wanted = row_sensitivity(exact, linears(exact), sequences=8, length=6)
    products.clear()
    found = row_sensitivity(model, linears(model), sequences=8, length=6)
    assert len(products) > 8 * 14 and set(products) == {dtype}
    for name, rows in wanted.items():
        assert torch.allclose(found[name], rows, rtol=0.1, atol=0.02 * float(rows.max())), name
    assert not torch.is_autocast_enabled() and model(input_ids=texts).logits.dtype == dtype
