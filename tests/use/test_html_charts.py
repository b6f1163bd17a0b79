"""Charts: their ticks, gaps, marks and tables; what they name is escaped."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle3fn.use.html_charts import Bars, Chart, Line, Mark, bar_chart, line_chart, short, ticks

NUMBERS = st.floats(-1e15, 1e15, allow_subnormal=False)
OR_NONE = st.none() | NUMBERS


def drawn(chart: Chart) -> ElementTree.Element:
    """The chart as a tree: it is well formed."""
    return ElementTree.fromstring(chart.svg)


def of_class(chart: Chart, name: str) -> list[ElementTree.Element]:
    return [each for each in drawn(chart).iter() if name in each.get("class", "").split()]


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(4, 12))
def test_ticks_are_few_round_and_inside(low, width, most):
    high = low + max(width, abs(low) * 1e-6)
    found = ticks(low, high, most)
    margin = (high - low) * 1e-6
    assert 1 <= len(found) <= most
    assert all(low - margin <= tick <= high + margin for tick in found)
    if len(found) > 1:
        step = (found[-1] - found[0]) / (len(found) - 1)
        digits = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(digits - round_) for round_ in (1, 2, 5)) < 1e-2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.12345, "0.1235"),
        (999.0, "999"),
        (1234.0, "1234"),
        (31_049, "31k"),
        (999_999, "1e+06"),
        (4_500_000, "4.5M"),
        (-2e9, "-2G"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


@given(st.lists(st.tuples(st.integers(0, 10**8), OR_NONE), max_size=8, unique_by=lambda p: p[0]))
def test_every_point_of_a_line_is_inside_the_drawing_and_in_the_table(points):
    points.sort()
    chart = line_chart("loss", "step", [Line("a", points, dots=True)])
    _, _, width, height = map(float, drawn(chart).get("viewBox", "").split())
    dots = of_class(chart, "dot")
    assert len(dots) == sum(value is not None for _, value in points)
    for dot in dots:
        assert 0 <= float(dot.get("cx", "nan")) <= width
        assert 0 <= float(dot.get("cy", "nan")) <= height
    assert chart.rows == [[short(x), short(value)] for x, value in points]
    assert len(of_class(chart, "hit")) == len(points)


def test_higher_values_are_drawn_higher():
    chart = line_chart("t", "x", [Line("a", [(1, 1.0), (2, 3.0), (3, 2.0)], dots=True)])
    tops = [float(dot.get("cy", "nan")) for dot in of_class(chart, "dot")]
    assert tops[1] < tops[2] < tops[0]
    bars = of_class(bar_chart("t", "x", ["a", "b"], [Bars("n", [1.0, 2.0])]), "bar")
    heights = [float(bar.get("height", "nan")) for bar in bars]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)


def test_a_missing_value_is_a_gap_and_a_lone_value_a_dot():
    line = Line("a", [(1, 1.0), (2, 2.0), (3, None), (4, 2.0), (5, None)])
    chart = line_chart("loss", "step", [line])
    assert [len(re.findall("[ML]", each.get("d", ""))) for each in of_class(chart, "line")] == [2]
    assert len(of_class(chart, "dot")) == 1
    bars = bar_chart("n", "x", ["a", "b"], [Bars("n", [None, 2.0])])
    assert len(of_class(bars, "bar")) == 1 and bars.rows == [["a", "–"], ["b", "2"]]


def test_values_under_the_pointer_are_those_of_every_series_there():
    lines = [Line("one", [(1, 0.5), (2, 0.25)]), Line("two", [(2, 4.0)], dots=True)]
    chart = line_chart("t", "x", lines, x_name=lambda x: f"step {x}")
    assert [each.text for each in of_class(chart, "value")] == [
        "step 1 · one 0.5",
        "step 2 · one 0.25 · two 4",
    ]
    assert chart.header == ["x", "one", "two"]


def test_marks_are_drawn_with_their_labels():
    chart = line_chart(
        "t",
        "x",
        [Line("a", [(0, 1.0), (10, 2.0)])],
        under=lambda x: f"under {x:g}",
        across=Mark(5.0, "level"),
        down=Mark(4, "place"),
    )
    texts = [each.text for each in drawn(chart).iter("text")]
    assert len(of_class(chart, "mark")) == 2
    assert {"level", "place", "under 0"} <= set(texts)


EVIL = "</text><script>alert(1)</script>\x1b[2J\ud800\u202e"


def test_names_are_escaped():
    for chart in (
        line_chart(EVIL, EVIL, [Line(EVIL, [(1, 1.0)])]),
        bar_chart(EVIL, EVIL, [EVIL], [Bars(EVIL, [1.0])]),
    ):
        assert "<script" not in chart.svg
        assert not {"\x1b", "\ud800", "\u202e"} & set(chart.svg)
        assert {each.tag for each in drawn(chart).iter()} <= set(
            "svg g path text rect circle".split()
        )


def test_second_label_of_the_last_tick_ends_within_the_picture():
    chart = line_chart("t", "x", [Line("a", [(0, 1.0), (6, 2.0)])], under="{:g}k tokens".format)
    labels = of_class(chart, "faint")
    *others, last = labels
    assert last.text == "6k tokens" and "end" in last.get("class", "").split()
    assert all("middle" in label.get("class", "").split() for label in others)
