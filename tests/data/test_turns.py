"""Rows to turns: what is read, in which forms, and what is refused by name."""

import json

import pytest

from eagle3fn.base.errors import UserError
from eagle3fn.data.row_values import forms_of
from eagle3fn.data.turns import conversation_of
from tests.factories import talk

TURNS = talk("a", "one")


def read(row):
    return conversation_of(row, "file:1")


def turn(**more):
    return {"role": "assistant", "content": "one", **more}


def row_with(*turns, **more):
    return {"messages": [{"role": "user", "content": "a"}, *turns], **more}


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("gpt", "assistant"),
        ("observation", "tool"),
        ("developer", "developer"),
        ("tool", "tool"),
        ("system", "system"),
    ],
)
def test_names_of_roles(name, role):
    for key, text in (("role", "content"), ("from", "value")):
        row = row_with({key: name, text: "b"}, turn())
        assert read(row).turns[1] == {"role": role, "content": "b"}


def test_supervised_are_the_assistants_turns_by_weight():
    row = row_with(turn(weight=0), turn(weight=1), turn(train=False), turn(train=True), turn())
    assert read(row).supervised == (2, 4, 5)
    assert read(row | {"weight": 0}).supervised == ()
    assert read(row_with(turn(weight=1.0))).supervised == (1,)


def test_parts_of_contents():
    parts = [{"type": "text", "text": "b"}, "c", {"type": "output_text", "text": "d"}]
    assert read(row_with(turn(content=parts))).turns[1]["content"] == ["b", "c", "d"]
    assert read(row_with(turn(content=parts[:1]))).turns[1]["content"] == "b"
    thinking = [{"type": "thinking", "thinking": "x"}, *parts[:1]]
    found = read(row_with(turn(content=thinking))).turns[1]
    assert (found["reasoning"], found["content"]) == ("x", "b")


def test_the_same_thought_under_two_names_is_one():
    found = read(row_with(turn(reasoning_content="x", thinking="x"))).turns[1]
    assert found["reasoning"] == "x"


def test_calls_and_tools_in_their_forms():
    function = {"name": "clock", "arguments": {"zone": "UTC"}}
    text = {"name": "clock", "arguments": '{"zone": "UTC"}'}
    call = {"type": "function", "function": function}
    for value in ([call], [{"function": text}], [function], function, [text]):
        assert read(row_with(turn(content=None, tool_calls=value))).turns[1]["tool_calls"] == [call]
    found = read(row_with({"from": "function_call", "value": json.dumps(function)})).turns[1]
    assert found == {"role": "assistant", "content": "", "tool_calls": [call]}

    tool = {"name": "clock", "parameters": {}}
    whole = {"type": "function", "function": tool}
    for value in ([whole], [tool], json.dumps([tool]), tool, [{"function": tool}]):
        assert read(row_with(turn(), tools=value)).tools == [whole]
    assert read(row_with(turn(), tools=None)).tools == []


def test_a_system_text_beside_the_turns():
    assert read(row_with(turn(), system="be kind")).turns[0] == {
        "role": "system",
        "content": "be kind",
    }
    first = {"role": "system", "content": "be kind"}
    both = {"messages": [first, *TURNS], "system": "be kind"}
    assert read(both).turns == [first, *TURNS]
    assert read(row_with(turn(), system="be kind")).supervised == (2,)


def test_arguments_of_the_template():
    row = row_with(turn(), enable_thinking=False, chat_template_kwargs={"enable_thinking": True})
    assert read(row).arguments == {"enable_thinking": True}
    assert read(row_with(turn(), reasoning_effort="low")).arguments == {"reasoning_effort": "low"}


def test_keys_that_change_nothing_are_told():
    row = row_with(turn(score=1), source="web", id=7, images=[], documents=None)
    assert read(row).unused == {"source", "turn.score", "images", "documents"}


