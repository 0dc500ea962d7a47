"""LoRA on quantized models: variants, initializations, experts, embeddings, whole modules, several adapters."""

from __future__ import annotations

import copy

import adapters
import peft
import pytest
import torch
from adapters import TOKENS, attach, base_state, load, logits, lora, plain, same, train, untouched
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_gg import RF8Experts, quantize_
from hf_gg.integrations.peft import MergeWarning
from hf_gg.nn import RF8Embedding, RF8Linear


pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("default::hf_gg.integrations.peft.MergeWarning"),
]


def check(base, config, tmp_path, merges=True, atol=1e-5):
    """The adapter equals that on the decoded model, in its outputs, its training, its file and its merge."""
    model = attach(copy.deepcopy(base), config())
    expected, codes = logits(model), base_state(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(copy.deepcopy(base), tmp_path)), expected)
    torch.testing.assert_close(logits(load(plain(base), tmp_path)), expected, atol=atol, rtol=atol)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    if merges:
        with pytest.warns(MergeWarning):
            model.merge_adapter()
        assert (logits(model) - expected).abs().max() < 1.5
        model.unmerge_adapter()
        assert same(base_state(model), codes)
        assert torch.equal(logits(model), expected)
    twin = attach(plain(base), config())
    losses = train(model)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(train(twin), abs=2e-4)
    return model


VARIANTS = {
    "DoRA": {"use_dora": True},
    "DoRA with dropout": {"use_dora": True, "lora_dropout": 0.1},
    "rsLoRA": {"use_rslora": True},
    "BD-LoRA": {
        "use_bdlora": peft.BdLoraConfig(nblocks=2, target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj"])
    },
    "VeLoRA": {"velora_config": peft.tuners.lora.VeloraConfig()},
    "MonteCLoRA": {"monteclora_config": peft.MontecloraConfig(num_samples=2)},
    "lora_bias": {"lora_bias": True},
    "QALoRA": {"use_qalora": True},
    "all-linear": {"target_modules": "all-linear", "lora_alpha": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, tmp_path):
    check(adapters.llama(), lambda: lora(**VARIANTS[name]), tmp_path)


def test_alora(tmp_path):
    base = adapters.llama()
    model = attach(base, lora(alora_invocation_tokens=[int(TOKENS[0, 2])]))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(plain(adapters.llama()), tmp_path)), logits(model), atol=1e-5, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="cannot merge LORA"):
        model.merge_adapter()


def test_arrow(tmp_path):
    base, paths = adapters.llama(), []
    for number in range(2):
        paths.append(str(tmp_path / str(number)))
        attach(copy.deepcopy(base), lora(lora_alpha=2 + number)).save_pretrained(paths[-1])
    config = peft.ArrowConfig(top_k=1, rng_seed=1)
    found = []
    for model in (copy.deepcopy(base), plain(base)):
        arrow = peft.create_arrow_model(base_model=model, task_specific_adapter_paths=paths, arrow_config=config)
        found.append(logits(arrow.eval()))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="Cannot merge an active Arrow router"):
        peft.create_arrow_model(
            base_model=copy.deepcopy(base), task_specific_adapter_paths=paths, arrow_config=config
        ).merge_adapter()


def test_kasa(tmp_path):
    base = adapters.llama()
    with pytest.warns(MergeWarning, match="initialization changed base weights"):
        peft.get_peft_model(copy.deepcopy(base), lora(kasa_config=peft.KasaConfig()))
    model = attach(copy.deepcopy(base), lora(kasa_config=peft.KasaConfig()))
    torch.testing.assert_close(
        logits(model), logits(attach(plain(base), lora(kasa_config=peft.KasaConfig()))), atol=0.2, rtol=0
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(copy.deepcopy(base), tmp_path)), logits(model))


