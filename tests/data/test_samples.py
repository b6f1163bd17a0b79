"""Samples by the engine's rule, situation by situation; and against a slow oracle, drawn."""

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3fn.base.errors import UserError
from eagle3fn.data.samples import (
    EMPTY_THOUGHT,
    NO_ANSWER,
    NO_QUESTION,
    NOT_TRAINED,
    TOO_LONG,
    SampleMaker,
)
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.turns import conversation_of
from eagle3fn.data.written import EMPTY, NO_THOUGHT
from tests.data import chat_templates as own
from tests.factories import talk

LONG = 10_000
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


def maker(
    template: Any,
    *,
    stops: tuple[str, ...] = (),
    eos: str | None = "<|im_end|>",
    max_length: int = LONG,
    tokenizer: Any = own.merging_tokenizer,
    **arguments: Any,
) -> SampleMaker:
    made = tokenizer(template, eos)
    numbers = [made.convert_tokens_to_ids(each) for each in stops]
    return SampleMaker(ChatTemplate(made, numbers, arguments), max_length)


def samples(made, row):
    return made.samples("row", conversation_of(row, "file:1"), "file:1")


def shown(made, row):
    """Samples as text, what is supervised in brackets, line breaks as ⏎."""
    texts = []
    for sample in samples(made, row).samples:
        text = ""
        last = 0
        for number, on in zip(sample.input_ids.tolist(), sample.token_mask.tolist(), strict=True):
            text += ("⟦" if on else "⟧") * (on != last) + made.template.tokenizer.decode([number])
            last = on
        texts.append((text + "⟧" * last).replace("\n", "⏎"))
    return texts


def row_of(*texts, **more):
    return {"messages": talk(*texts), **more}


def answered(**answer):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **answer}]}


USER = "<|im_start|>user⏎{}<|im_end|>⏎<|im_start|>assistant⏎"


# One row of the table each.


def test_prompts_that_go_on_share_a_sample():
    assert shown(maker(own.PLAIN), row_of("a", "one", "b", "two")) == [
        USER.format("a") + "⟦one<|im_end|>⟧⏎" + USER.format("b") + "⟦two<|im_end|>⟧"
    ]


def test_history_without_thoughts_gives_each_answer_its_own_sample():
    thought = "<think>\nx\n</think>\n\n"
    found = maker(own.THINKS)
    row = row_of("a", thought + "one", "b", thought + "two")
    assert shown(found, row) == [
        USER.format("a") + "⟦<think>⏎x⏎</think>⏎⏎one<|im_end|>⟧",
        USER.format("a")
        + "one<|im_end|>⏎"
        + USER.format("b")
        + "⟦<think>⏎x⏎</think>⏎⏎two<|im_end|>⟧",
    ]
    assert [each.id for each in samples(found, row).samples] == ["row", "row:4"]


def test_a_thought_that_the_prompt_opens_is_not_supervised_in_its_opening():
    found = maker(own.OPENS)
    text = USER.format("a") + "<think>⏎⟦x⏎</think>⏎⏎one<|im_end|>⟧"
    assert shown(found, row_of("a", "x\n</think>\n\none")) == [text]
    assert shown(found, row_of("a", "<think>\nx\n</think>\n\none")) == [text]
    assert samples(found, row_of("a", "one")).dropped == [NO_THOUGHT]


def test_a_header_that_is_a_tag_opens_no_thought():
    tagged = own.PLAIN.replace("<|im_start|>assistant\n", "<bot>\n").replace(
        own.HEAD, "{{ '<bot>\n' if m.role == 'assistant' else '<|im_start|>' + m.role + '\n' }}"
    )
    assert shown(maker(tagged), row_of("a <b>", "one")) == [
        "<|im_start|>user⏎a <b><|im_end|>⏎<bot>⏎⟦one<|im_end|>⟧"
    ]


@pytest.mark.parametrize("question", ["a <think>", "a <think></think>"])
def test_a_question_that_ends_with_a_tag_is_like_any_other(question):
    for answer in ("x\n</think>\n\none", "<think>\nx\n</think>\n\none"):
        assert shown(maker(own.OPENS), row_of(question, answer)) == [
            USER.format(question) + "<think>⏎⟦x⏎</think>⏎⏎one<|im_end|>⟧"
        ]
    assert samples(maker(own.OPENS), row_of(question, "one")).dropped == [NO_THOUGHT]
    trimmed = own.PLAIN.replace(own.END, "{{ '\n' }}").replace(own.ASK, "")
    assert shown(maker(trimmed.replace(own.HEAD, "")), row_of(question, "one")) == [
        question + "⏎⟦one<|im_end|>⟧"
    ]


