"""Prompts of an evaluation: texts and categories, from one file or several."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from eagle3fn.base.errors import UserError
from eagle3fn.use.prompts import Prompts, read_prompts


def test_prompts_are_read(tmp_path):
    path = tmp_path / "tasks.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write('{"task_id": 1, "prompt": "a"}\n\n{"prompt": "b\\n"}\n')
    assert read_prompts(path) == Prompts(["a", "b\n"], ["", ""], "tasks.jsonl.gz")
    assert read_prompts(path, first=1).texts == ["a"]


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_several_files_are_categories(tmp_path):
    """A row's own category comes first; `first` counts in each file."""
    code = write_rows(tmp_path / "code.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    chat = write_rows(
        tmp_path / "chat.jsonl", {"prompt": "d", "category": "jokes"}, {"prompt": "e"}
    )
    found = read_prompts(code, chat, first=2)
    assert found.texts == ["a", "b", "d", "e"]
    assert found.categories == ["code", "code", "jokes", "chat"]
    assert found.name == "code, chat"
    assert read_prompts(chat).categories == ["jokes", ""]


def test_files_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
        write_rows(Path(name, "test.jsonl"), {"prompt": name})
    found = read_prompts("a/test.jsonl", "b/test.jsonl")
    assert found.categories == ["a/test.jsonl", "b/test.jsonl"]
    with pytest.raises(UserError, match=r"--prompts .*test\.jsonl: is given twice"):
        read_prompts("a/test.jsonl", tmp_path / "a/test.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"text": "b"}\n', "1 of 2 rows is bad: .*tasks.jsonl:2: no text under"),
        ('{"prompt": " "}\n{\n', "2 of 2 rows are bad: .*:1: no text .*; .*:2: not JSON"),
        ("[1]\n", "1 of 1 rows is bad: .*tasks.jsonl: item 1: not a JSON object, such as"),
        ("", "no rows"),
        ('{"prompt": "a", "category": 3}\n', 'no text under "category"'),
        ('{"prompt": "a", "category": " "}\n', 'no text under "category"'),
    ],
)
def test_unreadable_prompts_are_named(tmp_path, text, message):
    path = tmp_path / "tasks.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"tasks\.jsonl: .*{message}"):
        read_prompts(path)
