"""BackSlash fine-tuning of a BERT-type model on labelled text, against six other ways to a small model.

    python recipes/backslash_classifier.py                                  # what backslash_classifier.yaml says
    python recipes/backslash_classifier.py --max_steps 300 --backslash 1 2  # other values

See `articles.py` for the model and the data, `backslash_study.py` for methods and `rate_study.py` for measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from articles import ArticleArguments, classifier
from backslash_study import BackSlashArguments
from rate_study import arguments_or, read_arguments, run


@dataclass
class ClassifierArguments(BackSlashArguments, ArticleArguments):
    pass


def main(arguments: list[str] | None = None) -> Path:
    """Run what is not in the results yet; returns the CSV file."""
    config = Path(__file__).with_suffix(".yaml")
    study, training = read_arguments(ClassifierArguments, config, arguments_or(arguments))
    return run(study, training, *classifier(study), "higher")


if __name__ == "__main__":
    main()
