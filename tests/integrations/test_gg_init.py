"""The context `gg_init`, `gg_init_` and `GGConfig(init=…)` on models of Transformers."""

from __future__ import annotations

import functools
import json
import math
import re
import threading
from pathlib import Path

import pytest
import torch
import transformers as tf
import transformers.initialization as initialization
from families import FAMILIES, quiet
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import nn
from transformers.initialization import TORCH_INIT_FUNCTIONS

import hf_gg
from hf_gg import GGConfig, GGInit, RF8Linear, gg_init, gg_init_
from hf_gg.integrations.initialization import drawing
from hf_gg.training.initialization import fans, matrices


# Matrices that the models themselves fill with something else than draws about zero.
SET_BY_THE_MODEL = ("embed_positions.weight", "A_log", "gate_up_proj_bias", "down_proj_bias")
# Vectors that they draw; the numbers depend on what was drawn before.
RANDOM_VECTORS = ("sinks", "router.bias", "dt_proj.bias", "cls_token")


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def new(family: str, **changes) -> tf.PreTrainedModel:
    config = FAMILIES[family].config()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(7)
    return FAMILIES[family].auto.from_config(config)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def drawn(model: nn.Module) -> dict[str, torch.Tensor]:
    """The matrices that are drawn, without the zero rows of padding."""
    found = {}
    for name, module, parameter in matrices(model):
        if not name.endswith(SET_BY_THE_MODEL) or (name.endswith("embed_positions.weight") and "decoder" in name):
            weight, row = parameter.detach(), getattr(module, "padding_idx", None)
            if isinstance(module, nn.Embedding) and row is not None:
                assert not weight[row].any(), name
                weight = torch.cat([weight[:row], weight[row + 1 :]])
            found[name] = weight
    return found


def check_law(weights: torch.Tensor, shape: float) -> None:
    """Draws divided by their standard deviation."""
    x = weights.double().flatten().numpy()
    unit = math.sqrt(math.gamma(1 / shape) / math.gamma(3 / shape))
    assert stats.kstest(x, stats.gennorm(shape, scale=unit).cdf).statistic < 1.95 / math.sqrt(x.size)


@functools.cache
def own_deviations(family: str) -> dict[str, float]:
    """What the model's own initializer gives each of its matrices, from several models."""
    squares: dict[str, list[torch.Tensor]] = {}
    for seed in range(4):
        torch.manual_seed(seed)
        for name, weight in drawn(FAMILIES[family].auto.from_config(FAMILIES[family].config())).items():
            squares.setdefault(name, []).append(weight.double().square().mean())
    return {name: float(torch.stack(found).mean().sqrt()) for name, found in squares.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_deviations(family):
    """Every matrix has the law, with the deviation that the model itself gives it; all else is as without."""
    plain, expected = values(new(family)), own_deviations(family)
    with gg_init(shape=0.5):
        model = new(family)
    found = drawn(model)
    assert found.keys() == expected.keys()
    kurtosis = float(stats.gennorm(0.5).stats("k")) + 3
    for name, weight in found.items():
        error = 5 * math.sqrt(kurtosis / 4 / weight.numel() + 3 / 4 / 4 / weight.numel())
        assert float(weight.double().square().mean().sqrt()) == pytest.approx(expected[name], rel=error), name
    check_law(torch.cat([weight.flatten() / expected[name] for name, weight in found.items()]), 0.5)
    for name, value in values(model).items():
        if name not in found and not name.endswith(RANDOM_VECTORS):
            assert torch.equal(value, plain[name]), name
    assert {name for name, _ in model.named_parameters()} == plain.keys()  # ties are as they were


@pytest.mark.parametrize(
    "family", ["llama-tied", "gpt2", "bert-cls", "t5", "vit", "mixtral", "gpt-oss", "deepseek-v3"]
)
def test_shape_2_is_what_the_model_does(family):
    plain = values(new(family))
    with gg_init(shape=2):
        found = values(new(family))
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    with gg_init(shape=1):
        assert any(not torch.equal(value, plain[name]) for name, value in values(new(family)).items())
    after = values(new(family))
    assert all(torch.equal(after[name], plain[name]) for name in plain)


def test_gpt2_scales_residual_projections():
    with gg_init(shape=1.0):
        model = new("gpt2")
    block = model.transformer.h[0]
    assert float(block.mlp.c_proj.weight.detach().std()) == pytest.approx(0.02 / 2, rel=0.05)  # 1 / sqrt(2 layers)
    assert float(block.mlp.c_fc.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    with gg_init(shape=1.0, std=0.02, gain=2.0):
        model = new("gpt2")
    assert float(model.transformer.h[0].mlp.c_proj.weight.detach().std()) == pytest.approx(0.04, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "mixtral", "gpt-oss", "whisper", "mamba"])
@pytest.mark.parametrize("std", ["fan_in", "fan_out"])
def test_fans_of_families(family, std):
    with gg_init(shape=1.5, std=std, gain="relu"):
        model = new(family)
    again = gg_init_(new(family), shape=1.5, std=std, gain="relu")
    for checked in (model, again):
        for name, module, parameter in matrices(checked):
            if name not in drawn(model):
                continue
            n = fans(module, parameter, name.rpartition(".")[2])[std == "fan_out"]
            error = 6 * math.sqrt((3.8 - 1) / 4 / parameter.numel())
            found = float(parameter.detach().square().mean().sqrt())
            padding = 1 / 20 if isinstance(module, nn.Embedding) else 0
            assert found == pytest.approx(math.sqrt(2 / n), rel=error + padding), name
    layers = dict(model.named_modules())
    if family == "gpt2":  # Conv1D is [in, out]
        name, shape = "transformer.h.0.attn.c_attn", (64, 192)
    elif family == "gpt-oss":  # experts are [experts, in, out]
        name, shape = "model.layers.0.mlp.experts", (4, 64, 192)
    elif family == "mixtral":
        name, shape = "model.layers.0.mlp.experts", (4, 192, 64)
    else:
        return
    weight = layers[name].gate_up_proj if "experts" in name else layers[name].weight
    assert weight.shape == shape
    n = {"fan_in": 64, "fan_out": 192}[std]
    assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / n), rel=0.05)


