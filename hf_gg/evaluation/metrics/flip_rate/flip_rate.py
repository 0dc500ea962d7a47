"""Share of predictions that are others than a reference model's: `evaluate.load(metric_path("flip_rate"))`."""

import datasets
import evaluate
import numpy


_DESCRIPTION = """\
Share of examples (or tokens) whose most likely class (or next token) is another one than the reference model's. Two
models of equal accuracy may well differ on many examples; this says on how many."""

_INPUTS = """\
Args:
    predictions: classes or tokens, integers.
    references: those of the reference model on the same inputs, in the same order.
Returns:
    flip_rate: the share that differs, 0 to 1.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class FlipRate(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        if not len(predictions):
            raise ValueError("There are no predictions to compare.")
        return {"flip_rate": float((numpy.asarray(predictions) != numpy.asarray(references)).mean())}
