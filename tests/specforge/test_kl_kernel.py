"""Level 1: our Triton loss against SpecForge's, alone and in the whole objective; on the CPU both are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.model import losses
from eagle3fn.specforge import kl_kernel as legacy_kl
from eagle3fn.specforge.kl_kernel import launch_shape, mean_kl
from eagle3fn.specforge.oracle import ENVIRONMENT, Oracle, run_oracle
from eagle3fn.testing.results import differences, nontrivial, run_forward
from eagle3fn.testing.strategies import drawn, for_oracle
from tests import devices
from tests.specforge.cuda_cases import compare_kernel, with_kl
from tests.specforge.private_tape import old_kl, on_private_tape

pytest.importorskip(
    "triton", reason="the legacy kernel is written in Triton, which is not installed"
)


not_by_stand_in = pytest.mark.skipif(
    devices.STAND_IN, reason="SpecForge's kernel takes tensors of a real card alone"
)


def problem(
    columns: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(columns)
    logits = torch.randn(2, 3, columns, generator=source).to(dtype)
    return (
        logits,
        torch.randn(2, 3, columns, generator=source).softmax(-1),
        torch.tensor([[1, 0, 1], [1, 1, 0]])[..., None],
    )


@pytest.mark.parametrize("columns", [1, 16, 24, 100, 2047])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@not_by_stand_in
def test_the_kernel_alone_has_the_old_bits(
    oracle: Oracle, columns: int, dtype: torch.dtype, device: str
) -> None:
    seen = compare_kernel(oracle, columns, dtype, device)
    assert seen["decided"] and not seen["own_kernel"] and not seen["old_kernel"]
    assert (
        seen["reordering_seen"] or columns < 100
    )  # few columns can sum to the same bits in another order


def test_level_1_whole_cases_equal_the_old_tool(oracle: Oracle) -> None:
    """Loss, metrics and every gradient, each side with its own real kernel; B·S at most 32."""
    cases = [
        case
        for case in map(for_oracle, drawn(60, 11))
        if len(case.lengths) * max(case.lengths) <= 16
    ][:24]
    counted = 0
    for case in cases:
        old = run_oracle(oracle, case, level=1)
        counted += nontrivial(old)
        assert differences(run_forward(with_kl(mean_kl, "sdpa"), case), old) == [], case
    print(f"level 1: {len(cases)} cases, {counted} non-trivial")
    assert len(cases) == 24 and counted >= 0.8 * 24


def test_both_kernels_compile_to_the_same_arithmetic(oracle: Oracle) -> None:
    """For a GPU of compute capability 9.0, which need not be here: the same instructions on floating-point numbers."""
    file = str(sys.modules[oracle.eagle3.LogSoftmaxLoss.__module__].__file__)
    kept = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "tests/model/ptx_ops.py", file]
    done = subprocess.run(
        command,
        cwd=root,
        env=kept | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 8, done.stderr
    assert all(line.endswith("same") for line in lines), done.stdout


def test_it_is_the_plain_expression_to_rounding() -> None:
    logits, p, mask = problem()
    for n in (None, torch.tensor(4.0)):
        for mine, plain in zip(
            *(pull(kl, logits, p, mask, n) for kl in (mean_kl, losses.kl_loss)), strict=True
        ):
            torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-7)


def pull(kl: losses.KL, logits, p, mask, n=None) -> tuple[torch.Tensor, torch.Tensor]:
    value, pullback = torch.func.vjp(lambda z: kl(z, p, mask, n), logits)  # pyright: ignore
    return value, pullback(torch.ones(()))[0]


def test_masked_rows_have_zero_gradient_and_inputs_stay() -> None:
    logits, p, mask = problem(dtype=torch.bfloat16)
    kept = logits.clone()
    value, pullback = torch.func.vjp(lambda z: mean_kl(z, p, mask), logits)  # pyright: ignore
    first, second = pullback(torch.ones(()))[0], pullback(torch.ones(()))[0]
    assert torch.equal(first, second) and torch.equal(logits, kept) and value.dtype == torch.float32
    assert not first[mask[..., 0] == 0].any() and first[mask[..., 0] == 1].any()


def test_vmap_is_one_by_one() -> None:
    logits, p, mask = problem()
    gradient = torch.func.vmap(lambda z: pull(mean_kl, z[None], p[:1], mask[:1])[1][0])(logits)
    each = torch.stack([pull(mean_kl, z[None], p[:1], mask[:1])[1][0] for z in logits])
    assert torch.equal(gradient, each)


def test_a_second_derivative_raises() -> None:
    logits, p, mask = problem()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.func.vjp(torch.func.grad(lambda z: mean_kl(z, p, mask)), logits)[1](logits)


def test_the_private_tape_has_the_bits_of_backward_and_one_order(oracle: Oracle) -> None:
    logits, p, mask = problem(dtype=torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    loss = oracle.eagle3.LogSoftmaxLoss.apply(leaf * 1, p, mask)
    loss.backward()
    value, gradient = pull(old_kl(oracle), logits, p, mask)
    assert (
        torch.equal(value, loss.detach())
        and leaf.grad is not None
        and torch.equal(gradient, leaf.grad)
    )

    def cube(x: torch.Tensor) -> torch.Tensor:
        return on_private_tape(lambda x: (x**3).sum(), x)

    x = torch.tensor([1.0, 2.0])
    assert torch.equal(torch.func.vjp(cube, x)[1](torch.ones(()))[0], 3 * x**2)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.func.vjp(torch.func.grad(cube), x)[1](x)


def test_launch_shape_and_its_limit() -> None:
    shapes = {
        1: (1, 4),
        24: (32, 4),
        1024: (1024, 4),
        1025: (2048, 8),
        5000: (8192, 16),
        32_000: (32_768, 32),
    }
    assert {columns: launch_shape(columns) for columns in shapes} == shapes
    assert launch_shape(131_072) == (131_072, 32)
    with pytest.raises(UserError, match="at most 131072"):
        launch_shape(131_073)


def test_the_kernel_is_chosen_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert (
        losses.kl_on(cuda, torch.bfloat16) is mean_kl
        and losses.kl_on(cuda, torch.float32) is mean_kl
    )
    assert (
        losses.kl_on(cuda, torch.float64) is losses.kl_loss
        and losses.kl_on(cpu, torch.bfloat16) is losses.kl_loss
    )
    legacy_kl._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="pip install triton"):
        mean_kl(*problem())
