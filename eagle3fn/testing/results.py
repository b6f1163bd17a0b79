"""What is compared of a forward and backward pass, by name, and how far two results lie apart."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.grad import value_and_grad
from eagle3fn.base.types import Aux, Params
from eagle3fn.model import forward as forward_file
from eagle3fn.model.losses import kl_loss
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_params

Result = dict[str, Tensor]
"""`loss`, `losses` and `acceptance` and `correct` and `rows` `(K,)`, then gradients under their leaf's name."""

ForwardLoss = Callable[..., tuple[Tensor, Any]]
"""As `eagle3fn.forward_loss`: `(params, batch, *, config, frozen) → (loss, aux)`, `aux` with the fields of `Aux`."""

_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def named(loss: Tensor, aux: Aux, gradients: Params) -> Result:
    """A result from a loss, its metrics and its gradients; rates as the old tool divides them."""
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
    config, params = case.config(), on(device, tiny_params(case))
    frozen, batch = on(device, tiny_frozen(case)), on(device, tiny_batch(case))
    compute = value_and_grad(
        lambda params: forward_loss(params, batch, config=config, frozen=frozen), has_aux=True
    )
    (loss, aux), gradients = compute(params)
    return named(loss, aux, gradients)


@contextlib.contextmanager
def plain_kl() -> Iterator[None]:
    """Our side of level 2: the legacy numerics take the plain expression of the loss, on CUDA too, while it is open."""
    chosen = forward_file.kl_on
    forward_file.kl_on = lambda device, dtype: kl_loss
    try:
        yield
    finally:
        forward_file.kl_on = chosen


def differences(left: Result, right: Result) -> list[str]:
    """Names of what is missing on a side, or of another shape or dtype, or not `torch.equal`."""
    names = [*left, *(name for name in right if name not in left)]
    return [name for name in names if not _same(left.get(name), right.get(name))]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def nontrivial(result: Result) -> bool:
    """True if the loss and every gradient leaf have an entry that is not zero."""
    metrics = ("losses", "acceptance", "correct", "rows")
    return all(bool(value.count_nonzero()) for name, value in result.items() if name not in metrics)


def ulps(a: Tensor, b: Tensor) -> int:
    """The largest number of representable values between `a` and `b`; -1 if they cannot be compared."""
    if (
        a.shape != b.shape
        or a.dtype != b.dtype
        or not bool((torch.isfinite(a) & torch.isfinite(b)).all())
    ):
        return -1
    if not a.numel():
        return 0
    return max(abs(x - y) for x, y in zip(_ranks(a), _ranks(b), strict=True))


def _ranks(x: Tensor) -> list[int]:
    """Every entry's place among the values of its dtype; 0 is zero, of either sign."""
    if not x.is_floating_point():
        return x.flatten().tolist()
    whole = _INTEGERS.get(x.dtype, torch.int64)
    bits = x.detach().contiguous().view(whole).long().flatten().tolist()
    lowest = torch.iinfo(whole).min
    return [lowest - value if value < 0 else value for value in bits]
