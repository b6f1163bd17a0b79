"""Tiny problems drawn at random: a Hypothesis strategy, or a list that a seed determines.

Both take every field's values from one table, `VALUES`.
"""

import functools
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import Field, replace
from itertools import islice, takewhile
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from eagle3fn.base.draft_config import switches
from eagle3fn.base.weights import Weights
from eagle3fn.model.losses import LOSSES
from eagle3fn.testing.builders import Case

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Pick = Callable[[str, Sequence[Any]], Any]
"""Chooses one of the values. The name identifies the choice; no two choices of a case share one."""

MAX_ROWS = 64
"""`B·S` at most, so that a case stays cheap."""

TRIES = 40
"""How many values of one field `simplest` tries at most."""


def _weighted(weights: dict[Any, int]) -> tuple[Any, ...]:
    """Each value as often as its weight says."""
    return tuple(value for value, weight in weights.items() for _ in range(weight))


def _first(value: int, others: range) -> tuple[int, ...]:
    """All values of a range, one of them before the others."""
    return (value, *(other for other in others if other != value))


# Three of four cases have 4 to 10 tokens at most. With one to three, little is left to compare.
LONGEST = _weighted({length: 11 if 4 <= length <= 10 else 1 for length in range(1, 33)})

# What a switch of the draft is drawn from, by its field's type; those of other types are not drawn.
SWITCH_VALUES: dict[Any, Sequence[Any]] = {
    bool: (False, True),
    int: (1, 2, 3),
    int | None: (None, 1, 3, 9),
}


def switch_values(fields: Sequence[Field[Any]]) -> tuple[tuple[tuple[str, Any], ...], ...]:
    """No switch, each value of each switch alone, and the last values of all of them together;
    those that have their default are left out.
    """
    alone = []
    together = []
    for field in fields:
        others = [value for value in SWITCH_VALUES.get(field.type, ()) if value != field.default]
        alone += [((field.name, value),) for value in others]
        together += [(field.name, value) for value in others[-1:]]
    return ((), *alone, tuple(together))


LOSS_SUMS = (
    Weights({"kl": 0.5, "tv": 2.0}),
    Weights({"ce": 0.1, "lk": 1.0, "nla": 0.25}),
)
"""Weighted sums of losses by row; the second one reads settings."""

# What a loss reads; "lk_lambda" is SpecForge's, for those who pin it.
_SETTINGS_OF = {name: loss.needs for name, loss in LOSSES.items()}
_SETTINGS_OF["lk_lambda"] = _SETTINGS_OF["lk"]

VALUES: dict[str, Sequence[Any]] = {
    "heads": ((4, 2), (1, 1), (2, 1), (3, 1), (2, 2), (6, 2)),
    "head_dim": (6, 4, 8),
    "hidden": (16, 24),
    "target_hidden": (16, 24, 20),
    "intermediate": _first(24, range(8, 41)),
    "vocab": _first(40, range(20, 51)),
    "draft_vocab": _first(24, range(10, 51)),
    "lengths": LONGEST,
    "steps": (1, 2, 3, 4, 5, 6, 7, 8),
    "dtype": ("float32", "bfloat16"),
    "teacher": ("full", "compact"),
    "chunk": _first(11, range(3, 61)),
    "normalization": ("rows", "mask"),
    "loss": (*LOSSES, *LOSS_SUMS),
    "kl_scale": (1.0, 0.5, 0.0),
    "kl_decay": (3.0, 1.0, 0.0),
    # "one" and "empty" leave little to compare.
    "mask": _weighted({"drawn": 18, "padding": 8, "full": 8, "one": 1, "empty": 1}),
    "tokens": _weighted({"mixed": 5, "inside": 2, "outside": 1}),
    "tied": (False, True),
    "eps": (1e-6, 1e-5, 1e-2),
    "theta": (10_000.0, 500_000.0, 100.0),
    "own_positions": (False, True),
    "taps": (3, 3, 3, 1, 2, 5),
    "switches": switch_values(switches()),
    "seed": range(10**6 + 1),
}
"""The values of every field of `Case`, the simplest first: what a failing case shrinks to.

A value that is listed several times is drawn so much more often. `_values` narrows the fields that
depend on others; `lengths` lists the longest sample's length; of `switches` any may be drawn
together. fp64 is for those who pin it. A draft
that is not as wide as its target trains an embedding of its own.
"""