@pytest.mark.parametrize("init", [True, "gaussian", "eva", "orthogonal", "mica"])
def test_initializations_that_leave_the_weight(init):
    base = adapters.llama()
    model = attach(copy.deepcopy(base), lora(init_lora_weights=init))
    torch.testing.assert_close(logits(model), logits(base), atol=1e-5, rtol=1e-5)
    assert untouched(model, base)
    twin = attach(plain(base), lora(init_lora_weights=init))
    assert train(model) == pytest.approx(train(twin), abs=2e-4)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initializations_that_change_the_weight(init, tmp_path):
    base = adapters.llama()
    with pytest.warns(MergeWarning, match="initialization changed base weights"):
        peft.get_peft_model(copy.deepcopy(base), lora(init_lora_weights=init))
    model = attach(copy.deepcopy(base), lora(init_lora_weights=init))
    assert not untouched(model, base)
    assert (logits(model) - logits(base)).abs().max() < 0.2
    # what is left of the weight and the adapter give the weight again, but for the rounding
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = base.model.layers[0].self_attn.q_proj.dequantize()
    rest = layer.get_base_layer().dequantize()
    assert (rest + layer.get_delta_weight("default") - weight).norm() < 0.05 * rest.norm()
    codes = base_state(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert same(base_state(model), codes)
    if init != "pissa_niter_4":  # drawn at random, so PEFT itself cannot repeat it when it loads
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(load(copy.deepcopy(base), tmp_path)), logits(model))


def test_eva_from_data():
    model = attach(adapters.llama(), lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)))
    data = [{"input_ids": torch.randint(0, adapters.VOCABULARY, (2, 8))} for _ in range(10)]
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    assert train(model)[-1] < train(model)[0] + 1


def test_corda_sees_weights_and_not_codes():
    from peft.tuners.lora.corda import preprocess_corda

    found = []
    for model in (adapters.llama(), plain(adapters.llama())):
        config = lora(init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm"))
        preprocess_corda(model, config, run_model=lambda model=model: model(TOKENS[:1]))
        attached = attach(model, config)
        found.append(
            (attached.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight, logits(attached))
        )
    (a, quantized), (b, exact) = found
    torch.testing.assert_close(a.abs(), b.abs(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(quantized, exact, atol=0.2, rtol=0)


def test_loraga_needs_the_float_model(tmp_path):
    from peft.tuners.lora import preprocess_loraga

    base, file = adapters.llama(), str(tmp_path / "cache" / "gradients.pt")
    config = lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    with pytest.raises(NotImplementedError, match="cache_file"):
        preprocess_loraga(base, config, lambda: None)
    twin = plain(base)
    preprocess_loraga(twin, config, lambda: twin(input_ids=TOKENS, labels=TOKENS).loss.backward(), cache_file=file)
    preprocess_loraga(base, config, None, cache_file=file)
    model = attach(base, config)
    assert (logits(model) - logits(adapters.llama())).abs().max() < 0.3


# --- embeddings and whole modules ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_quantized_embeddings(tied, dora, tmp_path):
    base = adapters.llama(tied=tied, quantize_embeddings=True, quantize_lm_head=True)
    model = attach(copy.deepcopy(base), lora(target_modules=["embed_tokens"], use_dora=dora, lora_alpha=0.2))
    expected, codes = logits(model), base_state(model)
    model.save_pretrained(tmp_path)
    assert not any(value.dtype == torch.uint8 for value in load_file(tmp_path / "adapter_model.safetensors").values())
    assert torch.equal(logits(load(copy.deepcopy(base), tmp_path)), expected)
    torch.testing.assert_close(logits(load(plain(base), tmp_path)), expected, atol=1e-5, rtol=1e-5)
    model.merge_adapter()
    assert not same(base_state(model), codes)
    model.unmerge_adapter()
    assert same(base_state(model), codes)
    assert train(model)[-1] < 10


def test_tied_embeddings_merge_together():
    base = adapters.llama(tied=True, quantize_embeddings=True, quantize_lm_head=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base.lm_head.weight_scale is base.model.embed_tokens.weight_scale
    model = attach(copy.deepcopy(base), lora(target_modules=["embed_tokens", "lm_head"]))
    codes = base_state(model)
    model.merge_adapter()
    bare = model.base_model.model
    head, embedding = bare.lm_head.get_base_layer(), bare.model.embed_tokens.get_base_layer()
    assert torch.equal(head.dequantize(), embedding.dequantize())
    model.unmerge_adapter()
    assert same(base_state(model), codes)


def test_embedding_saved_by_a_float_model(tmp_path):
    base = adapters.llama(quantize_embeddings=True)
    twin = attach(plain(base), lora(target_modules=["embed_tokens", "q_proj"]))
    twin.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in keys)
    model = load(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("quantized", [False, True])
def test_trainable_token_indices(quantized, tmp_path):
    base = adapters.llama(quantize_embeddings=quantized)
    check(base, lambda: lora(trainable_token_indices=[3, 4, 5]), tmp_path)


def test_modules_to_save(tmp_path):
    base = adapters.llama(quantize_lm_head=True)
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head", "mlp"])
    model = attach(copy.deepcopy(base), config)
    assert type(model.base_model.model.lm_head.modules_to_save["default"]) is torch.nn.Linear
    losses = train(model)
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load(copy.deepcopy(base), tmp_path / "adapter")), expected)
    torch.testing.assert_close(logits(load(plain(base), tmp_path / "adapter")), expected, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))

    with pytest.warns(MergeWarning, match="modules_to_save"):
        merged = model.merge_and_unload()
    assert isinstance(merged.lm_head, RF8Linear)
    assert isinstance(merged.model.layers[0].mlp.down_proj, RF8Linear)
    assert (logits(merged) - expected).abs().max() < 0.5
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(merged))


