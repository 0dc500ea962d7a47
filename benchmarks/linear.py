"""Linear layers, SmolLM2 end to end and its loading, by `hf-gg bench`; results and the roofline in `results/`.

Arguments are those of `hf-gg bench`.
"""

from __future__ import annotations

import sys

from _common import RESULTS

from hf_gg.cli.main import main


if __name__ == "__main__":
    files = ["--csv", str(RESULTS / "linear.csv"), "--plot", str(RESULTS / "roofline.png")]
    sys.exit(main(["bench", *sys.argv[1:], *files]))
