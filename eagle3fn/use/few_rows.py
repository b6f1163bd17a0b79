"""Products of a few rows, as a verification makes them, at nearly the cost of one row's.

A plain decoding step multiplies one row, a verification a few. Both read every weight once and wait
for memory, so a block of four rows need not cost much more than one row. But torch's product of a
few rows on a CPU reads the weights about twice as slowly as that of one; oneDNN's, from weights in
its blocked layout, reads them at nearly the same speed.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
"""`(…, N)` → `(…, M)`: the rows times a weight, plus its bias."""

_FEW = 16  # rows from which on torch's own product is as fast


@torch.inference_mode()
def speed_up_few_rows(model: Any) -> None:
    """Let a target's linear layers multiply few rows from packed copies of their weights.

    On CPUs, in a dtype that oneDNN multiplies, and where a short measurement says that it pays. The
    layers' weights stay as they are, so the copies take their memory once more.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    largest = max(layers, key=lambda layer: layer.weight.numel(), default=None)
    if largest is None or not _can_pack(largest.weight):
        return
    least = least_rows(largest)
    if least is None:
        return
    for layer in layers:
        layer.forward = few_rows_product(layer, least)  # pyright: ignore[reportAttributeAccessIssue]


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


def least_rows(layer: nn.Linear) -> int | None:
    """From how many rows on the packed copy is faster: 1 or 2; None if it is not at 4 rows.

    Each way is timed five times, in turn.
    """
    packed = few_rows_product(layer, 1)

    def pays(rows: int) -> bool:
        x = torch.ones(rows, layer.in_features, dtype=layer.weight.dtype)
        seconds: dict[Product, list[float]] = {packed: [], layer.forward: []}
        for _ in range(5):
            for product, times in seconds.items():
                begin = perf_counter()
                product(x)
                times.append(perf_counter() - begin)
        return min(seconds[packed]) < min(seconds[layer.forward])

    if not pays(4):
        return None
    return 1 if pays(1) else 2
