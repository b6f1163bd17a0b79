"""Drawn tiny problems: one recipe, as a Hypothesis strategy or as a list from a seed."""

import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from eagle3fn.testing.builders import Case

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LOSSES = ("kl", "lk_alpha", "lk_lambda")
MASKS = (
    ("drawn",) * 18 + ("padding",) * 8 + ("full",) * 8 + ("one", "empty")
)  # the last two leave little to compare
TOKENS = ("mixed",) * 5 + ("inside", "inside", "outside")
LONGEST = (
    ((4, 10),) * 18 + ((11, 32),) * 5 + ((1, 3),)
)  # in one or two places little is left to compare
PLACES = 64  # B·S at most


def recipe(pick: Callable[[Sequence[Any]], Any], number: Callable[[int, int], int]) -> Case:
    """A case over every option, from a way to choose and a way to draw a whole number between two others.

    fp32 and bf16 are drawn; fp64 is for who pins it. A draft of another width than its target's trains its own
    embedding.
    """
    kv_heads, vocab, hidden = pick([1, 2]), number(20, 50), pick([16, 24])
    return Case(
        heads=(kv_heads * pick([1, 2, 3]), kv_heads),
        head_dim=pick([4, 6, 8]),
        hidden=hidden,
        target_hidden=pick([hidden, hidden, 20]),
        intermediate=number(8, 40),
        vocab=vocab,
        draft_vocab=vocab if pick([False, True]) else number(vocab // 2, vocab - 1),
        lengths=_lengths(pick, number),
        steps=pick([3, 1, 2, 4, 5, 6, 7, 8]),
        dtype=pick(["float32", "bfloat16"]),
        teacher=pick(["full", "compact"]),
        chunk=number(3, 60),
        normalization=pick(["rows", "mask"]),
        loss=pick(LOSSES),
        kl_scale=pick([1.0, 0.5, 0.0]),
        kl_decay=pick([3.0, 1.0, 0.0]),
        mask=pick(MASKS),
        tokens=pick(TOKENS),
        tied=pick([False, True]),
        eps=pick([1e-6, 1e-5, 1e-2]),
        theta=pick([10_000.0, 500_000.0, 100.0]),
        own_positions=pick([False, True]),
        seed=number(0, 10**6),
    )


def _lengths(
    pick: Callable[[Sequence[Any]], Any], number: Callable[[int, int], int]
) -> tuple[int, ...]:
    """One to four samples' lengths, shorter than the unroll or longer; the longest stands anywhere among them."""
    rows = pick([2, 1, 3, 4])
    longest = min(number(*pick(LONGEST)), PLACES // rows)
    full = number(0, rows - 1)
    return tuple(longest if row == full else number(1, longest) for row in range(rows))


def for_oracle(case: Case) -> Case:
    """The case as the old tool knows it: a target as wide as the draft, and a division by all rows."""
    return replace(case, target_hidden=case.hidden, normalization="rows")


def cases(**fixed: Any) -> "SearchStrategy[Case]":
    """A Hypothesis strategy of cases; `fixed` pins fields of `Case`.

    What Hypothesis draws is one whole number, so that cases lie evenly over the options: choice by choice it repeats
    parts of what it drew before. A failing case is made plain by `simplest`, not by Hypothesis.
    """
    from hypothesis import strategies as st

    return st.integers(0, 2**24 - 1).map(lambda index: nth(index, 0, **fixed))


def oracle_cases(**fixed: Any) -> "SearchStrategy[Case]":
    """A Hypothesis strategy of cases the old tool knows."""
    return cases(**fixed).map(for_oracle)


def drawn(count: int, seed: int, **fixed: Any) -> list[Case]:
    """`count` cases, evenly over the options and the same ones for the same seed; `fixed` pins fields of `Case`."""
    return [nth(index, seed, **fixed) for index in range(count)]


def nth(index: int, seed: int, **fixed: Any) -> Case:
    """The case that stands at `index` in `drawn`."""
    source = random.Random(f"{seed} {index}")
    return replace(recipe(source.choice, source.randint), **fixed)


def simplest(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The case with every field at its default for which it still fails, the last field first."""
    plain = Case()
    for field in reversed(fields(Case)):
        simpler = replace(case, **{field.name: getattr(plain, field.name)})
        if simpler != case and _possible(simpler) and fails(simpler):
            case = simpler
    return case


def _possible(case: Case) -> bool:
    return case.draft_vocab <= case.vocab
