import copy
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from policies import is_right, llama, tokenizer, vision_language
from transformers import TrainerCallback
from trl import GRPOConfig, SFTConfig

from hf_gg import GGConfig, quantize_
from hf_gg.posttraining.continual import ContinualRunner, Task, average_accuracy, forgetting
from hf_gg.posttraining.rewards import number_match
from hf_gg.posttraining.rif import AllDropped, Sampling
from hf_gg.posttraining.tasks import right


# --- metrics, by hand ---

P = [[0.8, 0.1, 0.2], [0.6, 0.7, 0.3], [0.5, 0.75, 0.9]]


def test_average_accuracy_and_forgetting():
    assert average_accuracy(P) == pytest.approx((0.5 + 0.75 + 0.9) / 3)
    # task 0: 0.5 - max(0.8, 0.6); task 1: 0.75 - max(0.1, 0.7)
    assert forgetting(P) == pytest.approx((-0.3 + 0.05) / 2)
    holes = [[0.8, math.nan, math.nan], [0.6, 0.7, math.nan], P[2]]
    assert forgetting(holes) == forgetting(torch.tensor(holes).double()) == forgetting(P)
    table = np.random.default_rng(0).random((5, 5))
    wanted = np.mean([table[4, j] - max(table[t, j] for t in range(4)) for j in range(4)])
    assert forgetting(table) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "scores", [[], [[]], [0.5], [[0.5]], [[0.5, 0.5]], [[0.1, 0.2], [math.nan, 0.3]], [[1, math.inf, 0], P[1], P[2]]]
)
def test_forgetting_of_bad_tables(scores):
    with pytest.raises(ValueError, match=r"table|two tasks|missing"):
        forgetting(scores)
    with pytest.raises(ValueError, match=r"last row of scores has numbers that are missing"):
        average_accuracy([[0.5, math.nan]])


# --- runs ---


def task(name: str, offset: int) -> Task:
    """k + 1 = k + 1 + offset, for one-digit k: something a tiny model learns by heart."""
    rows = [{"prompt": f"{name} {k} + 1 =", "answer": str(k + 1 + offset)} for k in range(8)]
    return Task(name, Dataset.from_list(rows), Dataset.from_list(rows), number_match)


TASKS = [task("20", 0), task("30", 10)]
EVALUATION = Sampling(n=1, temperature=0.0, max_new_tokens=2)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1}


def sft(**options) -> SFTConfig:
    options = {"max_steps": 40, "learning_rate": 2e-2, "save_steps": 15, "max_length": 32} | options
    return SFTConfig("unused", per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True, **options)


def grpo(**options) -> GRPOConfig:
    options = {"max_steps": 6, "learning_rate": 1e-2, "save_steps": 2, "num_generations": 4} | options
    return GRPOConfig(
        "unused",
        per_device_train_batch_size=8,
        max_completion_length=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        **options,
    )


