"""Tensors between the host and a device, and what a device multiplies fast."""

import platform
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.tree import tree_map

T = TypeVar("T")

_LONGEST_REASON = 120  # characters

SPREAD = "auto"
"""The device of a target that is spread over all cards."""


def check_device(name: str) -> str:
    """The name of a device that numbers can be computed on.

    Raises:
        UserError: unknown, or not on this machine.
    """
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        line = str(error).splitlines()[0]
        unknown = line.startswith("Expected one of")
        reason = "torch has none of that name" if unknown else printable(line, _LONGEST_REASON)
        raise UserError(
            f"device {name!r}: not usable here ({reason}); name cpu or cuda, or a card as cuda:1"
        ) from None
    return name


def check_spread() -> str:
    """The kind of the cards that a target can be spread over, such as "cuda".

    Raises:
        UserError: no card, or accelerate is not installed.
    """
    if not torch.accelerator.is_available():
        raise UserError(f"device {SPREAD!r}: no card to spread the target over; name cpu")
    if find_spec("accelerate") is None:
        raise UserError(
            f"device {SPREAD!r}: needs accelerate; pip install accelerate, or name one card"
        )
    kind = torch.accelerator.current_accelerator()
    assert kind
    return kind.type


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on `device`; the host does not wait for work queued on the device.

    A copy to CUDA from ordinary memory waits for the whole stream, one from pinned memory is queued
    in it. A tensor that is on a device already, or goes to the host, is copied by `Tensor.to`.
    """
    kind = torch.device(device).type
    if x.device.type != "cpu" or kind == "cpu":
        return x.to(device)

    if kind == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def to_device(values: T, device: str) -> T:
    """The tree, such as a batch, with every tensor on `device`; arrays stay on the host.

    On the way there the host does not wait.
    """

    def sent(leaf: Any) -> Any:
        return send(leaf, device) if isinstance(leaf, Tensor) else leaf

    return tree_map(sent, values)


def multiplies_bf16(device: torch.device | str) -> bool:
    """Whether a device has instructions that multiply bf16 matrices, so that bf16 beats fp32 there.

    Other devices convert every value to fp32 and back: six to ten times slower than fp32 on a
    processor with AVX2. Read from the hardware's flags and never measured: the same machine always
    gives the same answer, whatever else runs on it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        # ROCm's cards all do; of NVIDIA's, those from Ampere on.
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False

    # oneDNN says yes to any x86 with AVX512, which converts: there the instructions are asked for.
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """What to compute in where the choice is free: bf16 where it is multiplied, else fp32."""
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32
