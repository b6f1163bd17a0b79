"""Bad rows: all are counted, the first are named, and a share of them is left out where asked."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle3fn.base.errors import UserError
from eagle3fn.data.rejects import MEND_OR_SKIP, Dropped, allowed, rejecting, usable
from eagle3fn.data.row_files import FileRow, read_rows


def positive(row: FileRow) -> int:
    if row.value < 0:
        raise UserError(f"{row.where} (id {row.value}): {row.value} is negative; mend or delete it")
    return row.value


def rows(*numbers: int) -> list[FileRow]:
    """A row for each number. That of 0 could not be read."""
    return [
        FileRow(
            f"a.jsonl:{place}",
            number or None,
            None if number else "broken; mend or delete the line",
        )
        for place, number in enumerate(numbers, 1)
    ]


def take(numbers, **options) -> list[int]:
    with rejecting("a.jsonl", **options) as rejects:
        return list(usable(rows(*numbers), positive, rejects))


def test_good_rows_pass_and_bad_ones_are_named_in_one_line():
    assert take([3, 1, 2]) == [3, 1, 2]
    message = (
        r"^a.jsonl: 3 of 5 rows are bad: a.jsonl:2: broken; "
        r"a.jsonl:3 \(id -1\): -1 is negative; a.jsonl:5 \(id -2\): -2 is negative; "
        r"mend or delete them$"
    )
    with pytest.raises(UserError, match=message):
        take([1, 0, -1, 2, -2])
    with pytest.raises(
        UserError, match=r"^a.jsonl: 1 of 2 rows is bad: .*; mend .* --skip-bad 0.05$"
    ):
        take([0, 1], remedy=MEND_OR_SKIP)


@given(st.integers(1, 30), st.integers(1, 100))
def test_the_share_that_a_refusal_names_suffices(bad, good):
    numbers = [0] * bad + [1] * good
    for limit in (None, 0.0):
        with pytest.raises(UserError) as raised:
            take(numbers, limit=limit, remedy=MEND_OR_SKIP)
        (share,) = re.findall(r"--skip-bad ([\d.]*\d)", str(raised.value))
        assert take(numbers, limit=float(share)) == [1] * good


def test_no_share_is_named_where_every_row_is_bad():
    for limit in (None, 0.0):
        with pytest.raises(UserError, match=r"2 of 2 rows are bad.*; mend or delete them$"):
            take([0, 0], limit=limit, remedy=MEND_OR_SKIP)


def test_five_bad_rows_are_named_of_more():
    with pytest.raises(UserError, match=r"^a.jsonl: 7 of 7 rows are bad") as raised:
        take([0] * 7)
    assert ": a.jsonl:1, :2, :3, :4, :5 and 2 more: broken; mend" in str(raised.value)


def test_five_reasons_are_shown_of_more():
    with pytest.raises(UserError, match=r"^a.jsonl: 9 of 9 rows are bad") as raised:
        take([-1, -2, -3, -4, -5, -6, -7, -1, 0])
    text = str(raised.value)
    assert "a.jsonl:1 (id -1), :8 (id -1): -1 is negative" in text
    assert text.count("negative") == 5 and text.endswith("…; mend or delete them")


@pytest.mark.parametrize(
    ("bad", "good", "passes"),
    [(1, 0, True), (1, 3, True), (2, 37, False), (2, 38, True), (3, 57, True), (3, 56, False)],
)
def test_a_share_of_bad_rows_is_left_out(bad, good, passes):
    numbers = [0] * bad + [1] * good
    if passes:
        assert take(numbers, limit=0.05) == [1] * good
    else:
        message = rf"{bad} of {bad + good} rows are bad, more than the share 0.05 that is left out"
        with pytest.raises(UserError, match=message):
            take(numbers, limit=0.05)


def test_a_file_that_is_mostly_bad_is_refused_before_its_end():
    read = []

    def broken():
        for _ in range(1000):
            read.append(1)
            yield FileRow("a", None, "broken")

    with pytest.raises(UserError, match="200 of 200 rows are bad"), rejecting("a", 0.5) as rejects:
        list(usable(broken(), positive, rejects))
    assert len(read) == 200


def test_rows_rejected_are_in_a_file_that_is_whole_or_not_there(tmp_path):
    path = tmp_path / "rejects.jsonl"
    with pytest.raises(UserError):
        take([0, 0, 0], limit=0.5, path=path)
    assert list(tmp_path.iterdir()) == []

    take([0, 1, -1, 2], limit=0.5, path=path)
    assert [row.value for row in read_rows(path)] == [
        {"where": "a.jsonl:1", "reason": "broken; mend or delete the line", "row": None},
        {"where": "a.jsonl:3", "reason": "-1 is negative; mend or delete it", "row": -1},
    ]
    take([1], limit=0.5, path=path)
    assert path.read_bytes() == b""


def test_a_rejected_row_may_hold_half_of_a_surrogate_pair(tmp_path):
    path = tmp_path / "rejects.jsonl"
    with rejecting("a", 1.0, path) as rejects:
        rejects.read()
        rejects.add("a:1", "not Unicode", {"text": "\ud800"})
    assert json.loads(path.read_text())["row"] == {"text": "\ud800"}


def test_an_error_of_the_block_is_not_covered_by_its_bad_rows():
    with pytest.raises(KeyError), rejecting("a") as rejects:
        rejects.read()
        rejects.add("a:1", "broken")
        raise KeyError


def test_rows_left_out_are_told():
    with rejecting("a", 0.5) as rejects:
        assert rejects.describe() == ""
        rejects.read(4)
        rejects.add("a:1", "broken")
    assert rejects.describe() == "a: 1 of 4 rows is bad: a:1: broken; left out"
    assert [allowed(0.05, count) for count in (0, 39, 40)] == [1, 1, 2]


def test_dropped_rows_are_told_by_frequency():
    dropped = Dropped()
    assert dropped.describe(10) == ""
    dropped["have no assistant turn"] += 2
    dropped["have no supervised token within --max-length 64"] += 7
    assert dropped.describe(10) == (
        "9 of 10 conversations dropped: 7 have no supervised token within --max-length 64, "
        "2 have no assistant turn"
    )
    dropped.update(Dropped({"have no assistant turn": 6}))  # another process's
    assert dropped.describe(20).startswith("15 of 20 conversations dropped: 8 have no assistant")
