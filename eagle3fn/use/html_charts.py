"""Charts as inline SVG that need no script: values show under the pointer by CSS alone.

Colours are classes of the page: `s0`, `s1`, `s2` for the first, second and third series.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

from eagle3fn.base.errors import printable

_WIDTH = 420
_LEFT = 48
_RIGHT = 408
_TOP = 30
_BOTTOM = 204
_LABEL = 40  # letters of a name
_SMALLEST = 1e-300  # between two ticks: powers of ten below are not exact

Number = float | None


class Line(NamedTuple):
    """A line of a chart; None is a gap. `dots` marks each point."""

    name: str
    points: Sequence[tuple[float, Number]]
    dots: bool = False


class Bars(NamedTuple):
    """One series of a bar chart, a value for each group; None is no bar."""

    name: str
    values: Sequence[Number]


class Mark(NamedTuple):
    """A dotted line across a chart at a value of its axis."""

    at: float
    label: str


class Chart(NamedTuple):
    """A drawn chart, and the same numbers as a table."""

    title: str
    svg: str  # escaped: to be put into a page as it is
    legend: list[str]  # names of the series, in the order of their colours
    header: list[str]
    rows: list[list[str]]


def short(value: Number) -> str:
    """A number in four digits at most: `0.1234`, `1.2k`, `31k`, `4.5M`; a dash for None."""
    if value is None:
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scale = 1e3 if letter == "k" else size
            return f"{value / scale:.3g}{letter}" if abs(value) < 999.5 * scale else f"{value:.3g}"
    return f"{value:.4g}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, `most` (>= 4) at most: 1, 2 or 5 times `10^n`."""
    if not high > low:
        return [low]
    rough = (high - low) / max(most - 1, 1)
    if rough < _SMALLEST:
        return [low]
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


