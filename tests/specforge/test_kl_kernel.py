"""Level 1: our Triton loss against SpecForge's, alone and in the whole objective.

On the CPU both are interpreted.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eagle3fn import specforge
from eagle3fn.base.errors import UserError
from eagle3fn.specforge import arithmetic, kl_kernel
from eagle3fn.specforge.arithmetic import KL, SPECFORGE, kl_loss, kl_on
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.specforge.kl_kernel import LARGEST, launch_shape, mean_kl
from eagle3fn.specforge.oracle import ENVIRONMENT, Oracle, run_oracle
from eagle3fn.testing.builders import Case
from eagle3fn.testing.results import differences, nontrivial, run_forward
from eagle3fn.testing.strategies import drawn
from tests import devices
from tests.factories import LossInput
from tests.specforge.cuda_cases import (
    case_at,
    compare_case,
    compare_kernel,
    reordered,
)
from tests.specforge.helpers import loss_with
from tests.specforge.private_tape import on_private_tape, specforge_kl

pytest.importorskip(
    "triton", reason="SpecForge's loss on CUDA is written in Triton, which is not installed"
)

ROOT = Path(__file__).resolve().parents[2]
not_by_stand_in = pytest.mark.skipif(
    devices.STAND_IN, reason="SpecForge's kernel takes tensors of a real card alone"
)


def problem(columns: int = 24, dtype: torch.dtype = torch.float32) -> LossInput:
    """Six rows, two of them masked."""
    source = torch.Generator().manual_seed(columns)
    logits = torch.randn(2, 3, columns, generator=source).to(dtype)
    p = torch.randn(2, 3, columns, generator=source).softmax(-1)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])[..., None]
    return LossInput(logits, p_draft=p, p_full=p, mask=mask)


def value_and_gradient(
    kl: KL, logits: Tensor, p: Tensor, mask: Tensor, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    value, pullback = torch.func.vjp(lambda z: kl(z, p, mask, count), logits)  # pyright: ignore
    return value, pullback(torch.ones(()))[0]


# Equal to SpecForge's


@pytest.mark.parametrize("columns", [1, 16, 24, 100, 2047])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@not_by_stand_in
def test_the_kernel_alone_equals_specforges(
    oracle: Oracle, columns: int, dtype: torch.dtype, device: str
) -> None:
    row = compare_kernel(oracle, columns, dtype, device)
    assert row["decided"]
    assert row["own_kernel"] == {}
    assert row["old_kernel"] == {}
    # Few columns can sum to the same bits in another order.
    assert row["reordering_seen"] or columns < 100


def small_cases() -> list[Case]:
    """At most 16 places each: interpreted kernels are slow."""
    cases = [for_specforge(case) for case in drawn(60, 11)]
    small = [case for case in cases if len(case.lengths) * max(case.lengths) <= 16]
    return small[:24]


def test_whole_cases_equal_specforge_at_level_1(oracle: Oracle) -> None:
    """Loss, metrics and every gradient, each side with its own real kernel."""
    counted = 0
    cases = small_cases()
    for case in cases:
        expected = run_oracle(oracle, case, level=1)
        counted += nontrivial(expected)
        assert differences(run_forward(loss_with(mean_kl), case), expected) == [], case
    print(f"level 1: {len(cases)} cases, {counted} non-trivial")
    assert len(cases) == 24
    assert counted >= 0.8 * 24


def test_a_gates_case_is_equal_and_its_control_detected(oracle: Oracle) -> None:
    for index in range(2):
        row = compare_case(oracle, case_at(index, 0, "cpu"), "sdpa", "cpu")
        assert row["nontrivial"]
        assert row["decided"]
        assert row["own_kernel"] == {}
        assert row["old_kernel"] == {}
        assert row["reordering_seen"]


def test_the_gates_control_differs_on_every_case() -> None:
    for index in range(30):
        case = case_at(index, 3, "cpu")
        plain = run_forward(loss_with(kl_loss), case)
        changed = run_forward(loss_with(kl_loss, reordered(SPECFORGE)), case)
        assert differences(plain, changed) != [], case


def test_both_kernels_compile_to_the_same_arithmetic(oracle: Oracle) -> None:
    """For a GPU of compute capability 9.0, which need not be here: the same instructions."""
    file = str(sys.modules[oracle.eagle3.LogSoftmaxLoss.__module__].__file__)
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "tests/model/ptx_ops.py", file],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 8, done.stderr
    assert all(line.endswith("same") for line in lines), done.stdout


def test_the_private_tape_has_the_bits_of_backward(oracle: Oracle) -> None:
    logits, p, _, mask = problem(dtype=torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    loss = oracle.eagle3.LogSoftmaxLoss.apply(leaf * 1, p, mask)
    loss.backward()

    value, gradient = value_and_gradient(specforge_kl(oracle), logits, p, mask)
    assert torch.equal(value, loss.detach())
    assert leaf.grad is not None
    assert torch.equal(gradient, leaf.grad)


def test_the_private_tape_can_be_differentiated_once() -> None:
    def cube(x: Tensor) -> Tensor:
        return on_private_tape(lambda x: (x**3).sum(), x)

    x = torch.tensor([1.0, 2.0])
    assert torch.equal(torch.func.vjp(cube, x)[1](torch.ones(()))[0], 3 * x**2)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.func.vjp(torch.func.grad(cube), x)[1](x)


# Alone


@pytest.mark.parametrize("count", [None, torch.tensor(4.0)])
def test_the_kernel_is_the_plain_expression_to_rounding(count: Tensor | None) -> None:
    logits, p, _, mask = problem()
    ours = value_and_gradient(mean_kl, logits, p, mask, count)
    plain = value_and_gradient(kl_loss, logits, p, mask, count)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_masked_rows_have_zero_gradient_and_inputs_stay() -> None:
    logits, p, _, mask = problem(dtype=torch.bfloat16)
    before = logits.clone()
    value, pullback = torch.func.vjp(lambda z: mean_kl(z, p, mask), logits)  # pyright: ignore
    first = pullback(torch.ones(()))[0]
    second = pullback(torch.ones(()))[0]

    assert value.dtype == torch.float32
    assert torch.equal(first, second)
    assert torch.equal(logits, before)
    assert not first[mask[..., 0] == 0].any()
    assert first[mask[..., 0] == 1].any()


def test_vmap_is_one_by_one() -> None:
    logits, p, _, mask = problem()

    def gradient(z: Tensor) -> Tensor:
        return value_and_gradient(mean_kl, z[None], p[:1], mask[:1])[1][0]

    one_by_one = torch.stack([gradient(z) for z in logits])
    assert torch.equal(torch.func.vmap(gradient)(logits), one_by_one)


def test_a_second_derivative_raises() -> None:
    logits, p, _, mask = problem()
    gradient = torch.func.grad(lambda z: mean_kl(z, p, mask))
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.func.vjp(gradient, logits)[1](logits)


def test_default_dtype_does_not_change_a_bit() -> None:
    logits, p, _, mask = problem()
    expected, expected_gradient = value_and_gradient(mean_kl, logits, p, mask)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        loss = mean_kl(logits, p, mask)
        gradient = torch.func.grad(lambda z: mean_kl(z, p, mask))(logits)
    finally:
        torch.set_default_dtype(before)
    assert loss.dtype == gradient.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)


def test_launch_shape_and_its_limit() -> None:
    shapes = {
        1: (1, 4),
        24: (32, 4),
        1024: (1024, 4),
        1025: (2048, 8),
        5000: (8192, 16),
        32_000: (32_768, 32),
        LARGEST: (LARGEST, 32),
    }
    assert {columns: launch_shape(columns) for columns in shapes} == shapes
    with pytest.raises(UserError, match=r"draft_vocab_size = 131073: .* at most 131072; lower it"):
        launch_shape(LARGEST + 1)


def test_the_kernel_is_chosen_on_cuda_alone() -> None:
    cuda = torch.device("cuda")
    cpu = torch.device("cpu")
    assert kl_on(cuda, torch.bfloat16) is mean_kl
    assert kl_on(cuda, torch.float32) is mean_kl
    assert kl_on(cuda, torch.float64) is kl_loss
    assert kl_on(cpu, torch.bfloat16) is kl_loss


@pytest.mark.parametrize("loss", ["kl", "lk_lambda"])
def test_the_recipe_asks_for_the_kl_of_its_device_and_dtype(
    monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    asked = []

    def recorded(device: torch.device, dtype: torch.dtype) -> KL:
        asked.append((device.type, dtype))
        return kl_loss

    monkeypatch.setattr(arithmetic, "kl_on", recorded)
    run_forward(specforge.forward_loss, Case(dtype="bfloat16", loss=loss, steps=2))
    assert asked == [("cpu", torch.bfloat16)] * 2


def test_without_triton_the_message_has_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    kl_kernel._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    logits, p, _, mask = problem()
    with pytest.raises(UserError, match="pip install triton, or train without --recipe specforge"):
        mean_kl(logits, p, mask)