class Kill(TrainerCallback):
    """Ends the process's work, as far as Python can, after some steps of some task."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_step_end(self, args, state, control, **_):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        f"{file.parent.parent.name} {name}": value
        for file in sorted(folder.glob("*/model/*.safetensors"))
        for name, value in load_file(file).items()
    }


def compare(run, tmp_path, kills) -> None:
    """A run that is cut off again and again ends as one in one piece, to the bit."""
    whole = run(tmp_path / "whole", []).run()
    for after in kills:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", [Kill(after)]).run()
    cut = run(tmp_path / "cut", []).run()
    assert cut.scores == whole.scores and cut.start == whole.start and cut.general == whole.general
    for one, other in zip(cut.filters, whole.filters):
        assert (one is None) == (other is None)
        if one is not None:
            assert one | {"seconds": 0} == other | {"seconds": 0}
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert first.keys() == second.keys() and len(first) > 4
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sft_learns_forgets_and_goes_on_after_kills(tmp_path):
    calls = []

    def general(model, words):
        calls.append(1)
        return float(model(torch.tensor([[3, 4, 5]])).logits.sum().detach())

    def run(folder, callbacks):
        return ContinualRunner(
            llama, tokenizer(), TASKS, folder, sft(), evaluation=EVALUATION, general=general, callbacks=callbacks
        )

    compare(run, tmp_path, [20, 30, 20])
    result = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert result["scores"][0][0] == 1 and result["scores"][1][1] == 1  # learned by heart
    assert result["scores"][1][0] < 1 and result["forgetting"] == result["scores"][1][0] - 1  # and forgotten
    assert result["average_accuracy"] == pytest.approx(sum(result["scores"][1]) / 2)
    assert result["general"][0] != result["general"][1]
    assert (tmp_path / "whole" / "scores.png").stat().st_size > 5000
    before = len(calls)
    run(tmp_path / "whole", []).run()  # everything is there
    assert len(calls) == before


def loose(completions, answer, **_):
    """Right where any number was said: so that a random model is right sometimes."""
    return [float(any(word.isdigit() and int(word) % 3 == 0 for word in text.split())) for text in completions]


def test_grpo_with_filter_on_rf8_goes_on_after_kills(tmp_path):
    tasks = [Task(old.name, old.train, old.test, loose, format=is_right) for old in TASKS]

    def run(folder, callbacks):
        return ContinualRunner(
            lambda: quantize_(llama(), GGConfig()),
            tokenizer(),
            tasks,
            folder,
            grpo(beta=0.01),
            peft_config=LoraConfig(**LORA),
            rif={"n": 4, "min_correct": 1, "max_correct": 3, "max_new_tokens": 3, "batch_tokens": 60},
            evaluation=EVALUATION,
            callbacks=callbacks,
        )

    compare(run, tmp_path, [3, 3, 5])
    result = json.loads((tmp_path / "whole" / "results.json").read_text())
    for found in result["filters"]:
        assert found["kept"] + found["dropped"] == 8 and 0 < found["kept"] < 8
        assert found["kept"] == sum(found["histogram"][1:4])
    assert {name.split()[0] for name in weights(tmp_path / "whole")} == {"00-20", "01-30"}
    assert not any("ref" in name for name in weights(tmp_path / "whole"))


def test_each_row_is_right_from_its_own_threshold_on():
    def half(completions, **_):
        return [{"a": 0.25, "b": 0.5, "c": None, "d": math.nan}[text] for text in completions]

    tasks = [Task(name, None, None, half, threshold=threshold) for name, threshold in (("x", 0.25), ("y", 0.5))]
    found = right(tasks)(completions=[*"ababcd"], task=[0, 0, 1, 1, 0, 1])
    assert found[:5] == [1, 1, 0, 1, None] and math.isnan(found[5])


def pictures(name: str, blue: int) -> Task:
    """One question of eight pictures; the answer is in their colour alone."""
    chat = [{"role": "user", "content": f"{name} +"}]
    images = [Image.new("RGB", (16 + 8 * (k % 2), 16), ((k % 2) * 255, 0, blue)) for k in range(8)]
    answers = [str(k % 2 + 3) for k in range(8)]
    data = Dataset.from_dict({"prompt": [chat] * 8, "image": images, "answer": answers, "completion": answers})
    return Task(name, data, data, number_match)


def test_sft_learns_from_images(tmp_path):
    tasks = [pictures("20", 0), pictures("30", 255)]
    words = vision_language()[1]

    def run(folder, **options):
        args = sft(max_length=None, max_steps=24)
        return ContinualRunner(
            lambda: vision_language()[0], words, tasks, folder, args, evaluation=EVALUATION, **options
        ).run()

    result = run(tmp_path / "a")
    assert result.scores[0][0] == result.scores[1][1] == 1  # 0.5 without the images
    assert run(tmp_path / "b", joint=True).scores == [[1, 1]]
    texts = Task("text", TASKS[0].train, TASKS[0].test, number_match)
    with pytest.raises(ValueError, match="with and without images cannot be mixed"):
        ContinualRunner(llama, words, [tasks[0], texts], tmp_path / "c", sft(), joint=True)
    written = tasks[0].train.remove_columns("prompt").add_column("prompt", ["<|image_pad|> 20 +"] * 8)
    with pytest.raises(ValueError, match="20: GRPO takes prompts with images as chats only"):
        ContinualRunner(llama, words, [Task("20", written, written, number_match)], tmp_path / "c", grpo())


class Columns(TrainerCallback):
    """Notes which columns the trainer has."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_train_begin(self, args, state, control, train_dataloader=None, **_):
        self.names |= {*train_dataloader.dataset.column_names}