def test_a_closing_tag_within_a_line_is_a_word_and_ends_no_thought():
    for answer in ("use </think> to end", "use `</think>`", "<b> and </think>, too"):
        assert shown(maker(own.THINKS), row_of("a", answer)) == [
            USER.format("a") + f"⟦<think>⏎⏎</think>⏎⏎{answer}<|im_end|>⟧"
        ]
        assert shown(maker(own.THINKS, enable_thinking=False), row_of("a", answer)) == [
            USER.format("a") + f"<think>⏎⏎</think>⏎⏎⟦{answer}<|im_end|>⟧"
        ]
    for answer in ("x\n</think>\n\none", "x</think>\none"):
        assert shown(maker(own.THINKS), row_of("a", answer)) == [
            USER.format("a") + "⟦<think>⏎x⏎</think>⏎⏎one<|im_end|>⟧"
        ]


def test_parts_of_an_answer_are_joined_as_the_template_joins_them():
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "world"}]
    both = own.PLAIN.replace(
        "{{ m.content }}",
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}",
    )
    for template, joined in ((both, "Hello world"), (own.PLAIN, "Hello ⏎world")):
        (text,) = shown(maker(template), answered(content=parts))
        assert text == USER.format("q") + f"⟦{joined}<|im_end|>⟧"


def test_a_question_that_ends_with_a_tag_opens_no_thought():
    bare = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    assert shown(maker(bare), row_of("write <b>", "one")) == ["write <b>⏎⟦one<|im_end|>⟧"]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_rendered_or_refused_by_name(key):
    row = answered(content="one", **{key: "x"})
    assert shown(maker(own.THINKS), row) == [
        USER.format("q") + "⟦<think>⏎x⏎</think>⏎⏎one<|im_end|>⟧"
    ]
    for template, remedy in (
        (own.PLAIN, "a target that thinks"),
        (own.OPENS, "after <think> and before </think>"),
    ):
        with pytest.raises(UserError, match=rf"file:1: turn 2: .*reasoning_content; .*{remedy}"):
            samples(maker(template), row)


def test_line_breaks_that_a_parser_keeps_around_a_thought_are_not_doubled():
    kept = answered(content="\n\none", reasoning_content="\nx\n")
    assert shown(maker(own.THINKS), kept) == [
        USER.format("q") + "⟦<think>⏎x⏎</think>⏎⏎one<|im_end|>⟧"
    ]