# --- loading ---


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    with quiet():
        new("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("labels", [1, 300])
def test_only_missing_weights_are_drawn(llama, labels):
    stored = load_file(llama / "model.safetensors")
    with gg_init(shape=0.5, std=0.1):
        torch.manual_seed(1)
        model, info = tf.AutoModelForSequenceClassification.from_pretrained(
            llama, num_labels=labels, output_loading_info=True
        )
    assert set(info["missing_keys"]) == {"score.weight"}
    for name, parameter in model.named_parameters():
        if name != "score.weight":
            assert torch.equal(parameter, stored[name]), name
    if labels > 1:
        check_law(model.score.weight.detach() / 0.1, 0.5)
    torch.manual_seed(1)
    expected = hf_gg.ggd.sampling.gg_(torch.empty(labels, 64), 0.1, 0.5)
    assert torch.equal(model.score.weight, expected)


def test_mismatched_sizes_and_absent_layers(llama, tmp_path):
    stored = load_file(llama / "model.safetensors")
    absent = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in stored.items() if k != absent}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with gg_init(shape=0.5):
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=300, ignore_mismatched_sizes=True)
    fresh = {absent, "model.embed_tokens.weight", "lm_head.weight"}
    for name, parameter in model.named_parameters():
        if name in fresh:
            check_law(parameter.detach() / 0.02, 0.5)
        else:
            assert torch.equal(parameter, stored[name]), name


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("std", ["model", 0.5])
def test_resized_embeddings(family, std):
    model = new(family)
    old = values(model)
    with gg_init(shape=0.5, std=std):
        model.resize_token_embeddings(428, mean_resizing=False)
    rows = model.get_input_embeddings().weight.detach()
    assert torch.equal(rows[:128], old["model.embed_tokens.weight"])
    check_law(rows[128:] / (0.02 if std == "model" else std), 0.5)
    head = model.lm_head.weight.detach()
    if family == "llama":
        assert torch.equal(head[:128], old["lm_head.weight"])
        check_law(head[128:] / (0.02 if std == "model" else std), 0.5)
        assert not torch.equal(head, rows)
    else:
        assert model.lm_head.weight is model.get_input_embeddings().weight
    assert all(torch.equal(value, old[name]) for name, value in values(model).items() if "layers" in name)
    model.resize_token_embeddings(100)  # and smaller
    assert torch.equal(model.get_input_embeddings().weight, old["model.embed_tokens.weight"][:100])