def test_forms_of_a_text():
    assert forms_of(' "é"\n') == (' "é"\n', '"é"', ' \\"é\\"\\n', ' \\"\\u00e9\\"\\n')
    assert forms_of("a") == ("a",)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ([], "must be a JSON object"),
        ({"instruction": "a"}, r"no list of turns .its keys are .'instruction'..; a row must read"),
        ({"conversations": []}, "no list of turns .conversations is empty."),
        ({"conversations": "hi"}, "conversations 'hi': must be a list of turns"),
        ({"prompt": 7}, "prompt 7: must be a text or a list of turns"),
        ({"messages": TURNS, "conversations": TURNS[:1]}, "conversations and messages differ"),
        ({"text": "a", "system": "b"}, "system beside text"),
        ({"text": "a", "tools": [{"name": "clock"}]}, "tools beside text"),
        (row_with("hi"), "turn 2: 'hi': must be"),
        (row_with({"role": "bot", "content": "x"}), "turn 2: role 'bot': must be one of"),
        (row_with({"role": ["a"], "content": "x"}), "turn 2: role "),
        (row_with({"content": "x"}), "turn 2: role None"),
        (row_with({"role": "assistant"}), "turn 2: content None: must be a string"),
        (row_with(turn(content=7)), "turn 2: content 7: must be a string"),
        (row_with(turn(content="b \ud83d c")), r"turn 2: content 'b \\ud83d c': .*UTF-8"),
        (row_with(turn(reasoning_content="\ud83d")), "turn 2: reasoning_content .*UTF-8"),
        (row_with(turn(reasoning_content=7)), "reasoning_content 7: must be a string"),
        (row_with(turn(reasoning_content="x", thinking="y")), "two different thoughts"),
        (row_with(turn(content=["a", 7])), "a part of content 7: must be a text or a JSON object"),
        (row_with(turn(content=[None])), "a part of content None: must be a text"),
        (row_with(turn(content=[{"type": "image_url"}])), "a part of type 'image_url': only text"),
        (row_with(turn(weight=0.5)), "turn 2: weight 0.5: must be 0 or 1"),
        (row_with(turn(weight=True)), "weight True: must be 0 or 1"),
        (row_with(turn(train="no")), "train 'no': must be true or false"),
        (row_with(turn(), weight=2), "file:1: weight 2"),
        (row_with({"role": "user", "content": "b", "tool_calls": [{"name": "f"}]}), "only the ass"),
        (row_with({"role": "user", "content": "b", "thinking": "x"}), "reasoning of role user"),
        (row_with(turn(tool_calls=[{"id": "c"}])), "turn 2: tool call "),
        (row_with(turn(tool_calls=[{"name": "f", "arguments": "{"}])), "'{': must be JSON"),
        (row_with(turn(tool_calls=[{"name": "f", "arguments": [1]}])), "must be a JSON object"),
        (row_with({"from": "function_call", "value": "clock()"}), "'clock.*must be JSON"),
        (row_with(turn(tool_calls=[{"name": "f", "arguments": []}])), "must be a JSON object"),
        (
            row_with(turn(tool_calls=[{"name": "f", "parameters": {}}])),
            "parameters in the call of f",
        ),
        (
            row_with(turn(tool_calls=[{"name": "f", "arguments": {"a": "\ud83d"}}])),
            "tool call .*UTF-8",
        ),
        (row_with(turn(), tools=[{"name": "f\ud83d"}]), "file:1: tool .*UTF-8"),
        (row_with(turn(value="two")), "turn 2: content and value differ"),
        (row_with(turn(), enable_thinking="False"), "'False' is a text, .*; write false without"),
        (
            row_with(turn(), chat_template_kwargs={"tools": 1}),
            "tools is no argument of the template",
        ),
        (row_with(turn(), tools=["clock"]), "file:1: tool 'clock': must be"),
        (row_with(turn(), tools="clock"), "'clock': must be JSON"),
        (row_with(turn(), chat_template_kwargs=[1]), "chat_template_kwargs .*JSON object"),
        ({"messages": [{"role": "system", "content": "a"}, *TURNS], "system": "b"}, "another text"),
        (row_with(turn(), functions=[{"name": "f"}]), "functions is not supported; write tools"),
        (row_with(turn(), documents=["d"]), "documents is not supported"),
        (row_with(turn(), images=["i"]), "images is not supported; only text is trained"),
        (row_with(turn(), chosen=TURNS), "chosen is not supported; write the answer"),
        (row_with(turn(function_call={"name": "f"})), "function_call is not supported; write tool"),
        (row_with(turn(loss=False)), "loss is not supported; write weight"),
        (row_with(turn(prefix=True)), "prefix is not supported; write the whole answer"),
    ],
)
def test_bad_rows_are_refused_by_name(row, named):
    with pytest.raises(UserError, match=f"^file:1: .*{named}|^file:1: {named}|^{named}"):
        read(row)
