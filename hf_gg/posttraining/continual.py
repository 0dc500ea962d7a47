"""Tasks learned one after the other, by SFT or GRPO in TRL's stock trainers, and what is forgotten on the way.

Everything that is done is on disk, and a run that is cut off, between tasks or inside one, goes on from there: models
by task, checkpoints inside a task, rollouts by batch. Every task starts from the files of the one before it, so that a
run in one piece does the same.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .judging import missing_answer, roll_out
from .rewards import described
from .rif import filter_by_rollouts
from .rollout_cache import fingerprint
from .rollouts import Sampling
from .scores import ContinualResult, average_accuracy, forgetting, plot_scores
from .tasks import Task, by_task, digest_of, last_checkpoint, mixed, right, with_completion


__all__ = ["ContinualResult", "ContinualRunner", "Task", "average_accuracy", "forgetting", "plot_scores"]

_IMAGES = ("image", "images")


class ContinualRunner:
    """Learns tasks one after the other and evaluates all of them after each.

    Args:
        load: gives the base model anew; called before every task and every evaluation.
        tokenizer: of the model; its processor for prompts with images, which GRPO takes as chats.
        tasks: in their order.
        output_dir: folder of the run; one that holds another run is refused.
        args: `trl.SFTConfig` or `trl.GRPOConfig`, which says how the tasks are learned. Its `output_dir` is not used;
            `save_steps` says what a kill can cost.
        peft_config: of an adapter that learns in place of the model, the same one through all tasks.
        rif: before each GRPO the instances are filtered with these options of `filter_by_rollouts` (n, min_correct,
            temperature, …); None for none.
        evaluation: how answers are made for evaluation; greedy, 64 new tokens by default.
        general: a benchmark of something else: called with model and tokenizer before and after all tasks.
        joint: train once on all tasks mixed: the upper bound that others are compared with.
        weights: of the rewards for being right and for the format, in GRPO.
        callbacks: for the trainers.
        start_cache: a JSON file of scores before any training, which several runs may share: the model, adapter
            included, is evaluated once for the same test data and `evaluation`. Rewards are told apart by their names.

    Raises:
        ValueError: no tasks, two of one name or one that cannot be a folder's, a task without data or answers, another
            run's folder. TypeError: other arguments.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        tokenizer: Any,
        tasks: Sequence[Task],
        output_dir: str | Path,
        args: Any,
        peft_config: Any = None,
        rif: dict[str, Any] | None = None,
        evaluation: Sampling | None = None,
        general: Callable[[Any, Any], float] | None = None,
        joint: bool = False,
        weights: tuple[float, float] = (0.9, 0.1),
        callbacks: Sequence[Any] = (),
        start_cache: str | Path | None = None,
    ) -> None:
        from trl import GRPOConfig, SFTConfig

        if not isinstance(args, (SFTConfig, GRPOConfig)):
            raise TypeError(f"args must be a trl.SFTConfig or a trl.GRPOConfig, got {type(args).__name__}.")
        self.grpo = isinstance(args, GRPOConfig)
        if rif is not None and not self.grpo:
            raise ValueError("rif filters instances for GRPO: leave it out with an SFTConfig.")
        names = [task.name for task in tasks]
        if not names or len({*names}) < len(names):
            raise ValueError(f"tasks must be one or more, of different names, got {names}.")
        for name in names:
            if not name.strip(". ") or any(sign in name for sign in "/\\\0"):
                raise ValueError(f"a task's name is that of a folder too, without / and \\, got {name!r}.")
        for task in tasks:
            for part, data in (("train", task.train), ("test", task.test)):
                missing = sorted({"prompt", "answer"} - {*data.column_names})
                if missing:
                    raise ValueError(f"{task.name}: {part} has no column {missing[0]!r}.")
                if len(data) == 0:
                    raise ValueError(f"{task.name}: {part} is empty.")
                if "task" in data.column_names:
                    raise ValueError(f"{task.name}: {part} has a column 'task', which the runner fills: rename it.")
                if (place := missing_answer(data["answer"])) is not None:
                    raise ValueError(f"{task.name}: row {place} of {part} has no answer: drop it or fill it in.")
            if self.grpo and {*_IMAGES} & {*task.train.column_names} and isinstance(task.train[0]["prompt"], str):
                raise ValueError(f"{task.name}: GRPO takes prompts with images as chats only, got a text.")
        if joint and len({tuple(name in task.train.column_names for name in _IMAGES) for task in tasks}) > 1:
            raise ValueError("tasks with and without images cannot be mixed: give all the same column of images.")
        self.load, self.tokenizer, self.tasks = load, tokenizer, [*tasks]
        self.args, self.peft_config, self.rif = args, peft_config, rif
        self.evaluation = evaluation or Sampling(n=1, temperature=0.0, max_new_tokens=64)
        self.general, self.joint, self.weights, self.callbacks = general, joint, weights, [*callbacks]
        self.folder = Path(output_dir)
        self.start_cache = None if start_cache is None else Path(start_cache)
        self._claim_folder()

    def run(self) -> ContinualResult:
        """Do what is not yet done, and return everything; `results.json` and `scores.png` hold it too."""
        state = _read(self.folder / "state.json") or {"scores": []}
        if "general" in state and (state["general"][0] is None) != (self.general is None):
            had = "without" if self.general is not None else "with"
            raise ValueError(
                f"{self.folder} was begun {had} a general benchmark: go on so, or give another output_dir."
            )
        if "start" not in state:
            model = self._model(-1)
            state |= {"start": self._start(model), "general": [self._general(model)]}
            _write(self.folder / "state.json", state)
        steps = [self.tasks] if self.joint else [[task] for task in self.tasks]
        for number in range(len(state["scores"]), len(steps)):
            if not (self._place(number) / "model").exists():
                with _named("in training on", ", ".join(task.name for task in steps[number])):
                    self._learn(number, steps[number])
            model = self._model(number)
            state["scores"].append(self._evaluate(model))
            if number == len(steps) - 1:
                state["general"].append(self._general(model))
            _write(self.folder / "state.json", state)
        learned = [_read(self._place(number) / "learned.json") or {} for number in range(len(steps))]
        general = state["general"]
        result = ContinualResult(
            tasks=[task.name for task in self.tasks],
            start=state["start"],
            scores=state["scores"],
            general=None if general[0] is None else (general[0], general[1]),
            filters=[found.get("filter") for found in learned],
            seconds=[found.get("seconds", 0.0) for found in learned],
        )
        _write(self.folder / "results.json", result.to_dict())
        plot_scores(result, self.folder / "scores.png")
        return result

    def _learn(self, number: int, tasks: list[Task]) -> None:
        """Train on tasks and save the model."""
        place, start = self._place(number), time.perf_counter()
        model = self._model(number - 1)
        data, report = mixed(tasks, self.args.seed), None
        if self.rif is not None:
            # which has each task's own threshold in it
            options = {"show_progress": not self.args.disable_tqdm, **self.rif}
            data, found = filter_by_rollouts(
                model, self.tokenizer, data, right(tasks), cache=place / "rollouts.jsonl", **options
            )
            report = found.to_dict()
        args = copy.deepcopy(self.args)
        args.output_dir = str(place / "trainer")
        trainer = self._grpo(model, args, data, tasks) if self.grpo else self._sft(model, args, data)
        trainer.train(resume_from_checkpoint=last_checkpoint(Path(args.output_dir)))
        learned = trainer.accelerator.unwrap_model(trainer.model)
        options = {"selected_adapters": ["default"]} if self.peft_config is not None else {}
        temporary = place / ".model"
        shutil.rmtree(temporary, ignore_errors=True)
        learned.save_pretrained(temporary, **options)
        _write(place / "learned.json", {"filter": report, "seconds": time.perf_counter() - start})
        temporary.replace(place / "model")
        shutil.rmtree(args.output_dir, ignore_errors=True)

    def _grpo(self, model: Any, args: Any, data: Any, tasks: list[Task]) -> Any:
        from trl import GRPOTrainer

        needed = args.generation_batch_size // args.num_generations
        if len(data) < needed:  # the trainer would do no step, and say nothing
            raise ValueError(
                f"{len(data)} instances are left, and a step of GRPO takes {needed} (generation_batch_size="
                f"{args.generation_batch_size} / num_generations={args.num_generations}): take smaller batches, more "
                "or easier instances, or a lower min_correct."
            )
        rewards: list[Any] = [by_task(tasks, "reward")]
        if any(task.format is not None for task in tasks):
            rewards.append(by_task(tasks, "format"))
            if args.reward_weights is None:
                args.reward_weights = [*self.weights]
        # TRL looks at any one of prompt and completion to tell chats from texts, and GRPO has no use for the latter
        data = data.remove_columns([name for name in data.column_names if name == "completion"])
        words = self.tokenizer
        if hasattr(words, "tokenizer"):  # GRPO pads prompts on the left, and a processor what goes with them by itself
            words = copy.deepcopy(words)
            words.tokenizer.padding_side = "left"
        trainer = GRPOTrainer(
            model, rewards, args, train_dataset=data, processing_class=words, callbacks=self.callbacks
        )
        trainer.add_callback(_order_by_epoch())
        return trainer

    def _sft(self, model: Any, args: Any, data: Any) -> Any:
        from trl import SFTTrainer

        columns = data.column_names
        data = data.map(with_completion, remove_columns=[name for name in columns if name not in _IMAGES])
        return SFTTrainer(model, args, train_dataset=data, processing_class=self.tokenizer, callbacks=self.callbacks)

    def _model(self, number: int) -> Any:
        """The model after a task; -1: before all of them."""
        from transformers import set_seed

        base = self.load()
        self._check_base(base)
        if self.peft_config is None:
            if number < 0:
                return base
            return type(base).from_pretrained(self._place(number) / "model", dtype=base.dtype).to(base.device)
        from peft import PeftModel, get_peft_model

        if number >= 0:
            return PeftModel.from_pretrained(base, self._place(number) / "model", is_trainable=True)
        set_seed(self.args.seed)
        return get_peft_model(base, copy.deepcopy(self.peft_config))

    def _start(self, model: Any) -> list[float]:
        """Scores before any training; of the cache, if they are there."""
        if self.start_cache is None:
            return self._evaluate(model)
        tests = [[digest_of(task.test), described(task.reward), task.threshold] for task in self.tasks]
        key = fingerprint(model, tests, self.evaluation.to_dict())
        known = _read(self.start_cache) or {}
        if key not in known:
            known[key] = self._evaluate(model)
            self.start_cache.parent.mkdir(parents=True, exist_ok=True)
            _write(self.start_cache, known)
        return known[key]

    def _evaluate(self, model: Any) -> list[float]:
        scores = []
        for task in self.tasks:
            with _named("in the evaluation of", task.name):
                report = roll_out(
                    model,
                    self.tokenizer,
                    task.test,
                    task.reward,
                    self.evaluation,
                    threshold=task.threshold,
                    show_progress=False,
                )
            scores.append(report.accuracy)
        return scores

    def _general(self, model: Any) -> float | None:
        return None if self.general is None else float(self.general(model, self.tokenizer))

    def _place(self, number: int) -> Path:
        return self.folder / ("joint" if self.joint else f"{number:02}-{self.tasks[number].name}")

    def _check_base(self, base: Any) -> None:
        """`ValueError` if `load` gives another model than before."""
        file, found = self.folder / "base.json", {"base": fingerprint(base)}
        known = _read(file)
        if known is None:
            _write(file, found)
        elif known != found:
            raise ValueError(
                f"load gives another model than the one that {self.folder} was begun with (or another one each time): "
                "give the same one, or another output_dir."
            )

    def _claim_folder(self) -> None:
        """Write what this run is into its folder; `ValueError` if the folder is another run's."""
        args = self.args.to_dict()
        for name in ("output_dir", "logging_dir", "run_name", "disable_tqdm"):
            args.pop(name, None)
        what = {
            "method": type(self.args).__name__,
            "tasks": [_described(task) for task in self.tasks],
            "args": args,
            "peft": None if self.peft_config is None else self.peft_config.to_dict(),
            "rif": self.rif,
            "evaluation": self.evaluation.to_dict(),
            "joint": self.joint,
            "weights": [*self.weights],
        }
        file = self.folder / "run.json"
        if (found := _read(file)) is not None:
            if found != json.loads(json.dumps(what, default=_plain)):
                raise ValueError(f"{self.folder} holds another run (see run.json): give another output_dir.")
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no run: give another output_dir.")
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(file, what)


@contextmanager
def _named(what: str, task: str) -> Iterator[None]:
    """Notes on an exception which task it came from (Python 3.10 has no notes)."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(f"This happened {what} {task}.")
        raise


def _order_by_epoch() -> Any:
    """A callback that draws the order of each epoch anew from the seed and its number.

    GRPO's sampler goes on drawing from where the epoch before it ended, so that a trainer that is resumed in a later
    epoch would take the order of the first one.
    """
    from transformers import TrainerCallback

    class OrderByEpoch(TrainerCallback):
        def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
            place = train_dataloader
            while place is not None:
                if hasattr(place, "generator") and hasattr(place, "mini_repeat_count"):
                    place.generator.manual_seed(args.seed + int(state.epoch + 1e-6))
                    return
                place = getattr(place, "batch_sampler", None) or getattr(place, "sampler", None)

    return OrderByEpoch()


def _described(task: Task) -> list[Any]:
    rewards = [getattr(reward, "__name__", type(reward).__name__) for reward in (task.reward, task.format)]
    return [task.name, digest_of(task.train), digest_of(task.test), *rewards, task.threshold]


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _write(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content, sort_keys=True, indent=1, default=_plain) + "\n", encoding="utf-8")
    temporary.replace(file)