@pytest.mark.parametrize("std", ["model", 0.5])
def test_resized_embeddings_about_the_mean(std):
    """`mean_resizing`, the default: around the mean of the old rows, with the tiny deviation that the model gives."""
    model = new("llama").double()
    old = values(model)["model.embed_tokens.weight"]
    with gg_init(shape=0.5, std=std):
        model.resize_token_embeddings(528)
    rows = model.get_input_embeddings().weight.detach()
    assert torch.equal(rows[:128], old)
    deviation = math.sqrt(1e-9) * old.std(0, correction=0) if std == "model" else std
    check_law((rows[128:] - old.mean(0)) / deviation, 0.5)


def test_padding_rows_stay_zero():
    with gg_init(shape=1.0):
        model = new("bert-cls")
    embedding = model.bert.embeddings.word_embeddings
    assert embedding.padding_idx == 0 and not embedding.weight[0].any() and embedding.weight[1:].all()
    assert not gg_init_(model, shape=1.0).bert.embeddings.word_embeddings.weight[0].any()


# --- contexts ---


def test_contexts_nest_and_end():
    functions = dict(TORCH_INIT_FUNCTIONS)
    with gg_init(shape=0.5) as outer:
        assert outer == GGInit(0.5)
        patched = dict(TORCH_INIT_FUNCTIONS)
        with gg_init(shape=2.0):
            inner = values(new("llama"))
        with drawing(None):
            unchanged = values(new("llama"))
        outside = values(new("llama"))
        with pytest.raises(RuntimeError, match="within"), gg_init(shape=1.0):
            raise RuntimeError("within")
        assert TORCH_INIT_FUNCTIONS == patched != functions
        assert all(torch.equal(value, outside[name]) for name, value in values(new("llama")).items())
    assert TORCH_INIT_FUNCTIONS == functions
    plain = values(new("llama"))
    assert all(torch.equal(inner[name], plain[name]) for name in plain)
    assert all(torch.equal(unchanged[name], outside[name]) for name in plain)
    assert not torch.equal(outside["lm_head.weight"], plain["lm_head.weight"])
    with pytest.raises(RuntimeError, match="within"), gg_init(shape=1.0):
        raise RuntimeError("within")
    assert TORCH_INIT_FUNCTIONS == functions
    assert "wrapper" not in tf.PreTrainedModel._initialize_weights.__qualname__
    assert "__wrapped__" not in vars(tf.PreTrainedModel._init_added_embeddings_weights_with_mean)


def test_contexts_belong_to_a_thread():
    """While one thread is in a context, another one's models are as ever, and so after the first one has left it."""
    entered, done = threading.Event(), threading.Event()
    weights = []

    def other():
        with gg_init(shape=0.5, std=3.0):
            entered.set()
            assert done.wait(60)
            weights.append(nn_embedding())

    def nn_embedding():
        layer = nn.Embedding(100, 50)
        new_model = object.__new__(tf.LlamaForCausalLM)
        nn.Module.__init__(new_model)
        new_model.config = FAMILIES["llama"].config()
        new_model._init_weights(layer)
        return layer.weight.detach()

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    plain = nn_embedding()
    with gg_init(shape=2.0, std=0.3):
        own = nn_embedding()
    done.set()
    thread.join(60)
    assert float(plain.std()) == pytest.approx(0.02, rel=0.1)
    assert float(own.std()) == pytest.approx(0.3, rel=0.1)
    assert float(weights[0].std()) == pytest.approx(3, rel=0.3)
    with gg_init():
        pass
    assert float(nn_embedding().std()) == pytest.approx(0.02, rel=0.1)