def call(**arguments):
    return {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": arguments}}


def test_tool_calls_are_supervised_and_tools_are_in_the_prompt():
    row = answered(content=None, tool_calls=[call(zone="UTC")]) | {"tools": [CLOCK]}
    row["messages"] += [
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        {"role": "assistant", "content": "it is noon"},
    ]
    (text,) = shown(maker(own.THINKS), row)
    assert text.startswith("<|im_start|>system⏎TOOLS [{")
    assert '"name": "clock"' in text.partition("⟦")[0]
    assert [each.partition("⟧")[0] for each in text.split("⟦")[1:]] == [
        '<think>⏎⏎</think>⏎⏎<tool_call>{"name": "clock", "arguments": {"zone": "UTC"}}</tool_call>'
        "<|im_end|>",
        "<think>⏎⏎</think>⏎⏎it is noon<|im_end|>",
    ]


def test_tools_and_calls_that_are_not_rendered_are_refused_by_name():
    calls = answered(content="", tool_calls=[call(zone="UTC")])
    with pytest.raises(UserError, match=r"turn 2: .*does not render tool_calls \(clock\)"):
        samples(maker(own.PLAIN), calls)
    with pytest.raises(UserError, match=r"file:1: tools: .*does not render clock; delete tools"):
        samples(maker(own.PLAIN), row_of("a", "one", tools=[CLOCK]))


@pytest.mark.parametrize(
    ("zone", "written"),
    [("it's", r"it\'s"), ('it\'s\\ a "b"' + "\n", r'it\'s\\ a "b"\n')],
)
def test_arguments_in_single_quotes_are_rendered(zone, written):
    quoted = own.THINKS.replace(
        "(t.function | tojson)",
        "t.function.name + '(zone=\\'' + (t.function.arguments.zone | replace('\\\\', '\\\\\\\\')"
        " | replace('\\'', '\\\\\\'') | replace('\n', '\\\\n')) + '\\')'",
    )
    (text,) = shown(maker(quoted), answered(content="", tool_calls=[call(zone=zone)]))
    assert f"<tool_call>clock(zone='{written}')</tool_call>" in text


def test_a_second_call_that_is_not_rendered_is_refused():
    first = own.THINKS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    two = [call(zone="UTC"), call(zone="CET")]
    with pytest.raises(UserError, match=r"does not render tool_calls"):
        samples(maker(first), answered(content="", tool_calls=two))
    with pytest.raises(UserError, match=r"does not render tool_calls"):
        samples(maker(first), answered(content="", tool_calls=[two[0], two[0]]))
    assert len(samples(maker(own.THINKS), answered(content="", tool_calls=two)).samples) == 1


def test_a_content_that_is_lost_beside_calls_is_refused():
    lost = own.THINKS.replace("{{ c }}", "{{ c if not m.tool_calls else '' }}")
    with pytest.raises(UserError, match=r"changes the text of this answer"):
        samples(maker(lost), answered(content="I look", tool_calls=[call(zone="UTC")]))


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}])
def test_weights_of_turns_and_rows_are_heeded(off):
    row = row_of("a", "one", "b", "two")
    row["messages"][1] |= off
    assert shown(maker(own.PLAIN), row) == [
        USER.format("a") + "one<|im_end|>⏎" + USER.format("b") + "⟦two<|im_end|>⟧"
    ]
    assert samples(maker(own.PLAIN), row).dropped == [NOT_TRAINED]
    found = samples(maker(own.PLAIN), row_of("a", "one", "b", "two") | off)
    assert (found.samples, found.dropped) == ([], [NOT_TRAINED] * 2)


def test_a_reason_that_is_not_the_rows_choice_comes_first():
    row = row_of("a", "one", "b" * 300, "two")
    row["messages"][1]["weight"] = 0
    assert samples(maker(own.PLAIN, max_length=100), row).dropped == [TOO_LONG, NOT_TRAINED]


def test_empty_thoughts_of_the_template_are_noted():
    row = row_of("a", "one", "b", "<think>\nx\n</think>\n\ntwo", "c", "three")
    assert samples(maker(own.THINKS), row).notes == [EMPTY_THOUGHT] * 2
    assert not samples(maker(own.THINKS), row_of("a", "<think>\n\n</think>\n\none")).notes
    assert not samples(maker(own.THINKS, enable_thinking=False), row_of("a", "one")).notes
    assert not samples(maker(own.PLAIN), row_of("a", "one")).notes


@pytest.mark.parametrize("row", [row_of("a", "one", "b", "two"), {"text": "some words of text"}])
def test_supervised_tokens_that_are_cut_off_are_counted(row):
    whole = samples(maker(own.PLAIN), row)
    (mask,) = (each.token_mask.tolist() for each in whole.samples)
    assert whole.cut == 0
    for length in range(2, len(mask)):
        found = samples(maker(own.PLAIN, max_length=length), row)
        answered = len(found.dropped)  # a second answer whose prompt is too long is dropped
        kept = sum(sum(each.token_mask.tolist()) for each in found.samples)
        if found.samples and not answered:
            assert found.cut == sum(mask) - kept > 0
        if answered == 1:
            assert found.cut + kept == mask.index(0, mask.index(1)) - mask.index(1)


def test_what_the_prompt_supplies_is_never_supervised():
    text = USER.format("a") + "<think>⏎⏎</think>⏎⏎⟦one<|im_end|>⟧"
    row = row_of("a", "one")
    given_to_all = maker(own.THINKS, enable_thinking=False)
    assert shown(given_to_all, row) == [text]
    assert shown(given_to_all, row_of("a", "<think>\n\n</think>\n\none")) == [text]
    for more in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
        assert shown(maker(own.THINKS), row | more) == [text]
    # A row's own argument comes before the option.
    assert shown(given_to_all, row | {"enable_thinking": True}) == [
        USER.format("a") + "⟦<think>⏎⏎</think>⏎⏎one<|im_end|>⟧"
    ]