def test_grpo_with_filter_on_images_goes_on_after_kills(tmp_path):
    sizes, columns = [], Columns()

    def of_images(completions, image, **_):
        sizes.extend(picture.size for picture in image)
        return [float(len(text) % 2) for text in completions]

    tasks = [Task(old.name, old.train, old.test, of_images) for old in (pictures("20", 0), pictures("30", 255))]

    def run(folder, callbacks):
        model, processor = vision_language()
        return ContinualRunner(
            lambda: copy.deepcopy(model),
            processor,
            tasks,
            folder,
            grpo(beta=0.01, max_steps=3),
            peft_config=LoraConfig(**LORA | {"target_modules": "all-linear"}),
            rif={"n": 4, "min_correct": 1, "max_new_tokens": 3, "batch_tokens": 150},
            evaluation=EVALUATION,
            callbacks=[columns, *callbacks],
        )

    compare(run, tmp_path, [2, 3])
    # a completion that is a text makes TRL take the chats for texts, in some processes
    assert {"prompt", "image", "answer"} <= columns.names and "completion" not in columns.names
    assert {*sizes} == {(16, 16), (24, 16)}
    names = weights(tmp_path / "whole")
    assert any("visual" in name for name in names) and any("language_model" in name for name in names)


def test_the_start_is_evaluated_once(tmp_path, monkeypatch):
    seen = []
    evaluate = ContinualRunner._evaluate
    monkeypatch.setattr(ContinualRunner, "_evaluate", lambda self, model: seen.append(1) or evaluate(self, model))

    def start(name, seed=0, tasks=TASKS, evaluation=EVALUATION, **options):
        runner = ContinualRunner(
            lambda: llama(seed),
            tokenizer(),
            tasks,
            tmp_path / name,
            sft(max_steps=1, **options),
            evaluation=evaluation,
            start_cache=tmp_path / "start.json",
        )
        del seen[:]
        return runner.run().start, len(seen) - len(tasks)

    first, count = start("a")
    assert count == 1
    assert start("b", learning_rate=1e-3) == (first, 0)
    others = {"seed": 1}, {"tasks": TASKS[:1]}, {"evaluation": Sampling(n=1, temperature=0.0, max_new_tokens=3)}
    for number, other in enumerate(others):
        assert start(f"c{number}", **other)[1] == 1
    assert len(json.loads((tmp_path / "start.json").read_text())) == 4


def test_joint_training_judges_each_row_by_its_task(tmp_path):
    seen = []

    def first(completions, answer, prompts, **_):
        seen.extend(("first", prompt.split()[0]) for prompt in prompts)
        return loose(completions, answer)

    def second(completions, answer, prompts, **_):
        seen.extend(("second", prompt.split()[0]) for prompt in prompts)
        return loose(completions, answer)

    tasks = [Task("20", TASKS[0].train, TASKS[0].test, first), Task("30", TASKS[1].train, TASKS[1].test, second)]
    runner = ContinualRunner(
        llama, tokenizer(), tasks, tmp_path / "run", grpo(max_steps=8), evaluation=EVALUATION, joint=True
    )
    result = runner.run()
    assert {*seen} == {("first", "20"), ("second", "30")}
    assert len(result.scores) == 1 and len(result.scores[0]) == 2
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["forgetting"] is None and written["average_accuracy"] == pytest.approx(sum(result.scores[0]) / 2)


def test_too_few_instances_for_a_step(tmp_path):
    """The stock trainer would stop at step 0, and the run would tell of training that did not happen."""

    def first(completions, prompts, **_):
        return [float(prompt.split()[1] == "0") for prompt in prompts]

    tasks = [Task("20", TASKS[0].train, TASKS[0].test, first)]
    rif = {"n": 2, "max_new_tokens": 2}
    run = ContinualRunner(llama, tokenizer(), tasks, tmp_path / "a", grpo(), rif=rif, evaluation=EVALUATION)
    with pytest.raises(ValueError, match=r"1 instances are left, and a step of GRPO takes 2 \(") as caught:
        run.run()
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["This happened in training on 20."]
    assert not (tmp_path / "a" / "results.json").exists()