def test_structured_and_off_centre_draws_are_left_to_the_model():
    class Model(tf.PreTrainedModel):
        config_class = tf.LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.a, self.b, self.c = (nn.Linear(30, 30, bias=False) for _ in range(3))
            self.token = nn.Parameter(torch.empty(1, 1, 30))
            self.post_init()

        def _init_weights(self, module):
            if module is self:
                nn.init.orthogonal_(self.a.weight)
                nn.init.normal_(self.b.weight, mean=5.0, std=0.1)
                nn.init.uniform_(self.c.weight, 0, 1)
                nn.init.normal_(self.token)

    config = FAMILIES["llama"].config()
    torch.manual_seed(1)
    plain = values(Model(config))
    with gg_init(shape=0.5, std="fan_in"):
        torch.manual_seed(1)
        found = values(Model(config))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("initializer", "arguments"),
    [
        ("uniform_", {"a": -0.3, "b": 0.3}),
        ("normal_", {"std": 0.3}),
        ("trunc_normal_", {"std": 1.3}),
        ("trunc_normal_", {"std": 0.5, "a": -0.2, "b": 0.2}),
        ("trunc_normal_", {"std": 0.02}),
        ("xavier_uniform_", {"gain": 1.7}),
        ("xavier_normal_", {}),
        ("kaiming_uniform_", {"a": math.sqrt(5)}),
        ("kaiming_uniform_", {"mode": "fan_out", "nonlinearity": "relu"}),
        ("kaiming_normal_", {"nonlinearity": "linear"}),
    ],
)
@pytest.mark.parametrize("size", [(300, 500), (50, 60, 3, 3)])
def test_deviations_of_torchs_initializers(initializer, arguments, size):
    parameter = nn.Parameter(torch.empty(size))
    expected = float(getattr(initialization, initializer)(parameter, **arguments).detach().std())
    with gg_init(shape=1.0):
        found = getattr(initialization, initializer)(parameter, **arguments).detach()
    assert float(found.std()) == pytest.approx(expected, rel=0.02)
    check_law(found / expected, 1.0)


@pytest.mark.parametrize("arguments", [{"shape": 0}, {"std": "own"}, {"gain": "swish"}, {"shape": math.nan}])
def test_bad_values(arguments):
    model, functions = new("llama"), dict(TORCH_INIT_FUNCTIONS)
    before = values(model)
    for make in (lambda: gg_init(**arguments), lambda: gg_init_(model, **arguments)):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            make()
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert TORCH_INIT_FUNCTIONS == functions


# --- in place ---


@pytest.mark.parametrize("family", FAMILIES)
def test_in_place(family):
    """The law as in the context, all else as the model's initializer sets it, whatever was there before."""
    fresh = new(family)
    expected, deviations = values(fresh), own_deviations(family)
    model = new(family)
    with torch.no_grad():
        for thing in (*model.parameters(), *model.buffers()):
            if thing.is_floating_point():
                thing.fill_(math.nan)
            thing._is_hf_initialized = True  # as after loading
    torch.manual_seed(3)
    assert gg_init_(model, shape=0.5) is model
    first = values(model)
    found = drawn(model)
    check_law(torch.cat([weight.flatten() / deviations[name] for name, weight in found.items()]), 0.5)
    for name, value in first.items():
        if name not in found and not name.endswith(RANDOM_VECTORS):
            assert torch.equal(value, expected[name]), name
        assert value.isfinite().all(), name
    # buffers that `_init_weights` does not set are not lost to it, but were here
    model.load_state_dict({k: v for k, v in fresh.state_dict().items() if k not in first}, strict=False)
    assert {name for name, _ in model.named_parameters()} == expected.keys()
    torch.manual_seed(3)
    assert all(torch.equal(value, first[name]) for name, value in values(gg_init_(model, shape=0.5)).items())


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral", "t5"])
def test_meta_device_and_later_memory(family):
    with torch.device("meta"), gg_init(shape=0.5):
        model = new(family)
    assert gg_init_(model, shape=0.5).device.type == "meta"
    model.to_empty(device="cpu")
    deviations = own_deviations(family)
    gg_init_(model, shape=0.5)
    assert torch.isfinite(FAMILIES[family].logits(model)).all()
    assert {name for name, _ in model.named_parameters()} == values(new(family)).keys()
    found = drawn(model)
    check_law(torch.cat([weight.flatten() / deviations[name] for name, weight in found.items()]), 0.5)

    with torch.device("meta"):
        model = new(family)
    model.to_empty(device="cpu")
    with gg_init(shape=0.5):
        model.initialize_weights()
    model.tie_weights()
    assert torch.isfinite(FAMILIES[family].logits(model)).all()
    found = drawn(model)
    check_law(torch.cat([weight.flatten() / deviations[name] for name, weight in found.items()]), 0.5)