@pytest.mark.parametrize("more", [{}, {"enable_thinking": False}])
def test_a_thought_where_the_prompt_says_that_there_is_none_is_refused(more):
    row = row_of("a", "<think>\nx\n</think>\n\none", **more)
    made = maker(own.THINKS, **({} if more else own.NOT_THINKING))
    said = r"turn 2: the answer has a thought, which the prompt rules out .*delete the thought, or"
    with pytest.raises(UserError, match=said + " drop enable_thinking=false"):
        samples(made, row)
    with pytest.raises(UserError, match=said):
        samples(made, row_of("a", "x\n</think>\n\none", **more))
    with pytest.raises(UserError, match=said):
        samples(made, answered(content="one", reasoning_content="x") | more)


@pytest.mark.parametrize(
    "empty", ["<think>\n\n</think>\n\n", "<think></think>\n", "\n<think> </think>"]
)
@pytest.mark.parametrize(
    "template",
    [own.THINKS, own.PLAIN.replace(own.ASK, own.THINKS[own.THINKS.rindex("{% if add_gen") :])],
)
def test_an_empty_thought_is_the_prompts_however_the_answer_repeats_it(template, empty):
    found = shown(maker(template, enable_thinking=False), row_of("a", empty + "one"))
    assert found == [USER.format("a") + "<think>⏎⏎</think>⏎⏎⟦one<|im_end|>⟧"]
    nothing = samples(maker(template, enable_thinking=False), row_of("a", empty))
    assert (nothing.samples, nothing.dropped) == ([], [EMPTY])


def test_a_row_key_that_changes_meaning_is_used():
    row = {"system": "be kind", "conversations": [{"from": "human", "value": "a"}]}
    row["conversations"].append({"from": "gpt", "value": "one"})
    assert shown(maker(own.PLAIN), row) == [
        "<|im_start|>system⏎be kind<|im_end|>⏎" + USER.format("a") + "⟦one<|im_end|>⟧"
    ]


def test_the_next_roles_mark_is_the_stop_token_of_each_answer():
    found = maker(own.ROLES, eos="<|end|>", stops=("<|user|>", "<|observation|>"))
    assert shown(found, row_of("a", "one", "b", "two")) == [
        "<|user|>a<|assistant|>⟦one<|user|>⟧b<|assistant|>⟦two<|user|>⟧"
    ]


def test_stop_tokens_come_from_the_generation_config_alone():
    unnamed = own.PLAIN.replace("<|im_end|>", "<|end|>")
    found = maker(unnamed, eos=None, stops=("<|end|>",))
    assert shown(found, row_of("a", "one"))[0].endswith("⟦one<|end|>⟧")


def test_a_special_token_after_answers_is_their_end_where_no_stop_token_is_named():
    found = maker(own.PLAIN, eos=None)
    assert shown(found, row_of("a", "one"))[0].endswith("⟦one<|im_end|>⟧")


def test_no_end_at_all_is_refused():
    bare = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    with pytest.raises(UserError, match=r"no eos token.*generation_config.json"):
        samples(maker(bare, eos=None), row_of("a", "one"))


def test_generation_marks_change_nothing():
    row = row_of("a", "one", "b", "two")
    assert shown(maker(own.MARKED), row) == shown(maker(own.PLAIN), row)


def test_prompt_and_answer_are_tokenized_apart():
    (sample,) = samples(maker(own.PLAIN), row_of("a", "\none")).samples
    ids = sample.input_ids.tolist()
    tokenizer = own.merging_tokenizer(own.PLAIN)
    prompt = tokenizer(USER.format("a").replace("⏎", "\n")).input_ids
    line = tokenizer("\n").input_ids
    assert tokenizer("\n\n").input_ids != line * 2  # they merge
    assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) - 1 : len(prompt) + 1] == line * 2
    assert sample.token_mask.tolist().index(1) == len(prompt)


def test_a_history_that_merges_otherwise_begins_a_sample():
    # The second prompt has one token where the first answer began.
    found = shown(maker(own.PLAIN), row_of("a", "\none", "b", "two"))
    assert len(found) == 2
    assert "⟦⏎one" in found[0]
    assert "one" in found[1].partition("⟦")[0]


