"""DeepShape, then fine-tuning: a BERT-type model whose matrices are reshaped before it learns to tell subjects apart.

    python recipes/deepshape.py                               # what deepshape.yaml says
    python recipes/deepshape.py --max_steps 300 --shape 0.9   # other values

Methods: `shape`: factors on the shape ν at the same standard deviation; `std`: factors on the standard deviation at
the same shape; `both`: factors on the shape with `both_std` on the standard deviation. Plain training is the same
without DeepShape. See `articles.py` for the model and the data, and `rate_study.py` for measures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import transformers as tf
from articles import ArticleArguments, classifier
from rate_study import arguments_or, read_arguments, run

from hf_gg import deepshape_
from hf_gg.training.deepshape import MAPS, check_factor


@dataclass
class DeepShapeArguments(ArticleArguments):
    colors: ClassVar[dict[str, str]] = {"shape": "#d62728", "std": "#1f77b4", "both": "#9467bd"}
    main: ClassVar[str] = "shape"

    shape: list[float] = field(default_factory=list, metadata={"help": "factors on ν"})
    std: list[float] = field(default_factory=list, metadata={"help": "factors on the standard deviation"})
    both: list[float] = field(default_factory=list, metadata={"help": "factors on ν, together with both_std"})
    both_std: float = field(default=0.6, metadata={"help": "the factor on the standard deviation in `both`"})
    map: str = field(default="parametric", metadata={"help": "or empirical"})

    def callbacks(self, method: str, value: float) -> list[tf.TrainerCallback]:
        """See `StudyArguments`."""
        shape = 1.0 if method == "std" else value
        std = {"shape": 1.0, "std": value, "both": self.both_std}[method]
        return [Reshape(shape, std, self.map, self.modules)]

    def check(self) -> None:
        """See `StudyArguments`."""
        super().check()
        for method in self.colors:
            for value in getattr(self, method):
                check_factor(method, value)
        check_factor("both_std", self.both_std)
        if self.map not in MAPS:
            raise ValueError(f"map must be one of {', '.join(MAPS)}, got {self.map!r}.")


class Reshape(tf.TrainerCallback):
    """DeepShape before the first step."""

    def __init__(self, shape_scale: float, std_scale: float, map: str, modules: list[str]) -> None:
        self.settings = {"shape_scale": shape_scale, "std_scale": std_scale, "map": map, "modules": modules or None}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Map the matrices."""
        deepshape_(model, **self.settings)


def main(arguments: list[str] | None = None) -> Path:
    """Run what is not in the results yet; returns the CSV file."""
    config = Path(__file__).with_suffix(".yaml")
    study, training = read_arguments(DeepShapeArguments, config, arguments_or(arguments))
    return run(study, training, *classifier(study), "higher")


if __name__ == "__main__":
    main()