def test_a_module_that_holds_a_model():
    model = nn.ModuleDict({"body": new("bert-cls"), "head": nn.Linear(300, 200)})
    bias = model["head"].bias.detach().clone()
    gg_init_(model, shape=0.5)
    check_law(model["body"].bert.encoder.layer[0].output.dense.weight.detach() / 0.02, 0.5)
    check_law(model["head"].weight.detach() * math.sqrt(3 * 300), 0.5)
    assert torch.equal(model["head"].bias, bias)
    check_law(gg_init_(nn.Linear(300, 200), shape=0.5, std=1.0).weight.detach(), 0.5)


def test_quantized_models_are_refused(llama):
    model = tf.AutoModelForCausalLM.from_pretrained(llama, quantization_config=GGConfig())
    before = values(model)
    with pytest.raises(TypeError, match=r"q_proj\.weight is torch.uint8: .*dequantize"):
        gg_init_(model, shape=1.0)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


@pytest.mark.parametrize("thing", [None, 3, {"a": torch.ones(2, 2)}])
def test_what_is_no_module_is_refused(thing):
    for function in (gg_init_, hf_gg.training.initialization.gg_init_):
        with pytest.raises(TypeError, match=f"torch.nn.Module, got {type(thing).__name__}"):
            function(thing)


# --- the config ---


@pytest.mark.parametrize("options", [{}, {"init": GGInit(shape=0.5)}, {"modules_to_not_convert": ["q_proj"]}])
def test_the_report_lists_no_scale_of_a_new_head(llama, options):
    """The head was a quantized one on the meta device; it stays in full precision."""
    model, info = tf.AutoModelForSequenceClassification.from_pretrained(
        llama, num_labels=3, quantization_config=GGConfig(**options), output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    assert type(model.score) is nn.Linear and isinstance(model.model.layers[0].mlp.up_proj, RF8Linear)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_config_round_trip(llama, tmp_path):
    config = GGConfig(init=GGInit(shape=0.5, std=0.1, gain="relu"))
    assert config.to_dict()["init"] == {"shape": 0.5, "std": 0.1, "gain": "relu"}
    assert "init" not in GGConfig().to_dict()
    assert GGConfig.from_dict(json.loads(json.dumps(config.to_dict()))).init == config.init
    assert repr(config)

    def load(folder, **kwargs):
        model = tf.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=300, dtype=torch.float32, **kwargs
        )
        # as any layer that the checkpoint has not, the new head stays in full precision
        assert type(model.score) is nn.Linear and isinstance(model.model.layers[0].mlp.up_proj, RF8Linear)
        return model

    model = load(llama, quantization_config=config)
    deviation = 0.1 * math.sqrt(2)
    check_law(model.score.weight.detach() / deviation, 0.5)
    expected = tf.AutoModelForCausalLM.from_pretrained(llama, quantization_config=GGConfig())
    expected.save_pretrained(tmp_path / "plain")
    for name, value in expected.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value), name

    base = tf.AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    base.save_pretrained(tmp_path / "with")
    written = json.loads((tmp_path / "with" / "config.json").read_text())["quantization_config"]
    assert written["init"] == {"shape": 0.5, "std": 0.1, "gain": "relu"}
    again = load(tmp_path / "with")
    assert again.config.quantization_config.init == config.init
    check_law(again.score.weight.detach() / deviation, 0.5)
    # a config at load: on a checkpoint without one, and in place of the one in it
    check_law(load(tmp_path / "plain").score.weight.detach() / 0.02, 2.0)
    other = GGConfig(init=GGInit(shape=1.0))
    for folder in ("plain", "with"):
        check_law(load(tmp_path / folder, quantization_config=other).score.weight.detach() / 0.02, 1.0)
    with gg_init(shape=8.0, std=0.5):
        check_law(load(tmp_path / "plain").score.weight.detach() / 0.5, 8.0)
        check_law(load(tmp_path / "with").score.weight.detach() / deviation, 0.5)  # the config is the inner one
    check_law(load(llama, quantization_config=GGConfig()).score.weight.detach() / 0.02, 2.0)


def test_bad_configs():
    for init, message in (
        (1.0, "init must be a GGInit or a dict of its keys, got 1.0"),
        ({"nu": 1}, "Unknown GGInit key 'nu'"),
        ({"shape": 9}, "shape must be a number from 0.1 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            GGConfig(init=init)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_examples_of_the_documentation(llama):
    text = (Path(__file__).parents[2] / "docs/initialization.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        names = {"folder": llama}
        exec(snippet, names)
        assert isinstance(names["model"], tf.PreTrainedModel)