def test_blanks_that_the_template_writes_before_an_answer_are_the_targets():
    text = "<|im_start|>user⏎ a<|im_end|>⏎<|im_start|>assistant⏎⟦ one<|im_end|>⟧"
    assert shown(maker(own.BLANK), row_of("a", "one")) == [text]
    assert shown(maker(own.BLANK), row_of("a", " one")) == [text]
    # Its own blanks stay, whatever the template does.
    assert "⟦⏎one ⏎<|im_end|>⟧" in shown(maker(own.TRIMS), row_of("a", "\none \n"))[0]


# Special tokens as text.


def ends(made, row):
    """How often a sample has the token that ends turns."""
    (sample,) = samples(made, row).samples
    return sample.input_ids.tolist().count(made.template.tokenizer.eos_token_id)


@pytest.mark.parametrize("answer", ["<|im_end|>", "say <|im_end|>", "<|im_end|> is a mark", "x\n"])
@pytest.mark.parametrize("template", [own.PLAIN, own.TRIMS, own.MARKED, own.BLANK])
def test_an_answer_with_the_end_mark_as_text(template, answer):
    made = maker(template)
    row = row_of("a", answer)
    (text,) = shown(made, row)
    assert text.endswith(answer.replace("\n", "⏎") + "<|im_end|>⟧")
    assert ends(made, row) == 2  # the question's and the answer's


def test_other_special_tokens_in_an_answer_are_text_and_tags_are_tokens():
    made = maker(own.PLAIN)
    tokenizer = made.template.tokenizer
    (sample,) = samples(made, row_of("a", "<|user|> <think>")).samples
    written = sample.input_ids[sample.token_mask == 1].tolist()
    assert tokenizer.convert_tokens_to_ids("<|user|>") not in written
    assert tokenizer.convert_tokens_to_ids("<think>") in written


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "one", "reasoning_content": 'is "<|im_end|>" the end?'},
        {"content": "", "tool_calls": [call(zone='a "<|im_end|>"\n', more="<|im_end|>")]},
        {"content": "<|im_end|>", "tool_calls": [call(zone="<|im_end|>")]},
    ],
)
def test_special_tokens_in_thoughts_and_arguments_are_text(answer):
    made = maker(own.THINKS)
    (text,) = shown(made, answered(**answer))
    assert ends(made, answered(**answer)) == 2
    assert text.endswith("<|im_end|>⟧")


def test_a_thought_in_the_content_has_the_end_mark_as_text():
    made = maker(own.OPENS)
    row = row_of("a", "is <|im_end|> it?\n</think>\n\n<|im_end|>")
    assert ends(made, row) == 2
    assert shown(made, row)[0].endswith("⟦is <|im_end|> it?⏎</think>⏎⏎<|im_end|><|im_end|>⟧")


def test_a_text_with_special_tokens_that_the_template_changes_is_refused():
    upper = own.THINKS.replace("(t.function | tojson)", "(t.function | tojson | upper)")
    row = answered(content="", tool_calls=[call(zone="<|im_end|>")])
    with pytest.raises(UserError, match=r"turn 2: "):
        samples(maker(upper), row)


def token_names(made, row):
    """The supervised tokens of the only sample, by name."""
    (sample,) = samples(made, row).samples
    written = sample.input_ids[sample.token_mask == 1].tolist()
    return made.template.tokenizer.convert_ids_to_tokens(written)


def test_tags_are_tokens_beside_special_tokens_as_text_even_if_they_are_special():
    from tokenizers import AddedToken

    tokenizer = own.merging_tokenizer(own.THINKS)
    tags = [AddedToken(each, special=True, normalized=False) for each in own.TAGS]
    tokenizer.add_tokens(tags, special_tokens=True)
    made = SampleMaker(ChatTemplate(tokenizer), LONG)
    names = token_names(made, row_of("a", "<think>\nx\n</think>\n\nwrite <|im_end|> <tool_call>"))
    assert [each for each in names if each in (*own.TAGS, "<|im_end|>")] == [
        "<think>",
        "</think>",
        "<tool_call>",
        "<|im_end|>",
    ]


