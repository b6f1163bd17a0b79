"""The shapes of public records and functions, checked on real values by jaxtyping.

A shape is a text such as `(B, S + K, D) fp32`, by the letters that `base.types` lists; without a
dtype it is any floating-point one. A record's shapes are read from the comments of its fields, so
that a comment cannot go stale; those of functions are in `FUNCTIONS`. In one call a letter has one
value: a draft's sizes come from its configuration, the others from the first tensor that has them.
"""

import ast
import functools
import inspect
import io
import re
import textwrap
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64, Shaped, jaxtyped
from torch import Tensor

from eagle3fn.base import types
from eagle3fn.base.rows import RowPlan
from eagle3fn.base.types import Aux, Batch, Frozen, Params, Sample, Teacher, TrainState, VocabMap
from eagle3fn.data.target_tensors import TargetTensors
from eagle3fn.model.head_loss import Pairs, PairScores
from eagle3fn.model.table import row_of
from eagle3fn.train.optimizer import Moments
from eagle3fn.use.export import Draft

RECORDS = (
    *(Sample, Batch, VocabMap, Frozen, Teacher, Aux, TrainState, RowPlan, TargetTensors, Pairs),
    *(PairScores, Moments, Draft),
)
"""Records whose comments are checked."""

DTYPES: dict[str, Any] = {"": Float, "fp32": Float32, "int64": Int64, "int32": Int32, "bool": Bool}
SHAPE = re.compile(r"\(([^)]*)\) ?(fp32|int64|int32|bool)?")


class ShapeError(AssertionError):
    """A value of another shape or dtype than is stated."""


class Each(NamedTuple):
    """A sequence of records, in each of which the letters have values of their own."""

    record: Any


class Maybe(NamedTuple):
    """A record, or None."""

    record: Any


class Function(NamedTuple):
    """Shapes of a function's arguments, by name, and of its result.

    A text is a tensor or an array, or nothing if it ends in "?"; a record's class stands for its
    fields, `Params` for the parameters; a tuple has an entry an item, a list one for all items, and
    a dict those of its keys.
    """

    arguments: dict[str, Any]
    result: Any


FUNCTIONS: dict[str, Function] = {
    # data
    "align_mask": Function({"token_mask": "(S,) int64"}, "(S,) int64"),
    "collate": Function({"samples": Each(Sample)}, Batch),
    "collate_packed": Function({"samples": Each(Sample)}, Batch),
    "align": Function(
        {
            "input_ids": "(B, S) int64",
            "attention_mask": "(B, S) int64",
            "row_mask": "(B, S) int64",
            "aux_hidden": "(B, S, A·Ht)",
            "last_hidden": "(B, S, Ht)",
            "position_ids": "(B, S) int64?",
        },
        Batch,
    ),
    "plan_rows": Function(
        {"row_mask": "(B, K, S) int64", "survives": "(B, S) int64?", "starts": "(B, S) int64?"},
        RowPlan,
    ),
    "over_steps": Function({"row_mask": "(…, S) int64"}, "(…, K, S) int64"),
    "global_row_counts": Function({"batches": Each(Batch)}, "(K,) fp32"),
    "read_sample": Function({}, Sample),
    "load_map": Function({}, VocabMap),
    "read_target_tensors": Function({}, TargetTensors),
    "make_frozen": Function({"target": TargetTensors, "vocab_map": VocabMap}, Frozen),
    # model
    "init_params": Function({}, Params),
    "start_from_target": Function({"params": Params, "frozen": Frozen}, Params),
    "forward_loss": Function({"params": Params, "batch": Batch, "frozen": Frozen}, ("()", Aux)),
    "make_teacher": Function({"label_hidden": "(B, S, Ht)", "frozen": Frozen}, Teacher),
    "heads": Function(
        {"weights": Params, "embeds": "(B, S, H)?", "hidden": "(B, S, H)"},
        ("(B, N, S, E)", "(B, J, S, E)", "(B, J, S, E)"),
    ),
    "logits": Function({"params": Params, "hidden": "(B, S, H)"}, "(B, S, D)"),
    "acceptance": Function({"logits": "(B, S, D)", "p_full": "(B, S, D)"}, "(B, S) fp32"),
    "loss value": Function(
        {"logits": "(…, D) fp32", "p_draft": "(…, D) fp32", "p_full": "(…, D) fp32"}, "(…) fp32"
    ),
    "loss closed": Function(
        {"logits": "(…, D) fp32", "draft": "(…, D) fp32"}, ("(…) fp32", "(…, D) fp32")
    ),
    "block_attention": Function(
        {
            "q": "(T, N, E)",
            "key": "(B, S, J, E)",
            "value": "(B, S, J, E)",
            "step_keys": ["(T, J, E)"],
            "step_values": ["(T, J, E)"],
        },
        "(T, N, E)",
    ),
    "head_and_loss": Function(
        {
            "draft": "(R, H)",
            "head": "(D, H)",
            "pairs": Pairs,
            "target_head": "(V, Ht)",
            "t2d": "(V,) bool",
            "d2t": "(D,) int64",
        },
        ("() fp32", "(X,) fp32", "(X,) bool", "(X,) fp32", "(X,) bool"),
    ),
    # train and use
    "init_state": Function({"params": Params}, TrainState),
    "step": Function(
        {"state": TrainState, "batch": Each(Batch), "frozen": Frozen},
        (
            TrainState,
            {"loss": "() fp32", "aux": Aux, "tokens": "() int64", "grad_norm": "() fp32"},
        ),
    ),
    "export": Function({"params": Params, "frozen": Frozen}, None),
    "load_draft": Function({}, Draft),
}


