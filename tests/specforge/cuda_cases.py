"""One case of the CUDA gate: SpecForge against our unroll with its loss kernel, then with ours.

SpecForge's side is its script's own `run_forward` and `run_backward_and_update` (`oracle_script`),
where its commit is at hand. Its wheel has no such script: there it is the model's forward and
`.backward()`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.types import Batch, Frozen, Params
from eagle3fn.model import layers
from eagle3fn.model.forward import ForwardLoss, Operations, forward_plain
from eagle3fn.model.losses import KL
from eagle3fn.specforge.kl_kernel import mean_kl
from eagle3fn.specforge.oracle import Oracle, run_oracle
from eagle3fn.testing.builders import Case, tiny_params
from eagle3fn.testing.results import Result, differences, nontrivial, run_forward, ulps
from eagle3fn.testing.strategies import drawn, for_oracle
from tests.specforge.oracle_script import run_script, run_step
from tests.specforge.private_tape import specforge_kl, with_flex

WIDE = {
    "hidden": 256,
    "target_hidden": 256,
    "intermediate": 512,
    "heads": (8, 2),
    "head_dim": 32,
    "vocab": 40_000,
}
WIDE_DRAFTS = (3000, 8192, 16_000, 32_768)  # draft vocabularies of the wide cases
WIDTHS = (100, 1000, 2047, 2048, 5000, 8192, 16_000, 32_768, 40_000, 100_000, 131_072)


def case_at(index: int, seed: int, device: str) -> Case:
    """A case with something to compare.

    On CUDA every fourth is as wide as the larger blocks of the loss kernel.
    """
    case = replace(for_oracle(drawn(1, seed * 100_000 + index)[0]), tokens="inside")
    case = replace(case, mask="drawn" if case.mask in ("one", "empty") else case.mask)
    case = replace(case, lengths=tuple(max(length, 5) for length in case.lengths))
    if device != "cuda" or index % 4:
        return case
    draft_vocab = WIDE_DRAFTS[index // 4 % len(WIDE_DRAFTS)]
    return replace(case, **WIDE, draft_vocab=draft_vocab, lengths=(48, 40), steps=7)


def operations_of(kl: KL, attention: str) -> Operations:
    """Operations with this loss and the attention of one of SpecForge's backends."""
    operations = Operations(kl=kl)
    return with_flex(operations) if attention == "flex_attention" else operations


def with_kl(kl: KL, attention: str) -> ForwardLoss:
    """The plain unroll with these operations, a `forward_loss`."""
    operations = operations_of(kl, attention)

    def forward(params: Params, batch: Batch, *, config: Config, frozen: Frozen) -> Any:
        return forward_plain(params, batch, config=config, frozen=frozen, operations=operations)

    return forward


def their_side(oracle: Oracle, case: Case, attention: str, device: str) -> Callable[[], Result]:
    """SpecForge on a case at level 1."""
    run = run_script if oracle.kind == "commit" else run_oracle
    return lambda: run(oracle, case, 1, attention, device)


def our_side(
    oracle: Oracle, kl: KL, case: Case, attention: str, device: str
) -> Callable[[], Result]:
    """Ours on a case, with the results that SpecForge's side has."""
    loss = with_kl(kl, attention)
    if oracle.kind == "commit":
        return lambda: run_step(loss, case, device)
    return lambda: run_forward(loss, case, device)


