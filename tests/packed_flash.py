"""PyTorch's flash kernel for sequences of several lengths, as the CPU can compute it.

The CPU has a flash kernel for sequences of one length alone: here it runs once a conversation. The
operations take and return what those of CUDA do, `(B·S, N, E)` and a log-sum-exp `(N, B·S)`.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from eagle3fn.model import flash_attention

aten = torch.ops.aten


def forward(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    bounds_of_keys: Tensor,
    longest: int,
    longest_of_keys: int,
    dropout: float,
    causal: bool,
    *,
    return_debug_mask: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """`_flash_attention_forward`: the attended values, their log-sum-exp, and what is not read."""
    assert not return_debug_mask
    check_bounds(q, bounds, longest)
    assert bounds_of_keys is bounds and longest_of_keys == longest

    attended = torch.full_like(q, torch.nan)
    log_sum = torch.full(q.shape[1::-1], torch.nan, dtype=flash_attention.at_least_fp32(q.dtype))
    for span in spans(bounds):
        heads_first = (one_sequence(x[span]) for x in (q, key, value))
        out, log = aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first, dropout, causal, scale=scale
        )
        attended[span] = places(out)
        log_sum[:, span] = log[0]
    unread = torch.empty(0)
    return attended, log_sum, unread, unread, unread


def backward(
    grad: Tensor,
    q: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    bounds: Tensor,
    bounds_of_keys: Tensor,
    longest: int,
    longest_of_keys: int,
    dropout: float,
    causal: bool,
    *seeds: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """`_flash_attention_backward`: the gradients by `q`, `key` and `value`."""
    check_bounds(q, bounds, longest)
    assert bounds_of_keys is bounds and longest_of_keys == longest
    assert log_sum.shape == q.shape[1::-1] and log_sum.is_contiguous()
    assert len(seeds) == 2

    grads = tuple(torch.full_like(x, torch.nan) for x in (q, key, value))
    for span in spans(bounds):
        heads_first = (one_sequence(x[span]) for x in (grad, q, key, value, out))
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads_first, log_sum[None, :, span].contiguous(), dropout, causal, scale=scale
        )
        for whole, part in zip(grads, found, strict=True):
            whole[span] = places(part)
    return grads


def check_bounds(q: Tensor, bounds: Tensor, longest: int) -> None:
    """The kernel reads bounds as they are: wrong ones are reads outside of its tensors."""
    lengths = bounds.diff()
    assert bounds.dtype == torch.int32 and bounds.is_contiguous()
    assert int(bounds[0]) == 0 and int(bounds[-1]) == len(q)
    assert int(lengths.min()) > 0 and int(lengths.max()) == longest


def spans(bounds: Tensor) -> Iterator[slice]:
    """The places of each conversation."""
    for first, end in itertools.pairwise(bounds.tolist()):
        yield slice(first, end)


def one_sequence(x: Tensor) -> Tensor:
    """Places `(S, N, E)` as `(1, N, S, E)`."""
    return x.transpose(0, 1)[None]


def places(x: Tensor) -> Tensor:
    """`(1, N, S, E)` as places `(S, N, E)`."""
    return x[0].transpose(0, 1)


@contextlib.contextmanager
def on_cpu() -> Iterator[Any]:
    """While this is open the kernel runs on the CPU; yields the forward's mock, which counts."""
    kernels = mock.Mock(forward=mock.Mock(side_effect=forward), backward=backward)
    with mock.patch.object(flash_attention, "packed_kernel", kernels):
        yield kernels.forward
