"""Divergence of predictions from a reference model's: `evaluate.load(metric_path("kl_to_reference"))`."""

import datasets
import evaluate
import torch

from hf_gg.evaluation.measures import token_figures


_DESCRIPTION = """\
Mean Kullback-Leibler divergence KL(reference || model), nats, of the distributions over classes or next tokens."""

_INPUTS = """\
Args:
    predictions: the model's logits (or log-probabilities), one row an example.
    references: the reference model's on the same inputs, in the same order.
Returns:
    kl_to_reference: nats, 0 where both say the same.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class KLToReference(evaluate.Metric):
    def _info(self):
        rows = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": rows, "references": rows}),
        )

    def _compute(self, predictions, references):
        if not len(predictions):
            raise ValueError("There are no predictions to compare.")
        if len({len(row) for row in [*predictions, *references]}) != 1:
            raise ValueError("All rows must have the same length: one logit for each class.")
        logits, reference = torch.tensor(predictions).double(), torch.tensor(references).double()
        kl = token_figures(logits, torch.zeros(len(logits), dtype=torch.long), reference).kl
        assert kl is not None
        if not bool(kl.isfinite().all()):
            raise ValueError(
                f"The divergence of row {int((~kl.isfinite()).nonzero()[0])} is not finite: are there NaN?"
            )
        return {"kl_to_reference": float(kl.mean())}
