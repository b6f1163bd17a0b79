"""Weights in the layout that a processor reads fastest for a few rows at a time.

A plain decoding step multiplies one row, a verification a few. Both read every weight once and wait
for memory, so a block of four rows need not cost much more than one row. torch's own product of a
few rows reads the weights about twice as slowly as that of one; oneDNN's blocked layout is read at
nearly the same speed for one row and for a few.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from eagle3fn.base.device import multiplies_bf16
from eagle3fn.model.table import EMBED
from eagle3fn.use.export import Draft


class PackedWeight(Tensor):
    """A matrix `(M, N)` in oneDNN's blocked layout, which `F.linear` multiplies by.

    Any other operation takes it as an ordinary tensor, unpacked for that operation.
    """

    packed: Tensor
    product: Any  # (x, packed weight, bias, pointwise operation and its arguments) → (…, M)

    @staticmethod
    def __new__(cls, packed: Tensor) -> "PackedWeight":
        """A tensor of the packed one's shape, without memory of its own."""
        return Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, packed.shape, dtype=packed.dtype, device=torch.device("cpu")
        )

    def __init__(self, packed: Tensor) -> None:
        """Keep the packed values, and the operation that multiplies by them."""
        self.packed = packed
        self.product = torch.ops.mkldnn._linear_pointwise.default

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Its shape and dtype."""
        return f"PackedWeight({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """`F.linear(x, weight, bias)` multiplies by the packed values."""
        if func is F.linear and len(args) > 1 and not kwargs:
            weight = args[1]
            if type(weight) is cls:
                bias = args[2] if len(args) > 2 else None
                return weight.product(args[0], weight.packed, bias, "none", [], "")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Detached, as `nn.Parameter` does it, a weight stays packed."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed)
        args, kwargs = tree_map_only(cls, _unpacked, (args, kwargs or {}))
        return func(*args, **kwargs)


def _unpacked(weight: PackedWeight) -> Tensor:
    return weight.packed.to_dense()


def pack(weight: Tensor) -> Tensor:
    """The same matrix packed; as it is where that does not pay.

    It pays on CPUs, with oneDNN, in a dtype that the processor multiplies: fp32, or bf16 where it
    has such products.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return weight
    fast = weight.dtype == torch.float32
    if weight.dtype == torch.bfloat16:
        fast = multiplies_bf16("cpu")
    if not fast:
        return weight
    return PackedWeight(torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous()))


def pack_target(model: Any) -> None:
    """Pack the weights of a target's linear layers, in place of the ordinary ones.

    An embedding whose matrix is the head's too keeps it as it is.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(pack(module.weight), requires_grad=False)


def pack_draft(draft: Draft) -> Draft:
    """A draft whose matrices are packed, but for an embedding that it trains."""
    params = {}
    for name, value in draft.params.items():
        is_product = value.ndim == 2 and name != EMBED
        params[name] = pack(value) if is_product else value
    return draft._replace(params=params)