# Shapes as texts


def legend() -> set[str]:
    """The letters that `base.types` explains."""
    text = inspect.getdoc(types) or ""
    return set(re.findall(r"`([A-Z]t?)`", text))


def letters(text: str) -> set[str]:
    """The letters of a shape."""
    found = SHAPE.match(text)
    assert found, text
    return set(re.findall(r"[A-Za-z]+", found[1]))


def tensor_type(text: str, kind: type = Tensor) -> Any:
    """A shape as a type of jaxtyping, of tensors or of arrays."""
    found = SHAPE.match(text)
    assert found, f"{text!r} is no shape"
    inside = found[1].replace("·", "*").replace(" ", "").replace("…", "*rows")
    axes = [axis for axis in inside.split(",") if axis]
    return DTYPES[found[2] or ""][kind, " ".join(axes)]


@functools.cache
def fields_of(record: Any) -> dict[str, Any]:
    """The shapes of a record's fields; a field that holds no tensor is left out."""
    comments = _comments(record)
    found = {}
    for name, hint in get_type_hints(record).items():
        inside = [part for part in get_args(hint) if part is not NoneType]
        if hint in (Tensor, Tensor | None, np.ndarray, np.ndarray | None):
            text = comments.get(name, "")
            match = SHAPE.match(text)
            assert match, f"{record.__name__}.{name}: no shape in its comment: {text!r}"
            found[name] = match[0].rstrip() + ("?" if inside else "")
        elif hint == Params:
            found[name] = Params
        elif hasattr(hint, "_fields"):
            found[name] = hint
        elif len(inside) == 1 and hasattr(inside[0], "_fields"):
            found[name] = Maybe(inside[0])
    return found


def _comments(record: Any) -> dict[str, str]:
    """The comment of each field: after it, or else the lines above it."""
    source = textwrap.dedent(inspect.getsource(record))
    after: dict[int, str] = {}  # by line: a comment after code
    alone: dict[int, str] = {}  # … and one on a line of its own
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            kind = alone if token.line.lstrip().startswith("#") else after
            kind[token.start[0]] = token.string.removeprefix("#").strip()

    found = {}
    for node in ast.parse(source).body[0].body:  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(node, ast.AnnAssign):
            continue
        above = []
        line = node.lineno - 1
        while line in alone:
            above.insert(0, alone[line])
            line -= 1
        found[ast.unparse(node.target)] = after.get(node.lineno, " ".join(above))
    return found


