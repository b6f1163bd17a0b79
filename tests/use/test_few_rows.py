"""Products of a few rows: the same values, and a target that decodes the same with them."""

from typing import Any

import pytest
import torch
from torch import nn

from eagle3fn.use import few_rows
from eagle3fn.use.decode import speculate
from eagle3fn.use.few_rows import few_rows_product, least_rows, speed_up_few_rows
from tests.use.tiny_target import prompt, random_draft, target

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def linear(biased: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=biased).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 2, 8, 17, 70])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("least", [1, 2])
def test_products_are_those_of_the_layer(rows, biased, least):
    layer = linear(biased)
    x = torch.randn(1, rows, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(few_rows_product(layer, least)(x), layer(x))


@pytest.mark.parametrize(("rows", "packed"), [(1, False), (2, True), (16, True), (17, False)])
def test_only_a_few_rows_take_the_packed_copy(rows, packed):
    """Told by the weight, which is changed after the copy was made."""
    layer = linear(False)
    product = few_rows_product(layer, 2)
    layer.weight.zero_()
    assert bool(product(torch.ones(rows, 24)).any()) is packed


@pytest.mark.parametrize(
    ("seconds", "least"),
    [
        ({4: (1, 2), 1: (1, 2)}, 1),
        ({4: (1, 2), 1: (2, 1)}, 2),
        ({4: (2, 1)}, None),
    ],
)
def test_what_is_faster_is_taken(monkeypatch, seconds, least):
    """`seconds` of the packed and of the ordinary product at 4 rows and at 1."""
    layer = linear()
    clock = [0.0]

    def timed(which: int) -> Any:
        def product(x: torch.Tensor) -> None:
            clock[0] += seconds[len(x)][which]

        return product

    monkeypatch.setattr(few_rows, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(few_rows, "few_rows_product", lambda *_: timed(0))
    layer.forward = timed(1)
    assert least_rows([layer]) == least


@pytest.mark.parametrize("least", [1, 2, None])
def test_a_target_decodes_the_same_tokens(monkeypatch, least):
    """A target of its own, as its layers are changed."""
    ids = prompt(0, 9)
    expected = speculate(target(), random_draft(), ids, 4, 16, ())
    monkeypatch.setattr(few_rows, "least_rows", lambda layers: least)
    model = target.__wrapped__()
    speed_up_few_rows(model)
    assert ("forward" in vars(model.lm_head)) is (least is not None)
    found = speculate(model, random_draft(), ids, 4, 16, ())
    assert found.tokens == expected.tokens
    assert found.accepted_by_position == expected.accepted_by_position


def test_a_dtype_without_such_products_is_left_alone():
    model = nn.Sequential(linear().double())
    speed_up_few_rows(model)
    assert "forward" not in vars(model[0])
