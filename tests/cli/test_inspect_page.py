"""The HTML page in headless Chromium: rows, sorting, no error on the console, no request that leaves the file."""

import re
import shutil
import subprocess

import pytest

from hf_gg import data
from hf_gg.cli import main


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")

# What the page's own script did: a click on the head of ν sorts the rows, the filter hides some.
PROBE = """
<script>
const column = [...document.querySelectorAll("#tensor-table thead th")].find((th) => th.textContent.trim() === "ν");
column.querySelector("button").click();
const values = [...document.querySelectorAll("#tensor-table tbody tr:not(.unfitted)")].map(
  (row) => Number(row.cells[4].dataset.value));
filter.value = "c_fc";
filter.dispatchEvent(new Event("input"));
document.body.dataset.sorted = String(values.every((value, i) => i === 0 || values[i - 1] <= value));
document.body.dataset.fitted = String(values.length);
document.body.dataset.shown = shown.textContent;
document.body.dataset.requests = String(performance.getEntriesByType("resource").length);
</script>
</body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["inspect", str(data.mgm_gpt2()), "--html", str(path)]) == 0
    return path


def test_nothing_is_fetched(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//)", text) and "@import" not in text
    assert "default-src 'none'" in text and "nan" not in re.sub(r"<script>.*</script>", "", text, flags=re.S).lower()


def test_names_are_escaped(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"<img src=x onerror=alert(1)>.weight": torch.randn(32, 32)}, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path), "--html", str(tmp_path / "o.html")]) == 0
    assert "<img" not in (tmp_path / "o.html").read_text(encoding="utf-8")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_chromium(page, tmp_path):
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "CONSOLE" not in run.stderr, run.stderr[-2000:]
    dom = run.stdout
    assert dom.count('class="unfitted"') == 67 and dom.count("<figure") == 7
    found = dict(re.findall(r'data-(sorted|fitted|shown|requests)="([^"]*)"', dom))
    assert found == {"sorted": "true", "fitted": "34", "shown": "16 of 101 tensors", "requests": "0"}
