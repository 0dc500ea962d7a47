"""Models over several processes (tensor, expert, data parallel, fully sharded) against the model in one.

All fast checks run in one pair of processes, because starting one takes longer than most checks. What is checked is in
`parallel_worker.py`; a test here is the outcome of one check.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parallel_worker import FAST, SLOW, SLOW_4


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_checks(folder: Path, names: list[str], world: int, limit: float) -> dict[str, dict]:
    """Run checks in `world` processes; every one of them is ended when this returns.

    Returns:
        By check, what the processes measured or the error of the one that failed.
    """
    outcomes: dict[str, dict] = {}
    attempt = 0
    while len(outcomes) < len(names):  # after an error the rest runs in new processes
        attempt += 1
        place = folder / str(attempt)
        place.mkdir()
        left = [name for name in names if name not in outcomes]
        log = _run(place, left, world, limit)
        found = [_read(place / f"results-{rank}.json") for rank in range(world)]
        before = len(outcomes)
        for name in left:
            errors = [result[name]["error"] for result in found if "error" in result.get(name, {})]
            if errors:
                outcomes[name] = {"error": "\n\n".join(errors)}
            elif all(name in result for result in found):
                outcomes[name] = found[0][name]
        if len(outcomes) == before:
            return outcomes | {name: {"error": f"no process came so far in {limit} s.\n{log}"} for name in left}
    return outcomes


def _run(place: Path, names: list[str], world: int, limit: float) -> str:
    """Returns the end of what the processes wrote."""
    worker, processes, end = HERE / "parallel_worker.py", [], time.monotonic() + limit
    logs = [place / f"log-{rank}.txt" for rank in range(world)]
    try:
        for rank in range(world):
            command = [sys.executable, worker, str(rank), str(world), place, *names]
            with logs[rank].open("w") as log:
                processes.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=place, env=ENVIRONMENT)
                )
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                end = min(end, time.monotonic() + 20)  # one failed: the others notice soon, or never
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return "\n".join(log.read_text()[-3000:] for log in logs)


def _read(file: Path) -> dict[str, dict]:
    return json.loads(file.read_text()) if file.exists() else {}


def report(outcomes: dict[str, dict], name: str) -> None:
    outcome = outcomes[name]
    for what, value in outcome.get("measured", {}).items():
        print(f"{what}: {value:.1e}")
    if "error" in outcome:
        pytest.fail(outcome["error"], pytrace=False)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run_checks(tmp_path_factory.mktemp("fast"), list(FAST), world=2, limit=200)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run_checks(tmp_path_factory.mktemp("slow"), list(SLOW), world=2, limit=900)


@pytest.fixture(scope="module")
def slow_4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run_checks(tmp_path_factory.mktemp("slow_4"), list(SLOW_4), world=4, limit=900)


@pytest.mark.parametrize("name", FAST)
def test_two_processes(fast: dict[str, dict], name: str) -> None:
    report(fast, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_processes_every_family(slow: dict[str, dict], name: str) -> None:
    report(slow, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_4)
def test_four_processes(slow_4: dict[str, dict], name: str) -> None:
    report(slow_4, name)


@pytest.mark.slow
def test_examples_of_the_documentation(tmp_path: Path) -> None:
    """Both scripts of docs/parallel.md, as they stand there, under torchrun."""
    import transformers as tf
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    import hf_gg

    config = tf.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    hf_gg.quantize_(tf.LlamaForCausalLM(config)).save_pretrained(tmp_path / "model")
    words = {word: number for number, word in enumerate(("<unk>", "Once", "upon", "a", "time"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "model")
    # the package's entry point, as an installation leaves it
    site = tmp_path / "site"
    info = site / "hf_gg-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-gg\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nhf_gg = hf_gg.integrations.autoload:install\n")
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    scripts = re.findall(r"```python\n(.*?)```", (ROOT / "docs/parallel.md").read_text(), re.DOTALL)
    assert len(scripts) == 2
    for number, script in enumerate(scripts):
        file = tmp_path / f"example{number}.py"
        file.write_text(script)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with (tmp_path / "log.txt").open("w") as log:
            process = subprocess.Popen(
                [*command, str(file), str(tmp_path / "model"), str(tmp_path / f"out{number}")],
                cwd=tmp_path,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=200)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # torchrun's children too
                code = process.wait()
        assert code == 0, (tmp_path / "log.txt").read_text()[-3000:]
        assert any((tmp_path / f"out{number}").glob("*.safetensors"))
