"""ENVs.md lists every environment variable that the package reads, and no other of its own."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
READ = re.compile(r"""(?:environ(?:\.get)?\s*[\[(]|getenv\()\s*["']([A-Z][A-Z_]+)["']""")


def test_every_variable_is_listed():
    listed = set(re.findall(r"^\| `([A-Z_]+)`", (ROOT / "ENVs.md").read_text(), re.MULTILINE))
    sources = "\n".join(path.read_text() for path in (ROOT / "hf_gg").rglob("*.py"))
    read = set(READ.findall(sources))
    assert {"HF_GG_BACKEND", "HF_GG_CACHE", "CC"} <= read
    assert read <= listed, read - listed
    assert {name for name in listed if name.startswith("HF_GG_")} <= set(re.findall(r"HF_GG_[A-Z_]+", sources))
