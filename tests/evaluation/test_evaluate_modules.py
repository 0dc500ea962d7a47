"""Our modules of the `evaluate` library: opened from the package's path without a hub, and used by its evaluator."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from toy import model, save, tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, pipeline

from hf_gg import GGConfig, quantize_
from hf_gg.evaluation import METRICS, metric_path


evaluate = pytest.importorskip("evaluate", reason="evaluate is an extra: pip install hf-gg[eval]")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """One for all: a package of copied modules is imported once in a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def load(name: str, tmp_path):
    return evaluate.load(metric_path(name), cache_dir=str(tmp_path / "cache"))


def test_flip_rate(tmp_path):
    metric = load("flip_rate", tmp_path)
    assert metric.compute(predictions=[1, 2, 3, 4], references=[1, 2, 0, 4]) == {"flip_rate": 0.25}
    metric.add_batch(predictions=[1, 1], references=[1, 1])
    metric.add(prediction=0, reference=1)
    assert metric.compute()["flip_rate"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", METRICS)
def test_nothing_to_measure_is_an_error(tmp_path, name):
    """And no NaN."""
    given = {"data": []} if name == "bits_per_weight" else {"predictions": [], "references": []}
    with pytest.raises(ValueError, match="There are no"):
        load(name, tmp_path).compute(**given)


def test_kl_to_reference(tmp_path):
    metric = load("kl_to_reference", tmp_path)
    logits, reference = torch.randn(9, 4).double(), torch.randn(9, 4).double()
    q, p = F.log_softmax(logits, -1), F.log_softmax(reference, -1)
    found = metric.compute(predictions=logits.tolist(), references=reference.tolist())
    expected = F.kl_div(q, p, reduction="batchmean", log_target=True).item()
    assert found["kl_to_reference"] == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="row 0 is not finite"):
        metric.compute(predictions=[[float("nan"), 0.0]], references=[[0.0, 1.0]])
    with pytest.raises(ValueError, match="same length"):
        metric.compute(predictions=[[0.0, 0.0]], references=[[0.0, 1.0, 2.0]])


@pytest.mark.parametrize(("config", "low", "high"), [(GGConfig(), 8.5, 9.2), (GGConfig(coding="rans"), 6.5, 8.5)])
def test_bits_per_weight(tmp_path, config, low, high):
    quantized = quantize_(model(), config)
    quantized.save_pretrained(tmp_path / "rf8")
    model().to(torch.bfloat16).save_pretrained(tmp_path / "float")
    metric = load("bits_per_weight", tmp_path)
    found = metric.compute(data=[str(tmp_path / "rf8")])
    assert low < found["bits_per_weight"] < high
    size = sum(file.stat().st_size for file in (tmp_path / "rf8").glob("*.safetensors"))
    weights = sum(parameter.numel() for parameter in model().parameters())
    # the file has a header besides
    assert found["model_bits_per_weight"] == pytest.approx(8 * size / weights, rel=0.12)
    if config.coding == "none":
        rows = [module for module in quantized.modules() if hasattr(module, "weight_scale")]
        codes, scales = (sum(p.numel() for p in each) for each in zip(*((m.weight, m.weight_scale) for m in rows)))
        assert found["bits_per_weight"] == pytest.approx(8 + 32 * scales / codes)
    assert metric.compute(data=[str(tmp_path / "float")]) == {"bits_per_weight": 16, "model_bits_per_weight": 16}


def test_unknown_metric():
    with pytest.raises(ValueError, match="'accuracy' is no metric of hf_gg: the metrics are bits_per_weight"):
        metric_path("accuracy")
    assert all(metric_path(name).endswith(name) for name in METRICS)


def test_evaluator_on_a_quantized_classifier(tmp_path):
    """Which share of classes is another one than the full-precision classifier's."""
    datasets = pytest.importorskip("datasets")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
        pad_token_id=0,
        initializer_range=0.3,
    )
    full = LlamaForSequenceClassification(config).eval()
    save(tmp_path / "rf8", quantize_(copy.deepcopy(full), GGConfig()))
    words = tokenizer()
    words.pad_token = "<unk>"
    texts = [letter * 3 + other for letter in "abcdefgh" for other in "stuvwxyz"]

    def classify(which):
        answers = pipeline("text-classification", model=which, tokenizer=words, device="cpu")(texts)
        return [int(answer["label"].removeprefix("LABEL_")) for answer in answers]

    quantized = LlamaForSequenceClassification.from_pretrained(tmp_path / "rf8").eval()
    assert quantized.config.quantization_config.quant_method == "gg"
    data = datasets.Dataset.from_dict({"text": texts, "label": classify(full)})
    expected = sum(one != other for one, other in zip(data["label"], classify(quantized))) / len(texts)
    assert expected > 0
    # with Transformers 5 evaluate 0.4.6 takes models and folders, and fails on pipelines
    for which in (quantized, str(tmp_path / "rf8")):
        found = evaluate.evaluator("text-classification").compute(
            model_or_pipeline=which,
            tokenizer=words,
            data=data,
            metric=load("flip_rate", tmp_path),
            label_mapping={f"LABEL_{number}": number for number in range(3)},
            device=-1,
        )
        assert found["flip_rate"] == expected
