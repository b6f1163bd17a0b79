"""Tensors between the host and a device."""

import torch
from torch import Tensor


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
