"""TOML that is read back to an equal value, and overrides of a command line."""

import doctest
import os
import shlex
import time
import tomllib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle3fn.base import toml
from eagle3fn.base.config import load_config
from eagle3fn.base.errors import UserError
from eagle3fn.base.toml import override, read_toml, to_toml
from tests.factories import make_draft

KEYS = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SCALARS = st.one_of(st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), TEXTS)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(TEXTS, SCALARS))


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, max_size=3), max_size=3))
def test_written_toml_is_read_back_to_an_equal_value(tree):
    assert tomllib.loads(to_toml(tree)) == tree


def test_tuples_are_lists_and_keys_without_a_value_are_left_out():
    text = to_toml({"draft": {"aux_layers": (1, 2, 4), "rope_scaling": {"factor": None, "a": 1}}})
    assert tomllib.loads(text) == {"draft": {"aux_layers": [1, 2, 4], "rope_scaling": {"a": 1}}}


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("data.max_length=5", {"data": {"max_length": 5, "order": "stored"}}),
        ("data.order = 'x'", {"data": {"order": "x"}}),
        ("data.order=x y", {"data": {"order": "x y"}}),
        (
            "draft.aux_layers=[1,2,4]",
            {"data": {"order": "stored"}, "draft": {"aux_layers": [1, 2, 4]}},
        ),
        ("a.b.c=true", {"data": {"order": "stored"}, "a": {"b": {"c": True}}}),
    ],
)
def test_override_sets_a_value_in_toml_or_a_string(text, tree):
    found = {"data": {"order": "stored"}}
    override(found, text)
    assert found == tree


@pytest.mark.parametrize("text", ["data.order", "order=3", ""])
def test_override_without_section_key_and_value_is_refused(text):
    with pytest.raises(UserError, match=r"must read section.key=value"):
        override({}, text)


def test_override_of_a_key_of_many_parts_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"a key of more than 64 parts") as caught:
        override({}, "train.init" + ".a" * 3000 + "=1")
    assert len(str(caught.value)) < 200


def test_override_of_a_value_as_a_section_is_refused():
    with pytest.raises(UserError, match=r"data is a value, not a section"):
        override({"data": 3}, "data.order=stored")


def test_unreadable_toml_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.toml: no such file"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_text("a = [")
    with pytest.raises(UserError, match=r"a.toml: not TOML"):
        read_toml(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "[" * 1000 + "]" * 1000, "nested more than 64 deep"),
        ("a = " + "[" * 65 + "]" * 65, "nested more than 64 deep"),
        ("a = " + "{a = " * 1000, "nested more than 64 deep"),
        ("a." * 50_000 + "b = 1", "a key of more than 64 parts"),
        ("[" + "a." * 50_000 + "b]", "a key of more than 64 parts"),
        ("a = " + "9" * 5000, "a whole number of too many digits"),
        ("a = 0x" + "f" * 5000, "a whole number beyond 64 bits"),
        ("a = [9223372036854775808]", "a whole number beyond 64 bits"),
        ("a = 1979-05-27", "1979-05-27: a date or time"),
        ("#" * 2**18 + "\n", "larger than 262144 bytes"),
    ],
    ids=lambda value: value[:12],
)
def test_toml_beyond_any_configuration_is_refused_in_one_line(tmp_path, text, reason):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UserError, match=f"a.toml: .*{reason}") as caught:
        read_toml(tmp_path / "a.toml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


DOTS = "." * 70
KEY = "a" + ".a" * 64


@pytest.mark.parametrize(
    "text",
    [
        f"a = 1 # {DOTS}",
        f"# don't {DOTS}\na = 1",
        f'a = "{DOTS}"',
        f"a = '{DOTS}'",
        f'a = "\\"{DOTS}" # {DOTS}',
        f'a = """{DOTS}\n\\"""{DOTS}"""""',
        f"a = '''{DOTS}\n'{DOTS}'''",
        f'"{DOTS}" = 1',
        f"[a.'{DOTS}']",
        f'a = ["{DOTS}", {{b = "{DOTS}"}}]',
        "a" + ".a" * 63 + " = 1",
    ],
)
def test_dots_of_texts_and_comments_are_no_keys(tmp_path, text):
    (tmp_path / "a.toml").write_text(text)
    assert read_toml(tmp_path / "a.toml") == tomllib.loads(text)


BEFORE = ["'#'", '""""""', '"""b"""""', "'''b'''''", '"\\""', '"""\\\\"""', "'\\'", '"#"']


@pytest.mark.parametrize("value", BEFORE)
@pytest.mark.parametrize("key", [f"{KEY} = 1", f"[{KEY}]", f"[[{KEY}]]", f"'b'.{KEY} = 1"])
def test_no_text_hides_a_key_after_it(tmp_path, value, key):
    for text in (f"a = {value}\n{key}", f"# ''' \"\"\"\n{key}", f"b = {{a = {value}, {KEY} = 1}}"):
        (tmp_path / "a.toml").write_text(text)
        with pytest.raises(UserError, match="a key of more than 64 parts"):
            read_toml(tmp_path / "a.toml")


@pytest.mark.parametrize("part", ['"""', "'''", '\\"""', '"\\', "'", '"', "\\", '"""\\', '\\"'])
def test_texts_without_an_end_take_no_time(tmp_path, part):
    (tmp_path / "a.toml").write_text("a = " + part * (2**17 // len(part)))
    begin = time.perf_counter()
    with suppress(UserError):
        read_toml(tmp_path / "a.toml")
    assert time.perf_counter() - begin < 2


def test_toml_that_is_no_text_or_no_file_is_refused(tmp_path):
    (tmp_path / "a.toml").write_bytes(b'a = "\xff"')
    with pytest.raises(UserError, match=r"a.toml: not UTF-8, byte 6"):
        read_toml(tmp_path / "a.toml")
    os.mkfifo(tmp_path / "p.toml")
    with pytest.raises(UserError, match=r"p.toml: is a pipe"):
        read_toml(tmp_path / "p.toml")


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 2000, "1\nb = 2", "1979-05-27"])
def test_override_that_is_no_value_is_a_text(value):
    tree = {}
    override(tree, f"data.order={value}")
    assert tree == {"data": {"order": value}}


def test_override_that_is_not_utf8_is_refused():
    with pytest.raises(UserError, match=r"is not UTF-8"):
        override({}, "train.init=\udcff")


def test_what_toml_has_not_is_not_written():
    with pytest.raises(UserError, match="None: TOML has no such value"):
        to_toml({"draft": {"rope_scaling": {"a": [None]}}})


def test_as_override_is_read_back():
    """A shell's quotes are added where it needs them."""
    assert doctest.testmod(toml).failed == 0
    for value in (1.0, 3, True, "all", ("norm", "bias"), {"a:b": 0.5, "kl": 1.0}):
        text = toml.as_override("a.b", value)
        tree: dict = {}
        override(tree, shlex.split(text)[0])
        found = tree["a"]["b"]
        assert (tuple(found) if isinstance(found, list) else found) == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.decay_roles=norm", r"a list, such as 'optimizer\.decay_roles=\[\"norm\"\]'"),
        ("optimizer.decay_roles=norms", r"such as 'optimizer\.decay_roles=\[\"attention\"\]'"),
        ("draft.aux_layers=2", r"a list, such as draft\.aux_layers=\[1\]"),
    ],
)
def test_a_list_is_asked_for_as_it_is_written(setting, message):
    with pytest.raises(UserError, match=message):
        load_config(None, [setting], make_draft())
