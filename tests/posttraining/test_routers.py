"""Capture of routing in every family, against the definition."""

import pytest
import torch
import transformers as tf
from moe import CONFIGS, TEXT, moe, rows, tokenizer

from hf_gg.integrations.transformers import GGConfig, quantize_
from hf_gg.posttraining.roma import (
    Collator,
    Samples,
    capture,
    choose_routers,
    describe,
    find_routers,
    last_positions,
    register_router,
    routing,
)
from hf_gg.posttraining.routers import ROUTERS
from hf_gg.posttraining.samples import INDEX, LAST, PROMPT


LAYERS = {"deepseek-v2": [1, 2], "deepseek-v3": [1, 2]}


def batch_of(side: str, count: int = 6) -> dict[str, torch.Tensor]:
    samples = Samples(rows(count), tokenizer(side))
    return Collator(samples.tokenizer)([samples[i] for i in range(count)])


def r_of(model, batch, **options) -> torch.Tensor:
    routers, batch = find_routers(model), dict(batch)
    last, prompt = batch.pop(LAST), batch.pop(PROMPT)
    batch.pop(INDEX)
    with capture(routers) as captured:
        model(**batch)
    where = prompt if options.pop("mean", False) else last
    return routing(captured, routers, where, prompt.shape[1], **options)


def by_definition(model, family: str, tokens: list[int]) -> torch.Tensor:
    """r of one prompt alone, without padding, from the hidden states before each router."""
    inputs, wanted = {}, []
    routers = [(n, m) for n, m in model.named_modules() if type(m).__name__ in ROUTERS]
    handles = [
        m.register_forward_pre_hook(lambda m, x, n=n: inputs.update({n: x[0].reshape(-1, x[0].shape[-1])[-1]}))
        for n, m in routers
    ]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    for name, module in routers:
        z = module.weight.detach().double() @ inputs[name].double()
        z = z + module.bias.detach().double() if hasattr(module, "bias") else z
        scores = 1 / (1 + (-z).exp()) if family == "deepseek-v3" else (z - z.max()).exp()
        wanted.append(scores / scores.sum())
    return torch.cat(wanted)


@pytest.mark.parametrize("family", CONFIGS)
def test_last_prompt_token_whichever_side_is_padded(family):
    model = moe(family)
    routers = find_routers(model)
    assert [int(router.name.split(".")[2]) for router in routers] == LAYERS.get(family, [0, 1, 2])
    found = {side: r_of(model, batch_of(side)).detach() for side in ("left", "right")}
    assert found["left"].shape == (6, 4 * len(routers)) and found["left"].dtype == torch.float32
    assert torch.allclose(found["left"], found["right"], atol=2e-6)
    encode = tokenizer()
    for i, row in enumerate(rows(6)):
        wanted = by_definition(model, family, encode(row["prompt"])["input_ids"])
        assert torch.allclose(found["right"][i].double(), wanted, atol=2e-6)
    sums = found["left"].view(6, -1, 4).sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    assert float(found["left"].std(0).mean()) > 1e-3


@pytest.mark.parametrize("family", CONFIGS)
def test_gradient_reaches_routers(family):
    model = moe(family).requires_grad_(False)
    for router in find_routers(model):
        router.module.requires_grad_(True)
    r = r_of(model, batch_of("left"))
    r.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", CONFIGS)
def test_r_is_what_the_model_exchanges_experts_by(family):
    """Against the weights and experts that the module itself gives: r at the chosen ones, up to their common scale."""
    model, batch, given = moe(family), batch_of("right"), []
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.tensor([0.9, -0.9, 0.5, -0.5]))  # so that the largest scores are not the chosen ones
    handles = [
        router.module.register_forward_hook(lambda m, x, out: given.append(out)) for router in find_routers(model)
    ]
    r, masked = r_of(model, batch).detach(), r_of(model, batch, mask_top_k=True).detach()
    for handle in handles:
        handle.remove()
    rows_of = torch.arange(6) * batch["input_ids"].shape[1] + batch[LAST]
    layers = len(given) // 2
    for layer, (_, weights, experts) in enumerate(given[:layers]):
        part, own = r.view(6, layers, 4)[:, layer], experts[rows_of]
        weights, mine = weights[rows_of].float(), part.gather(1, own)
        assert torch.allclose(weights / weights.sum(1, keepdim=True), mine / mine.sum(1, keepdim=True), atol=1e-5)
        chosen = torch.zeros(6, 4).scatter(1, own, 1)
        assert torch.equal(masked.view(6, layers, 4)[:, layer], part * chosen)


