"""One case of the CUDA gate: controls, parity with the old loss kernel inside our unroll, then with our own."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eagle3fn.model import layers
from eagle3fn.model.forward import forward_legacy, legacy_operations
from eagle3fn.model.kernels.legacy_kl import mean_kl
from eagle3fn.model.losses import KL
from eagle3fn.testing.builders import Case
from eagle3fn.testing.oracle import Oracle, run_oracle
from eagle3fn.testing.private_tape import old_kl, with_flex
from eagle3fn.testing.results import ForwardLoss, Result, differences, nontrivial, run_forward, ulps
from eagle3fn.testing.strategies import drawn, for_oracle

WIDE = {"hidden": 256, "target_hidden": 256, "intermediate": 512, "heads": (8, 2), "head_dim": 32, "vocab": 40_000}
WIDTHS = (100, 1000, 2047, 2048, 5000, 8192, 16_000, 32_768, 40_000, 100_000, 131_072)


def case_at(index: int, seed: int, device: str) -> Case:
    """A case with something to compare. On CUDA every fourth is as wide as the loss kernel's larger blocks."""
    case = replace(for_oracle(drawn(1, seed * 100_000 + index)[0]), tokens="inside")
    case = replace(case, mask="drawn" if case.mask in ("one", "empty") else case.mask)
    case = replace(case, lengths=tuple(max(length, 5) for length in case.lengths))
    if device != "cuda" or index % 4:
        return case
    return replace(case, **WIDE, draft_vocab=(3000, 8192, 16_000, 32_768)[index // 4 % 4], lengths=(48, 40), steps=7)


def with_kl(kl: KL, attention: str) -> ForwardLoss:
    """Our legacy `forward_loss` with another loss and the attention of an old backend."""

    def forward(params: Any, batch: Any, *, config: Any, frozen: Any) -> Any:
        operations = legacy_operations(batch.aux_hidden.device, batch.aux_hidden.dtype)._replace(kl=kl)
        operations = with_flex(operations) if attention == "flex_attention" else operations
        return forward_legacy(params, batch, config=config, frozen=frozen, operations=operations)

    return forward


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
    """The old tool against itself, against ours with its loss and with our own, and against a reordering."""
    old, own = with_kl(old_kl(oracle), attention), with_kl(mean_kl, attention)

    def wrong() -> Result:
        with reordered():
            return run_forward(own, case, device)

    return _verdict(
        repr(case),
        lambda: run_oracle(oracle, case, 1, attention, device),
        lambda: run_forward(old, case, device),
        lambda: run_forward(own, case, device),
        wrong,
    )


def compare_kernel(oracle: Oracle, width: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The loss alone on 24 rows, six of them masked: mean, gradient, and each row's; the control permutes columns."""
    source = torch.Generator().manual_seed(width)
    logits = (torch.randn(4, 6, width, generator=source) * 3).to(device, dtype)
    p = torch.randn(4, 6, width, generator=source).softmax(-1).to(device)
    mask = torch.tensor([1, 1, 0, 1] * 6, device=device).view(4, 6, 1)
    other = torch.randperm(width, generator=source).to(device)

    def by_row(kl: Callable[..., Tensor]) -> Tensor:  # in a mean over many rows a reordering can round away
        rows = zip(*(x.flatten(0, 1)[:, None, None] for x in (logits, p, mask)), strict=True)
        return torch.stack([kl(*row, None) for row in rows])

    def run(kl: Callable[..., Tensor]) -> Result:
        loss, pullback = torch.func.vjp(lambda z: kl(z, p, mask, None), logits)  # pyright: ignore
        return {"loss": loss, "logits": pullback(torch.tensor(0.9, device=device))[0], "each": by_row(kl)}

    def old() -> Result:
        leaf = logits.clone().requires_grad_()
        loss = oracle.eagle3.LogSoftmaxLoss.apply(leaf * 1, p, mask)
        loss.backward(torch.tensor(0.9, device=device))
        each = by_row(lambda z, p, mask, _: oracle.eagle3.LogSoftmaxLoss.apply(z.clone(), p, mask))
        return {"loss": loss.detach(), "logits": _there(leaf.grad), "each": each}

    def permuted(z: Tensor, p: Tensor, *rest: Any) -> Tensor:
        return mean_kl(z[..., other], p[..., other], *rest)

    name = f"{width} columns, {str(dtype).removeprefix('torch.')}"
    return _verdict(name, old, lambda: run(old_kl(oracle)), lambda: run(mean_kl), lambda: run(permuted))


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _verdict(name: str, old: Callable, with_old: Callable, with_own: Callable, wrong: Callable) -> dict[str, Any]:
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
    return {name: ulps(a[name], b[name]) if name in a and name in b else -1 for name in differences(a, b)}


def distance(oracle: Oracle, case: Case, device: str) -> dict[str, Any]:
    """The old tool as people run it against ours: the largest distance in ulps; -1: not finite."""
    old, own = run_oracle(oracle, case, 1, "sdpa", device), run_forward(with_kl(mean_kl, "sdpa"), case, device)
    gradients = [name for name in old if name not in ("loss", "losses", "acceptance", "correct", "rows")]
    each = [ulps(old[name], own[name]) for name in gradients]
    far = {"loss": ulps(old["loss"], own["loss"]), "gradients": -1 if -1 in each else max(each)}
    return {"case": repr(case), "nontrivial": nontrivial(old), "ulps": far}
