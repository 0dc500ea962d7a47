"""What rollouts of a data set gave, batch by batch in a file, so that a run that was cut off goes on from there."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


_SAMPLED = 1 << 16  # numbers of each parameter that tell one policy from another


class RolloutCache:
    """Batches that are done, one line of a file each; a line that was cut off by a kill counts for nothing.

    Args:
        path: of the file; None keeps nothing.
        fingerprint: of the run.
        sizes: instances of each batch.
        n: rollouts an instance.

    Raises:
        ValueError: a file of another run, of something else, or damaged.
    """

    def __init__(self, path: str | Path | None, fingerprint: str, sizes: Sequence[int], n: int) -> None:
        self.path = None if path is None else Path(path)
        self.batches: dict[int, dict[str, Any]] = {}
        if self.path is None:
            return
        head = json.dumps({"hf_gg_rollouts": 1, "run": fingerprint})
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(head)
            return
        content = self.path.read_text(encoding="utf-8", errors="replace")
        lines = content.split("\n")
        if lines[0] != head:
            known = lines[0].startswith('{"hf_gg_rollouts"')
            if len(lines) > 1 or not head.startswith(lines[0]):
                raise ValueError(
                    f"{self.path} holds rollouts of another policy, data set or other options: give another file, or "
                    "delete it to start anew."
                    if known
                    else f"{self.path} is no cache of rollouts: give another file."
                )
        good = [head]
        for place, line in enumerate(lines[1:-1], 2):
            try:
                record = json.loads(line)
                _check(record, sizes, n)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.path}, line {place} is damaged ({error!r:.200}): without that line, its batch is rolled "
                    "out again and the others stay."
                ) from None
            self.batches[record.pop("batch")] = record
            good.append(line)
        if content != "\n".join(good) + "\n":  # the last line was cut off
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("\n".join(good) + "\n", encoding="utf-8")
            temporary.replace(self.path)
        elif not os.access(self.path, os.W_OK):
            raise PermissionError(f"{self.path} cannot be written to.")

    def add(self, number: int, record: dict[str, Any]) -> None:
        self.batches[number] = record
        if self.path is not None:
            self._append(json.dumps({"batch": number, **record}))

    def _append(self, line: str) -> None:
        """Write a line by one call, so that those of two processes do not mix."""
        assert self.path is not None  # whoever calls this has looked
        content = f"{line}\n".encode()
        with self.path.open("ab", buffering=0) as file:
            if (written := file.write(content)) != len(content):
                raise OSError(
                    f"{self.path}: only {written} of {len(content)} bytes could be written; is the disk full?"
                )


def _check(record: dict[str, Any], sizes: Sequence[int], n: int) -> None:
    """An error for a record that cannot be of these batches."""
    number, counts, failures = record["batch"], record["counts"], record["failures"]
    whole = [number, record["tokens"], *counts, *(value for failure in failures for value in failure[:2])]
    if any(type(value) is not int or value < 0 for value in whole):
        raise ValueError("a number that is no whole one from 0 on")
    if number >= len(sizes) or len(counts) != sizes[number] or max(counts) > n:
        raise ValueError(f"batch {number} with counts {counts}")
    if any(len(failure) != 3 or not isinstance(failure[2], str) for failure in failures):
        raise ValueError("failures of another form")
    if not 0 <= record["seconds"] < math.inf:
        raise ValueError(f"seconds {record['seconds']}")


def fingerprint(model: Any, *given: Any) -> str:
    """Of all that counts depend on: a policy (of its large parameters a sample), data and options."""
    digest = hashlib.sha256()
    digest.update(json.dumps(given, sort_keys=True, default=_plain).encode())
    for name, parameter in model.named_parameters() if hasattr(model, "named_parameters") else ():
        flat = parameter.detach().reshape(-1)
        flat = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What stands for a value in JSON: of an image its pixels."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if hasattr(value, "tobytes"):
        return [getattr(value, "size", 0), hashlib.sha256(value.tobytes()).hexdigest()]
    return str(value)