def test_nothing_is_right(tmp_path):
    def never(completions, **_):
        return [0.0 for _ in completions]

    tasks = [TASKS[0], Task("30", TASKS[1].train, TASKS[1].test, never)]
    rif, args = {"n": 2, "max_new_tokens": 2, "min_correct": 1}, grpo(max_steps=1)
    tasks[0] = Task("20", TASKS[0].train, TASKS[0].test, loose)
    run = ContinualRunner(llama, tokenizer(), tasks, tmp_path / "a", args, rif=rif, evaluation=EVALUATION)
    with pytest.raises(AllDropped) as caught:
        run.run()
    assert caught.value.report.counts == [0] * 8
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["This happened in training on 30."]
    assert len(json.loads((tmp_path / "a" / "state.json").read_text())["scores"]) == 1  # task 20 is kept


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path):
    def run(callbacks):
        return ContinualRunner(
            llama, tokenizer(), TASKS[:1], tmp_path / "a", sft(), evaluation=EVALUATION, callbacks=callbacks
        )

    with pytest.raises(KeyboardInterrupt):
        run([Kill(35)]).run()
    folder = tmp_path / "a" / "00-20" / "trainer"
    shutil.copytree(folder / "checkpoint-30", folder / "checkpoint-38")
    (folder / "checkpoint-38" / "optimizer.pt").write_bytes(b"cut")
    state = (folder / "checkpoint-38" / "trainer_state.json").read_text()
    (folder / "checkpoint-38" / "trainer_state.json").write_text(state[:50])
    assert run([]).run().scores == [[1.0]]


def test_what_may_not_change_in_a_run_that_goes_on(tmp_path):
    def run(seed=0, general=None, callbacks=()):
        return ContinualRunner(
            lambda: llama(seed),
            tokenizer(),
            TASKS,
            tmp_path / "a",
            sft(max_steps=5),
            peft_config=LoraConfig(**LORA),
            evaluation=EVALUATION,
            general=general,
            callbacks=callbacks,
        )

    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[Kill(7)]).run()
    with pytest.raises(ValueError, match="load gives another model than the one that"):
        run(seed=1).run()
    with pytest.raises(ValueError, match="was begun without a general benchmark"):
        run(general=lambda model, words: 1.0).run()
    assert len(run().run().scores) == 2


def test_names_columns_and_answers(tmp_path):
    train, test = TASKS[0].train, TASKS[0].test
    for name in ("a/b", "..", "", "a\\b", "a\0b"):
        with pytest.raises(ValueError, match="a task's name is that of a folder too"):
            ContinualRunner(llama, tokenizer(), [Task(name, train, test, number_match)], tmp_path / "a", sft())
    numbered = train.add_column("task", ["x"] * 8)
    with pytest.raises(ValueError, match="20: train has a column 'task'"):
        ContinualRunner(llama, tokenizer(), [Task("20", numbered, test, number_match)], tmp_path / "a", sft())
    for holes in (["1", None], ["1", " "], [1.0, math.nan]):
        data = Dataset.from_dict({"prompt": ["1", "2"], "answer": holes})
        with pytest.raises(ValueError, match="20: row 1 of train has no answer"):
            ContinualRunner(llama, tokenizer(), [Task("20", data, test, number_match)], tmp_path / "a", sft())
    assert not (tmp_path / "a").exists()


def test_bad_runs(tmp_path):
    words = tokenizer()
    with pytest.raises(TypeError, match=r"must be a trl.SFTConfig or a trl.GRPOConfig, got dict"):
        ContinualRunner(llama, words, TASKS, tmp_path / "a", {})
    with pytest.raises(ValueError, match="rif filters instances for GRPO"):
        ContinualRunner(llama, words, TASKS, tmp_path / "a", sft(), rif={})
    with pytest.raises(ValueError, match="of different names"):
        ContinualRunner(llama, words, [TASKS[0], TASKS[0]], tmp_path / "a", sft())
    with pytest.raises(ValueError, match="one or more"):
        ContinualRunner(llama, words, [], tmp_path / "a", sft())
    empty = Dataset.from_dict({"prompt": [], "answer": []})
    with pytest.raises(ValueError, match="20: test is empty"):
        ContinualRunner(llama, words, [Task("20", TASKS[0].train, empty, number_match)], tmp_path / "a", sft())
    bare = Dataset.from_dict({"prompt": ["1"]})
    with pytest.raises(ValueError, match="20: train has no column 'answer'"):
        ContinualRunner(llama, words, [Task("20", bare, TASKS[0].test, number_match)], tmp_path / "a", sft())
    assert not (tmp_path / "a").exists()
    ContinualRunner(llama, words, TASKS, tmp_path / "a", sft())
    ContinualRunner(llama, words, TASKS, tmp_path / "a", sft())
    for other in (sft(learning_rate=1e-3), grpo()):
        with pytest.raises(ValueError, match="a holds another run"):
            ContinualRunner(llama, words, TASKS, tmp_path / "a", other)
    with pytest.raises(ValueError, match="a holds another run"):
        ContinualRunner(llama, words, TASKS[::-1], tmp_path / "a", sft())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        ContinualRunner(llama, words, TASKS, tmp_path / "b", sft())
