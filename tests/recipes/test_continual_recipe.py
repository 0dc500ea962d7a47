import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers as tf
from scipy import ndimage

from hf_gg import data


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    yield
    for name in ("continual", "arithmetic", "pictures"):
        sys.modules.pop(name, None)


ASSISTANT = """{% for message in messages %}{% if message['role'] == 'assistant' %}= {% endif %}
{{- message['content'] }} {% endfor %}{% if add_generation_prompt %}= {% endif %}"""


def save_llama(folder: Path, words: tf.PreTrainedTokenizerBase) -> Path:
    """A tiny random Llama with a tokenizer."""
    words.save_pretrained(folder)
    tf.set_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        max_position_embeddings=512,
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["few words", pytest.param("SmolLM2's", marks=pytest.mark.slow)])
def tiny(request, tmp_path, policies) -> Path:
    """A tiny random Llama, also with SmolLM2's tokenizer, which takes long to read and has 49,152 words."""
    if request.param == "few words":
        words = policies.tokenizer()
        words.chat_template = ASSISTANT
    else:
        file = data.smollm2_gguf()
        words = tf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return save_llama(tmp_path / "tiny", words)


@pytest.fixture
def policies(monkeypatch):
    """The tiny models of the tests of rollouts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "posttraining"))
    import policies

    return policies


def test_the_table(tiny, tmp_path, capsys):
    from continual import main

    arguments = f"--model {tiny} --methods sft grpo-rif --seeds 0 --tasks sums words"
    arguments += (
        " --max_steps 2 --train_instances 4 --test_instances 3 --per_device_train_batch_size 4 --num_generations 2"
    )
    arguments += " --max_completion_length 3 --n 2 --min_correct 0 --lora_rank 2 --save_steps 1 --rf8 true"
    arguments += f" --results {tmp_path}/a.csv --image {tmp_path}/a.png --output_dir {tmp_path}/runs"
    file = main(arguments.split())
    rows = list(csv.DictReader(file.open()))
    assert [row["method"] for row in rows] == ["sft", "grpo-rif"]
    assert rows[1]["kept"] == "1.000" and not rows[0]["kept"] and rows[0]["forgetting"]
    for row in rows:
        assert 0 <= float(row["end words"]) <= 1 and float(row["general_before"]) < 0
    assert (tmp_path / "a.png").stat().st_size > 5000
    first = file.read_text()
    assert main(arguments.split()).read_text() == first  # every run is there


@pytest.fixture
def tiny_vision(tmp_path, policies) -> Path:
    """A tiny random Qwen2.5-VL; its processor is read by AutoProcessor, but has no part for videos."""
    model, processor = policies.vision_language()
    model.save_pretrained(tmp_path / "vision")
    processor.save_pretrained(tmp_path / "vision")
    tf.AutoProcessor.register(type(model.config), type(processor), exist_ok=True)
    return tmp_path / "vision"


def test_the_table_of_pictures(tiny_vision, tmp_path):
    from continual import ContinualArguments, load, main, read, reads_images, tokenizer

    settings = ContinualArguments(model=str(tiny_vision))
    assert reads_images(settings) and not reads_images(ContinualArguments(model=str(tiny_vision), vision=False))
    assert type(load(settings)).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert hasattr(tokenizer(settings), "image_processor")
    arguments = (
        f"--model {tiny_vision} --methods sft grpo-rif grpo-no-kl sft-joint --seeds 0 --tasks count colour larger"
    )
    arguments += " --max_steps 2 --train_instances 4 --test_instances 3 --per_device_train_batch_size 4"
    arguments += " --num_generations 2 --max_completion_length 3 --n 2 --min_correct 0 --lora_rank 2 --save_steps 1"
    arguments += f" --results {tmp_path}/a.csv --image {tmp_path}/a.png --output_dir {tmp_path}/runs"
    rows = list(csv.DictReader(main(arguments.split()).open()))
    assert [row["method"] for row in rows] == ["sft", "grpo-rif", "grpo-no-kl", "sft-joint"]
    assert rows[1]["kept"] == "1.000" and not rows[3]["forgetting"]
    assert len({row["start larger"] for row in rows}) == 1
    assert len(json.loads((tmp_path / "runs" / "start.json").read_text())) == 1  # evaluated once
    vision = read(RECIPES / "continual_vision.yaml", [])
    assert vision.vision and vision.tasks == ["count", "colour", "larger"]


def test_pictures_need_a_model_that_reads_images(tiny):
    from continual import main

    with pytest.raises(ValueError, match="tasks: larger is of pictures, and the model reads texts only"):
        main(f"--model {tiny} --tasks sums larger".split())


def test_what_is_in_the_pictures():
    from pictures import PICTURES, pictures

    names = {(220, 30, 30): "red", (30, 160, 30): "green", (30, 60, 220): "blue", (235, 205, 20): "yellow"}
    names[0, 0, 0] = "black"
    for name in PICTURES:
        task = pictures(name, 30, 20)
        rows = [*task.train, *task.test]
        assert len({row["image"].tobytes() for row in rows}) == 50
        assert task.train["image"][3].tobytes() == pictures(name, 30, 20).train["image"][3].tobytes()
        answers = {row["answer"] for row in rows}
        assert answers == {"count": {*"123456"}, "colour": {*names.values()}, "larger": {"left", "right"}}[name]
        for row in rows:
            pixels = np.array(row["image"])
            drawn = (pixels != 255).any(-1)
            if name == "count":
                found = str(ndimage.label(drawn)[1])
            elif name == "colour":
                found = names[tuple(map(int, np.median(pixels[drawn], axis=0)))]
            else:
                found = "left" if drawn[:, :56].sum() > 1.5 * drawn[:, 56:].sum() else "right"
                assert ndimage.label(drawn)[1] == 2
            assert found == row["answer"]
            right = [[{"role": "assistant", "content": f"I see.\n{row['completion']}"}]]
            assert task.reward(completions=right, answer=[row["answer"]]) == [1] == task.format(completions=right)


def test_the_files_of_settings():
    from continual import read

    cpu, gpu = read(RECIPES / "continual.yaml", []), read(RECIPES / "continual_gpu.yaml", ["--seeds", "7"])
    assert cpu.use_cpu and len(cpu.seeds) == 2 and cpu.tasks == ["sums", "differences", "products", "words"]
    assert not gpu.use_cpu and gpu.seeds == [7] and gpu.rf8 and gpu.bf16
    for bad in (["--methods", "ppo"], ["--tasks", "poems"]):
        with pytest.raises(ValueError, match=f"got '{bad[1]}'"):
            read(RECIPES / "continual.yaml", bad)


def test_tasks():
    from arithmetic import TASKS, arithmetic

    for name in TASKS:
        task = arithmetic(name, 40, 20)
        asked = [row["prompt"][0]["content"] for row in [*task.train, *task.test]]
        assert len({*asked}) == len(asked) >= 50
        for row in task.train:
            right = [[{"role": "assistant", "content": f"It is so.\n{row['completion']}"}]]
            assert task.reward(completions=right, answer=[row["answer"]]) == [1]
            assert task.format(completions=right) == [1]
        assert arithmetic(name, 40, 20).train.to_list() == task.train.to_list()
    with pytest.raises(ValueError, match="sums has only 64 different questions"):
        arithmetic("sums", 10, 64)


def test_gsm8k(tmp_path):
    from arithmetic import gsm8k

    file = tmp_path / "train.jsonl"
    rows = [f'{{"question": "How many are {k}?", "answer": "There are {k}.\\n#### 1,00{k}"}}' for k in range(6)]
    file.write_text("\n".join(rows) + "\n\n")
    task = gsm8k(file, 3, 2)
    assert len(task.train) == 3 and len(task.test) == 2 and task.test[1]["answer"] == "1,005"
    assert task.train[0]["completion"] == "There are 0.\n#### 1,000"
    assert task.reward(completions=["so #### 1005"], answer=[task.test[1]["answer"]]) == [1]
    for text, message in (
        ("{", "line 7: no question"),
        ('{"question": "a", "answer": "b"}', "line 7: the answer does"),
        ('{"question": "a", "answer": "b #### none"}', "line 7: the answer does"),
        ('{"question": null, "answer": "b #### 4"}', "line 7: no question"),
        ("[1]", "line 7: no question"),
    ):
        file.write_text("\n".join([*rows, text]))
        with pytest.raises(ValueError, match=message):
            gsm8k(file, 3, 2)
    file.write_text("\n".join([*rows, '{"question": "two\u2028lines", "answer": "#### 7"}']), encoding="utf-8")
    assert "two\u2028lines" in gsm8k(file, 3, 2).test[1]["prompt"][0]["content"]
    file.write_text(rows[0])
    with pytest.raises(ValueError, match="has 1 rows: more than the 2"):
        gsm8k(file, 3, 2)
