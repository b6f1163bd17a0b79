"""Templates that would take too much time or memory, and faulty ones: one line, with the file."""

import signal
import time

import pytest

from eagle3fn.base.errors import UserError
from eagle3fn.data import jinja_budget
from eagle3fn.data.jinja import Program
from eagle3fn.data.jinja_budget import TemplateLimitError, weight
from eagle3fn.data.template import ChatTemplate, NoChatTemplateError
from tests.data import chat_templates as own
from tests.factories import CHATML, tiny_template

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
DOUBLE = "{% set x = x + x %}"

HUGE = {
    "repeated text": "{{ 'x' * 10**10 }}",
    "repeated list": "{{ [1] * 10**10 }}",
    "repeated lists": "{{ [messages * 2000] * 2000 }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "product": "{% set ns = namespace(n=3) %}{% for i in range(99) %}"
    "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "width": "{{ '%99999999999d' % 1 }}",
    "width from a list": "{{ '%*d' % (10**10, 1) }}",
    "precision": "{{ '%.999999999f' | format(1.5) }}",
    "format": "{{ '{:>99999999999}'.format(1) }}",
    "nested format": "{{ '{:>{}}'.format(1, 10**10) }}",
    "format from a filter": "{{ ('{0:99999999999}' | attr('format'))(1) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "center by name": "{{ 'x' | center(width=10**10) }}",
    "center, a method": "{{ 'x'.center(10**10) }}",
    "ljust by its name": "{{ 'x'['ljust'](10**10) }}",
    "zfill of a safe text": "{{ ('x' | safe).zfill(10**10) }}",
    "tabs": "{{ '\\t'.expandtabs(10**10) }}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "indent": "{{ 'a\\nb' | indent(10**10) }}",
    "tojson": "{{ messages | tojson(indent=10**10) }}",
    "join": "{% set x = 'x' * 10**5 %}{{ range(10**5) | join(x) }}",
    "join, a method": "{% set x = 'x' * 10**5 %}{{ x.join(('y' * 10**5) | list) }}",
    "replace": "{% set x = 'x' * 10**5 %}{{ x | replace('x', x) }}",
    "replace, a method": "{% set x = 'x' * 10**5 %}{{ x.replace('', x) }}",
    "batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "round": "{{ 1.5 | round(10**10, 'ceil') }}",
    "keys": "{{ dict.fromkeys(range(10**5), 'x') }}",
    "map": "{% set x = 'x' * 10**5 %}{{ ([x] * 600) | map('upper') | list | length }}",
    "doubled": DOUBLE * 99,
    "doubled in a set": "{% set x %}{{ x }}{{ x }}{% endset %}" * 99,
    "doubled by ~": "{% set x = x ~ x %}" * 99,
    "doubled in lists": "{% set x = [x, x] %}" * 99 + "{{ x }}",
    "doubled in dicts": "{% set x = {'a': x, 'b': x} %}" * 99 + "{{ x | tojson }}",
    "doubled by with": "{% with x = x ~ x %}" * 18
    + "{% with x = x * 999 %}" * 18
    + "{% endwith %}" * 36,
    "doubled in a namespace": "{% set ns = namespace(x='abc') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled by a macro": "{% macro f(x, n) %}{% if n %}{{ f(x + x, n - 1) }}{% endif %}"
    "{% endmacro %}{{ f('abc', 60) }}",
    "doubled by a loop": "{% for x in ['abc'] recursive %}{{ loop([x + x]) }}{% endfor %}",
    "long chain": "{% set y = 'x' * 10**6 %}{{ " + " ~ ".join(["y"] * 1000) + " }}",
    "long sum": "{% set y = 'x' * 10**6 %}{{ " + " + ".join(["y"] * 150) + " }}",
    "long list": "{% set y = 'x' * 10**6 %}{{ [" + ", ".join(["y | list"] * 150) + "] | length }}",
    "much text": "{% for i in range(10**5) %}{{ 'x' * 10**4 }}{% endfor %}",
    "much text in a macro": "{% macro f() %}{% for i in range(10**5) %}{% set x = 'x' * 10 %}"
    + "x" * 3000
    + "{% endfor %}{% endmacro %}{{ f() | length }}",
}


@pytest.mark.parametrize("name", HUGE)
def test_what_makes_too_much_is_refused_by_its_template(name, monkeypatch):
    monkeypatch.setattr(jinja_budget, "CHARACTERS", 2**22)  # sooner
    source = "{% set x = 'abc' %}" + HUGE[name]
    made = ChatTemplate(own.merging_tokenizer(source))
    with pytest.raises(UserError) as caught:
        made.render(TURNS, "file:1")
    assert str(caught.value).startswith("tiny: its chat template ")
    assert str(caught.value).endswith("; mend it")