class _Scale(NamedTuple):
    """From a value to a place in the drawing."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def _range(values: list[float], pad: float, zero: bool = False) -> tuple[float, float]:
    """From the least to the largest value, with a margin; never empty."""
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    if zero:
        low = min(low, 0.0)
    if high <= low:
        return low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
    margin = (high - low) * pad
    return (low if zero and low == 0 else low - margin), high + margin


def line_chart(
    title: str,
    x_label: str,
    lines: Sequence[Line],
    *,
    x_name: Callable[[float], str] = short,
    under: Callable[[float], str] | None = None,
    across: Mark | None = None,
    down: Mark | None = None,
) -> Chart:
    """Lines over numbers.

    Args:
        title: says what is measured.
        x_label: says of what.
        lines: three at most.
        x_name: a place's name, for the values and the table.
        under: a second label of each tick, below its number.
        across: a level.
        down: a place.
    """
    places = sorted({x for line in lines for x, _ in line.points})
    values = [y for line in lines for _, y in line.points if y is not None]
    if across is not None:
        values.append(across.at)
    x = _Scale(*_range([*places, *([down.at] if down else [])], 0.0), _LEFT, _RIGHT)
    y = _Scale(*_range(values, 0.06), _BOTTOM, _TOP)

    # Axes.
    svg = _canvas(title, [line.name for line in lines])
    _y_axis(svg, y)
    for tick in ticks(x.low, x.high, 5):
        _text(svg, x.at(tick), _BOTTOM + 16, short(tick), "tick middle")
        if under is not None:
            # A label in the middle of the last tick would leave the picture.
            is_last = x.at(tick) > _RIGHT - 30
            place = _RIGHT + 8 if is_last else x.at(tick)
            side = "end" if is_last else "middle"
            _text(svg, place, _BOTTOM + 30, under(tick), f"tick {side} faint")
    _x_label(svg, x_label, below=30 if under is None else 44)
    _marks(svg, x, y, across, down)

    # Lines, and what shows under the pointer.
    for number, line in enumerate(lines):
        _draw_line(svg, line, x, y, f"s{number}")
    found = [dict(line.points) for line in lines]
    rows = [[x_name(place), *(short(each.get(place)) for each in found)] for place in places]
    for number, place in enumerate(places):
        left = _LEFT if number == 0 else (x.at(places[number - 1]) + x.at(place)) / 2
        last = number == len(places) - 1
        right = _RIGHT if last else (x.at(place) + x.at(places[number + 1])) / 2
        dots = [(x.at(place), y.at(v)) for each in found if (v := each.get(place)) is not None]
        _hit(svg, (left, right), _values(rows[number], lines), dots)
    return Chart(
        title, _markup(svg), [line.name for line in lines], [x_label, *_names(lines)], rows
    )


def bar_chart(
    title: str,
    x_label: str,
    groups: Sequence[str],
    series: Sequence[Bars],
    *,
    across: Mark | None = None,
) -> Chart:
    """Bars from 0 on, side by side in each group.

    Args:
        title: says what is measured.
        x_label: says of what.
        groups: the groups' names.
        series: three at most.
        across: a level.
    """
    values = [value for each in series for value in each.values if value is not None]
    if across is not None:
        values.append(across.at)
    y = _Scale(*_range([0.0, *values], 0.06, zero=True), _BOTTOM, _TOP)
    svg = _canvas(title, [each.name for each in series])
    _y_axis(svg, y)
    _x_label(svg, x_label, below=30)

    width = (_RIGHT - _LEFT) / max(len(groups), 1)
    every = math.ceil(len(groups) / 8)  # names that there is room for
    rows = []
    for number, name in enumerate(groups):
        left = _LEFT + number * width
        bar = width * 0.76 / max(len(series), 1)
        for place, each in enumerate(series):
            value = each.values[number]
            if value is None:
                continue
            at = left + width * 0.12 + place * bar
            _rect(svg, at, y.at(value), bar, y.at(0) - y.at(value), f"bar s{place}")
        if number % every == 0:
            _text(svg, left + width / 2, _BOTTOM + 16, name, "tick middle")
        rows.append([printable(name, _LABEL), *(short(each.values[number]) for each in series)])
        _hit(svg, (left, left + width), _values(rows[-1], series), [])
    _marks(svg, None, y, across, None)  # over the bars
    return Chart(title, _markup(svg), [e.name for e in series], [x_label, *_names(series)], rows)


# Parts of a drawing


def _canvas(title: str, names: list[str]) -> Element:
    label = f"Chart of {title}: {', '.join(names)}. The table after it has the numbers."
    return Element("svg", {"role": "img", "aria-label": printable(label, 300)})


def _x_label(svg: Element, text: str, below: int) -> None:
    """The name of the axis, so far below it; the drawing ends there."""
    place = _BOTTOM + below
    _text(svg, (_LEFT + _RIGHT) / 2, place, text, "axis middle")
    svg.set("viewBox", f"0 0 {_WIDTH} {place + 6}")


def _y_axis(svg: Element, y: _Scale) -> None:
    for tick in ticks(y.low, y.high):
        _path(svg, [(_LEFT, y.at(tick)), (_RIGHT, y.at(tick))], "grid")
        _text(svg, _LEFT - 6, y.at(tick) + 4, short(tick), "tick end")


def _marks(
    svg: Element, x: _Scale | None, y: _Scale, across: Mark | None, down: Mark | None
) -> None:
    if across is not None:
        _path(svg, [(_LEFT, y.at(across.at)), (_RIGHT, y.at(across.at))], "mark")
        _text(svg, _RIGHT - 2, y.at(across.at) - 5, across.label, "tick end label")
    if down is not None and x is not None:
        place = x.at(down.at)
        _path(svg, [(place, _TOP), (place, _BOTTOM)], "mark")
        if place > (_LEFT + _RIGHT) / 2:
            _text(svg, place - 4, _TOP + 10, down.label, "tick end label")
        else:
            _text(svg, place + 4, _TOP + 10, down.label, "tick label")


def _draw_line(svg: Element, line: Line, x: _Scale, y: _Scale, style: str) -> None:
    """A line cut at its gaps; a part of one point is a dot."""
    part: list[tuple[float, float]] = []
    for place, value in [*line.points, (0.0, None)]:
        if value is not None:
            part.append((x.at(place), y.at(value)))
            continue
        if len(part) > 1:
            _path(svg, part, f"line {style}")
        if len(part) == 1 or line.dots:
            for dot in part:
                _dot(svg, dot, f"dot {style}")
        part = []


def _hit(
    svg: Element, sides: tuple[float, float], text: str, dots: list[tuple[float, float]]
) -> None:
    """A part of the width whose values show while the pointer is in it."""
    group = SubElement(svg, "g", {"class": "hit"})
    _rect(group, sides[0], _TOP, sides[1] - sides[0], _BOTTOM - _TOP, "")
    for dot in dots:
        _dot(group, dot, "ring")
    _text(group, 4, 16, text, "value")


def _values(row: list[str], series: Sequence[Line] | Sequence[Bars]) -> str:
    names = ["", *_names(series)]
    shown = [f"{name} {text}".strip() for name, text in zip(names, row, strict=True) if text != "–"]
    return " · ".join(shown)


def _names(series: Sequence[Line] | Sequence[Bars]) -> list[str]:
    return [each.name for each in series]


def _path(parent: Element, points: list[tuple[float, float]], style: str) -> None:
    place = "L".join(f"{left} {top}" for left, top in points)
    SubElement(parent, "path", {"d": f"M{place}", "class": style})


def _dot(parent: Element, place: tuple[float, float], style: str) -> None:
    SubElement(
        parent, "circle", {"cx": str(place[0]), "cy": str(place[1]), "r": "3", "class": style}
    )


def _rect(
    parent: Element, left: float, top: float, width: float, height: float, style: str
) -> None:
    sizes = {"x": left, "y": top, "width": max(width, 0.0), "height": max(height, 0.0)}
    attributes = {name: f"{value:.1f}" for name, value in sizes.items()}
    SubElement(parent, "rect", attributes | {"class": style})


def _text(parent: Element, left: float, top: float, text: str, style: str) -> None:
    where = {"x": f"{left:.1f}", "y": f"{top:.1f}", "class": style}
    SubElement(parent, "text", where).text = printable(text, 120)


def _markup(svg: Element) -> str:
    """The drawing as HTML; the serializer escapes its texts."""
    return tostring(svg, encoding="unicode")