def reordered_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`layers.rms_norm` that multiplies by the weight before it scales and casts."""
    wide = x.to(layers.at_least_fp32(x.dtype))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return ((wide * weight) * scale).to(x.dtype)


def compare_case(oracle: Oracle, case: Case, attention: str, device: str) -> dict[str, Any]:
    """SpecForge against itself, ours with its loss, ours with our own, and ours reordered."""
    theirs = their_side(oracle, case, attention, device)
    with_theirs = our_side(oracle, specforge_kl(oracle), case, attention, device)
    with_ours = our_side(oracle, mean_kl, case, attention, device)

    def control() -> Result:
        """A difference in rounding alone, which the comparison must detect."""
        with mock.patch.object(layers, "rms_norm", reordered_norm):
            return with_ours()

    return _verdict(repr(case), theirs, with_theirs, with_ours, control)


def compare_kernel(oracle: Oracle, width: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The loss alone on 24 rows, six of them masked: the mean, its gradient, and each row's loss.

    The control permutes the columns.
    """
    source = torch.Generator().manual_seed(width)
    logits = (torch.randn(4, 6, width, generator=source) * 3).to(device, dtype)
    p = torch.randn(4, 6, width, generator=source).softmax(-1).to(device)
    mask = torch.tensor([1, 1, 0, 1] * 6, device=device).view(4, 6, 1)
    other = torch.randperm(width, generator=source).to(device)
    grad = torch.tensor(0.9, device=device)

    def by_row(kl: Callable[..., Tensor]) -> Tensor:
        """Each row's loss, `(24,)`: in a mean over many rows a reordering can round away."""
        rows = zip(*(x.flatten(0, 1)[:, None, None] for x in (logits, p, mask)), strict=True)
        return torch.stack([kl(*row, None) for row in rows])

    def run(kl: Callable[..., Tensor]) -> Result:
        loss, pullback = torch.func.vjp(lambda z: kl(z, p, mask, None), logits)  # pyright: ignore
        return {"loss": loss, "logits": pullback(grad)[0], "each": by_row(kl)}

    def theirs() -> Result:
        kernel = oracle.eagle3.LogSoftmaxLoss
        leaf = logits.clone().requires_grad_()
        loss = kernel.apply(leaf * 1, p, mask)
        loss.backward(grad)
        assert leaf.grad is not None
        each = by_row(lambda z, p, mask, _: kernel.apply(z.clone(), p, mask))
        return {"loss": loss.detach(), "logits": leaf.grad, "each": each}

    def permuted(z: Tensor, p: Tensor, *rest: Any) -> Tensor:
        return mean_kl(z[..., other], p[..., other], *rest)

    name = f"{width} columns, {str(dtype).removeprefix('torch.')}"
    with_theirs = partial(run, specforge_kl(oracle))
    return _verdict(name, theirs, with_theirs, partial(run, mean_kl), partial(run, permuted))


def _verdict(
    name: str,
    theirs: Callable[[], Result],
    with_theirs: Callable[[], Result],
    with_ours: Callable[[], Result],
    control: Callable[[], Result],
) -> dict[str, Any]:
    """A case's row; it is decided if SpecForge's side equals itself when it is run again."""
    expected = theirs()
    return {
        "case": name,
        "nontrivial": nontrivial(expected),
        "decided": not differences(expected, theirs()),
        "old_kernel": _apart(expected, with_theirs()),
        "own_kernel": _apart(expected, with_ours()),
        "reordering_seen": bool(differences(expected, control())),
    }


def _apart(a: Result, b: Result) -> dict[str, int]:
    """What differs, and by how many ulps; -1: missing on a side, or not comparable."""
    found = {}
    for name in differences(a, b):
        found[name] = ulps(a[name], b[name]) if name in a and name in b else -1
    return found


def distance(oracle: Oracle, case: Case, device: str) -> dict[str, Any]:
    """SpecForge as people run it against ours: the largest distance in ulps; -1: not finite."""
    theirs = their_side(oracle, case, "sdpa", device)()
    ours = our_side(oracle, mean_kl, case, "sdpa", device)()

    of_leaf = [ulps(theirs[name], ours[name]) for name in tiny_params(case)]
    gradients = -1 if -1 in of_leaf else max(of_leaf)
    far = {"loss": ulps(theirs["loss"], ours["loss"]), "gradients": gradients}
    return {"case": repr(case), "nontrivial": nontrivial(theirs), "ulps": far}
