"""What is found about a chat template by rendering, and what is refused."""

import pickle

import pytest
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from eagle3fn.base.errors import UserError
from eagle3fn.data.jinja import Program
from eagle3fn.data.rendering import Rendering
from eagle3fn.data.template import ChatTemplate, Opened
from eagle3fn.data.turns import conversation_of
from tests.data import chat_templates as own

PARTS = own.PLAIN.replace(
    "{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"
)
BOTH = own.PLAIN.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}",
)


def template(source, arguments=None, **more):
    return ChatTemplate(own.merging_tokenizer(source, **more), (), arguments)


def prompt(made, *contents):
    row = {"messages": [{"role": "user", "content": each} for each in contents]}
    return Rendering(made, conversation_of(row, "file:1"), "file:1").prompt(len(contents))


@pytest.mark.parametrize("source", [PARTS, BOTH, own.PLAIN])
def test_contents_are_given_as_the_template_takes_them(source):
    made = template(source)
    assert "user\none<|im_end|>" in prompt(made, "one")
    joined = "one\ntwo" if source == own.PLAIN else "onetwo"
    assert f"user\n{joined}<|im_end|>" in prompt(made, ["one", "two"])


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("none", [True, False])
def test_calls_are_given_as_the_template_takes_them(as_text, none):
    arguments = "'' + t.function.arguments" if as_text else "t.function.arguments.values() | join"
    empty = "m.content is none" if none else "m.content is string"
    source = (
        "{% for m in messages %}{% if m.tool_calls %}"
        "{% if not (" + empty + ") %}{{ raise_exception('content') }}{% endif %}"
        "{% for t in m.tool_calls %}{{ t.function.name ~ " + arguments + " }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    function = {"name": "clock", "arguments": {"zone": "UTC"}}
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
        ]
    }
    text = Rendering(template(source), conversation_of(row, "file:1"), "file:1").through(2)
    assert text == ('aclock{"zone": "UTC"}' if as_text else "aclockUTC")


def test_thoughts_are_found():
    found = template(own.THINKS).thought
    assert found == ("<think>\n", "\n</think>\n\n", True)
    assert template(own.PLAIN).thought is None
    assert template(own.OPENS).thought is None


def test_opened_thoughts_are_found():
    made = template(own.OPENS)
    assert made.opened(prompt(made, "a")) == Opened("<think>\n", "</think>")
    for source, text in ((own.PLAIN, "a"), (own.PLAIN, "<b>"), (own.THINKS, "a")):
        made = template(source)
        assert made.opened(prompt(made, text)) is None


def test_arguments_are_those_that_the_template_asks_for():
    source = (
        "{% set style = style | default('short') %}{% if not day is defined %}{% set day = 1 %}"
        "{% endif %}{% for m in messages %}{% set text = m.content %}"
        "{{ style ~ day ~ text ~ tone }}{% endfor %}"
    )
    assert Program(source).arguments == {"style", "day", "tone", "messages"}
    made = template(source, {"style": "long", "day": 2, "tone": "!"})
    assert prompt(made, "a") == "long2a!"
    with pytest.raises(UserError, match=r"--template-arg: text: .*write one of day, style, tone"):
        template(source, {"text": "b"})


def test_a_template_has_the_date_of_no_day():
    source = "{% for m in messages %}{{ strftime_now('%d %b %Y') + m.content }}{% endfor %}"
    assert prompt(template(source), "a") == "01 Jan 2026a"


def test_json_is_as_the_library_writes_it():
    source = "{{ messages | tojson }}{{ {'b': 1, 'a': 'é<'} | tojson(indent=1, sort_keys=true) }}"
    text = Program(source).render({"messages": ["é"]})
    assert text == '["é"]{\n "a": "é<",\n "b": 1\n}'


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}{{ messages.__class__.__mro__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% set ns = namespace(_a=1) %}",
        "{{ messages.append(1) }}",
        "{% set f = ''.format_map %}{{ f({'a': 1}).__class__.__name__ }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    try:
        text = Program(source).render({"messages": [{"role": "user"}]})
    except (SecurityError, TemplateError):
        return
    assert "class" not in text


@pytest.mark.parametrize("attribute", ["items", "get", "role", "missing"])
def test_messages_are_read_as_jinja_reads_them(attribute):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = "{{ m." + attribute + " is defined }}{{ m." + attribute + " is callable }}"
    plain = ImmutableSandboxedEnvironment().from_string(source)
    message = {"role": "user", "items": "a"}
    assert Program(source).render({"m": message}) == plain.render(m=message)


def test_programs_go_to_other_processes():
    made = template(own.PLAIN)
    text = prompt(made, "a")
    assert prompt(pickle.loads(pickle.dumps(made)), "a") == text
    assert pickle.loads(pickle.dumps(Program("{{ a }}"))).render({"a": 1}) == "1"


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(UserError, match=r"tiny: no chat template; take an instruction-tuned"):
        prompt(template(None), "a")


def test_named_templates():
    with pytest.raises(UserError, match=r"no default chat template, only rag, tool_use; copy"):
        prompt(template({"rag": "a", "tool_use": "b"}), "a")

    made = template({"default": own.PLAIN, "tool_use": own.THINKS})
    assert "TOOLS" not in prompt(made, "a")
    row = {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "clock"}]}
    rendering = Rendering(made, conversation_of(row, "file:1"), "file:1")
    assert "TOOLS" in rendering.prompt(1)
    assert made.has_tools and made.has_calls


def test_what_is_no_template_is_refused():
    with pytest.raises(UserError, match=r"tiny: its chat template is no Jinja template .*mend it"):
        prompt(template("{% for %}"), "a")


def test_a_refusal_of_the_template_names_the_row():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"file:1: .*roles must alternate.*mend or delete the row"):
        prompt(template(strict), "a")
