"""Every tuner of PEFT on a quantized model, against the same adapter on the model with decoded weights."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path

import adapters
import peft
import pytest
import torch
from adapters import CONFIGS, attach, base_state, load, logits, lora, plain, same, train, untouched

from hf_gg.integrations.peft import MergeWarning, helpers, injection, install, support, view
from hf_gg.integrations.peft.layers import RF8TunerLayer
from hf_gg.nn import RF8Linear


TUNERS = sorted(support.TUNERS)
ON_EMBEDDINGS = {"TRAINABLE_TOKENS"}

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("default::hf_gg.integrations.peft.MergeWarning"),
]


def model_for(name: str, dtype: torch.dtype = torch.float32):
    return adapters.llama(dtype, quantize_embeddings=name in ON_EMBEDDINGS)


def test_table_names_every_tuner():
    added = {"BACKSLASH", "DEEPSHAPE"}  # by this package
    assert {kind.value for kind in peft.PeftType} - added <= set(support.TUNERS)
    assert set(CONFIGS) == set(support.TUNERS) - {"XLORA"}


def test_docs_show_the_table():
    docs = Path(__file__).parents[2] / "docs" / "peft.md"
    assert support.markdown() in docs.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_adapter_is_that_of_the_decoded_model(name, tmp_path):
    base = model_for(name)
    model = attach(copy.deepcopy(base), CONFIGS[name]())
    if name in ("SHADOW", "LN_TUNING", "ADAPTION_PROMPT"):  # these start as the identity
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = logits(model, name)
    assert (expected - logits(base)).abs().max() > 1e-3
    assert untouched(model, base)

    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(copy.deepcopy(base), tmp_path), name), expected)
    torch.testing.assert_close(logits(load(plain(base), tmp_path), name), expected, atol=1e-5, rtol=1e-5)

    with model.disable_adapter():
        assert torch.equal(logits(model, name), logits(base))
    assert torch.equal(logits(model, name), expected)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_training_is_that_of_the_decoded_model(name):
    base = model_for(name)
    twin = plain(base)
    model = attach(copy.deepcopy(base), CONFIGS[name]())
    losses = train(model, name)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(train(attach(twin, CONFIGS[name]()), name), abs=2e-4)
    assert untouched(model, base)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_merge(name):
    expected = support.TUNERS[name].merge
    base = model_for(name)
    model = attach(copy.deepcopy(base), CONFIGS[name]())
    before, codes = logits(model, name), base_state(model)
    if not expected:
        with pytest.raises((NotImplementedError, AttributeError)):  # a prompt's model has no `merge_adapter`
            model.merge_adapter()
        assert same(base_state(model), codes)
        return
    if expected.startswith("exact"):
        model.merge_adapter()
        torch.testing.assert_close(logits(model, name), before, atol=1e-5, rtol=1e-5)
    else:
        with pytest.warns(MergeWarning, match="rounds their sum to rf8"):
            model.merge_adapter()
        twin = attach(plain(base), CONFIGS[name]())
        twin.merge_adapter()
        compare_merged_weights(model, twin)
    if name == "OSF":
        with pytest.raises(NotImplementedError):
            model.unmerge_adapter()
        return
    model.unmerge_adapter()
    assert same(base_state(model), codes)
    assert torch.equal(logits(model, name), before)


def compare_merged_weights(model, twin):
    others, seen = dict(twin.named_modules()), 0
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale") and name.endswith("base_layer"):
            merged, exact = module.dequantize(), others[name].weight.detach().float()
            assert (merged - exact).norm() < 0.05 * exact.norm()
            seen += 1
    assert seen


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_weight_is_decoded_where_the_table_says(name, monkeypatch):
    reads = []
    original = view.FloatWeight.get
    model = attach(model_for(name), CONFIGS[name]())
    monkeypatch.setattr(view.FloatWeight, "get", lambda self: reads.append(self) or original(self))
    logits(model, name)
    assert bool(reads) == support.TUNERS[name].reads


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_bfloat16(name, tmp_path):
    base = model_for(name, torch.bfloat16)
    model = attach(copy.deepcopy(base), CONFIGS[name]())
    expected = logits(model, name)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(plain(base), tmp_path), name), expected, atol=0.15, rtol=0.05)
    losses = train(model, name)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(train(attach(plain(base), CONFIGS[name]()), name), abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_gpt2(name, flag, tmp_path):
    """What was a Conv1D is a linear layer for every tuner, also for those that take no Conv1D."""
    base = adapters.gpt2()
    config = CONFIGS[name]()
    targets = getattr(config, "target_modules", None)
    if targets is not None:
        for_gpt2 = {"embed_tokens": ["wte"], "input_layernorm": ["ln_1"]}
        config.target_modules = set(for_gpt2.get(next(iter(targets)), ["attn.c_proj", "mlp.c_proj"]))
    if name == "IA3":
        config.feedforward_modules = {"mlp.c_proj"}
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = flag
    model = attach(copy.deepcopy(base), config)
    expected, codes = logits(model, name), base_state(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(copy.deepcopy(base), tmp_path), name), expected)
    if name in ("LORA", "VERA", "IA3", "FOURIERFT", "UNILORA", "TINYLORA", "WAVEFT"):
        torch.testing.assert_close(logits(load(plain(base), tmp_path), name), expected, atol=1e-5, rtol=1e-5)
    if support.TUNERS[name].merge == "rounds, exact unmerge":
        model.merge_adapter()
        assert (logits(model, name) - expected).abs().max() < 0.5
        model.unmerge_adapter()
        assert same(base_state(model), codes)
    assert train(model, name)[-1] < 10


def test_xlora(tmp_path):
    base = adapters.llama()
    base.config.use_cache = False
    folders = {}
    for number in ("0", "1"):
        folders[number] = str(tmp_path / number)
        attach(copy.deepcopy(base), lora(lora_alpha=int(number) + 1)).save_pretrained(folders[number])

    def make(model):
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, xlora_size=16, adapters=folders, xlora_dropout_p=0.0
        )
        return attach(model, config)

    model, twin = make(copy.deepcopy(base)), make(plain(base))
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-5, rtol=1e-5)
    assert train(model) == pytest.approx(train(twin), abs=2e-4)


def test_miss_bat(tmp_path):
    base = adapters.llama()
    model = attach(copy.deepcopy(base), peft.MissConfig(r=4, target_modules=adapters.TARGETS, init_weights="bat"))
    losses = train(model)
    twin = attach(plain(base), peft.MissConfig(r=4, target_modules=adapters.TARGETS, init_weights="bat"))
    assert losses == pytest.approx(train(twin), abs=2e-4)
    codes = base_state(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert same(base_state(model), codes)


def test_layers_are_stock_on_a_float_model():
    model = attach(plain(adapters.llama()), lora(modules_to_save=["lm_head"]))
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert layers
    assert {type(layer) for layer in layers} == {peft.tuners.lora.Linear}
    with warnings.catch_warnings():
        warnings.simplefilter("error", MergeWarning)
        model.merge_adapter()


def test_status_names_the_format():
    model = attach(adapters.llama(), CONFIGS["OFT"]())
    assert model.get_model_status().quantization_backend == "rf8"
    assert model.get_layer_status()[0].quantization_backend == "rf8"


def test_backend_outside_of_a_merge():
    layer = next(m for m in attach(adapters.llama(), CONFIGS["OFT"]()).modules() if isinstance(m, RF8TunerLayer))
    weight = layer.get_base_weight()
    assert torch.equal(weight, layer.get_base_layer().dequantize())
    layer.set_base_weight(weight * 2)
    torch.testing.assert_close(layer.get_base_layer().dequantize(), weight * 2)


def test_broken_adapter_is_not_merged():
    model = attach(adapters.llama(), lora())
    codes = base_state(model)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge()
    assert not layer.merged
    assert same(base_state(model), codes)


def test_unchanged_rows_keep_their_codes():
    model = attach(adapters.llama(), lora())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = base_state(layer)
    with torch.no_grad():
        layer.lora_B["default"].weight[5:] = 0
    layer.merge()
    after = base_state(layer)
    assert torch.equal(before["base_layer.weight"][5:], after["base_layer.weight"][5:])
    assert not torch.equal(before["base_layer.weight"][:5], after["base_layer.weight"][:5])


def test_several_tuners_on_one_weight():
    model = peft.PeftMixedModel(adapters.llama(), lora(), "first")
    model.add_adapter("second", CONFIGS["LOHA"]())
    model.set_adapter(["first", "second"])
    model.eval()
    codes, before = base_state(model), logits(model)
    model.merge_adapter()
    assert not same(base_state(model), codes)
    model.unmerge_adapter()
    assert same(base_state(model), codes)
    assert torch.equal(logits(model), before)


def test_merge_in_two_steps():
    model = attach(adapters.llama(), lora())
    model.add_adapter("second", lora(r=2))
    codes, before = base_state(model), logits(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert same(base_state(model), codes)
    assert torch.equal(logits(model), before)


def test_disabling_a_merged_adapter_unmerges_it():
    base = adapters.llama()
    model = attach(copy.deepcopy(base), CONFIGS["HRA"]())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_and_save(safe, tmp_path):
    from transformers import AutoModelForCausalLM

    model = attach(adapters.llama(), lora(lora_bias=True))
    before = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    assert isinstance(merged.model.layers[0].self_attn.q_proj, RF8Linear)
    assert not any(isinstance(m, RF8TunerLayer) for m in merged.modules())
    assert 0 < (logits(merged) - before).abs().max() < 0.5
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(merged))


def test_copy_and_pickle():
    model = attach(adapters.llama(), lora())
    model.merge_adapter()
    twin = copy.deepcopy(model)
    model.unmerge_adapter()
    before = base_state(model)
    assert not same(base_state(twin), before)
    twin.unmerge_adapter()
    assert same(base_state(twin), before)
    layer = twin.base_model.model.model.layers[0].self_attn.q_proj
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(3, 32)
    assert type(again) is type(layer)
    assert torch.equal(again(x), layer(x))


def test_low_cpu_mem_usage(tmp_path):
    base = adapters.llama()
    for name in ("LORA", "OFT", "VERA", "FROD"):
        model = attach(copy.deepcopy(base), CONFIGS[name]())
        model.save_pretrained(tmp_path / name)
        again = load(copy.deepcopy(base), tmp_path / name, low_cpu_mem_usage=True)
        assert torch.equal(logits(again), logits(model))


@pytest.mark.slow
def test_lora_compiles_and_others_break_the_graph():
    model = attach(adapters.llama(), lora())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(adapters.TOKENS).logits, model(adapters.TOKENS).logits)
    model = attach(adapters.llama(), CONFIGS["HRA"]())
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(adapters.TOKENS).logits, model(adapters.TOKENS).logits)


# --- what raises ---


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        (lambda: peft.LNTuningConfig(target_modules=["q_proj"]), NotImplementedError, "LN_TUNING .* normalization"),
        (lambda: lora(target_modules=[], target_parameters=["q_proj.weight"]), ValueError, "`target_modules`"),
        (
            lambda: peft.FrodConfig(
                target_modules=adapters.TARGETS, progressbar=False, runtime_offload_base_weight=True
            ),
            NotImplementedError,
            "FROD .* leave it False",
        ),
    ],
)
def test_what_cannot_work_raises(config, error, match):
    with pytest.raises(error, match=match):
        attach(adapters.llama(), config())


def test_loftq_raises(monkeypatch):
    config = lora()
    config.init_lora_weights = "loftq"
    with pytest.raises(ValueError, match="use 'pissa' or True"):
        attach(adapters.llama(), config)


def test_shadow_with_quantized_embeddings_raises():
    with pytest.raises(NotImplementedError, match="quantize_embeddings=False"):
        attach(adapters.llama(quantize_embeddings=True), CONFIGS["SHADOW"]())


def test_tuners_that_peft_cannot_merge_are_named():
    with pytest.raises(NotImplementedError, match="cannot merge POLY"):
        attach(adapters.llama(), CONFIGS["POLY"]()).merge_adapter()


def test_replicated_layers_are_not_merged():
    model = attach(adapters.llama(), lora(layer_replication=[(0, 2), (1, 2)]))
    with pytest.raises(ValueError, match="shares one weight"):
        model.merge_adapter()


# --- registration ---


def test_install_is_idempotent():
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import other

    before = BaseTuner.__init__, other.prepare_model_for_kbit_training, peft.get_peft_model_state_dict
    install()
    assert (BaseTuner.__init__, other.prepare_model_for_kbit_training, peft.get_peft_model_state_dict) == before


def test_another_peft_gives_a_warning(monkeypatch):
    def gone():
        raise AttributeError("BaseTuner has no attribute 'inject_adapter'")

    def feature_gone():
        raise ImportError("no such module")

    hooks = (("adapters on quantized layers", gone, True), ("CorDA on quantized models", feature_gone, False))
    monkeypatch.setattr("hf_gg.integrations.peft._HOOKS", hooks)
    with pytest.warns(UserWarning, match="does not support adapters on quantized layers.*Install peft") as caught:
        install()
    assert len(caught) == 1


_ORDERS = {
    "ours first": "import hf_gg.integrations.peft, peft",
    "hook": "import hf_gg, peft",
    "peft first": "import peft, hf_gg, hf_gg.integrations.peft",
}
_CHECK = """
import sys
from peft.tuners.tuners_utils import BaseTuner
import peft.tuners.oft.layer, peft.utils.quantization_utils
for function in (
    BaseTuner.__init__, peft.prepare_model_for_kbit_training, peft.get_peft_model_state_dict,
    peft.utils.quantization_utils.resolve_quantization_backend, peft.tuners.oft.layer.resolve_quantization_backend,
    peft.tuners.oft.model.resolve_quantization_backend, peft.utils.resolve_quantization_backend,
):
    assert function._hf_gg_wrapped, function
"""


@pytest.mark.parametrize(
    "order",
    ["hook", pytest.param("ours first", marks=pytest.mark.slow), pytest.param("peft first", marks=pytest.mark.slow)],
)
def test_either_order_of_imports(order):
    code = f"{_ORDERS[order]}\n{_CHECK}"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_wrapped_functions_pass_float_layers_on():
    from peft.utils.quantization_utils import resolve_quantization_backend

    assert resolve_quantization_backend(torch.nn.Linear(2, 2)) is None
    assert injection.quantized_in(torch.nn.Linear(2, 2)) == []
    assert helpers.quantized_in is injection.quantized_in
