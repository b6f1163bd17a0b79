"""What is compared of a forward and backward pass, by name, and how far apart two results are."""

import math
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.grad import value_and_grad
from eagle3fn.base.types import Aux, Params
from eagle3fn.model.forward import ForwardLoss
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_params

Result = dict[str, Tensor]
"""The scalar `loss`; `METRICS`, each `(K,)`; then every gradient under its leaf's name."""

METRICS = ("losses", "acceptance", "correct", "rows")

# The integers that have a floating-point dtype's width.
_INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def named(loss: Tensor, aux: Aux, gradients: Params) -> Result:
    """A result from a loss, its metrics and its gradients.

    The acceptance rate is `accept / max(accept_rows, 1e-8)`; `rows` are at least 1e-6.
    """
    seen = {
        "loss": loss.detach(),
        "losses": aux.losses,
        "acceptance": aux.accept / aux.accept_rows.clamp_min(1e-8),
        "correct": aux.correct,
        "rows": aux.rows.clamp_min(1e-6),
    }
    return seen | gradients


def run_forward(forward_loss: ForwardLoss, case: Case, device: str = "cpu") -> Result:
    """The result of `forward_loss` on a case, gradients by `value_and_grad`."""
    config = case.config()
    params = on(device, tiny_params(case))
    frozen = on(device, tiny_frozen(case))
    batch = on(device, tiny_batch(case))

    def loss_of(params: Params) -> tuple[Tensor, Any]:
        return forward_loss(params, batch, config=config, frozen=frozen)

    (loss, aux), gradients = value_and_grad(loss_of, has_aux=True)(params)
    return named(loss, aux, gradients)


def nontrivial(result: Result) -> bool:
    """True if the loss and every gradient leaf have an entry that is not zero."""
    return all(bool(value.count_nonzero()) for name, value in result.items() if name not in METRICS)


def differences(left: Result, right: Result, allowed: int = 0) -> list[str]:
    """Names of what is missing on a side, has another shape or dtype, or is not equal.

    Equal means `torch.equal`, or for floating-point values `ulps_at_largest` of at most `allowed`.
    """
    names = [*left, *(name for name in right if name not in left)]
    return [name for name in names if not _same(left.get(name), right.get(name), allowed)]


def _same(a: Tensor | None, b: Tensor | None, allowed: int) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    if torch.equal(a, b):
        return True
    return allowed > 0 and a.is_floating_point() and ulps_at_largest(a, b) <= allowed


def ulps_at_largest(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units in the last place of the largest magnitude of both.

        max |a - b| / (eps · 2^floor(log2 max(|a|, |b|)))

    Infinite if an entry is NaN, or not the same where it is infinite.

    Args:
        a: floating-point values.
        b: as many, of the same shape and dtype.
    """
    finite = torch.isfinite(a) & torch.isfinite(b)
    if not torch.equal(a[~finite], b[~finite]):
        return math.inf

    x = a[finite].double()
    y = b[finite].double()
    if torch.equal(x, y):
        return 0.0

    # The spacing of the dtype at the largest magnitude; below the normal numbers it is constant.
    limits = torch.finfo(a.dtype)
    largest = float(torch.maximum(x.abs(), y.abs()).max())
    exponent = math.frexp(max(largest, limits.tiny))[1] - 1
    unit = math.ldexp(limits.eps, exponent)
    return float((x - y).abs().max()) / unit


def ulps(a: Tensor, b: Tensor) -> int:
    """The largest number of representable values between an entry of `a` and that of `b`.

    -1 if they cannot be compared: another shape or dtype, or an entry that is not finite.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return -1
    if not bool((torch.isfinite(a) & torch.isfinite(b)).all()):
        return -1
    if not a.numel():
        return 0
    return max(abs(x - y) for x, y in zip(_ranks(a), _ranks(b), strict=True))


def _ranks(x: Tensor) -> list[int]:
    """Every entry's place among the values of its dtype; 0 is zero, of either sign."""
    if not x.is_floating_point():
        return x.flatten().tolist()

    # Read as integers, positive values count upwards from zero, and negative ones from the lowest
    # integer, which is -0.
    integers = _INTEGERS[x.dtype]
    bits = x.detach().contiguous().view(integers).long().flatten().tolist()
    lowest = torch.iinfo(integers).min
    return [lowest - value if value < 0 else value for value in bits]
