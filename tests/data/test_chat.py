"""Masks over assistant turns, by spans and by the template's own marks; malformed rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3fn.base.errors import UserError
from eagle3fn.data.chat import describe_mask, encode, end_marks, messages_of
from tests.factories import CHATML, MARKED, talk, tiny_tokenizer

SPANS = tiny_tokenizer(CHATML)
MARKS = tiny_tokenizer(MARKED)
# Writes more before the last answer than before earlier ones: more than the next turn is long.
THOUGHT = "<think>" + "nothing " * 8 + "</think>"
RESHAPING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}" + THOUGHT + "{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)


def supervised(tokenizer, ids, mask):
    return tokenizer.decode(ids[mask == 1].tolist())


@given(st.lists(TEXTS, min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_mask_covers_answers_and_their_end_tokens(texts):
    ids, mask = encode(SPANS, talk(*texts), "x")
    answers = texts[1::2]
    assert supervised(SPANS, ids, mask) == "".join(text + "<|im_end|>" for text in answers)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape

    marked_ids, marked_mask = encode(MARKS, talk(*texts), "x")
    assert torch.equal(ids, marked_ids)
    assert torch.equal(mask, marked_mask)


def test_template_that_writes_the_last_answer_differently_is_masked_right():
    tokenizer = tiny_tokenizer(RESHAPING)
    ids, mask = encode(tokenizer, talk("a", "one", "b", "two"), "x")
    assert supervised(tokenizer, ids, mask) == f"one<|im_end|>{THOUGHT}two<|im_end|>"


def test_generation_marks_of_the_template_decide():
    without_end = MARKED.replace(
        "{{ m['content'] + '<|im_end|>' }}{% endgen", "{{ m['content'] }}{% endgen"
    )
    tokenizer = tiny_tokenizer(without_end)
    ids, mask = encode(tokenizer, talk("a", "one", "b", "two"), "x")
    assert supervised(tokenizer, ids, mask) == "onetwo"


def test_answer_before_any_question_is_not_supervised():
    turns = [{"role": "assistant", "content": "hello"}, *talk("a", "b")]
    ids, mask = encode(SPANS, turns, "x")
    assert supervised(SPANS, ids, mask) == "b<|im_end|>"


def test_end_marks_are_the_special_tokens_after_answers():
    assert end_marks(SPANS) == ["<|im_end|>"]


def test_described_mask_brackets_supervised_runs_and_stays_short():
    ids, mask = encode(SPANS, talk("a", "bcd"), "x")
    assert "⟦bcd<|im_end|>⟧" in describe_mask(SPANS, ids, mask)
    assert describe_mask(SPANS, ids, torch.zeros_like(mask)).count("⟦") == 0

    ids, mask = encode(SPANS, talk("a" * 5000, "b" * 5000), "x")
    assert len(describe_mask(SPANS, ids, mask)) < 500


def test_template_whose_turns_are_not_in_order_is_refused():
    thinking = CHATML.replace(
        "<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>' }}{% endif"
    )
    with pytest.raises(UserError, match=r"c.jsonl:4: turn 2.*generation"):
        encode(tiny_tokenizer(thinking), talk("a", "b"), "c.jsonl:4")


def test_missing_template_is_refused():
    with pytest.raises(UserError, match=r"no chat template; take an instruction-tuned target"):
        encode(tiny_tokenizer(None), talk("a", "b"), "c.jsonl:4")


def test_refusal_of_the_template_names_the_row():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"c.jsonl:4: .*roles must alternate.*mend or delete"):
        encode(tiny_tokenizer(strict), talk("a", "b"), "c.jsonl:4")


def test_all_styles_of_rows_are_read():
    turns = talk("a", "b")
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert messages_of({"conversations": turns}, "x") == turns
    assert messages_of({"messages": turns}, "x") == turns
    assert messages_of({"conversations": sharegpt}, "x") == turns


def row(*turns):
    return {"conversations": list(turns)}


@pytest.mark.parametrize(
    ("malformed", "named"),
    [
        ([], "no list of turns; a row must read"),
        ({}, "no list of turns; a row must read"),
        ({"conversations": []}, "no list of turns"),
        ({"conversations": "hi"}, "no list of turns"),
        (row("hi"), "turn 1: 'hi': must be.*mend or delete"),
        (
            row({"role": "bot", "content": "x"}),
            "turn 1: role 'bot': must be one of.*mend or delete",
        ),
        (row({"role": ["a"], "content": "x"}), "turn 1: role .*mend or delete"),
        (row({"content": "x"}), "turn 1: role None"),
        (row({"role": "user"}), "turn 1: content None: must be a string.*mend or delete"),
        (
            row(*talk("a"), {"role": "assistant", "content": 7}),
            "turn 2: content 7: must be a string",
        ),
        (row(*talk("a", "b \ud83d c")), r"turn 2: content 'b \\ud83d c': .*UTF-8.*mend or delete"),
    ],
)
def test_malformed_row_is_refused_with_its_place(malformed, named):
    with pytest.raises(UserError, match=f"c.jsonl:4.*{named}"):
        messages_of(malformed, "c.jsonl:4")
