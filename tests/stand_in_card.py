"""A simulated card: a device whose tensors are computed on the CPU and do not mix with the host's.

It finds, without a card, a tensor made on the wrong device and a value read on the host in the
middle of a step. Its numbers are the CPU's and its kernels are interpreted: it certifies nothing.

The device has the name of PyTorch's "meta", which every build of PyTorch has. While `stand_in()` is
open, every operation goes through `_run`, which unwraps the values, computes, and wraps the
results. Attention is chosen as on a card. Loss and scores are the plain expressions, since an
interpreted kernel takes seconds; a Triton kernel that a test calls by name is interpreted.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import optree
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from eagle3fn.model import fast, flash_attention
from eagle3fn.model.kernels import score
from eagle3fn.specforge import kl_kernel
from tests import packed_flash

NAME = "meta"
aten = torch.ops.aten

READS = {  # operations whose result, or its shape, the host needs
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_dim.default,
    aten._unique2.default,
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}


class Wait(NamedTuple):
    """An operation at which the host waits for the device."""

    what: str
    where: tuple[str, ...]  # the package's lines that led there, the innermost last


class OnCard(Tensor):
    """A tensor on the card; `held` has its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnCard":
        return Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME),
            requires_grad=False,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.held!r})"

    def tolist(self) -> list:
        """The values, on the host; PyTorch's own refuses a subclass."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Everything(TorchDispatchMode):
    """Also runs operations without a tensor argument, which may create one on the card."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_waits: list[Wait] = []


def to_host(tree: Any) -> Any:
    """A tree with the values of the card's tensors in their place."""
    return optree.tree_map(lambda x: x.held if isinstance(x, OnCard) else x, tree)


def to_card(tree: Any) -> Any:
    """A tree with all its tensors on the card."""

    def wrap(x: Any) -> Any:
        is_host_tensor = isinstance(x, Tensor) and not isinstance(x, OnCard)
        return OnCard(x) if is_host_tensor else x

    return optree.tree_map(wrap, tree)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the host if all its tensors are there, else on the card.

    Raises:
        RuntimeError: it mixes tensors of the host and of the card.
    """
    given: Any = (args, kwargs)
    tensors = [x for x in optree.tree_leaves(given) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OnCard)]
    _refuse_mixed(func, tensors, ours)
    _note_waits(func, args, kwargs, ours)

    # The result's device: the requested one, else that of the inputs.
    requested = kwargs.get("device")
    on_card = bool(ours) if requested is None else torch.device(requested).type == NAME
    if func in (aten._local_scalar_dense.default, aten.equal.default):
        on_card = False

    # Compute on the CPU.
    if requested is not None:
        kwargs_there = dict(kwargs, device=torch.device("cpu"))
    else:
        kwargs_there = kwargs
    out = func(*to_host(args), **to_host(kwargs_there))
    if on_card:
        out = to_card(out)
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
    frames = [f for f in traceback.extract_stack() if "/eagle3fn/" in f.filename]
    lines = [f"{Path(f.filename).name}:{f.lineno}: {f.line}" for f in frames[-3:]]
    _waits.append(Wait(what, tuple(lines)))


class _Launch:
    """A Triton kernel that is called with the values of the card's tensors."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.kernel[grid](*to_host(args), **kwargs)

        return call


def _by_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the CPU, for tensors on the card too."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if isinstance(args[0], OnCard):
            return to_card(function(*to_host(args), **kwargs))
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def stand_in() -> Iterator[list[Wait]]:
    """While this is open the card is there, under the device name `NAME`.

    Yields:
        What the host waited for; the list grows.
    """
    loss_kernels = tuple(map(_Launch, kl_kernel._kernels()))
    score_kernels = tuple(map(_Launch, score._kernels()))

    def has_flash_kernel(device: torch.device, dtype: torch.dtype, size: int) -> bool:
        return (
            device.type == NAME
            and dtype in flash_attention._DTYPES
            and size in flash_attention._HEAD_SIZES
        )

    packed_kernel = flash_attention.PackedKernel(
        forward=_by_value(packed_flash.forward), backward=_by_value(packed_flash.backward)
    )
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **rest: Any) -> Tensor:
        """`torch.tensor`, which no dispatch mode sees."""
        on_card = device is not None and torch.device(device).type == NAME
        return make(data, **rest).to(NAME) if on_card else make(data, device=device, **rest)

    replaced = [
        (torch, "tensor", tensor),
        (torch.cuda, "device_of", lambda x: contextlib.nullcontext()),
        (kl_kernel, "_kernels", lambda: loss_kernels),
        (score, "_kernels", lambda: score_kernels),
        (fast, "has_flash_kernel", has_flash_kernel),
        (flash_attention, "_flash", _by_value(flash_attention._flash)),
        (flash_attention, "_flash_backward", _by_value(flash_attention._flash_backward)),
        (flash_attention, "packed_kernel", packed_kernel),
    ]
    _waits.clear()
    with contextlib.ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(_Everything())
        yield _waits
