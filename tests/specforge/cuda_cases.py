"""One case of the CUDA gate: controls, then parity with each of the two loss kernels in our unroll.

SpecForge's side is its script's own `run_forward` and `run_backward_and_update`
(`tests.specforge.oracle_script`), where its commit is at hand. The wheel has no such script: there
it is the model's forward and `.backward()`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eagle3fn.model.unroll import Ops
from eagle3fn.specforge.arithmetic import KL, SPECFORGE
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.specforge.kl_kernel import mean_kl
from eagle3fn.specforge.oracle import Oracle, run_oracle
from eagle3fn.testing.builders import Case, tiny_params
from eagle3fn.testing.results import ForwardLoss, Result, differences, nontrivial, run_forward, ulps
from eagle3fn.testing.strategies import drawn
from tests.specforge.helpers import loss_with
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
WIDTHS = (100, 1000, 2047, 2048, 5000, 8192, 16_000, 32_768, 40_000, 100_000, 131_072)

Side = Callable[[], Result]
"""One side of a comparison, on a case that it has."""


def case_at(index: int, seed: int, device: str) -> Case:
    """A case with something to compare. On CUDA every fourth is as wide as the larger blocks."""
    case = for_specforge(drawn(1, seed * 100_000 + index)[0])
    case = replace(case, tokens="inside", lengths=tuple(max(n, 5) for n in case.lengths))
    if case.mask in ("one", "empty"):
        case = replace(case, mask="drawn")
    if device != "cuda" or index % 4:
        return case
    draft_vocab = (3000, 8192, 16_000, 32_768)[index // 4 % 4]
    return replace(case, **WIDE, draft_vocab=draft_vocab, lengths=(48, 40), steps=7)


# The sides

ATTENTION = {"sdpa": SPECFORGE, "flex_attention": with_flex(SPECFORGE)}
"""Our operations for each of SpecForge's backends."""


def reordered(ops: Ops) -> Ops:
    """The control that must be detected: the same attention in another order of operations.

    Values are multiplied by three before they are averaged, and the average is divided by three.
    """

    def attend(query: Tensor, keys: list[Tensor], values: list[Tensor], sight: Any) -> Tensor:
        tripled = [value * 3 for value in values]
        return ops.attend(query, keys, tripled, sight) / 3

    return ops._replace(attend=attend)


def specforge_side(oracle: Oracle, case: Case, attention: str, device: str) -> Side:
    """SpecForge on a case, at level 1."""
    run = run_script if oracle.kind == "commit" else run_oracle
    return lambda: run(oracle, case, 1, attention, device)


def our_side(oracle: Oracle, loss: ForwardLoss, case: Case, device: str) -> Side:
    """Ours on a case; its result has the names of SpecForge's."""
    if oracle.kind == "commit":
        return lambda: run_step(loss, case, device)
    return lambda: run_forward(loss, case, device)


# Comparisons


def compare_case(oracle: Oracle, case: Case, attention: str, device: str) -> dict[str, Any]:
    """SpecForge against itself, against ours with each of the two kernels, and the control."""
    ops = ATTENTION[attention]
    with_their_kernel = loss_with(specforge_kl(oracle), ops)
    with_own_kernel = loss_with(mean_kl, ops)
    with_reordering = loss_with(mean_kl, reordered(ops))
    return _verdict(
        repr(case),
        specforge_side(oracle, case, attention, device),
        our_side(oracle, with_their_kernel, case, device),
        our_side(oracle, with_own_kernel, case, device),
        our_side(oracle, with_reordering, case, device),
    )


def compare_kernel(oracle: Oracle, width: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The loss alone, on 24 rows, six of them masked: the mean, its gradient, and each row's loss.

    The control permutes the columns. Each row is compared too, as in a mean over many rows a
    reordering can round away.
    """
    source = torch.Generator().manual_seed(width)
    logits = (torch.randn(4, 6, width, generator=source) * 3).to(device, dtype)
    p = torch.randn(4, 6, width, generator=source).softmax(-1).to(device)
    mask = torch.tensor([1, 1, 0, 1] * 6, device=device).view(4, 6, 1)
    order = torch.randperm(width, generator=source).to(device)
    gradient = torch.tensor(0.9, device=device)

    def each_row(kl: KL) -> Tensor:
        by_row = [x.flatten(0, 1)[:, None, None] for x in (logits, p, mask)]
        rows = zip(*by_row, strict=True)
        return torch.stack([kl(z, p, mask, None) for z, p, mask in rows])

    def run(kl: KL) -> Result:
        loss, pullback = torch.func.vjp(lambda z: kl(z, p, mask, None), logits)  # pyright: ignore
        return {"loss": loss, "logits": pullback(gradient)[0], "each": each_row(kl)}

    def run_specforge() -> Result:
        kernel = oracle.eagle3.LogSoftmaxLoss
        leaf = logits.clone().requires_grad_()
        loss = kernel.apply(leaf * 1, p, mask)
        loss.backward(gradient)
        assert leaf.grad is not None
        each = each_row(lambda z, p, mask, _: kernel.apply(z.clone(), p, mask))
        return {"loss": loss.detach(), "logits": leaf.grad, "each": each}

    def permuted(z: Tensor, p: Tensor, mask: Tensor, count: Tensor | None) -> Tensor:
        return mean_kl(z[..., order], p[..., order], mask, count)

    return _verdict(
        f"{width} columns, {str(dtype).removeprefix('torch.')}",
        run_specforge,
        lambda: run(specforge_kl(oracle)),
        lambda: run(mean_kl),
        lambda: run(permuted),
    )


def _verdict(
    name: str,
    specforge: Side,
    with_their_kernel: Side,
    with_own_kernel: Side,
    with_reordering: Side,
) -> dict[str, Any]:
    """The row of a result file; its keys are those of the files that are committed."""
    expected = specforge()
    return {
        "case": name,
        "nontrivial": nontrivial(expected),
        "decided": not differences(expected, specforge()),
        "old_kernel": _apart(expected, with_their_kernel()),
        "own_kernel": _apart(expected, with_own_kernel()),
        "reordering_seen": bool(differences(expected, with_reordering())),
    }


def _apart(a: Result, b: Result) -> dict[str, int]:
    """The distance in ulps of everything that differs; -1 if it cannot be measured."""
    found = {}
    for name in differences(a, b):
        found[name] = ulps(a[name], b[name]) if name in a and name in b else -1
    return found


def distance(oracle: Oracle, case: Case, device: str) -> dict[str, Any]:
    """SpecForge as people run it against ours: the largest distance in ulps; -1: not finite."""
    expected = specforge_side(oracle, case, "sdpa", device)()
    ours = our_side(oracle, loss_with(mean_kl), case, device)()

    each = [ulps(expected[name], ours[name]) for name in tiny_params(case)]
    gradients = -1 if -1 in each else max(each)
    return {
        "case": repr(case),
        "nontrivial": nontrivial(expected),
        "ulps": {"loss": ulps(expected["loss"], ours["loss"]), "gradients": gradients},
    }
