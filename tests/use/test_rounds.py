"""The rounds that an evaluation keeps: the texts of tokens, the counts, what is read again."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle3fn.use.decode import Decoded, Round
from eagle3fn.use.eval_settings import EvalSettings
from eagle3fn.use.evaluate import evaluate
from eagle3fn.use.rounds import ANSWERS, TOKENS, describe_rounds, is_examples, pieces
from tests.use.tiny_target import write_pair


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8, as the last resort of byte-level ones."""

    def decode(self, ids: list[int], **options: bool) -> str:
        assert options == {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return bytes(ids).decode("utf-8", "replace")


@given(st.text(max_size=12), st.text(max_size=12))
def test_pieces_together_are_the_text(before, text):
    """Letters of several tokens stand at their last one, after any context."""
    ids = list(text.encode("utf-8", "replace"))
    context = list(before.encode("utf-8", "replace"))
    found = pieces(Bytes(), context, ids)
    assert len(found) == len(ids)
    if not text.startswith("\ufffd") and not before.endswith("\ufffd"):
        assert "".join(found) == bytes(ids).decode()


@given(st.text(min_size=1, max_size=6), st.integers(0, 20))
def test_a_letter_that_began_in_the_context_is_whole_in_the_piece(text, cut):
    ids = list(text.replace("\ufffd", "x").encode("utf-8", "replace"))
    cut = min(cut, len(ids) - 1)
    known = bytes(ids[:cut]).decode("utf-8", "ignore")
    assert known + "".join(pieces(Bytes(), ids[:cut], ids[cut:])) == bytes(ids).decode()


def decoded(tokens: list[int], rounds: list[Round]) -> Decoded:
    return Decoded(tokens, len(rounds), [], [], [], 1.0, 0.1, rounds)


def test_rounds_by_hand():
    answer = decoded(list(b"abcde"), [Round(list(b"bcx"), 2, 3), Round(list(b"zz"), 0, 1)])
    assert describe_rounds([answer], ["say it"], Bytes()) == [
        {
            "prompt": "say it",
            "first": [97],
            "first_text": ["a"],
            "rounds": [
                {
                    "drafted": [98, 99, 120],
                    "drafted_text": ["b", "c", "x"],
                    "accepted": 2,
                    "emitted": [98, 99, 100],
                    "emitted_text": ["b", "c", "d"],
                },
                {
                    "drafted": [122, 122],
                    "drafted_text": ["z", "z"],
                    "accepted": 0,
                    "emitted": [101],
                    "emitted_text": ["e"],
                },
            ],
            "left_out": 0,
        }
    ]


def test_tokens_after_an_end_token_are_not_accepted():
    """As in the counts of the whole evaluation."""
    answer = decoded(list(b"a<"), [Round(list(b"<bc"), 3, 1)])
    (example,) = describe_rounds([answer], ["p"], Bytes())
    (one,) = example["rounds"]
    assert one["accepted"] == 1
    assert (one["emitted_text"], one["drafted_text"]) == (["<"], ["<", "b", "c"])


def test_what_is_kept_is_bounded():
    answer = decoded([97] * 1001, [Round([97] * 4, 4, 5)] * 200)
    examples = describe_rounds([answer] * 9, ["p" * 10_000] * 9, Bytes())
    assert len(examples) == ANSWERS
    kept = sum(len(each["emitted"]) for each in examples[0]["rounds"])
    assert TOKENS - 5 < kept <= TOKENS and kept + 1 + examples[0]["left_out"] == 1001
    assert len(examples[0]["prompt"]) == 4001 and examples[0]["prompt"].endswith("…")


def test_halves_of_surrogate_pairs_are_not_kept():
    class Broken(Bytes):
        def decode(self, ids: list[int], **options: bool) -> str:
            return "\ud800" * len(ids)

    answer = decoded([1, 2], [Round([2], 0, 1)])
    text = json.dumps(describe_rounds([answer], ["\udfff"], Broken()))
    assert "\\ud" not in text and "?" in text


WARM = EvalSettings(
    tasks=3,
    max_new=40,
    draft_length=3,
    temperature=2.0,  # where a random draft's tokens are accepted now and then
    speed_tasks=1,
    speed_dtype="float32",
    few=1,
    repeats=1,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folders = write_pair(tmp_path_factory.mktemp("pair"))
    return evaluate(*folders, ["one", "two", "three", "four"], WARM)


def test_an_evaluation_has_the_rounds_of_its_first_answers(report):
    """They add up to what it counts of all answers, and the accepted tokens are the draft's."""
    examples = report["examples"]
    assert is_examples(examples)
    assert [each["prompt"] for each in examples] == ["one", "two", "three"]
    rounds = [one for each in examples for one in each["rounds"]]
    counted = report["by_prompt_length"]["1-64"]
    assert len(rounds) == counted["verifications"] > 3
    assert sum(len(one["emitted"]) for one in rounds) + len(examples) == counted["tokens"]
    for one in rounds:
        kept = one["accepted"]
        assert one["emitted"][:kept] == one["drafted"][:kept]
        assert len(one["emitted"]) in (kept, kept + 1)
    assert sum(one["accepted"] for one in rounds) > 0
    assert list(report)[-1] == "examples"  # numbers first, for who opens the file


def test_examples_are_read_again(report):
    assert is_examples(json.loads(json.dumps(report["examples"])))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), {}),
        ((0,), None),
        ((0, "prompt"), 3),
        ((0, "left_out"), -1),
        ((0, "first"), [1, 2]),
        ((0, "rounds"), None),
        ((0, "rounds", 0), 3),
        ((0, "rounds", 0, "accepted"), 99),
        ((0, "rounds", 0, "accepted"), "1"),
        ((0, "rounds", 0, "drafted"), ["a", "b", "c"]),
        ((0, "rounds", 0, "drafted_text"), ["a"]),
        ((0, "rounds", 0, "emitted_text"), None),
    ],
)
def test_damaged_examples_are_refused(report, path, value):
    tree: Any = {"all": copy.deepcopy(report["examples"])}
    keys = ["all", *path]
    place = tree
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    assert not is_examples(tree["all"])


def test_an_answer_of_one_token_has_no_rounds():
    (example,) = describe_rounds([decoded([97], [])], ["p"], Bytes())
    assert example["rounds"] == [] and example["first_text"] == ["a"]
