"""Products of a few rows, as a verification makes them, at nearly the cost of one row's.

A plain decoding step multiplies one row, a verification a few. Both read every weight once and wait
for memory, so a block of four rows need not cost much more than one row. But torch's product of a
few rows on a CPU reads the weights about twice as slowly as that of one; oneDNN's, from weights in
its blocked layout, reads them at nearly the same speed.
"""

import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
"""`(…, N)` → `(…, M)`: the rows times a weight, plus its bias."""

_FEW = 16  # rows from which on torch's own product is as fast
_TIMED_BYTES = 64 << 20  # of weights, beyond the processor's cache


@torch.inference_mode()
def speed_up_few_rows(model: Any) -> None:
    """Let a target's linear layers multiply few rows from packed copies of their weights.

    On CPUs, in a dtype that oneDNN multiplies, and for weights of a shape for which a short
    measurement says that it pays. The layers' weights stay as they are, so the copies take their
    memory once more.
    """
    by_shape: dict[torch.Size, list[nn.Linear]] = {}
    for module in model.modules():
        if type(module) is nn.Linear and _can_pack(module.weight):
            by_shape.setdefault(module.weight.shape, []).append(module)

    for layers in by_shape.values():
        least = least_rows(layers)
        if least is None:
            continue
        for layer in layers:
            product = few_rows_product(layer, least)
            layer.forward = product  # pyright: ignore[reportAttributeAccessIssue]


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def few_rows_product(layer: nn.Linear, least: int) -> Product:
    """The layer's product, from a packed copy of its weight for `least` to 16 rows."""
    weight = layer.weight
    bias = layer.bias
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    linear = torch.ops.mkldnn._linear_pointwise.default

    def product(x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if least <= rows <= _FEW:
            return linear(x, packed, bias, "none", [], "")
        return F.linear(x, weight, bias)

    return product


def least_rows(layers: Sequence[nn.Linear]) -> int | None:
    """From how many rows on packed copies are faster: 1 or 2; None if they are not at 4 rows.

    `layers` are of one shape; so many of them are timed that the processor's cache does not hold
    their weights. Each way is timed five times, in turn.
    """
    size = layers[0].weight.numel() * layers[0].weight.itemsize
    timed = layers[: math.ceil(_TIMED_BYTES / size)]
    ordinary = [layer.forward for layer in timed]
    packed = [few_rows_product(layer, 1) for layer in timed]

    def pays(rows: int) -> bool:
        x = torch.ones(rows, timed[0].in_features, dtype=timed[0].weight.dtype)
        least = [math.inf, math.inf]
        for _ in range(5):
            for way, products in enumerate((ordinary, packed)):
                begin = perf_counter()
                for product in products:
                    product(x)
                least[way] = min(least[way], perf_counter() - begin)
        return least[1] < least[0]

    if not pays(4):
        return None
    return 1 if pays(1) else 2