@pytest.mark.parametrize("mark", ["<|user|>", "<|system|>", "<|im_end|>"])
def test_the_templates_own_mark_is_the_token_beside_the_same_as_text(mark):
    marked = own.THINKS.replace("'<tool_call>'", "'<|user|>'").replace(
        "'</tool_call>'", "'<|system|>'"
    )
    row = answered(content="", tool_calls=[call(zone=mark)])
    names = token_names(maker(marked), row)
    assert [names.count(each) for each in ("<|user|>", "<|system|>", "<|im_end|>")] == [1, 1, 1]
    assert names[-2:] == ["<|system|>", "<|im_end|>"]


# Tokenizers with a blank before each text.


@pytest.mark.parametrize("prepend", ["always", "first"])
@pytest.mark.parametrize("answer", ["one", " one", "\none"])
def test_answers_go_on_without_a_blank_of_the_tokenizers(prepend, answer):
    made = maker(own.PLAIN, tokenizer=partial(own.blank_tokenizer, prepend=prepend))
    tokenizer = made.template.tokenizer
    (sample,) = samples(made, row_of("a", answer)).samples
    written = tokenizer.convert_ids_to_tokens(sample.input_ids[sample.token_mask == 1].tolist())
    assert written == [
        *{"one": ["one"], " one": ["▁one"], "\none": ["\n", "one"]}[answer],
        "<|im_end|>",
    ]


@pytest.mark.parametrize("prepend", ["always", "first", "never"])
def test_long_prompts_are_tokenized_in_pieces_as_they_are_whole(monkeypatch, prepend):
    made = maker(own.PLAIN, tokenizer=partial(own.blank_tokenizer, prepend=prepend))
    texts = [f"{own.SPECIAL[0]} one <think>\n{own.SPECIAL[1]}" * count for count in (1, 2, 4, 3)]
    whole = [made.tokens.prompt(text) for text in (*texts, "one" + texts[0], " one")]
    monkeypatch.setattr("eagle3fn.data.tokens._LONG", 0)
    encoded = []
    encode = made.tokens._encode
    monkeypatch.setattr(made.tokens, "_encode", lambda text: encoded.append(text) or encode(text))
    assert [made.tokens.prompt(text) for text in (*texts, "one" + texts[0], " one")] == whole
    assert len(encoded) <= 6  # each piece once, but for a new beginning


def test_special_tokens_that_take_the_blank_after_them():
    from tokenizers import AddedToken

    tokenizer = own.merging_tokenizer(own.PLAIN)
    wide = [AddedToken(each, special=True, normalized=False, rstrip=True) for each in own.SPECIAL]
    tokenizer.add_tokens(wide, special_tokens=True)
    made = SampleMaker(ChatTemplate(tokenizer), LONG)
    row = row_of("a", "one", "b", "two")
    (sample,) = samples(made, row).samples
    wanted = tokenizer("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n")
    assert sample.input_ids.tolist()[: len(wanted.input_ids)] == wanted.input_ids


# What gives no sample.


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, NO_ANSWER),
        ({"messages": [{"role": "assistant", "content": "a"}]}, NO_QUESTION),
        (row_of("a", " \n"), EMPTY),
        ({"text": "a"}, EMPTY),
    ],
)
def test_rows_without_a_sample_say_why(row, reason):
    found = samples(maker(own.PLAIN), row)
    assert (found.samples, found.dropped) == ([], [reason])


def test_a_plain_text_is_supervised_but_for_its_first_token():
    (sample,) = samples(maker(own.PLAIN), {"text": "the one"}).samples
    assert sample.token_mask.tolist() == [0] + [1] * (len(sample.input_ids) - 1)
    assert own.merging_tokenizer(None).decode(sample.input_ids) == "the one"


def test_text_of_a_role_that_is_not_rendered_is_refused():
    deaf = own.PLAIN.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"
    )
    row = row_of("a", "one", "b", "two")
    row["messages"][2]["role"] = "tool"
    with pytest.raises(UserError, match=r"turn 3: .*does not render the text of role tool"):
        samples(maker(deaf), row)


