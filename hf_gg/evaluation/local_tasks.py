"""Tasks for lm_eval that need no hub: real questions that ship inside its package, written as YAML and JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from .. import data


MMLU_DEV = "mmlu_dev_local"

_TASK = """\
# {count} questions of MMLU's dev set (MIT licence), which lm_eval ships as examples with its chain-of-thought tasks.
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: |-
  {{{{question}}}}
  A. {{{{choices[0]}}}}
  B. {{{{choices[1]}}}}
  C. {{{{choices[2]}}}}
  D. {{{{choices[3]}}}}
  Answer:
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_mmlu_dev(folder: str | Path) -> str:
    """Write a task of about 280 multiple-choice questions of MMLU's dev set, for `--include-path` and lm_eval.

    Args:
        folder: where to; it is made if it is not there.

    Returns:
        The task's name.

    Raises:
        FileNotFoundError: lm_eval is not installed.
    """
    folder = Path(folder).absolute()
    questions = data.mmlu_dev()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{MMLU_DEV}.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    task = _TASK.format(count=len(questions), name=MMLU_DEV, file=json.dumps(str(file)))
    (folder / f"{MMLU_DEV}.yaml").write_text(task, encoding="utf-8")
    return MMLU_DEV
