"""A card that is not there: tensors that lie on another device, compute on the CPU, and do not mix with the host's.

What it is for: a tensor made on the wrong device, or a value read on the host in the middle of a step, is found
without a card. What it is not: its numbers are the CPU's, its kernels are interpreted, so it certifies nothing.

PyTorch's device of shapes alone, "meta", lends its name, as every build of PyTorch knows it. While `stand_in()` is
open every operation passes `_run`, which takes the values out, computes, and puts the results on the card again.
Attention is chosen as on a card. Loss and scores are the plain expressions, as an interpreted kernel takes seconds;
where a test calls a Triton kernel by name, it is interpreted.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import optree
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from eagle3fn.model import fast, flash_attention
from eagle3fn.model.kernels import score
from eagle3fn.specforge import kl_kernel as legacy_kl

NAME = "meta"
aten = torch.ops.aten

READS = {  # what a host cannot know before the device has got there
    *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default),
    *(aten.masked_select.default, aten.unique_dim.default, aten._unique2.default),
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}


class Wait(NamedTuple):
    """The host waits for the device: what for, and the package's own lines that led there."""

    what: str
    where: tuple[str, ...]


class OnCard(Tensor):
    """A tensor on the card; `held` has its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnCard":
        return Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME), requires_grad=False,
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.held!r})"

    def tolist(self) -> list:
        """The values, on the host; PyTorch refuses this for a subclass."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Everything(TorchDispatchMode):
    """Tensors are made on the card where that is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_waits: list[Wait] = []


def taken(tree: Any) -> Any:
    """The values of the card's tensors in a tree."""
    return optree.tree_map(lambda x: x.held if isinstance(x, OnCard) else x, tree)


def put(tree: Any) -> Any:
    """A tree with its tensors on the card."""
    return optree.tree_map(
        lambda x: OnCard(x) if isinstance(x, Tensor) and not isinstance(x, OnCard) else x, tree
    )


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: on the host if all its tensors are there, else on the card."""
    given: Any = (args, kwargs)
    tensors = [x for x in optree.tree_leaves(given) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OnCard)]
    _refuse_mixed(func, tensors, ours)
    _note_waits(func, args, kwargs, ours)

    # Where the result lies: where it is asked to, else where the inputs do.
    wanted = kwargs.get("device")
    on_card = bool(ours) if wanted is None else torch.device(wanted).type == NAME
    if func in (aten._local_scalar_dense.default, aten.equal.default):
        on_card = False

    # Compute on the CPU.
    on_host = dict(kwargs, device=torch.device("cpu")) if wanted is not None else kwargs
    inner_args, inner_kwargs = taken(args), taken(on_host)
    out = func(*inner_args, **inner_kwargs)
    if on_card:
        out = put(out)
    if not ours or not on_card or func is aten._to_copy.default:
        return out
    return return_and_correct_aliasing(func, args, kwargs, out)


def _refuse_mixed(func: Any, tensors: list[Tensor], ours: list[OnCard]) -> None:
    """As on a card: only numbers, copies and indices may come from the host."""
    theirs = [x for x in tensors if not isinstance(x, OnCard) and x.ndim]
    if ours and theirs and func not in COPIES | INDEXING:
        shapes = [tuple(x.shape) for x in theirs]
        raise RuntimeError(
            f"{func}: expected all tensors on the same device, but {shapes} are on the host"
        )


def _note_waits(func: Any, args: Any, kwargs: dict[str, Any], ours: list[OnCard]) -> None:
    """Note an operation at which a host waits for its card."""
    if func is aten._to_copy.default:
        target = torch.device(kwargs.get("device") or args[0].device).type
        if target != args[0].device.type and not kwargs.get("non_blocking"):
            _note(f"a copy from {args[0].device.type} to {target}")
    elif func is aten.copy_.default:
        if len(ours) == 1 and not (len(args) > 2 and args[2]):
            _note("a copy between host and device")
    elif ours and func in READS:
        _note(str(func))
    elif ours and func in INDEXING:
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                _note("an index by a mask")
            elif isinstance(index, Tensor) and index.ndim and not isinstance(index, OnCard):
                _note("an index from the host")


def _note(what: str) -> None:
    lines = [f for f in traceback.extract_stack() if "/eagle3fn/" in f.filename]
    _waits.append(
        Wait(
            what, tuple(f"{f.filename.rpartition('/')[2]}:{f.lineno}: {f.line}" for f in lines[-3:])
        )
    )


class _Launch:
    """A Triton kernel that finds the values of the card's tensors."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.kernel[grid](*taken(args), **kwargs)

        return call


def _by_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the CPU's own, called for tensors on the card."""

    def call(*args: Any) -> Any:
        return put(function(*taken(args))) if isinstance(args[0], OnCard) else function(*args)

    return call


@contextlib.contextmanager
def stand_in() -> Iterator[list[Wait]]:
    """The card is there while this is open, under the device name `NAME`; gives what the host waited for, growing."""
    loss_kernels = tuple(map(_Launch, legacy_kl._kernels()))
    score_kernels = tuple(map(_Launch, score._kernels()))

    def has_flash_kernel(device: torch.device, dtype: torch.dtype, size: int) -> bool:
        return (
            device.type == NAME
            and dtype in flash_attention._DTYPES
            and size in flash_attention._HEAD_SIZES
        )

    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **rest: Any) -> Tensor:
        """PyTorch makes one of numbers past every mode."""
        on_card = device is not None and torch.device(device).type == NAME
        return make(data, **rest).to(NAME) if on_card else make(data, device=device, **rest)

    replaced = [
        (torch, "tensor", tensor),
        (torch.cuda, "device_of", lambda x: contextlib.nullcontext()),
        (legacy_kl, "_kernels", lambda: loss_kernels),
        (score, "_kernels", lambda: score_kernels),
        (fast, "has_flash_kernel", has_flash_kernel),
        (flash_attention, "_flash", _by_value(flash_attention._flash)),
        (flash_attention, "_flash_backward", _by_value(flash_attention._flash_backward)),
    ]
    _waits.clear()
    with contextlib.ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(_Everything())
        yield _waits
