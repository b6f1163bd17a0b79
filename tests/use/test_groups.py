"""Answers by category and by prompt length: groups, buckets, the printed table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle3fn.base.errors import UserError
from eagle3fn.use.groups import check_categories, describe_groups, group_lines, length_bucket


def test_buckets_by_hand():
    sizes = (1, 64, 65, 128, 129, 256, 257, 1025)
    assert [length_bucket(size) for size in sizes] == [
        *("1-64", "1-64", "65-128", "65-128", "129-256", "129-256", "257-512", "1025-2048")
    ]


@given(st.integers(1, 10**6))
def test_a_size_lies_in_its_bucket_and_no_other(size):
    smallest, largest = map(int, length_bucket(size).split("-"))
    assert smallest <= size <= largest
    assert length_bucket(smallest) == length_bucket(largest) != length_bucket(largest + 1)


def test_groups_by_hand():
    """Categories in the prompts' order, buckets from the shortest on."""
    found = describe_groups([7, 5, 3], [100, 10, 90], ["code", "", "code"], sum)  # pyright: ignore
    assert list(found["by_category"].items()) == [("code", 10), ("(none)", 5)]
    assert list(found["by_prompt_length"].items()) == [("1-64", 5), ("65-128", 10)]


@pytest.mark.parametrize("categories", [[], ["", ""]])
def test_without_categories_there_are_none(categories):
    assert describe_groups([1, 2], [3, 4], categories, len) == {  # pyright: ignore
        "by_prompt_length": {"1-64": 2}
    }


def test_table_by_hand():
    row = {"prompts": 2, "tokens": 40, "verifications": 25, "accepted_length": 1.52}
    unknown = {"prompts": 1, "tokens": 9, "verifications": None, "accepted_length": None}
    report = {"by_category": {"code": row, "a\x1bb": unknown}, "by_prompt_length": {"1-64": row}}
    assert group_lines(report) == [
        "category                 accepted  prompts verified   tokens",
        "code                        1.520        2       25       40",
        "a\\x1bb                          -        1        -        9",
    ]


def test_another_number_of_categories_is_refused():
    check_categories(["a", "b"], [])
    with pytest.raises(UserError, match="categories: 1 of 2 prompts"):
        check_categories(["a", "b"], ["x"])
