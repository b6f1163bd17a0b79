"""Hypothesis strategies for tiny problems, and a list of drawn ones from a seed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from eagle3fn.testing.builders import Case

MASKS = ("drawn",) * 12 + ("padding",) * 5 + ("full",) * 5 + ("one", "empty")  # the last two leave little to compare
TOKENS = ("mixed",) * 5 + ("inside", "inside", "outside")
LOSSES = ("kl", "lk_alpha", "lk_lambda")


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Cases over every option; `fixed` pins fields of `Case`.

    fp32 and bf16 are drawn; for fp64 pin `dtype`. A draft of another width than its target's trains its own embedding.
    """
    kv_heads, vocab = draw(st.sampled_from([1, 2])), draw(st.integers(20, 50))
    hidden = draw(st.sampled_from([16, 24]))
    case = Case(
        heads=(kv_heads * draw(st.sampled_from([1, 2, 3])), kv_heads),
        head_dim=draw(st.sampled_from([4, 6, 8])),
        hidden=hidden,
        target_hidden=draw(st.sampled_from([hidden, hidden, 20])),
        intermediate=draw(st.integers(8, 40)),
        vocab=vocab,
        draft_vocab=draw(st.one_of(st.just(vocab), st.integers(vocab // 2, vocab - 1))),
        lengths=tuple(draw(_lengths())),
        steps=draw(st.sampled_from([3, 1, 2, 4, 5, 6, 7, 8])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        teacher=draw(st.sampled_from(["compact", "full"])),
        chunk=draw(st.integers(3, 60)),
        normalization=draw(st.sampled_from(["rows", "mask"])),
        loss=draw(st.sampled_from(LOSSES)),
        kl_scale=draw(st.sampled_from([1.0, 0.5, 0.0])),
        kl_decay=draw(st.sampled_from([3.0, 1.0, 0.0])),
        mask=draw(st.sampled_from(MASKS)),
        tokens=draw(st.sampled_from(TOKENS)),
        tied=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        theta=draw(st.sampled_from([10_000.0, 500_000.0, 100.0])),
        own_positions=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )
    return replace(case, **fixed)


def _lengths() -> st.SearchStrategy[list[int]]:
    """Of 1 to 4 rows, 4 to 10 tokens each."""
    return st.sampled_from([2, 1, 3, 4]).flatmap(lambda n: st.lists(st.integers(4, 10), min_size=n, max_size=n))


def oracle_cases(**fixed: Any) -> st.SearchStrategy[Case]:
    """Cases the old tool knows: a target as wide as the draft, and a division by all rows."""
    return cases(normalization="rows", **fixed).map(lambda case: replace(case, target_hidden=case.hidden))


def search(check: Callable[[Case], None], strategy: st.SearchStrategy[Case], count: int, start: int) -> None:
    """Call `check` on `count` drawn cases, the same ones for the same `start`; a failure is made smaller first."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.nested_given]
    phases = (Phase.generate, Phase.shrink)
    fixed = settings(max_examples=count, deadline=None, database=None, derandomize=False, print_blob=False,
                     phases=phases, suppress_health_check=quiet)  # fmt: skip

    @seed(start)
    @fixed
    @given(strategy)
    def run(case: Case) -> None:
        check(case)

    run()


def drawn(strategy: st.SearchStrategy[Case], count: int, start: int) -> list[Case]:
    """`count` cases, the same ones for the same `start` and hypothesis version."""
    found: list[Case] = []
    search(found.append, strategy, count, start)
    return found
