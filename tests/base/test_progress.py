"""Progress without a terminal: a line every half minute, with the time that is left."""

import sys
from collections.abc import Callable

import pytest

from eagle3fn.base import progress
from eagle3fn.base.progress import duration


@pytest.fixture
def pass_seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that this function alone moves."""
    now = 100.0

    def passed(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(progress, "monotonic", lambda: now)
    return passed


def test_a_line_comes_every_half_minute_and_says_what_is_left(pass_seconds, capsys):
    update = progress.bar("prompt", "plain")
    for done in range(1, 11):
        pass_seconds(10)
        update(done, 10)
    assert capsys.readouterr() == (
        "",
        "plain: prompt 3 of 10, 1 min 10 s left\n"
        "plain: prompt 6 of 10, 40.0 s left\n"
        "plain: prompt 9 of 10, 10.0 s left\n",
    )


def test_a_first_count_that_took_long_is_said_without_a_time_left(pass_seconds, capsys):
    update = progress.bar("step", log=True)
    pass_seconds(60)
    update(501, 1000, "loss 2.5")
    pass_seconds(60)
    update(502, 1000, "loss 2.4")
    assert capsys.readouterr() == (
        "step 501 of 1000: loss 2.5\nstep 502 of 1000: loss 2.4, 8 h 18 min left\n",
        "",
    )


def test_a_rate_is_of_what_was_done_since_the_first_count(pass_seconds, capsys):
    update = progress.bar("token", rate=True)
    pass_seconds(31)
    update(1000, 4000)  # found, not computed
    pass_seconds(40)
    update(2000, 4000)
    assert capsys.readouterr().err == (
        "token 1000 of 4000\ntoken 2000 of 4000, 25 tokens/s, 1 min 20 s left\n"
    )


def test_a_count_without_an_end_is_said(pass_seconds, capsys):
    update = progress.counter("row")
    update(1)
    pass_seconds(31)
    update(2)
    assert capsys.readouterr().err == "row 2\n"


def test_a_short_stage_and_its_end_say_nothing(pass_seconds, capsys):
    update = progress.bar("step", log=True)
    for done in (1, 2):
        pass_seconds(29 * done)
        update(done, 2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_and_no_lines(pass_seconds, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    update = progress.bar("step", log=True)
    for done in (1, 2, 3):
        pass_seconds(60)
        update(done, 3, "loss 2.5")
    progress.close()
    said = capsys.readouterr()
    assert said.out == "" and "step 2 of 3" not in said.err


def test_durations_have_two_units():
    times = [0.4, 75, 3 * 3600 + 120, 200_000]
    assert [duration(time) for time in times] == ["0.4 s", "1 min 15 s", "3 h 2 min", "2 d 7 h"]