ENDLESS = {
    "loops": "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "blocks": "{% set ns = namespace(n=60) %}{% block a scoped %}{% set ns.n = ns.n - 1 %}"
    "{% if ns.n %}{{ self.a() }}{{ self.a() }}{% endif %}{% set ns.n = ns.n + 1 %}{% endblock %}",
    "calls": "{% macro f(n) %}{{ caller(n) }}{{ caller(n) }}{% endmacro %}"
    "{% macro g(n) %}{% if n %}{% call(m) f(n - 1) %}{{ g(m) }}{% endcall %}{% endif %}"
    "{% endmacro %}{{ g(20) }}",
    "recursive loops": "{% for n in [40, 40] recursive %}{% if n %}{{ loop([n - 1, n - 1]) }}"
    "{% endif %}{% endfor %}",
}


LONG = {
    "filters": "{% for i in range(300) %}{{ (range(100000)|list)|sort|length }}{% endfor %}",
    "comparisons": "{% set a = range(100000)|list %}{% set b = range(100000)|list %}"
    + "{% if a == b %}{% endif %}" * 2000,
    "a chain": "{% set a = range(100000)|list %}{{ a" + "|sort" * 100 + "|length }}",
}


# What the timer raises in a callback of the garbage collection, as Hypothesis has one, is ignored
# there; the timer comes again.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", LONG)
def test_a_template_whose_single_expressions_take_long_is_stopped_by_time(name, monkeypatch):
    """What it makes is little, and little of it is charged. Left alone each takes most of a minute.

    The bound is far above what any machine takes to be stopped.
    """
    program = Program(LONG[name])
    monkeypatch.setattr(jinja_budget, "SECONDS", 0.05)
    before = time.thread_time()
    with pytest.raises(TemplateLimitError, match="takes longer than"):
        program.render({"messages": TURNS})
    assert time.thread_time() - before < 15


def test_a_rendering_leaves_no_timer():
    Program(own.PLAIN).render({"messages": TURNS})
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    assert signal.getsignal(signal.SIGPROF) is signal.SIG_DFL


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_an_end_is_stopped_by_time(name, monkeypatch):
    """By the clock alone: the budget of characters is far away."""
    monkeypatch.setattr(jinja_budget, "SECONDS", 0.02)
    with pytest.raises(TemplateLimitError, match="takes longer than"):
        Program(ENDLESS[name]).render({"messages": TURNS})


def test_a_template_without_an_end_is_stopped_by_its_budget(monkeypatch):
    """Without a clock."""
    monkeypatch.setattr(jinja_budget, "CHARACTERS", 2000)
    for source in ENDLESS.values():
        with pytest.raises(TemplateLimitError, match="makes more than 2000 characters"):
            Program(source).render({"messages": TURNS})


def test_a_template_is_not_tried_again_where_a_probe_was_stopped(monkeypatch):
    """Each of some ten probes would take as long."""
    monkeypatch.setattr(jinja_budget, "CHARACTERS", 2000)
    starts: list[None] = []
    start = jinja_budget.Budget.start

    def counted(self, variables):
        starts.append(None)
        start(self, variables)

    template = tiny_template(CHATML + "{% for i in range(99999) %}x{% endfor %}")
    monkeypatch.setattr(jinja_budget.Budget, "start", counted)
    with pytest.raises(NoChatTemplateError, match="makes more than 2000 characters"):
        template.content("text")
    assert len(starts) <= 4  # two of them read constants of the source


def test_a_process_that_was_stopped_has_more_time(monkeypatch):
    """A clock that jumped is no long rendering: only processor time counts."""
    clock = iter([0.0] + [1000.0 * number for number in range(1, 10**6)])
    monkeypatch.setattr(jinja_budget.time, "monotonic", lambda: next(clock))
    source = "{% for i in range(20000) %}{{ i }}{% endfor %}"
    assert Program(source).render({}).endswith("19999")


def test_a_long_conversation_has_a_larger_budget(monkeypatch):
    monkeypatch.setattr(jinja_budget, "CHARACTERS", 1000)
    long = [{"role": "user", "content": "x" * 5000}] * 20
    assert len(Program(own.PLAIN).render({"messages": long})) > 100_000


def test_a_value_weighs_what_it_holds():
    assert weight("abc") == 8 + 3
    objects = [[], "abc", {}, "a", "b", "c", [], 1, None]
    assert weight(["abc", {"a": "b", "c": [1, None]}]) == 8 * len(objects) + 3 + 1 + 1 + 1
    shared = ["x"]
    for _ in range(100):
        shared = [shared, shared]
    assert weight(shared, limit=1000) <= 1010


