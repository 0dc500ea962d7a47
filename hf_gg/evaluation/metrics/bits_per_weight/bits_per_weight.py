"""Bits that checkpoints take for each weight: `evaluate.load(metric_path("bits_per_weight"))`."""

import datasets
import evaluate

from hf_gg.integrations.size import stored_size


_DESCRIPTION = """\
Bits on disk for each weight of a checkpoint, scales, tables and outliers counted: of the quantized weights alone, and
of all weights together."""

_INPUTS = """\
Args:
    data: names of checkpoints: folders, files, names on the hub.
Returns:
    bits_per_weight: of the quantized weights of all checkpoints together (of all weights, where none is quantized).
    model_bits_per_weight: of all their weights.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class BitsPerWeight(evaluate.Measurement):
    def _info(self):
        return evaluate.MeasurementInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _compute(self, data):
        sizes = [stored_size(name) for name in data]
        weights, stored = sum(size.weights for size in sizes), sum(size.bytes for size in sizes)
        if not weights:
            raise ValueError(f"There are no weights in {', '.join(data) or 'what is given: name a checkpoint'}.")
        codes, coded = sum(size.quantized_weights for size in sizes), sum(size.quantized_bytes for size in sizes)
        model = 8 * stored / weights
        return {"bits_per_weight": 8 * coded / codes if codes else model, "model_bits_per_weight": model}
