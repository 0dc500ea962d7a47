"""What `hf-gg inspect` found, and its forms: a table, JSON, a PNG, an HTML page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...inspection import KindSummary, Row
from ...integrations.reading import Problem


@dataclass(frozen=True)
class Report:
    """The statistics of a checkpoint.

    Attributes:
        model: as the user named it.
        files: that were read.
        format: of the files.
        weight_format: of codes that were decoded, None if there were none.
        snr: that the predicted bits are for, dB.
        outlier_at: standard deviations.
        rows: one a tensor, in the order of the layers.
        kinds: one a kind of layer, the last one of all; empty if nothing has a fit.
        problems: what is damaged.
    """

    model: str
    files: list[str]
    format: str
    weight_format: str | None
    snr: float
    outlier_at: float
    rows: list[Row]
    kinds: list[KindSummary]
    problems: list[Problem] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The model's name without the path to it: a file's own, a folder's or a hub name's last two parts."""
        parts = Path(self.model).parts
        return parts[-1] if len(self.files) == 1 and parts[-1] == self.files[0] else "/".join(parts[-2:])