FAULTY = {
    "syntax": "{% for %}",
    "filter": "{{ messages | nofilter }}",
    "filter in a branch": "{% if messages %}{{ messages | nofilter }}{% endif %}",
    "test": "{{ messages is notest }}",
    "undefined": "{{ not_there.attribute }}",
    "types": "{{ 'a' + 1 }}",
    "zero": "{{ 1 / 0 }}",
    "overflow": "{{ 10.0 ** 1000 }}",
    "include": "{% include 'other' %}",
    "extends": "{% extends 'other' %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "not": "{{ " + "not " * 5000 + "1 }}",
    "sums": "{{ " + "1 + " * 50000 + "1 }}",
    "attributes": "{{ messages" + ".a" * 50000 + " }}",
    "blocks": "{% for a in b %}" * 60 + "{% endfor %}" * 60,
    "digits": "{{ " + "1" * 5000 + " }}",
    "length": "x" * (jinja_budget.LONGEST_SOURCE + 1),
    "sandbox": "{{ messages.append(1) }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "descriptor": "{{ dict.get({}, 1) }}",
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_template_is_named_and_not_the_row(name, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("of the target")
    tokenizer = own.merging_tokenizer(FAULTY[name])
    tokenizer.name_or_path = str(tmp_path)
    with pytest.raises(NoChatTemplateError) as caught:
        ChatTemplate(tokenizer).render(TURNS, "file:1")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'chat_template.jinja'}: its chat template ")
    assert len(text.splitlines()) == 1 and len(text) < 500 and "file:1" not in text


@pytest.mark.parametrize("fault", ["{{ raise_exception('no') }}", "{{ 1 + m.content }}"])
def test_a_template_that_takes_other_rows_refuses_the_row(fault):
    source = (
        "{% for m in messages %}{% if 'bad' in m.content %}" + fault + "{% endif %}{% endfor %}"
    )
    made = ChatTemplate(own.merging_tokenizer(source))
    with pytest.raises(UserError, match=r"^file:1: the chat template refuses these turns \("):
        made.render([{"role": "user", "content": "bad"}], "file:1")


def test_what_templates_use_writes_the_same_text():
    """Each guarded filter, method and operator, against Jinja's own."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = (
        "{{ 'ab' * 3 }}{{ [1] * 2 }}{{ 2 ** 5 }}{{ 7 % 4 }}{{ '%s-%03d' % ('a', 5) }}"
        "{{ '%s' | format('x') }}{{ '{}+{a}'.format(1, a=2) }}{{ 'x' | center(5) }}"
        "{{ 'a\nb' | indent(2) }}{{ 'a\nb' | indent(2, true) }}{{ [1, 2] | join('-') }}"
        "{{ messages | map(attribute='content') | join(', ') }}{{ ', '.join(['a', 'b']) }}"
        "{{ 'aXb' | replace('X', 'yy') }}{{ 'aXb'.replace('X', 'yy') }}{{ 1.256 | round(2) }}"
        "{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ [1, 2] | sum }}"
        "{{ 'x'.ljust(3) }}{{ 'x'.rjust(3) }}{{ '5'.zfill(3) }}{{ 'a\tb'.expandtabs(4) }}"
        "{{ messages | map('tojson') | join }}{{ messages[0].items() | list }}"
        "{% macro f(x) %}<{{ x }}{{ caller and caller() }}>{% endmacro %}{{ f('a' ~ 'b') }}"
        "{% call f(1) %}c{% endcall %}"
        "{% with a = 'b' ~ 'c' %}{{ a }}{% endwith %}{% filter upper %}abc{% endfilter %}"
        "{% for i in [1, 2] recursive %}{{ i }}{% if i == 1 %}{{ loop([5, 6]) }}{% endif %}"
        "{% endfor %}{% set ns = namespace(a='') %}"
        "{% for i in range(3) %}{% set ns.a = ns.a + 'x' %}{% endfor %}"
        "{{ ns.a }}{% set b %}{{ ns.a }}!{% endset %}{{ b }}{{ 'abc' | striptags | wordwrap(2) }}"
        "{{ " + " ~ ".join(["ns.a"] * 40) + " }}{{ [" + ", ".join(["b"] * 40) + "] | length }}"
    )
    plain = ImmutableSandboxedEnvironment()
    written = Program(source.replace("tojson", "string")).render({"messages": TURNS})
    assert written == plain.from_string(source.replace("tojson", "string")).render(messages=TURNS)


def test_limits_hold_for_all_renderings_together():
    """Each rendering begins with its whole budget and its whole time."""
    program = Program("{{ 'x' * 10**7 }}")
    for _ in range(20):
        assert len(program.render({})) == 10**7
