"""The BackSlash adapter on labelled text: what λ costs and saves in ΔW.

    python recipes/backslash_adapter.py                     # what backslash_adapter.yaml says
    python recipes/backslash_adapter.py --backslash 0.1 1   # other values

Plain training is the same adapter with λ = 0. Grids and shares pruned are those of ΔW; the base is not touched. See
`articles.py` for the model and the data, `backslash_study.py` for methods and `rate_study.py` for measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from articles import ArticleArguments, classifier
from backslash_study import BackSlashArguments
from rate_study import arguments_or, read_arguments, run

from hf_gg import BackSlashConfig


@dataclass
class AdapterArguments(BackSlashArguments, ArticleArguments):
    pass


def wrapped(model: torch.nn.Module) -> torch.nn.Module:
    """With an adapter on the encoder's matrices; what is penalized is told by callbacks."""
    config = BackSlashConfig(
        target_modules=r".*encoder.*(query|key|value|dense)", modules_to_save=["classifier"], lambda_=0.0, grid=None
    )
    return peft.get_peft_model(model, config)


def main(arguments: list[str] | None = None) -> Path:
    """Run what is not in the results yet; returns the CSV file."""
    config = Path(__file__).with_suffix(".yaml")
    study, training = read_arguments(AdapterArguments, config, arguments_or(arguments))
    return run(study, training, *classifier(study, wrapped), "higher")


if __name__ == "__main__":
    main()
