"""Answers of an evaluation by the category and the length of their prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from eagle3fn.base.errors import UserError, printable

T = TypeVar("T")
_SHORTEST = 64  # tokens of the first bucket at most
_NONE = "(none)"  # the category of prompts without one, where others have one

GROUPS = {"by_category": "category", "by_prompt_length": "prompt tokens"}
"""Keys of a report, and what their groups are called in a table."""


def check_categories(prompts: Sequence[str], categories: Sequence[str]) -> None:
    """Refuse another number of categories than of prompts; none at all is right.

    Raises:
        UserError: says both numbers.
    """
    if categories and len(categories) != len(prompts):
        raise UserError(
            f"categories: {len(categories)} of {len(prompts)} prompts; name one for each, or none"
        )


def length_bucket(size: int) -> str:
    """The bucket of a prompt of `size` tokens: "1-64", "65-128", "129-256", and so on."""
    largest = _SHORTEST
    while size > largest:
        largest *= 2
    smallest = 1 if largest == _SHORTEST else largest // 2 + 1
    return f"{smallest}-{largest}"


def describe_groups(
    answers: Sequence[T],
    lengths: Sequence[int],
    categories: Sequence[str],
    describe: Callable[[list[T]], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The report's `by_category`, if any prompt has one, and `by_prompt_length`.

    Args:
        answers: one to each prompt.
        lengths: of the prompts, in tokens.
        categories: of the prompts, or none.
        describe: numbers over some of the answers.
    """
    found = {}
    if any(categories):
        names = [category or _NONE for category in categories]
        found["by_category"] = _described(names, answers, describe)

    # Buckets from the shortest on.
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    buckets = [length_bucket(lengths[number]) for number in order]
    ordered = [answers[number] for number in order]
    found["by_prompt_length"] = _described(buckets, ordered, describe)
    return found


def _described(
    names: Sequence[str],
    answers: Sequence[T],
    describe: Callable[[list[T]], dict[str, Any]],
) -> dict[str, Any]:
    groups: dict[str, list[T]] = {}
    for name, answer in zip(names, answers, strict=True):
        groups.setdefault(name, []).append(answer)
    return {name: describe(group) for name, group in groups.items()}


def group_lines(report: Mapping[str, Any]) -> list[str]:
    """The report's groups as a table for people; no lines where all prompts are in one group."""
    lines = []
    for key, title in GROUPS.items():
        groups = report.get(key, {})
        if len(groups) > 1:
            lines.append(f"{title:24} {'accepted':>8} {'prompts':>8} {'verified':>8} {'tokens':>8}")
            lines += [_line(printable(name, 24), row) for name, row in groups.items()]
    return lines


def _line(name: str, row: Mapping[str, Any]) -> str:
    """A group's numbers; "-" where an engine did not count."""
    length = row["accepted_length"]
    verified = row["verifications"]
    return (
        f"{name:24} {'-' if length is None else format(length, '.3f'):>8} {row['prompts']:>8} "
        f"{'-' if verified is None else verified:>8} {row['tokens']:>8}"
    )