def test_modules_to_save_of_a_tied_head(tmp_path):
    base = adapters.llama(tied=True, quantize_embeddings=True, quantize_lm_head=True)
    model = attach(base, lora(modules_to_save=["lm_head"]))
    embedding = base_state(model)["model.embed_tokens.weight"]
    train(model)
    merged = model.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight, embedding)
    assert not torch.equal(merged.lm_head.weight, embedding)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(merged))


def test_classifier_is_trained_whole(tmp_path):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    config = copy.deepcopy(plain(adapters.llama()).config)
    config.num_labels, config.pad_token_id = 3, 0
    base = quantize_(LlamaForSequenceClassification(config).eval())
    model = attach(copy.deepcopy(base), lora(task_type="SEQ_CLS"))
    labels = torch.tensor([0, 2])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=TOKENS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = load(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


# --- experts ---


def _mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=adapters.VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            initializer_range=0.1,
        )
    )


def _gpt_oss():
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=adapters.VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            initializer_range=0.1,
            sliding_window=8,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(params=["mixtral", "gpt_oss"])
def moe(request):
    torch.manual_seed(0)
    return quantize_({"mixtral": _mixtral, "gpt_oss": _gpt_oss}[request.param]().eval())


def on_experts(**kwargs):
    return lora(r=3, lora_alpha=3, target_modules=["q_proj"], target_parameters=EXPERTS, **kwargs)


def test_experts(moe, tmp_path):
    model = attach(copy.deepcopy(moe), on_experts())
    twin = attach(plain(moe), on_experts())
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-5, rtol=1e-5)
    for one in (model, twin):
        one(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in gradients)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)
        else:
            assert parameter.grad is None
    expected, codes = logits(model), base_state(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(copy.deepcopy(moe), tmp_path)), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(moe))

    with pytest.warns(MergeWarning):
        model.merge_adapter()
    twin.merge_adapter()
    for layer, other in zip(_experts(model), _experts(twin), strict=True):
        for name in layer.quantized_names:
            merged, exact = layer.dequantize(name), getattr(other, name).detach()
            assert (merged - exact).norm() < 0.05 * exact.norm()
    model.unmerge_adapter()
    assert same(base_state(model), codes)
    assert torch.equal(logits(model), expected)

    merged = model.merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.experts, RF8Experts)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(merged))


def _experts(model):
    found = []
    for layer in model.base_model.model.model.layers:
        module = layer.mlp.experts
        while hasattr(module, "base_layer"):
            module = module.base_layer
        found.append(module)
    return found