def test_mean_and_masked_routing():
    model, batch = moe("olmoe"), batch_of("left")
    r, masked = r_of(model, batch).detach(), r_of(model, batch, mask_top_k=True).detach()
    parts = r.view(6, 3, 4)
    kept = parts >= parts.topk(2, -1).values[..., -1:]
    assert torch.equal(masked, (parts * kept).flatten(1))
    mean = r_of(model, batch, mean=True).detach()
    encode, row = tokenizer(), rows(6)[1]
    tokens = encode(row["prompt"])["input_ids"]
    wanted = sum(by_definition(model, "olmoe", tokens[: n + 1]) for n in range(len(tokens))) / len(tokens)
    assert torch.allclose(mean[1].double(), wanted, atol=2e-6)


def test_quantized_and_bfloat16_models():
    batch = batch_of("right")
    quantized = moe("mixtral")
    quantize_(quantized, GGConfig())
    exact = r_of(moe("mixtral"), batch)
    assert 0 < float((r_of(quantized, batch) - exact).abs().max()) < 0.05
    half = r_of(moe("mixtral").bfloat16(), batch)
    assert half.dtype == torch.float32 and float((half - exact).abs().max()) < 0.05


def test_choice_of_layers():
    model = moe("deepseek-v3")
    names = ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert [router.name for router in choose_routers(model, 5)] == names
    assert [router.name for router in choose_routers(model, 1)] == names[1:]
    assert [router.name for router in choose_routers(model, [1])] == names[:1]
    with pytest.raises(ValueError, match="layer 0 has no router; those with one are 1, 2"):
        choose_routers(model, [0])
    with pytest.raises(ValueError, match="layers must be at least 1"):
        choose_routers(model, 0)
    with pytest.raises(ValueError, match="layers is empty"):
        choose_routers(model, [])


def test_models_without_known_routers():
    dense = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router.*dense model"):
        find_routers(dense)

    class OwnRouter(torch.nn.Linear):
        pass

    dense.own = OwnRouter(2, 2)
    with pytest.raises(ValueError, match="OwnRouter: see hf_gg.posttraining.roma.register_router"):
        find_routers(dense)
    register_router("OwnRouter")
    try:
        assert [router.name for router in find_routers(dense)] == ["own"]
        with capture(find_routers(dense)), pytest.raises(ValueError, match="does not return logits, weights"):
            dense.own(torch.zeros(1, 2))
    finally:
        del ROUTERS["OwnRouter"]
    with pytest.raises(ValueError, match="scores must be"):
        register_router("OwnRouter", "tanh")


def test_what_was_not_seen():
    model = moe()
    routers = find_routers(model)
    with capture(routers[:1]) as captured:
        model(torch.tensor([[3, 4, 5]]))
    with pytest.raises(ValueError, match="layers.1.mlp.gate was not called"):
        routing(captured, routers, torch.tensor([2]), 3)
    with pytest.raises(ValueError, match="saw 3 tokens, not 2 rows of 3"):
        routing(captured, routers[:1], torch.tensor([2, 2]), 3)


def test_last_positions():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert last_positions(mask).tolist() == [1, 3, 3]
    with pytest.raises(ValueError, match="row without any token"):
        last_positions(torch.zeros(1, 3))


@pytest.mark.parametrize("family", ["olmoe", "deepseek-v3"])
def test_describe(family):
    """Rows in batches of any size are as one by one; load and loss as counted by hand."""
    model, encode = moe(family), tokenizer("left")
    samples = Samples(rows(7), encode)
    routers = choose_routers(model, 2)
    found = describe(model, samples, routers, batch_size=3)
    assert found.r.shape == (7, 8)
    counts = [torch.zeros(4, dtype=torch.float64) for _ in routers]
    for i in range(7):
        tokens = samples[i]["prompt"] + samples[i]["answer"]
        with torch.no_grad(), capture(routers) as captured:
            logits = model(torch.tensor([tokens])).logits[0]
        for own, router in zip(counts, routers):
            own += torch.bincount(captured.experts[router.name].flatten(), minlength=4)
        answer = samples[i]["answer"]
        logp = logits.double().log_softmax(-1)[-len(answer) - 1 : -1]
        wanted = -sum(float(logp[j, token]) for j, token in enumerate(answer)) / len(answer)
        assert float(found.loss[i]) == pytest.approx(wanted, abs=1e-5)
        assert torch.allclose(found.r[i], by_definition(model, family, samples[i]["prompt"])[-8:].float(), atol=2e-6)
    for own, share in zip(counts, found.load.values()):
        assert torch.allclose(own / own.sum(), share)
    part = describe(model, samples, routers, batch_size=2, rows=[5, 1])
    assert torch.allclose(part.r, found.r[[5, 1]], atol=2e-6)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"logits for train_dataset\[0\] are NaN"):
        describe(model, samples, routers)