# Checks


@contextmanager
def scope(sizes: dict[str, int]) -> Iterator[None]:
    """A scope in which these letters have their sizes, and others get one by the first use."""
    with jaxtyped("context"):
        for letter, size in sizes.items():
            kind: Any = Shaped[Tensor, letter]
            assert isinstance(torch.empty(size, device="meta"), kind)
        yield


class _Stated(NamedTuple):
    path: str
    value: Any
    text: str


class Checker:
    """Checks values against the stated shapes, and counts the calls of checked functions."""

    def __init__(self, sizes: dict[str, int]) -> None:
        """`sizes` are those of the letters that are known from the start."""
        self.sizes = sizes
        self.calls: Counter[str] = Counter()

    def check(self, value: Any, wanted: Any, path: str = "value") -> None:
        """Check a value in a scope of its own."""
        with scope(self.sizes):
            self._check_here({path: (value, wanted)})

    def checked(self, function: Callable[..., Any], name: str = "") -> Callable[..., Any]:
        """The function, its arguments and result checked in one scope a call."""
        name = name or function.__name__
        stated = FUNCTIONS[name]

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            wanted = {}
            for argument, shapes in stated.arguments.items():
                wanted[f"{name}: {argument}"] = (given.get(argument), shapes)
            with scope(self.sizes):
                self._check_here(wanted)
                result = function(*args, **kwargs)
                self._check_here({f"{name}: result": (result, stated.result)})
            self.calls[name] += 1
            return result

        return wrapper

    def _check_here(self, wanted: dict[str, tuple[Any, Any]]) -> None:
        stated: list[_Stated] = []
        for path, (value, shapes) in wanted.items():
            stated += self._leaves(value, shapes, path)

        # Sums of letters come last: they need the letters' values.
        for path, value, text in sorted(stated, key=lambda leaf: "+" in leaf.text):
            if value is None and text.endswith("?"):
                continue
            kind = np.ndarray if isinstance(value, np.ndarray) else Tensor
            if not isinstance(value, tensor_type(text, kind)):
                has_shape = isinstance(value, Tensor | np.ndarray)
                found = f"{value.dtype} {tuple(value.shape)}" if has_shape else repr(value)
                raise ShapeError(f"{path} is {found}, must be {text}; sizes: {self.sizes}")

    def _leaves(self, value: Any, wanted: Any, path: str) -> Iterator[_Stated]:
        """Every tensor with its shape."""
        if isinstance(wanted, str):
            yield _Stated(path, value, wanted)
        elif isinstance(wanted, Each):
            items = [value] if hasattr(value, "_fields") else value
            for i, item in enumerate(items):
                self.check(item, wanted.record, f"{path}[{i}]")
        elif isinstance(wanted, Maybe):
            if value is not None:
                yield from self._leaves(value, wanted.record, path)
        elif wanted is not None:
            for name, item, shapes in _parts(value, wanted):
                yield from self._leaves(item, shapes, path + name)


def _parts(value: Any, wanted: Any) -> list[tuple[str, Any, Any]]:
    """The parts of a tree: each one's name, value and shapes."""
    if wanted is Params:
        axes = {name: row_of(name).axes.replace(" ", ", ") for name in value}
        return [(f"[{name}]", leaf, f"({axes[name]})") for name, leaf in value.items()]
    if isinstance(wanted, dict):
        return [(f"[{key}]", value[key], shapes) for key, shapes in wanted.items()]
    if isinstance(wanted, list):
        wanted = tuple(wanted * len(value))
    if isinstance(wanted, tuple):
        pairs = zip(value, wanted, strict=True)
        return [(f"[{i}]", item, shapes) for i, (item, shapes) in enumerate(pairs)]
    return [(f".{name}", getattr(value, name), part) for name, part in fields_of(wanted).items()]