def test_several_adapters_on_experts(moe):
    model = attach(copy.deepcopy(moe), on_experts())
    model.add_adapter("second", on_experts())
    one = logits(model)
    model.set_adapter("second")
    two = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(one, two)
    assert not torch.allclose(two, both)
    codes = base_state(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert same(base_state(model), codes)
    assert torch.equal(logits(copy.deepcopy(model)), both)


def test_checkpointing_with_experts(moe):
    gradients = []
    for checkpointing in (False, True):
        model = attach(copy.deepcopy(moe), on_experts())
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_broken_adapter_on_experts_is_not_merged(moe):
    model = attach(moe, on_experts())
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    with torch.no_grad():
        wrapper.lora_A["default"].weight[0, 0] = float("inf")
    codes = base_state(model)
    with pytest.raises(ValueError, match="NaN or infinity"):
        wrapper.merge()
    assert same(base_state(model), codes)
    assert not wrapper.merged


def test_scales_of_experts_are_no_target(moe):
    config = lora(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj_scale"])
    with pytest.raises(ValueError, match="target 'down_proj'"):
        attach(moe, config)


# --- several adapters, and Transformers' own methods ---


def test_weighted_adapters(tmp_path):
    base = adapters.llama()
    model = attach(copy.deepcopy(base), lora())
    model.add_adapter("second", lora())
    for kind in ("cat", "svd", "linear", "ties", "dare_linear"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.7], kind, combination_type=kind, density=0.5)
        model.set_adapter(kind)
        model.save_pretrained(tmp_path, selected_adapters=[kind])
        torch.testing.assert_close(logits(model), logits(load(plain(base), tmp_path / kind)), atol=1e-5, rtol=1e-5)
    model.delete_adapter("second")
    assert untouched(model, base)


def test_mixed_batch():
    base = adapters.llama()
    model = attach(copy.deepcopy(base), lora())
    model.add_adapter("second", lora())
    expected = []
    for row, name in enumerate(("default", "second")):
        model.set_adapter(name)
        expected.append(logits(model)[row])
    with torch.no_grad():
        mixed = model(TOKENS, adapter_names=["default", "second"]).logits
        half = model(TOKENS, adapter_names=["__base__", "second"]).logits
    torch.testing.assert_close(mixed, torch.stack(expected))
    torch.testing.assert_close(half[0], logits(base)[0])


def test_hotswap(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    base = adapters.llama()
    attach(copy.deepcopy(base), lora()).save_pretrained(tmp_path / "one")
    other = attach(copy.deepcopy(base), lora(lora_alpha=3))
    other.save_pretrained(tmp_path / "two")
    model = load(copy.deepcopy(base), tmp_path / "one")
    hotswap_adapter(model, str(tmp_path / "two"), "default")
    assert torch.equal(logits(model), logits(other))


def test_conversion_to_lora(tmp_path):
    base = adapters.llama()
    model = attach(copy.deepcopy(base), peft.LoKrConfig(r=2, target_modules=adapters.TARGETS, init_weights=False))
    peft.save_as_lora(tmp_path, model, rank=32)
    torch.testing.assert_close(logits(load(base, tmp_path)), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flag", [False, True])
def test_gpt2_file_fits_a_float_model(flag, tmp_path):
    base = adapters.gpt2()
    model = attach(copy.deepcopy(base), lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=flag))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(plain(base), tmp_path)), logits(model), atol=1e-5, rtol=1e-5)
    model.merge_adapter()
    model.unmerge_adapter()
    assert untouched(model, base)


def test_methods_of_transformers(tmp_path):
    base = adapters.llama()
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(lora(), "mine")
    model.eval()
    expected = logits(model)
    assert not torch.allclose(expected, logits(base))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again.eval()), expected)
    assert untouched(again, base)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(whole), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(base))


def test_adapter_file_is_that_of_peft(tmp_path):
    """An adapter that was trained on the float model fits, and the other way round."""
    base = adapters.llama()
    attach(plain(base), lora()).save_pretrained(tmp_path / "float")
    attach(copy.deepcopy(base), lora()).save_pretrained(tmp_path / "quantized")
    one = load_file(tmp_path / "float" / "adapter_model.safetensors")
    two = load_file(tmp_path / "quantized" / "adapter_model.safetensors")
    assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in two.items()}
    save_file(one, tmp_path / "quantized" / "adapter_model.safetensors")
    model = load(copy.deepcopy(base), tmp_path / "quantized")
    torch.testing.assert_close(logits(model), logits(load(plain(base), tmp_path / "float")), atol=1e-5, rtol=1e-5)


def test_embedding_module_stays_quantized():
    base = adapters.llama(quantize_embeddings=True)
    model = attach(base, lora(target_modules=["embed_tokens"]))
    assert isinstance(model.base_model.model.model.embed_tokens.get_base_layer(), RF8Embedding)