def test_what_another_turn_says_too_does_not_count_as_rendered():
    with pytest.raises(UserError, match=r"file:1: tools: .*does not render clock; delete tools"):
        samples(maker(own.PLAIN), row_of("what does the clock say?", "one", tools=[CLOCK]))

    row = row_of("look at the clock", "", "noon", "one")
    row["messages"][1] |= {"tool_calls": [call(zone="UTC")], "weight": 0}
    row["messages"][2]["role"] = "tool"
    with pytest.raises(UserError, match=r"turn 2: .*does not render tool_calls \(clock\)"):
        samples(maker(own.PLAIN), row)
    assert len(samples(maker(own.THINKS), row).samples) == 1

    four = own.PLAIN.replace(
        own.HEAD + "{{ m.content }}" + own.END,
        "{% if m.role != 'developer' and (m.role != 'system' or loop.first) %}"
        + own.HEAD
        + "{{ m.content }}"
        + own.END
        + "{% endif %}",
    )
    for turns in (
        [{"role": "developer", "content": "be kind"}, *talk("be kind, please", "one")],
        [*talk("be kind, please", "one"), {"role": "system", "content": "kind"}, *talk("b", "two")],
    ):
        with pytest.raises(UserError, match=r"does not render the text of role (devel|system)"):
            samples(maker(four), {"messages": turns})
        assert samples(maker(own.PLAIN), {"messages": turns}).samples
    system = [{"role": "system", "content": "be kind"}, *talk("be kind, please", "one")]
    assert len(samples(maker(four), {"messages": system}).samples) == 1


def test_an_answer_that_the_template_changes_is_refused():
    with pytest.raises(UserError, match=r"turn 2: .*changes the text of this answer"):
        samples(maker(own.PLAIN.replace("m.content", "m.content | upper")), row_of("a", "one"))


def test_a_prompt_that_is_too_long_does_not_end_a_row_whose_next_is_shorter():
    thought = "<think>\n" + "x" * 300 + "\n</think>\n\n"
    row = row_of("a", thought + "look", "b", thought + "two")
    row["messages"][2]["role"] = "tool"  # in the first question's chain: its thought is shown
    row["messages"] += talk("c", "three")
    found = samples(maker(own.THINKS, max_length=250), row)
    assert [each.id for each in found.samples] == ["row", "row:6"]
    assert found.dropped == [TOO_LONG]
    assert found.samples[-1].token_mask[-1] == 1

    long = row_of("x" * 300, "one", "b", "two", "c", "three")
    assert samples(maker(own.PLAIN, max_length=250), long).dropped == [TOO_LONG] * 3


# Forms of rows.


def test_forms_of_rows_give_the_same_sample():
    turns = talk("a", "one")
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "one"}]
    rows: list[dict[str, Any]] = [
        {"messages": turns},
        {"conversations": turns},
        {"conversations": sharegpt},
        {"prompt": "a", "completion": "one"},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"prompt": turns},
        {
            "messages": [
                turns[0],
                {"role": "assistant", "content": [{"type": "text", "text": "one"}]},
            ]
        },
    ]
    made = maker(own.PLAIN)
    assert {tuple(shown(made, row)) for row in rows} == {(USER.format("a") + "⟦one<|im_end|>⟧",)}


def test_sharegpt_calls_and_observations():
    value = json.dumps({"name": "clock", "arguments": {"zone": "UTC"}})
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": value},
        {"from": "observation", "value": "noon"},
        {"from": "gpt", "value": "one"},
    ]
    (text,) = shown(maker(own.THINKS), {"conversations": turns, "tools": json.dumps([CLOCK])})
    assert text.count("⟦") == 2
    assert "<tool_call>" + value + "</tool_call><|im_end|>⟧⏎<|im_start|>tool⏎noon" in text


def test_row_arguments_that_the_template_lacks_are_refused():
    with pytest.raises(UserError, match=r"file:1: effort: .*no such variable.*one of enable_th"):
        samples(maker(own.THINKS), row_of("a", "one", chat_template_kwargs={"effort": 1}))
    with pytest.raises(UserError, match=r"enable_thinking: .*delete it: it has none"):
        samples(maker(own.PLAIN), row_of("a", "one", enable_thinking=False))


# Against an oracle, by the definition.

TEXTS = st.text(st.sampled_from("a the\none<|im_end|>") | st.characters(codec="utf-8"), max_size=12)
THOUGHTS = st.text("x y\n", max_size=5).map(str.strip).filter(bool)
HABITS = {
    "plain": (own.PLAIN, {}),
    "trims": (own.TRIMS, {}),
    "marked": (own.MARKED, {}),
    "blank": (own.BLANK, {}),
    "thinks": (own.THINKS, {}),
    "not thinking": (own.THINKS, {"enable_thinking": False}),
    "opens": (own.OPENS, {}),
    "roles": (own.ROLES, {"eos": "<|end|>", "stops": ("<|user|>",)}),
}


