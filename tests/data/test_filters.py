"""13-grams of texts, and which written conversations are kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_jsonl
from eagle3fn.data.filters import EXCLUDED, NEAR_COPY, REPETITIVE, SAME_USER, Sieve, repeated_share
from eagle3fn.data.grams import GRAM_SIZE, grams, grams_of_file, without, words
from tests.factories import talk

# 13-grams


def test_grams_are_runs_of_thirteen_words():
    words = [f"w{i}" for i in range(20)]
    assert grams(" ".join(words)) == {tuple(words[i : i + GRAM_SIZE]) for i in range(8)}
    assert grams("one two three") == set()


def test_grams_of_a_file_are_of_every_string_in_lower_case(tmp_path):
    words = " ".join(f"W{i}" for i in range(13))
    rows = [{"prompt": "short", "solution": words, "n": 3}, {"deep": {"list": [["x " * 13]]}}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    expected = {tuple(words.lower().split()), ("x",) * 13}
    assert grams_of_file(tmp_path / "a.jsonl") == expected


def test_turns_of_an_excluded_conversation_are_kept_out(tmp_path):
    row = {"id": "a", "conversations": talk(" ".join(f"w{i}" for i in range(13)))}
    write_jsonl(tmp_path / "c.jsonl", [row])
    other = {"id": "b", "conversations": talk("something else")}
    assert without([row, other], grams_of_file(tmp_path / "c.jsonl")) == [other]


@pytest.mark.parametrize("rows", [[], [{"n": 3}, {"deep": [1, None]}]])
def test_excluded_file_without_text_is_refused(tmp_path, rows):
    write_jsonl(tmp_path / "c.jsonl", rows)
    with pytest.raises(UserError, match=r"c.jsonl: no text.*name"):
        grams_of_file(tmp_path / "c.jsonl")


def test_letters_of_scripts_without_blanks_are_words():
    assert words("Was ist Python3? 什么是光合作用") == [
        "was",
        "ist",
        "python3",
        "?",
        *"什么是光合作用",
    ]
    assert words("カフェ2 now") == ["カ", "フ", "ェ", "2", "now"]


def test_parts_of_a_turn_are_looked_at_too(tmp_path):
    long = " ".join(f"w{i}" for i in range(13))
    row = {"conversations": [{"role": "user", "content": ["first", long]}]}
    assert without([row], grams(long)) == []


# Repetition


@given(st.lists(st.integers(0, 3), max_size=30))
def test_repeated_share_counts_windows_that_were_there_before(numbers):
    text = " ".join(f"w{number}" for number in numbers)
    windows = [tuple(numbers[i : i + 8]) for i in range(len(numbers) - 7)]
    repeated = sum(window in windows[:place] for place, window in enumerate(windows))
    assert repeated_share(text) == pytest.approx(repeated / max(len(windows), 1))


def numbered(first: int, count: int = 40) -> str:
    return " ".join(f"n{i}" for i in range(first, first + count))


@pytest.mark.parametrize("most", [0.1, 0.5, 1.0])
def test_turns_that_repeat_more_than_the_bound_are_dropped(most):
    looped = numbered(0, 10) * 6
    expected = REPETITIVE if repeated_share(looped) > most else None
    assert Sieve(set(), most).reason_against(talk("a question", looped)) == expected
    assert Sieve(set(), most).reason_against(talk(looped, "an answer")) == expected
    assert (expected is None) == (most == 1)


def test_copies_are_dropped_and_the_first_is_kept():
    sieve = Sieve(set())
    assert sieve.reason_against(talk("What is it?", numbered(0))) is None
    assert sieve.reason_against(talk("what  IS it?", numbered(100))) == SAME_USER
    assert sieve.reason_against(talk("and this?", numbered(5))) == NEAR_COPY

    # Less than half is shared: kept. What was dropped is not compared with.
    assert sieve.reason_against(talk("and that?", numbered(25))) is None
    assert sieve.reason_against(talk("more?", numbered(100))) is None


def test_system_texts_that_are_drawn_again_are_no_copies():
    system = [{"role": "system", "content": numbered(0, 100)}]
    sieve = Sieve(set())
    assert sieve.reason_against([*system, *talk("one?", "short")]) is None
    assert sieve.reason_against([*system, *talk("two?", "short")]) is None
    assert sieve.reason_against([*system, *talk("two?", "short")]) == SAME_USER


def test_excluded_texts_come_before_all_other_reasons():
    sieve = Sieve(grams(numbered(3, 13)), most_repeated=0.0)
    assert sieve.reason_against(talk("q", numbered(0) * 3)) == EXCLUDED
