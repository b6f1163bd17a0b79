"""Tensors between the host and a device."""

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on `device`, without the host waiting for what the device is doing.

    A copy to CUDA out of ordinary memory waits for the whole stream; one out of pinned memory is queued in it. A tensor
    of a device, and one that goes to the host, is copied as `Tensor.to` does.
    """
    if x.device.type != "cpu" or torch.device(device).type == "cpu":
        return x.to(device)
    if torch.device(device).type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
