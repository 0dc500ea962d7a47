"""Model cards from measured facts: what a checkpoint's files say, and what `hf-gg eval` has measured of it.

A card of ours begins with a comment that holds what the files do not say (the base, its licence, the commands) and a
digest of the text below, by which an edited card is told from one that may be replaced.
"""

from .facts import Facts, base_of, collect, fingerprint, marker_of, read_evaluation, read_license
from .marker import Marker, may_replace, read_marker
from .pushing import card_of_model
from .writing import write_card


__all__ = [
    "Facts",
    "Marker",
    "base_of",
    "card_of_model",
    "collect",
    "fingerprint",
    "marker_of",
    "may_replace",
    "read_evaluation",
    "read_license",
    "read_marker",
    "write_card",
]
