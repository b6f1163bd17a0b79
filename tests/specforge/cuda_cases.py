"""One case of the CUDA gate: controls, parity with SpecForge's loss kernel inside our unroll, then with our own.

SpecForge's side is its script's own `run_forward` and `run_backward_and_update` (`testing.oracle_script`), where its
commit is at hand; of the wheel, which has no such script, the model's forward and `.backward()`.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eagle3fn.model import layers
from eagle3fn.model.forward import Operations, forward_plain, legacy_operations
from eagle3fn.model.losses import KL
from eagle3fn.specforge.kl_kernel import mean_kl
from eagle3fn.specforge.oracle import Oracle, run_oracle
from eagle3fn.testing.builders import Case, tiny_params
from eagle3fn.testing.results import ForwardLoss, Result, differences, nontrivial, run_forward, ulps
from eagle3fn.testing.strategies import drawn, for_oracle
from tests.specforge.oracle_script import run_script, run_step
from tests.specforge.private_tape import old_kl, with_flex

WIDE = {
    "hidden": 256,
    "target_hidden": 256,
    "intermediate": 512,
    "heads": (8, 2),
    "head_dim": 32,
    "vocab": 40_000,
}
WIDTHS = (100, 1000, 2047, 2048, 5000, 8192, 16_000, 32_768, 40_000, 100_000, 131_072)


def case_at(index: int, seed: int, device: str) -> Case:
    """A case with something to compare. On CUDA every fourth is as wide as the loss kernel's larger blocks."""
    case = replace(for_oracle(drawn(1, seed * 100_000 + index)[0]), tokens="inside")
    case = replace(case, mask="drawn" if case.mask in ("one", "empty") else case.mask)
    case = replace(case, lengths=tuple(max(length, 5) for length in case.lengths))
    if device != "cuda" or index % 4:
        return case
    return replace(
        case,
        **WIDE,
        draft_vocab=(3000, 8192, 16_000, 32_768)[index // 4 % 4],
        lengths=(48, 40),
        steps=7,
    )


def operations_of(kl: KL, attention: str) -> Callable[[torch.device, torch.dtype], Operations]:
    """The legacy operations with another loss and the attention of one of SpecForge's backends."""

    def choose(device: torch.device, dtype: torch.dtype) -> Operations:
        operations = legacy_operations(device, dtype)._replace(kl=kl)
        return with_flex(operations) if attention == "flex_attention" else operations

    return choose


def with_kl(kl: KL, attention: str) -> ForwardLoss:
    """Our legacy `forward_loss` with these operations."""
    choose = operations_of(kl, attention)

    def forward(params: Any, batch: Any, *, config: Any, frozen: Any) -> Any:
        operations = choose(batch.aux_hidden.device, batch.aux_hidden.dtype)
        return forward_plain(params, batch, config=config, frozen=frozen, operations=operations)

    return forward


def their_side(oracle: Oracle, case: Case, attention: str, device: str) -> Callable[[], Result]:
    """SpecForge on a case at level 1."""
    run = run_script if oracle.kind == "commit" else run_oracle
    return lambda: run(oracle, case, 1, attention, device)


def our_side(
    oracle: Oracle, kl: KL, case: Case, attention: str, device: str
) -> Callable[[], Result]:
    """Ours on a case, with what SpecForge's side gives."""
    if oracle.kind == "commit":
        return lambda: run_step(operations_of(kl, attention), case, device)
    return lambda: run_forward(with_kl(kl, attention), case, device)


@contextlib.contextmanager
def reordered() -> Iterator[None]:
    """The control that must be detected: norms multiply by their weight before they scale and cast."""
    kept = layers.rms_norm

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(layers.at_least_fp32(x.dtype))
        return ((wide * weight) * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    layers.rms_norm = norm
    try:
        yield
    finally:
        layers.rms_norm = kept


def compare_case(oracle: Oracle, case: Case, attention: str, device: str) -> dict[str, Any]:
    """SpecForge against itself, against ours with its loss and with our own, and against a reordering."""
    theirs = their_side(oracle, case, attention, device)
    with_old = our_side(oracle, old_kl(oracle), case, attention, device)
    with_own = our_side(oracle, mean_kl, case, attention, device)

    def wrong() -> Result:
        with reordered():
            return with_own()

    return _verdict(repr(case), theirs, with_old, with_own, wrong)


def compare_kernel(oracle: Oracle, width: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The loss alone on 24 rows, six of them masked: mean, gradient, and each row's; the control permutes columns."""
    source = torch.Generator().manual_seed(width)
    logits = (torch.randn(4, 6, width, generator=source) * 3).to(device, dtype)
    p = torch.randn(4, 6, width, generator=source).softmax(-1).to(device)
    mask = torch.tensor([1, 1, 0, 1] * 6, device=device).view(4, 6, 1)
    other = torch.randperm(width, generator=source).to(device)

    def by_row(
        kl: Callable[..., Tensor],
    ) -> Tensor:  # in a mean over many rows a reordering can round away
        rows = zip(*(x.flatten(0, 1)[:, None, None] for x in (logits, p, mask)), strict=True)
        return torch.stack([kl(*row, None) for row in rows])

    def run(kl: Callable[..., Tensor]) -> Result:
        loss, pullback = torch.func.vjp(lambda z: kl(z, p, mask, None), logits)  # pyright: ignore
        return {
            "loss": loss,
            "logits": pullback(torch.tensor(0.9, device=device))[0],
            "each": by_row(kl),
        }

    def old() -> Result:
        leaf = logits.clone().requires_grad_()
        loss = oracle.eagle3.LogSoftmaxLoss.apply(leaf * 1, p, mask)
        loss.backward(torch.tensor(0.9, device=device))
        each = by_row(lambda z, p, mask, _: oracle.eagle3.LogSoftmaxLoss.apply(z.clone(), p, mask))
        return {"loss": loss.detach(), "logits": _there(leaf.grad), "each": each}

    def permuted(z: Tensor, p: Tensor, *rest: Any) -> Tensor:
        return mean_kl(z[..., other], p[..., other], *rest)

    name = f"{width} columns, {str(dtype).removeprefix('torch.')}"
    return _verdict(
        name, old, lambda: run(old_kl(oracle)), lambda: run(mean_kl), lambda: run(permuted)
    )


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _verdict(
    name: str, old: Callable, with_old: Callable, with_own: Callable, wrong: Callable
) -> dict[str, Any]:
    expected = old()
    return {
        "case": name,
        "nontrivial": nontrivial(expected),
        "decided": not differences(expected, old()),
        "old_kernel": _apart(expected, with_old()),
        "own_kernel": _apart(expected, with_own()),
        "reordering_seen": bool(differences(expected, wrong())),
    }


def _apart(a: Result, b: Result) -> dict[str, int]:
    return {
        name: ulps(a[name], b[name]) if name in a and name in b else -1
        for name in differences(a, b)
    }


def distance(oracle: Oracle, case: Case, device: str) -> dict[str, Any]:
    """SpecForge as people run it against ours: the largest distance in ulps; -1: not finite."""
    old = their_side(oracle, case, "sdpa", device)()
    own = our_side(oracle, mean_kl, case, "sdpa", device)()
    gradients = list(tiny_params(case))
    each = [ulps(old[name], own[name]) for name in gradients]
    far = {"loss": ulps(old["loss"], own["loss"]), "gradients": -1 if -1 in each else max(each)}
    return {"case": repr(case), "nontrivial": nontrivial(old), "ulps": far}