def cases(**pins: Any) -> "SearchStrategy[Case]":
    """A Hypothesis strategy of cases.

    A failing case shrinks field by field: to one sample of one token, one unroll step, and the
    default of every other field, as far as it still fails. Every case on the way is a valid one.

    Args:
        pins: fields of `Case`, each a value or a strategy: `dtype="float64"`,
            `vocab=st.integers(30, 50)`. Fields that depend on a pinned one follow it.

    Raises:
        ValueError: `Case` has no such field.
    """
    from hypothesis import assume
    from hypothesis import strategies as st

    _check_fields(pins)

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        chosen = {}
        for name, pin in pins.items():
            chosen[name] = draw(pin) if isinstance(pin, st.SearchStrategy) else pin

        def pick(name: str, values: Sequence[Any]) -> Any:
            return draw(_one_of(name, values))

        drawn_case = _complete(chosen, pick)

        # Pins that are strategies may draw what does not go together.
        query_heads, key_value_heads = drawn_case.heads
        assume(drawn_case.draft_vocab <= drawn_case.vocab)
        assume(query_heads % key_value_heads == 0)
        return drawn_case

    return case()


@functools.lru_cache(maxsize=1024)
def _one_of(name: str, values: Sequence[Any]) -> "SearchStrategy[Any]":
    """A strategy of the values.

    Hypothesis takes strategies over equal elements for the same thing and spends most examples on
    copying choices between them, with all else unchanged. The name makes the elements differ.
    """
    from hypothesis import strategies as st

    if len(values) > 1000:  # the seed alone
        return st.sampled_from(values)
    return st.sampled_from([(name, value) for value in values]).map(itemgetter(1))


def drawn(count: int, seed: int, /, **pins: Any) -> list[Case]:
    """`count` cases, evenly over the options; the same ones for the same seed.

    Every field has its own source of random numbers, made from `seed`, the case's index and the
    field's name. So a new field, or a new value of one, leaves all others as they were.

    Args:
        count: how many.
        seed: any whole number.
        pins: fields of `Case` with the value they have in every case.

    Raises:
        ValueError: `Case` has no such field, or a pin is a strategy.
    """
    return [nth(index, seed, **pins) for index in range(count)]


def nth(index: int, seed: int, /, **pins: Any) -> Case:
    """The case at `index` of `drawn(count, seed, **pins)`, for any count above `index`."""
    _check_fields(pins)
    for name, pin in pins.items():
        if hasattr(pin, "example"):  # a strategy; Hypothesis need not be installed here
            raise ValueError(f"{name} = {pin!r}: must be a value; `cases` takes strategies")

    def pick(name: str, values: Sequence[Any]) -> Any:
        return random.Random(f"{seed} {index} {name}").choice(values)

    return _complete(pins, pick)


def _check_fields(pins: dict[str, Any]) -> None:
    unknown = [name for name in pins if name not in VALUES]
    if unknown:
        raise ValueError(f"{unknown[0]}: not a field of Case; it has {', '.join(VALUES)}")


def _complete(pins: dict[str, Any], pick: Pick) -> Case:
    """The case with the pinned fields; the others are picked, in the order of `VALUES`."""
    chosen = dict(pins)
    for name in VALUES:
        if name in chosen:
            continue
        if name == "lengths":
            chosen[name] = _lengths(pick)
        elif name == "switches":
            chosen[name] = _switches(pick)
        else:
            chosen[name] = pick(name, _values(name, chosen))
    return Case(**chosen)