@st.composite
def conversations(draw, habit):
    """A row, and what the target wrote in each answer."""
    row: dict[str, Any] = {"messages": []}
    written = []
    for _ in range(draw(st.integers(1, 5))):
        row["messages"].append({"role": "user", "content": draw(TEXTS)})
        answer = draw(TEXTS.filter(str.strip))
        if habit in ("thinks", "not thinking"):
            answer = answer.lstrip("\n").replace("</think>", "")
        thought = draw(THOUGHTS)
        content = answer
        wrote = answer
        if habit == "blank" and not answer[:1].isspace():
            wrote = " " + answer
        if habit == "opens":
            content = wrote = f"{thought}\n</think>\n\n{answer}"
        if habit == "thinks":
            content = wrote = f"<think>\n{thought}\n</think>\n\n{answer}"
        turn = {"role": "assistant", "content": content}
        if draw(st.booleans()) and draw(st.booleans()):
            turn["weight"] = 0
        row["messages"].append(turn)
        written.append(wrote)
    return row, written


def oracle(made, row, written, max_length):
    """Each prompt is tokenized whole and each answer apart; ids are shared where they go on."""
    tokenizer = made.template.tokenizer
    end = next(iter(made.template.stops.values())) if len(made.template.stops) == 1 else None
    end = tokenizer.convert_tokens_to_ids("<|user|>") if end is None else end
    made_samples = []
    ids, mask = [], []
    for number, turn in enumerate(row["messages"]):
        if turn["role"] == "user" or turn.get("weight") == 0:
            continue
        prompt = tokenizer.apply_chat_template(
            row["messages"][:number],
            add_generation_prompt=True,
            tokenize=False,
            **made.template.arguments,
        )
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        if not ids or prompt_ids[: len(ids)] != ids:
            ids, mask = [], []
            made_samples.append((ids, mask))
        answer = plain_ids(tokenizer, written[number // 2])
        added = [*prompt_ids[len(ids) :], *answer, end]
        mask += [0] * (len(added) - len(answer) - 1) + [1] * (len(answer) + 1)
        ids += added
    cut = [(ids[:max_length], mask[:max_length]) for ids, mask in made_samples]
    kept = []
    for ids, mask in cut:
        if any(mask):
            end = len(mask) - mask[::-1].index(1) + 1  # one after the last supervised token
            kept.append((ids[:end], mask[:end]))
    return kept


def plain_ids(tokenizer, text):
    """Ids of an answer: tags are tokens, other special tokens are text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


@pytest.mark.parametrize("habit", HABITS)
@given(st.data(), st.sampled_from([LONG, 30, 60]))
@settings(max_examples=25)
def test_samples_are_those_of_the_definition(habit, data, max_length):
    template, more = HABITS[habit]
    made = maker(template, max_length=max_length, **more)
    row, written = data.draw(conversations(habit))
    found = samples(made, row)
    have = [(each.input_ids.tolist(), each.token_mask.tolist()) for each in found.samples]
    assert have == oracle(made, row, written, max_length)

    trained = sum(turn.get("weight", 1) for turn in row["messages"][1::2])
    assert set(found.dropped) <= {TOO_LONG, NOT_TRAINED}
    if max_length == LONG:
        supervised = [each.input_ids[each.token_mask == 1].tolist() for each in found.samples]
        stops = sum(ids.count(stop) for ids in supervised for stop in made.template.stops.values())
        assert stops == trained


@pytest.mark.parametrize("habit", ["plain", "trims", "marked"])
@given(st.data())
@settings(max_examples=15)
def test_weight_zero_takes_that_answer_away_alone(habit, data):
    made = maker(HABITS[habit][0])
    row, _ = data.draw(conversations(habit))
    for turn in row["messages"]:
        turn.pop("weight", None)
    whole = [text for each in shown(made, row) for text in answers(each)]
    number = data.draw(st.integers(0, len(whole) - 1))
    row["messages"][2 * number + 1]["weight"] = 0
    left = [text for each in shown(made, row) for text in answers(each)]
    assert left == whole[:number] + whole[number + 1 :]


def answers(text):
    return [each.rpartition("⟧")[0] for each in text.split("⟦")[1:]]
