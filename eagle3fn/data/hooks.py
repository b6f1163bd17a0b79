"""Outputs of chosen layers, kept by forward hooks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def layer_outputs(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list that holds, after each call of the model, the layers' outputs `(B, S, Ht)`.

    Entry `i` belongs to `layers[i]`; a later call overwrites it. Where a layer returns a tuple or
    list, its first tensor is the output. The hooks are removed at the end, also after an error.
    """
    outputs = [torch.empty(0) for _ in layers]

    def keep(place: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[place] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = []
    try:
        for place, layer in enumerate(layers):
            handles.append(layer.register_forward_hook(keep(place)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
