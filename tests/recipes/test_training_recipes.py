"""The recipes for LoRA, SFT and pretraining, in tiny: they run, resume, save what loads, and refuse bad values."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

import hf_gg
from hf_gg import data


FOLDER = Path(__file__).parents[2] / "recipes"
SHORT = ("--max_steps", "2", "--warmup_steps", "1", "--save_steps", "1", "--use_cpu", "true", "--report_to", "none")
SHORT += ("--per_device_train_batch_size", "2", "--disable_tqdm", "true")
TEXTS = [
    "the cat sat on the mat and looked at the other cat " * 30,
    "a dog ran after the cat " * 40,
    "the other cat sat on the mat and the dog " * 30,
]


@pytest.fixture(scope="module")
def recipes():
    for package in ("trl", "peft", "datasets"):
        pytest.importorskip(package)
    sys.path.insert(0, str(FOLDER))
    try:
        import lora
        import pretrain
        import settings
        import sft

        yield {"lora": lora, "pretrain": pretrain, "sft": sft, "settings": settings}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A random Llama with SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    words = tf.AutoTokenizer.from_pretrained(**data.smollm2())
    words.save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.LlamaConfig(vocab_size=len(words), **size, tie_word_embeddings=True, pad_token_id=words.pad_token_id)
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def test_lora(recipes, tiny, texts, tmp_path, capsys):
    from peft import PeftModel

    given = ["--model", tiny, "--texts", texts, "--window", "32", "--output_dir", str(tmp_path), "--eval_share", "0.3"]
    result = recipes["lora"].main([*given, *SHORT, "--max_steps", "8", "--learning_rate", "1e-2"])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["steps"] == 8 and result["perplexity_after"] < result["perplexity_before"]
    base = tf.AutoModelForCausalLM.from_pretrained(tiny, quantization_config=hf_gg.GGConfig())
    assert sum(isinstance(module, hf_gg.RF8Linear) for module in base.modules()) == 14
    PeftModel.from_pretrained(base, tmp_path)
    # goes on where it was
    again = recipes["lora"].main([*given, *SHORT, "--resume_from_checkpoint", "true", "--max_steps", "9"])
    assert again["steps"] == 9


def test_sft_with_chats(recipes, tiny, tmp_path, capsys):
    chats = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}]}
        for i in range(12)
    ]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", tiny, "--chats", str(chats), "--output_dir", str(tmp_path / "out"), "--max_length", "48"]
    result = recipes["sft"].main([*given, *SHORT, "--learning_rate", "1e-2"])
    assert result["steps"] == 2 and result["loss_after"] < result["loss_before"]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_sft_with_questions(recipes, tiny, tmp_path, capsys):
    given = ["--model", tiny, "--output_dir", str(tmp_path), "--max_length", "256", "--eval_rows", "3", *SHORT]
    result = recipes["sft"].main(given)
    assert 0 <= result["accuracy_before"] <= 1 and 0 <= result["accuracy_after"] <= 1 and result["rows"] > 200


def test_accuracy_counts_letters(recipes):
    class Words:
        def encode(self, letter, add_special_tokens):
            return ["ABCD".index(letter)]

        def apply_chat_template(self, prompt, add_generation_prompt, return_tensors):
            return {"input_ids": torch.tensor([["ABCD".index(prompt)]])}

    class Echo(torch.nn.Module):
        device = "cpu"

        def forward(self, ids):
            return tf.modeling_outputs.CausalLMOutput(logits=torch.nn.functional.one_hot(ids, 6).float())

    rows = [{"prompt": asked, "completion": [{"content": right}]} for asked, right in ("AA", "BB", "CD", "DD")]
    assert recipes["sft"].accuracy(Echo(), Words(), rows) == 0.75


def test_pretrain(recipes, texts, tmp_path, capsys):
    given = ["--texts", texts, "--output_dir", str(tmp_path), "--eval_share", "0.3", "--window", "16"]
    given += ["--hidden_size", "16", "--layers", "1", "--heads", "2", "--vocabulary", "300"]
    result = recipes["pretrain"].main([*given, *SHORT, "--backslash", "0.1"])
    assert result["steps"] == 2 and 0 < result["bits_per_weight"] < 12
    model, words = (kind.from_pretrained(tmp_path) for kind in (tf.AutoModelForCausalLM, tf.AutoTokenizer))
    assert words.decode(words("the cat")["input_ids"]) == "the cat"
    assert model.num_parameters() == result["parameters"]


def test_pretrain_with_an_architecture(recipes, tiny, texts, tmp_path, capsys):
    given = ["--architecture", tiny, "--texts", texts, "--output_dir", str(tmp_path), "--eval_share", "0.3"]
    result = recipes["pretrain"].main([*given, "--window", "16", *SHORT])
    assert result["parameters"] == tf.AutoModelForCausalLM.from_pretrained(tiny).num_parameters()


def test_windows(recipes):
    class Words:
        eos_token_id = 0

        def __call__(self, texts, **_):
            return {"input_ids": [list(map(int, text)) for text in texts]}

    rows = recipes["settings"].Dataset.from_dict({"text": ["123", "45678", "9"]})
    cut = recipes["settings"].windows(rows, "text", Words(), 4)
    assert cut["input_ids"] == cut["labels"] == [[1, 2, 3, 0], [4, 5, 6, 7], [8, 0, 9, 0]]
    assert recipes["settings"].windows(rows, "text", Words(), 4, 2)["input_ids"] == [[1, 2, 3, 0], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--text_column", "body"], "has no column 'body'"),
        (["--eval_share", "1"], "eval_share must be"),
        (["--window", "9999"], "fewer than a window"),
    ],
)
def test_bad_values(recipes, tiny, texts, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        recipes["lora"].main(["--model", tiny, "--texts", texts, "--output_dir", str(tmp_path), *SHORT, *given])


def test_unknown_keys_of_a_file(recipes, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("lora_rr: 3\n")
    with pytest.raises(ValueError, match="lora_rr"):
        recipes["lora"].main(["--config", str(config)])
