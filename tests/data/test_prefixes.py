"""Beginnings of a conversation, all from one rendering, are those rendered one by one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3fn.data.jinja import Program
from eagle3fn.data.prefixes import PrefixProgram
from tests.data import chat_templates as own

LOOP = "{% for m in messages %}"
BODY = "[{{ m.role }}:{{ m.content }}]"
ASK = "{% if add_generation_prompt %}>{% endif %}"
DONE = "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
IN_ORDER = {
    "plain": own.PLAIN,
    "trims": own.TRIMS,
    "marked": own.MARKED,
    "roles": own.ROLES,
    "counts": LOOP + "{{ loop.index0 }}{{ loop.first }}" + BODY + DONE,
    "looks back": LOOP + "{% if loop.previtem %}{{ loop.previtem.role }}{% endif %}" + BODY + DONE,
    "first": "{{ messages[0].content }}" + LOOP + BODY + DONE,
    "all but the first": "{% set rest = messages[1:] %}{{ messages[0].role }}"
    "{% for m in rest %}" + BODY + DONE,
    "keeps a state": "{% set ns = namespace(n='') %}"
    + LOOP
    + "{% set ns.n = ns.n + m.content %}{{ ns.n }}"
    + DONE,
    "back by index": LOOP
    + "{% if loop.index0 > 0 %}{{ messages[loop.index0 - 1].role }}{% endif %}"
    + BODY
    + DONE,
}
AHEAD = {
    "last": LOOP + BODY + "{% if loop.last %}!{% endif %}" + DONE,
    "next": LOOP + BODY + "{{ loop.nextitem.role }}" + DONE,
    "length": LOOP + BODY + "{{ loop.length }}" + DONE,
    "left": LOOP + BODY + "{{ loop.revindex0 }}" + DONE,
    "how many": "{{ messages | length }}" + LOOP + BODY + DONE,
    "many": "{% if messages | length > 3 %}!{% endif %}" + LOOP + BODY + DONE,
    "last question": own.THINKS,
    "from the end": LOOP + BODY + "{{ messages[-1].role }}" + DONE,
    "backwards": "{% for m in messages[::-1] %}" + BODY + DONE,
    "backwards by filter": "{% for m in messages | reverse %}" + BODY + DONE,
    "a list": "{% for m in messages | list %}" + BODY + DONE,
    "some": "{% for m in messages if m.role == 'user' %}" + BODY + DONE,
    "looks twice": LOOP + "{{ m.role }}" + "{% endfor %}" + LOOP + BODY + DONE,
    "buffered": "{% set text %}" + LOOP + BODY + "{% endfor %}{% endset %}{{ text }}" + ASK,
    "in a condition": "{% if true %}" + LOOP + BODY + "{% endfor %}{% endif %}" + ASK,
    "an end by state": "{% set ns = namespace(n=0) %}"
    + LOOP
    + "{% set ns.n = ns.n + 1 %}"
    + BODY
    + "{% endfor %}{{ ns.n }}",
    "an end by messages": LOOP + BODY + "{% endfor %}{{ messages[0].role }}{{ messages | length }}",
    "stops": LOOP + BODY + "{% if loop.index0 == 3 %}{% break %}{% endif %}" + DONE,
    "leaves out": LOOP + "{% if m.role == 'user' %}{% continue %}{% endif %}" + BODY + DONE,
    "two ahead": LOOP + BODY + "{{ messages[loop.index0 + 2].role }}" + DONE,
    "else": LOOP + BODY + "{% else %}none{% endfor %}",
    "as JSON": "{{ messages | tojson }}" + LOOP + BODY + DONE,
    "is it empty": "{% if messages == [] %}!{% endif %}" + LOOP + BODY + DONE,
    "a sequence": "{% if messages is sequence %}!{% endif %}" + LOOP + BODY + DONE,
    "no loop": "{{ messages[0].content }}",
    "tools last": "{% if messages %}{{ messages[0].role }}{% endif %}"
    "{% for t in tools or [] %}{{ t }}{% endfor %}" + ASK,
}
MESSAGES = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant"]),
        st.text("ab \n", max_size=3),
    ),
    min_size=1,
    max_size=9,
)


def beginnings(source, messages, ask):
    variables = {"add_generation_prompt": ask, "tools": None}
    found = PrefixProgram(source).prefixes(messages, variables)
    program = Program(source)
    for count in range(1, len(messages) + 1):
        text = found and found.of(count)
        if text is not None:
            assert text == program.render({**variables, "messages": messages[:count]}), count
        yield text


@pytest.mark.parametrize("name", IN_ORDER)
@given(MESSAGES, st.booleans())
@settings(max_examples=15)
def test_templates_in_order_give_every_beginning(name, messages, ask):
    texts = list(beginnings(IN_ORDER[name], messages, ask))
    behind = 1 if name == "all but the first" else 0  # the loop begins at the second message
    assert None not in texts[behind:]


@pytest.mark.parametrize("name", AHEAD)
@given(MESSAGES, st.booleans())
@settings(max_examples=30)
def test_templates_that_look_ahead_are_never_wrong(name, messages, ask):
    """`beginnings` compares each text that is given with a rendering of its own."""
    assert len(list(beginnings(AHEAD[name], messages, ask))) == len(messages)


@pytest.mark.parametrize("name", ["last", "how many", "backwards", "a list", "last question"])
def test_what_looks_ahead_gives_no_beginning(name):
    messages = [{"role": "user", "content": "a"}] * 5
    assert set(list(beginnings(AHEAD[name], messages, True))[:-1]) == {None}


def test_a_template_that_refuses_gives_none():
    source = LOOP + "{{ raise_exception('no') }}" + DONE
    assert PrefixProgram(source).prefixes([{"role": "user"}], {}) is None