def _values(name: str, chosen: dict[str, Any]) -> Sequence[Any]:
    """The values of a field that fit the fields chosen so far, the simplest first."""
    match name:
        case "vocab" if "draft_vocab" in chosen:
            # A pinned draft vocabulary needs a target vocabulary that holds it.
            least = chosen["draft_vocab"]
            return tuple(value for value in VALUES["vocab"] if value >= least) or (least,)

        case "draft_vocab":
            # In half of the cases the whole target vocabulary, else half of it or more.
            whole = chosen["vocab"]
            least = max(whole // 2, 1)
            smaller = range(least, whole)
            if Case.draft_vocab in smaller:
                part = _first(Case.draft_vocab, smaller)
            else:
                part = tuple(smaller)
            return part + (whole,) * max(len(part), 1)

        case "target_hidden":
            # In two of three cases the target is as wide as the draft.
            same = chosen["hidden"]
            return (same, same, 20)

        case "kl_scale" | "kl_decay":
            # Refused where the loss does not read them.
            loss = chosen["loss"]
            parts = [loss] if isinstance(loss, str) else loss
            if not any(name in _SETTINGS_OF.get(part, ()) for part in parts):
                return VALUES[name][:1]

    return VALUES[name]


def _switches(pick: Pick) -> tuple[tuple[str, Any], ...]:
    """In a third of the cases none; else any together, each of them off in two of three."""
    if not pick("any switch", (False, True, True)):
        return ()
    chosen = []
    for field in switches():
        off = (field.default,)
        others = [value for value in SWITCH_VALUES.get(field.type, ()) if value not in off]
        value = pick(f"switch {field.name}", off * 2 * max(len(others), 1) + tuple(others))
        if value != field.default:
            chosen.append((field.name, value))
    return tuple(chosen)


def _lengths(pick: Pick) -> tuple[int, ...]:
    """One to four samples' lengths. The longest has any place among them."""
    samples = pick("number of samples", (1, 2, 3, 4))
    longest = min(pick("longest sample", LONGEST), MAX_ROWS // samples)
    place_of_longest = pick("place of the longest sample", range(samples))

    lengths = []
    for sample in range(samples):
        if sample == place_of_longest:
            lengths.append(longest)
        else:
            lengths.append(pick(f"length of sample {sample}", range(1, longest + 1)))
    return tuple(lengths)


def simplest(case: Case, fails: Callable[[Case], bool], pinned: Collection[str] = ()) -> Case:
    """The case with every field as simple as it still fails.

    This is shrinking without Hypothesis: greedy, at most `TRIES` values of one field at a time,
    until no field gets simpler.

    Args:
        case: a case that fails.
        fails: whether a case fails.
        pinned: fields to leave as they are.
    """
    # The batch last: with few trained rows, a change of any other field may leave none of interest.
    last = ("steps", "lengths")
    others = [name for name in reversed(VALUES) if name not in last]
    names = [name for name in (*others, *last) if name not in pinned]

    before = None
    while case != before:
        before = case
        for name in names:
            if name == "lengths":
                case = _shortest(case, fails)
            else:
                case = _simplest_value(case, name, fails)
    return case


def _simplest_value(case: Case, name: str, fails: Callable[[Case], bool]) -> Case:
    """The case with the first value of one field that still fails."""
    current = getattr(case, name)
    simpler = takewhile(lambda value: value != current, dict.fromkeys(VALUES[name]))
    for value in islice(simpler, TRIES):
        changed = replace(case, **{name: value})
        if changed.draft_vocab <= changed.vocab and fails(changed):
            return changed
    return case


def _shortest(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The case with fewer samples, then shorter ones, until no single change fails any more."""
    for lengths in _shorter(case.lengths):
        changed = replace(case, lengths=lengths)
        if fails(changed):
            return _shortest(changed, fails)
    return case


def _shorter(lengths: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Lengths with one change: a sample left out, or one cut to a single token, to half, by one."""
    if len(lengths) > 1:
        for i in range(len(lengths)):
            yield lengths[:i] + lengths[i + 1 :]

    for i, length in enumerate(lengths):
        for shorter in sorted({1, length // 2, length - 1} - {0, length}):
            yield (*lengths[:i], shorter, *lengths[i + 1 :])
