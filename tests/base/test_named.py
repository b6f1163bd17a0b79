"""A setting's function, from a table or from a user's module."""

import math
from pathlib import Path

import pytest

from eagle3fn.base.errors import UserError
from eagle3fn.base.named import find

TABLE = {"half": lambda x: x / 2, "double": lambda x: 2 * x}


def test_a_table_name_comes_before_a_module():
    assert find("half", TABLE, "optimizer.name", ("x",)) is TABLE["half"]
    assert find("math:sqrt", TABLE, "optimizer.name", ("x",)) is math.sqrt
    assert find("math:sqrt", {"math:sqrt": abs}, "optimizer.name", ("x",)) is abs


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("thrid", r"one of 'half', 'double', or a function as 'module:function'"),
        ("math:", r"one of 'half', 'double'"),
        (":sqrt", r"one of 'half', 'double'"),
        ("no_such_module:f", r"cannot be imported \(ModuleNotFoundError: .*PYTHONPATH"),
        ("math:no_such", r"'no_such' must be a function of module 'math'; define it there"),
        ("math:pi", r"'pi' must be a function of module 'math'"),
        ("math:sqrt", r"must be a function of \(x, y\), not of \(x, /\)"),
        ("textwrap:dedent", r"must be a function of \(x, y\), not of \(text\)"),
    ],
)
def test_other_names_are_refused_with_a_remedy(name: str, message: str):
    with pytest.raises(UserError, match=rf"optimizer\.name = '{name}': .*{message}"):
        find(name, TABLE, "optimizer.name", ("x", "y"))


def test_a_function_may_have_more_arguments_with_defaults_or_no_known_ones():
    assert find("math:log", TABLE, "optimizer.name", ("x", "base")) is math.log
    assert find("textwrap:fill", TABLE, "optimizer.name", ("text",)).__name__ == "fill"


def test_an_error_inside_the_module_is_part_of_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "broken_loss.py").write_text("raise ValueError('no table of mine')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"ValueError: no table of mine\); mend it"):
        find("broken_loss:f", TABLE, "objective.loss", ("x",))
