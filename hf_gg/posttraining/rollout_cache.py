"""What rollouts of a data set gave, batch by batch in a file, so that a run that was cut off goes on from there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch


_SAMPLED = 1 << 16  # numbers of each parameter that tell one policy from another


class RolloutCache:
    """Batches that are done, one line of a file each; a line that was cut off by a kill counts for nothing."""

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self.path = None if path is None else Path(path)
        self.batches: dict[int, dict[str, Any]] = {}
        if self.path is None:
            return
        head = json.dumps({"hf_gg_rollouts": 1, "run": fingerprint})
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(head + "\n", encoding="utf-8")
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
        for line in lines[1:-1]:
            record = json.loads(line)
            self.batches[record.pop("batch")] = record
            good.append(line)
        if content != "\n".join(good) + "\n":  # the last line was cut off
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("\n".join(good) + "\n", encoding="utf-8")
            temporary.replace(self.path)

    def add(self, number: int, record: dict[str, Any]) -> None:
        self.batches[number] = record
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"batch": number, **record}) + "\n")


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
