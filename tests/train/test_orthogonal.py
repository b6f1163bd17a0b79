"""Matrices to about `U Vᵀ`: which singular values come near 1, and how near."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bench.orthogonal import matrix_flops, parse, run, zolotarev
from eagle3fn.train import orthogonal as module
from eagle3fn.train.orthogonal import FLOOR, newton_schulz, orthogonal, rational
from eagle3fn.train.shard import owners_of

SHAPES = [(5, 5), (6, 20), (20, 6), (150, 300), (1, 4)]


def matrix_of(values: Tensor, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix with these singular values, `U` and `Vᵀ`; fp64."""
    source = torch.Generator().manual_seed(seed)
    rows = len(values)
    u, _ = torch.linalg.qr(torch.randn(rows, rows, generator=source, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, rows, generator=source, dtype=torch.float64))
    return (u * values) @ v.T, u, v.T


def test_constants_are_zolotarevs() -> None:
    best = zolotarev(FLOOR, 2)
    assert best.scale == pytest.approx(module._SCALE, rel=1e-9)
    for pole, expected in zip(module._POLES, best.poles, strict=True):
        assert pole == pytest.approx(expected, rel=1e-9)
    assert best.error == pytest.approx(0.155, abs=5e-4)

    # It touches both bounds as often as the best one does: 2 · (2 · poles + 1) + 2 times over ±x.
    values = [best(FLOOR ** (i / 2000)) - 1 for i in range(2001)]
    touched = [value > 0 for value in values if abs(abs(value) - best.error) < 1e-5]
    assert 1 + sum(a != b for a, b in pairwise(touched)) == 6


def test_singular_values_above_the_floor_come_near_1_and_vectors_stay() -> None:
    """More values than the rows of a block of the Gram matrix."""
    values = torch.logspace(0, -3, 150, dtype=torch.float64)
    matrix, u, vt = matrix_of(values, 170)
    shares = values / values.norm()
    found = torch.linalg.multi_dot([u.T, rational(matrix), vt.T])
    best = zolotarev(FLOOR, 2)
    expected = torch.tensor([best(float(share)) for share in shares], dtype=torch.float64)
    assert torch.allclose(found, expected.diag(), atol=1e-8)

    is_above = shares >= FLOOR
    assert 50 < is_above.sum() < 150
    assert ((expected[is_above] - 1).abs() <= best.error + 1e-9).all()
    assert (expected[~is_above] < 1 - best.error).all()


def test_fp32_is_near_fp64_where_most_singular_values_are_tiny() -> None:
    """As in gradients: a half of them below 1e-4 of the norm."""
    matrix, _, _ = matrix_of(torch.logspace(0, -7, 200, dtype=torch.float64), 300)
    exact = rational(matrix)
    error = (rational(matrix.float()) - exact).norm() / exact.norm()
    assert error < 2e-3


@pytest.mark.parametrize("method", [rational, newton_schulz])
@pytest.mark.parametrize("shape", SHAPES)
def test_shape_dtype_and_argument_stay_and_scale_is_not_read(
    method: Callable[[Tensor], Tensor], shape: tuple[int, int]
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = matrix.clone()
    found = method(matrix)
    assert torch.equal(matrix, before)
    assert found.shape == matrix.shape
    assert found.dtype == matrix.dtype
    assert torch.equal(method(matrix * 2.0**-20), found)
    assert torch.allclose(method(matrix.T), found.T, atol=1e-5 if method is rational else 0.02)


def test_on_a_processor_it_is_the_rational_function() -> None:
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(orthogonal(matrix), rational(matrix))


@pytest.mark.parametrize("method", [rational, newton_schulz])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_spreads_and_zero_stays(
    method: Callable[[Tensor], Tensor], bad: float
) -> None:
    """The step's own check of the loss and the norm speaks of it, not the linear algebra."""
    matrix = torch.zeros(4, 7)
    assert torch.equal(method(matrix), matrix)
    matrix[1, 2] = bad
    assert method(matrix).isnan().any()


def test_ranks_share_matrices_by_their_work() -> None:
    shapes = {"small": (2, 2), "wide": (4, 100), "tall": (100, 4), "square": (12, 12)}
    assert set(owners_of(shapes, 1).values()) == {0}
    assert owners_of(shapes, 2) == {"square": 0, "wide": 1, "tall": 1, "small": 0}
    assert owners_of(shapes, 8) == {"square": 0, "wide": 1, "tall": 2, "small": 3}


def test_bench_counts_the_matrices_that_have_a_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's four."""
    words = ["orthogonal", "--shape", "tiny", "--seq", "96", "--rounds", "1", "--json"]
    monkeypatch.setattr("sys.argv", words)
    result = run(parse())
    shapes = [(64, 128), (32, 128), (32, 128), (64, 64)]
    expected = sum(matrix_flops(shape, "rational") for shape in shapes)
    assert result["flops"]["rational"] == expected
    assert result["of_step"].keys() == {"adamw", "muon", "muon_newton_schulz", "step"}
    assert result["of_step"]["step"] == result["ratio"]["adamw"] == result["share"]["1"] == 1
