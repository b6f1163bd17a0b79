"""A pickle's objects as records, read opcode by opcode: no class is looked up, nothing is called.

`torch.distributed.checkpoint` keeps its metadata as a pickle, and what unpickles a file runs
whatever the file names.
"""

from dataclasses import dataclass
from pickletools import genops
from typing import Any, NamedTuple


class Named(NamedTuple):
    """What a pickle calls by its name: a class, a function or a constant."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Record:
    """An object: what made it, from which arguments, and the state that it was given then."""

    kind: Any
    arguments: Any
    state: Any = None


class Pairs(list):
    """A dict's keys and values, alternating: nothing is hashed."""

    __slots__ = ()


_MOST_OPCODES = 2**22  # a leaf and rank have about a hundred
_VALUES = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": Pairs, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME"}


def read_records(raw: bytes) -> Any:
    """The value of a pickle of protocol 4 or later, by the opcodes that `pickle` writes for
    dataclasses.

    Returns:
        Strings, whole numbers, True, False and None as they are; lists and tuples; `Pairs` for a
        dict, `Named` for what a name stands for, `Record` for every other object.

    Raises:
        ValueError: not a pickle, or one that holds something else, or more than any checkpoint.
    """
    try:
        return _Machine().run(raw)
    except (IndexError, AttributeError, TypeError):
        raise ValueError("a pickle whose opcodes don't fit together") from None


class _Machine:
    """The stack, the marks on it, and the objects that are referred to again."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self, raw: bytes) -> Any:
        for number, (opcode, argument, _) in enumerate(genops(raw)):
            if number == _MOST_OPCODES:
                raise ValueError(f"a pickle of more than {_MOST_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                return self.stack.pop()
            self.do(opcode.name, argument)
        raise ValueError("a pickle without an end")

    def do(self, opcode: str, argument: Any) -> None:  # noqa: C901, PLR0912
        """Carry out one opcode."""
        stack = self.stack
        if opcode in _IGNORED:
            return

        # Values.
        if opcode in _VALUES:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            stack.append(_EMPTY[opcode]())

        # Several values into one.
        elif opcode == "MARK":
            self.marks.append(len(stack))
        elif opcode in _TUPLES:
            stack.append(tuple(self.taken(_TUPLES[opcode])))
        elif opcode == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif opcode in ("APPEND", "SETITEM"):
            items = self.taken(1 if opcode == "APPEND" else 2)
            stack[-1].extend(items)
        elif opcode in ("APPENDS", "SETITEMS"):
            items = self.since_mark()
            stack[-1].extend(items)

        # Objects.
        elif opcode == "STACK_GLOBAL":
            stack.append(Named(*self.taken(2)))
        elif opcode in ("NEWOBJ", "REDUCE"):
            stack.append(Record(*self.taken(2)))
        elif opcode == "BUILD":
            state = stack.pop()
            stack[-1].state = state

        # References.
        elif opcode == "MEMOIZE":
            self.memo.append(stack[-1])
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        else:
            raise ValueError(f"a pickle with the opcode {opcode}")

    def taken(self, count: int) -> list[Any]:
        """The last `count` values, taken from the stack."""
        place = len(self.stack) - count
        if place < 0:
            raise IndexError(count)
        values = self.stack[place:]
        del self.stack[place:]
        return values

    def since_mark(self) -> list[Any]:
        """The values since the last mark, taken from the stack."""
        return self.taken(len(self.stack) - self.marks.pop())
