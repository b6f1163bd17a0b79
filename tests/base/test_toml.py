"""TOML that is read back to an equal value, and overrides of a command line."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle3fn.base.errors import UserError
from eagle3fn.base.toml import override, read_toml, to_toml

KEYS = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=6)
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


def test_override_of_a_value_as_a_section_is_refused():
    with pytest.raises(UserError, match=r"data is a value, not a section"):
        override({"data": 3}, "data.order=stored")


def test_unreadable_toml_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.toml: no such file; name a TOML file"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_text("a = [")
    with pytest.raises(UserError, match=r"a.toml: not TOML"):
        read_toml(tmp_path / "a.toml")
