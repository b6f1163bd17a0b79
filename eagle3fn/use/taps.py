"""Outputs of chosen target layers, kept by forward hooks that stay in place over many calls.

Which tensor is a layer's output is decided as in `data.target.features`.
"""

from typing import Any

import torch
from torch import Tensor

from eagle3fn.data.target import decoder


class Taps:
    """The latest call's outputs of `layers`; hooks live from `open` to `close`."""

    def __init__(self, model: Any, layers: tuple[int, ...]) -> None:
        self._modules = [decoder(model).layers[layer] for layer in layers]
        self._latest: list[Tensor] = [torch.empty(0)] * len(layers)
        self._handles: list[Any] = []

    def open(self) -> None:
        """Register the hooks."""
        self._handles = [
            module.register_forward_hook(self._keep(i)) for i, module in enumerate(self._modules)
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def rows(self, count: int) -> Tensor:
        """The first `count` rows, the layers side by side: `(1, count, layers·Ht)`."""
        return torch.cat([value[:, :count] for value in self._latest], dim=-1)

    def _keep(self, index: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self._latest[index] = output if isinstance(output, Tensor) else output[0]

        return hook
