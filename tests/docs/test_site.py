"""The site builds, and every link in it leads somewhere (`strict` in mkdocs.yml)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


def test_site(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {"cli", "quickstart", "recipes", "changelog"} <= pages
    reference = (tmp_path / "site" / "api" / "models" / "index.html").read_text()
    assert "weight_format" in reference and "modules_to_not_convert" in reference
    assert "--target-bits" in (tmp_path / "site" / "cli" / "index.html").read_text()


def test_every_page_is_in_the_navigation():
    yaml = pytest.importorskip("yaml")
    known = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def files(part):
        if isinstance(part, str):
            return {part}
        return set().union(*map(files, part.values() if isinstance(part, dict) else part))

    docs = ROOT / "docs"
    assert {str(path.relative_to(docs)) for path in docs.rglob("*.md")} == files(known)
